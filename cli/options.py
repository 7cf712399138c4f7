"""From a job's dataclass to click options, so that command line, Python API and recipe cannot disagree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import click

Command = Callable[..., None]


def options(job: type) -> Callable[[Command], Command]:
    """Add an option for every field of the dataclass `job`; the command gets the built job as its first argument.

    A field's metadata gives `help` and, where there are few values, `choices`.
    """
    hints = get_type_hints(job)

    def decorate(command: Command) -> Command:
        def run(**values: Any) -> None:
            own = {f.name: values.pop(f.name) for f in fields(job)}
            command(job(**own), **values)

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        run.__click_params__ = list(getattr(command, "__click_params__", []))  # type: ignore[attr-defined]
        decorated: Command = run
        for f in reversed(fields(job)):
            decorated = _option(f.name, hints[f.name], f.default, dict(f.metadata))(decorated)
        return decorated

    return decorate


def _option(name: str, hint: Any, default: Any, metadata: dict[str, Any]) -> Callable[[Command], Command]:
    flag = name.replace("_", "-")
    kinds = [k for k in get_args(hint) if k is not NoneType] or [hint]
    text = metadata["help"]
    shown = default is not None and default is not MISSING
    if kinds[0] is bool:
        return click.option(f"--{flag}/--no-{flag}", name, default=default, help=text, show_default=shown)
    kind: Any = click.Choice(metadata["choices"]) if "choices" in metadata else kinds[0]
    if kind is Path:
        kind = click.Path(path_type=Path)
    return click.option(f"--{flag}", name, type=kind, default=default, help=text, show_default=shown)
