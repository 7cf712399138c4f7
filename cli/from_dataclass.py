"""From a job's dataclass to click options, so that command line, Python API and recipe cannot disagree; and from a file
of the same keys."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from calib import BadInput
from calib.jobs.options import Preset, described_presets
from cli.command import GroupedOption, new_name
from cli.versions import check_versions

Command = Callable[..., None]
THRESHOLD = 0.1  # share of the forgotten knowledge that quantization may recover
PEERS_NAMES = {  # of options, in llm-compressor, auto-round and GPTQModel; accepted, and not shown
    "samples": ("num-calibration-samples", "nsamples"), "length": ("max-seq-length", "seqlen"),
}  # fmt: skip


def options_from(*jobs: type) -> Callable[[Command], Command]:
    """Add an option for every field of the dataclasses `jobs`, once where several share it; the command gets what is
    built of them as its first arguments.

    A field's metadata gives `help` and, where there are few values, `choices`. With --config all of the command's
    options and arguments may come from a file as well; the command line overrides it.
    """
    known = {f.name: (f, get_type_hints(job)[f.name]) for job in reversed(jobs) for f in reversed(fields(job))}

    def decorate(command: Command) -> Command:
        def run(**values: Any) -> None:
            check_versions()
            preset, recipe = values.pop("preset", None), values.pop("recipe", None)
            if preset is not None and recipe is not None:
                raise click.UsageError("--preset and --recipe both say what is not given; leave one of them out")
            preset, own = recipe or preset, {name: values.pop(name) for name in known}
            given = own if preset is None else {name: own[name] for name in given_options(known)}
            make = (job if preset is None else partial(job.preset, preset) for job in jobs)  # type: ignore[attr-defined]
            built = [
                f(**{n: v for n, v in given.items() if n in job.__dataclass_fields__})  # type: ignore[attr-defined]
                for f, job in zip(make, jobs, strict=True)
            ]
            command(*built, **values)

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        run.__click_params__ = list(getattr(command, "__click_params__", []))  # type: ignore[attr-defined]
        decorated: Command = run
        for name, (f, hint) in known.items():
            decorated = _option(name, hint, f.default, dict(f.metadata))(decorated)
        return click.option(
            "--config", type=click.Path(path_type=Path), is_eager=True, expose_value=False, callback=_configured,
            help="TOML file of these options, such as seed = 3; the command line overrides the file",
        )(decorated)  # fmt: skip

    return decorate


def given_options(names: Iterable[str]) -> list[str]:
    """Names of the options that the command line or --config gives."""
    context = click.get_current_context()
    return [name for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT]


def all_presets(job: Any, presets: Mapping[str, Preset]) -> dict[str, Any]:
    """The job that a command line asks for by each preset; none where it gives an option that a preset is about."""
    given = given_options(f.name for f in fields(job))
    if any(option in given for preset in presets.values() for option in preset.values):
        return {}
    params = click.get_current_context().params
    return {name: job.preset(name, **{option: params[option] for option in given}) for name in presets}


def choosing_preset(presets: Mapping[str, Preset]) -> Callable[[Command], Command]:
    """Add the option that fills in what is not given."""
    return click.option(
        "--preset", type=click.Choice(list(presets)), cls=GroupedOption, group="basic",
        help=f"values for the options that are not given; {described_presets(presets)}",
    )  # fmt: skip


def choosing_recipe(recipes: Mapping[str, Preset]) -> Callable[[Command], Command]:
    """Add the option that fills in what is not given as a publication has it."""
    return click.option(
        "--recipe", type=click.Choice(list(recipes)), cls=GroupedOption, group="method",
        help=f"in place of --preset, a published method's values; {described_presets(recipes)}",
    )  # fmt: skip


def allowing_damage(command: Command) -> Command:
    """Add the option that lets a job keep a model that it has made much worse."""
    return click.option(
        "--allow-damage", is_flag=True, cls=GroupedOption, group="proof",
        help="write the model even if it is much worse, which fails the job otherwise; the report says so",
    )(command)  # fmt: skip


@dataclass(frozen=True)
class RecoveryOptions:
    """Options of a command that rounds, on knowledge that the model was made to forget.

    train: what the model was trained on, if no longer where its recipe says.
    allow: write the model whatever is recovered.
    threshold: the share of the forgotten knowledge that may be recovered.
    """

    train: Path | None
    allow: bool
    threshold: float


def gating(command: Command) -> Command:
    """Add the options of a gate to a command that rounds, which gets them as `recovery`."""

    def run(train: Path | None, allow_recovery: bool, threshold: float, **values: Any) -> None:
        command(recovery=RecoveryOptions(train, allow_recovery, threshold), **values)

    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__click_params__ = list(getattr(command, "__click_params__", []))  # type: ignore[attr-defined]
    decorated: Command = run
    for option in (
        click.option(
            "--train", type=click.Path(path_type=Path), cls=GroupedOption, group="proof",
            help="training data of the unlearned model, if no longer where its recipe says",
        ),
        click.option(
            "--allow-recovery", is_flag=True, cls=GroupedOption, group="proof",
            help="write the model whatever is recovered; it is still measured where the rows are available",
        ),
        click.option(
            "--recovery-threshold", "threshold", default=THRESHOLD, show_default=True, cls=GroupedOption, group="proof",
            help="share of the forgotten knowledge that quantization may recover; more fails the job",
        ),
    ):  # fmt: skip
        decorated = option(decorated)
    return decorated


def check_page(html: Path | None) -> None:
    """Raises BadInput where a page could not be written there."""
    if html is not None and (html.is_dir() or not html.parent.is_dir() or not os.access(html.parent, os.W_OK)):
        raise BadInput(f"html {html}: cannot be a file there; give a file in a folder that may be written to")


def _configured(context: click.Context, option: click.Parameter, file: Path | None) -> None:
    """Make what a file says the defaults of a command.  Raises BadInput where it says what is none of its options."""
    if file is None:
        return
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"config {file}: is no TOML file ({error})") from error
    known = {p.name: p for p in context.command.params if p.name and p is not option}
    known |= {"json": known["as_json"]}
    values = dict[str, Any]()
    for key, value in found.items():
        of = known.get(key.replace("-", "_"))
        if of is None or key == "as_json":
            near = get_close_matches(key.replace("-", "_"), known, 1)
            if (new := new_name(context.info_name or "", key)) is not None:
                raise BadInput(f"config {file}: '{key}' is called {new.removeprefix('--')} now")
            hint = f"; is {near[0].replace('_', '-')} meant?" if near else f", see parewell {context.info_name} --help"
            raise BadInput(f"config {file}: '{key}' is no option of {context.info_name}{hint}")
        switch, several = isinstance(of, click.Option) and of.is_flag, isinstance(of, click.Option) and of.multiple
        many = several and isinstance(value, list) and all(isinstance(one, str) for one in value)
        if not many and (isinstance(value, bool) != switch or several or not isinstance(value, str | int | float)):
            expected = "true or false" if switch else "a list of texts" if several else "a text or a number"
            raise BadInput(f"config {file}: {key} is {value}; it must be {expected}")
        assert of.name is not None
        if of.name in values:
            raise BadInput(f"config {file}: {key} stands there twice; leave one out")
        values[of.name] = (
            value if switch or several else str(value)
        )  # as on a command line, where 2.5 is no whole number
    context.default_map = {**values, **(context.default_map or {})}  # what --bits says is of the command line


def _option(name: str, hint: Any, default: Any, metadata: dict[str, Any]) -> Callable[[Command], Command]:
    flag = name.replace("_", "-")
    kinds = [k for k in get_args(hint) if k is not NoneType] or [hint]
    text = metadata["help"]
    shown = default is not None and default is not MISSING
    if kinds[0] is bool:
        return click.option(
            f"--{flag}/--no-{flag}", name, default=default, help=text, show_default=shown, cls=GroupedOption,
            group=metadata["group"],
        )  # fmt: skip
    several = get_origin(hint) is tuple
    kind: Any = click.Choice(metadata["choices"]) if metadata["choices"] else kinds[0]
    if kind is Path:
        kind = click.Path(path_type=Path)
    return click.option(
        f"--{flag}", name, *(f"--{other}" for other in PEERS_NAMES.get(name, ())), type=kind, default=default,
        help=text, show_default=shown and not several, cls=GroupedOption, group=metadata["group"], multiple=several,
    )  # fmt: skip
