"""The command line: one thin file per command, options made from the jobs' dataclasses."""

from __future__ import annotations

import sys


def main() -> None:
    """The console script.  Ctrl-C is one line also in the seconds that imports take, and so is want of memory."""
    try:
        from cli.main import run_cli
    except KeyboardInterrupt:
        print("parewell: interrupted", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, ImportError) as error:
        if isinstance(error, ImportError) and "map segment" not in str(error) and "allocate" not in str(error):
            raise
        print("parewell: no memory to start in; give the process two gigabytes or more", file=sys.stderr)
        sys.exit(1)
    run_cli()
