"""The command line: one thin file per command, options made from the jobs' dataclasses."""

from __future__ import annotations

import sys


def main() -> None:
    """The console script.  Ctrl-C is one line also in the seconds that imports take."""
    try:
        from cli.main import main as run
    except KeyboardInterrupt:
        print("parewell: interrupted", file=sys.stderr)
        sys.exit(130)
    run()
