"""`parewell`: exit status 0 done, 1 failed while running, 2 bad input, 130 interrupted."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import warnings
from io import TextIOWrapper

import click

from calib import BadInput, Damaged, Diverged, Failed, NoSpace, Recovered, first_line, one_line
from calib.runtime.memory import is_out_of_memory
from cli.attribute import attribute_command
from cli.audit import audit_command
from cli.command import CommandGroup
from cli.demo import demo_command
from cli.distill import distill_command
from cli.env import env_command
from cli.evaluate import evaluate_command
from cli.export import export_command
from cli.formats import formats_command
from cli.generate import generate_command
from cli.models import models_command
from cli.push import push_command
from cli.quantize import quantize_command
from cli.replay import replay_command
from cli.report import report_command
from cli.scaling_law import predict_command
from cli.show import show_command
from cli.soup import soup_command
from cli.unlearn import unlearn_command

LESS = {  # options of commands that make them need less memory
    "quantize": ("batch", "length", "memory-budget"),
    "distill": ("micro-batch-tokens", "gradient-checkpointing", "optimizer", "length"),
    "unlearn": ("micro-batch-tokens", "gradient-checkpointing", "optimizer", "lora", "length"),
    "audit": ("samples", "length"),
    "attribute": ("micro-batch-tokens", "memory-budget", "width", "length"),
    "evaluate": ("length", "memory-budget"),
    "export": ("held-out", "length"),
}

UNTIL_SAID = 10  # seconds that other processes wait for the first to say why all end


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Progress goes to stderr: bars on a terminal, else a line every 30 s; PAREWELL_QUIET=1 leaves it out.",
)
@click.version_option(package_name="parewell")
def parewell() -> None:
    """Make transformer models smaller, or forget data, and prove that it worked."""


for command in (
    quantize_command, distill_command, unlearn_command, evaluate_command, generate_command, export_command,
    audit_command, attribute_command, report_command, show_command, replay_command, push_command, predict_command,
    demo_command, env_command, models_command, formats_command, soup_command,
):  # fmt: skip
    parewell.add_command(command)


def run_cli() -> None:
    """The console script: turns what can go wrong into one line and an exit status."""
    _quiet()
    warnings.simplefilter("ignore")  # of libraries, to programmers
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that knows no arrow still gets its table
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    try:
        parewell(standalone_mode=False, prog_name="parewell")
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(f"{error.format_message()} (see parewell --help)", 2)
    except BadInput as error:
        _fail(str(error), 2)
    except Diverged as error:
        _fail(f"{error} and start anew with --no-resume", 1)
    except (Recovered, Damaged) as error:
        _fail(f"{error}{' --resume' if _resumable() else ''}", 1, everywhere=isinstance(error, Recovered))
    except (KeyboardInterrupt, click.Abort):
        again = [*(word for word in sys.argv[1:] if word not in ("--resume", "--no-resume")), "--resume"]
        _fail(f"interrupted; continue with: {_program()} {shlex.join(again)}" if _resumable() else "interrupted", 130)
    except Exception as error:
        if isinstance(error, ImportError) and ("map segment" in str(error) or "allocate" in str(error)):
            _fail("no memory to start in; give the process two gigabytes or more", 1)
        later = ", then continue with --resume" if _resumable() else ""
        if isinstance(error, NoSpace):
            _fail(f"{error}{later}", 1, everywhere=True)
        if is_out_of_memory(error):
            command = " ".join(sys.argv[1:2])
            on_device = (
                type(error).__name__ == "OutOfMemoryError" and command == quantize_command.name
            )  # torch's, of a GPU
            options = LESS.get(command, ()) + (("device-memory",) if on_device else ())
            less = ", ".join(f"--{option}" for option in options)
            asked = f", or ask for less at once ({less})" if less else ""
            _fail(f"no memory left ({first_line(error)}); make room{asked}{later}", 1, everywhere=True)
        if isinstance(error, Failed | OSError):
            _fail(str(error), 1, everywhere=True)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "gloo" not in str(error).lower():
            raise
        _fail("another process has failed and said why", 1)


def _quiet() -> None:
    """Let transformers say nothing but errors, whether it is imported by now or will be."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if (imported := sys.modules.get("transformers.utils.logging")) is not None:
        imported.set_verbosity_error()
        imported.disable_progress_bar()


def _resumable() -> bool:
    resumed = (quantize_command, distill_command, unlearn_command, attribute_command)
    return len(sys.argv) > 1 and sys.argv[1] in {command.name for command in resumed}


def _program() -> str:
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "parewell" if count == 1 else f"torchrun --nproc-per-node {count} -m cli"


def _fail(message: str, status: int, *, everywhere: bool = False) -> None:
    """Of several processes, which have parted by now, the first says it; `everywhere` is for what only one may know."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        click.echo(f"parewell: {one_line(message)}", err=True)
    else:
        time.sleep(UNTIL_SAID)  # torchrun ends all as soon as one has ended; the first must have spoken by then
    sys.exit(status)


if __name__ == "__main__":
    run_cli()
