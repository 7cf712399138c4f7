"""`parewell replay OUT DST`: make OUT again, step by step from the first model, and compare."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import click

import compressor
import unlearn
from calib import BadInput, first_line
from calib.jobs.options import difference, folder_identity, unmet_needs, with_new_names
from calib.jobs.recipe import read_recipe
from calib.model.checkpoint import find_model
from calib.model.companions import BASE_CARD, CARD
from calib.model.config import RECIPE, read_json
from calib.quant.scheme import Scheme
from cli.command import GroupedCommand
from cli.folders import check_written
from cli.versions import check_versions
from compressor import Distill, Export, Quantize
from unlearn import Unlearn

Run = Callable[..., dict[str, Any]]
JOBS: dict[str, tuple[type, Run]] = {
    "quantize": (Quantize, lambda *job: compressor.quantize(*job, allow_recovery=True, allow_damage=True)),
    "distill": (Distill, lambda *job: compressor.distill(*job, allow_recovery=True, allow_damage=True)),
    "unlearn": (Unlearn, lambda *job: unlearn.unlearn(*job, allow_damage=True)),
    "export": (Export, lambda *job: compressor.export(*job, allow_recovery=True, allow_damage=True)),
}


@dataclass(frozen=True)
class Replayed:
    """Result of a replay: by file of the output None, or how it differs; whether all agree."""

    files: Mapping[str, str | None]

    @property
    def agrees(self) -> bool:
        """Whether every file agrees."""
        return all(found is None for found in self.files.values())


@click.command(
    cls=GroupedCommand, short_help="Make an output again from its recipe.",
    examples={
        "parewell replay OUT AGAIN": "and compare, byte for byte",
        "parewell replay OUT AGAIN --model MODEL": "where the first model lies elsewhere now",
    },
)  # fmt: skip
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--model", help="the first model, if no longer where the recipe says")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON on stdout")
def replay_command(out: Path, dst: Path, model: str | None, as_json: bool) -> None:
    """Make OUT again in DST, by the steps of its recipe from the first model on, and say whether the bytes agree.

    Exit status 1 where they do not.
    """
    check_versions()
    found = replay_recipe(out, dst, model)
    if as_json:
        click.echo(json.dumps({"agrees": found.agrees, "files": found.files}))
    else:
        for name, options in found.files.items():
            click.echo(f"{name}: {'the same' if options is None else options}")
        click.echo(f"{dst}: {'is' if found.agrees else 'is not'} {out}, byte for byte")
    if not found.agrees:
        sys.exit(1)


def replay_recipe(out: Path, dst: Path, model: str | None = None) -> Replayed:
    """Raises BadInput, before anything is made, where a step is none of a job that can be done again, or where what it
    was made from is not to be had; steps in between are made in a folder that goes."""
    check_written(out, RECIPE)
    steps = read_recipe(out)
    for number, step in enumerate(steps):
        if "kept" in step:
            raise BadInput(f"{out}: is the {step['kept']} of a job that trained two models; replay the directory above")
        if step["job"] not in JOBS:
            raise BadInput(f"{out / RECIPE}: {step['job']} is no job that is replayed; replay what it was made from")
        _check_inputs(out, options_of(step, out), made={"cache", "imatrix_out"} | ({"student"} if number else set()))
    first = steps[0]["model"]
    if model is None and "given" not in first:
        raise BadInput(f"{out / RECIPE}: does not say where its first model lay; give --model FOLDER")
    last: str | Path = model or str(first["given"])
    files = first.get("files")  # none of a factory's model, which is one file
    if files and (wrong := difference(files, folder_identity(last, find_model(last), "")["files"])):
        raise BadInput(f"{last}: is not what {out} was made from: {wrong}; give --model FOLDER")
    if dst.exists() or not dst.resolve().parent.is_dir():
        raise BadInput(f"{dst}: exists, or its parent does not; give a new folder in one that is there")
    with tempfile.TemporaryDirectory(dir=dst.resolve().parent, prefix=".parewell-replay-") as scratch:
        for number, step in enumerate(steps):
            start, into, more = last, Path(scratch) / str(number) / _name_after(steps, number), dict[str, Any]()
            into.parent.mkdir()
            if number and step["options"].get("student") is not None:  # the student is what came before
                start, more = str(step["model"]["given"]), {"student": last}
            if step["options"].get("imatrix_out") is not None:  # which is there already, and no part of the output
                more["imatrix_out"] = Path(scratch) / f"imatrix-{number}.gguf"
            JOBS[step["job"]][1](start, into, options_of(step, out, **more))
            last = into
        shutil.move(last, dst)
    return Replayed(compare_folders(out, dst))


def _check_inputs(out: Path, options: Any, made: set[str]) -> None:
    """Raises BadInput where a file is gone that a step has read; options in `made` need not be there yet."""
    for name in (f.name for f in fields(options) if f.name not in made):
        if isinstance(path := getattr(options, name), Path) and not path.exists():
            raise BadInput(f"{out / RECIPE}: {name.replace('_', '-')} was {path}, which is not there; bring it back")


def _name_after(steps: Sequence[Mapping[str, Any]], number: int) -> str:
    """What the folder was called that a step made, as the next one says; reports repeat it."""
    if number + 1 == len(steps):
        return "out"
    following = steps[number + 1]
    called = following["student" if following["options"].get("student") is not None else "model"]["name"]
    return Path(str(called)).name or "model"


def options_of(step: Mapping[str, Any], out: Path, **more: Any) -> Any:
    """The options of a recipe's step, as its job takes them.  Raises BadInput."""
    job, given = JOBS[step["job"]][0], _recorded_options(step)
    if given.get("forget_where") is not None and not step["data"]["forget"]["rows"]:
        raise BadInput(f"{out / RECIPE}: a step forgot nothing, by a choice that is not written down; leave it out")
    if given.get("forget_where") is not None:  # which is not written down; the rows that it chose are
        given |= {"forget_where": None, "forget": None, "forget_lines": step["data"]["forget"]["lines"]}
    hints, known = get_type_hints(job), {f.name for f in fields(job)}
    if unknown := sorted(given.keys() - known):
        raise BadInput(f"{out / RECIPE}: option '{unknown[0]}' is of another version of parewell; replay it with that")
    for name, value in given.items():
        kinds = [kind for kind in get_args(hints[name]) if kind is not NoneType] or [hints[name]]
        if kinds[0] is Path and value is not None:
            given[name] = Path(value)
    try:
        return job(**given | more)
    except BadInput:
        raise
    except (TypeError, ValueError) as error:
        raise BadInput(f"{out / RECIPE}: has options that are none ({first_line(error)}); it was changed") from error


def _recorded_options(step: Mapping[str, Any]) -> dict[str, Any]:
    """By today's names; those that changed nothing, which earlier versions took in silence, as by default."""
    given = with_new_names(step["job"], step["options"])
    job = JOBS[step["job"]][0]
    defaults = {f.name: f.default for f in fields(job)}
    return given | {name: defaults[name] for name in unmet_needs(job, given)}


_SAID_BESIDE = ("recovery", "damage", "source")  # keys of a report that may differ though the bytes are the same


def compare_folders(out: Path, again: Path) -> dict[str, str | None]:
    """Compare two outputs file by file: None where they agree, or how they differ; where a recipe's models lay does not
    count, nor what a report says of a gate, of damage that was allowed or of the job before, nor pages and cards that
    say the same."""
    names = {str(f.relative_to(folder)) for folder in (out, again) for f in folder.rglob("*") if not f.is_dir()}
    names -= {"report.html", CARD, BASE_CARD}
    found = dict[str, str | None]()
    for name in sorted(names):
        a, b = out / name, again / name
        if not a.exists() or not b.exists():
            found[name] = f"is only in {out if a.exists() else again}"
        elif Path(name).name == RECIPE:
            found[name] = difference(*({"step": _apart_from_places(read_recipe(f.parent))} for f in (a, b)))
        elif name == "report.json":
            found[name] = difference(*(read_json(f) | dict.fromkeys(_SAID_BESIDE) for f in (a, b)))
        else:
            found[name] = None if a.read_bytes() == b.read_bytes() else "differs"
    return found


def _apart_from_places(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By number, without where models lay, and with rows to forget as they are written down."""
    plain = dict[str, Any]()
    for number, step in enumerate(steps, 1):
        model = {name: value for name, value in step["model"].items() if name not in ("given", "name")}
        options = {n: v for n, v in _recorded_options(step).items() if n not in ("student", "forget_where", "forget_lines", "forget", "imatrix_out")}  # noqa: E501  # fmt: skip
        student = {n: v for n, v in step.get("student", {}).items() if n not in ("given", "name")}
        scheme = {"scheme": Scheme.recorded_name(step["scheme"])} if isinstance(step.get("scheme"), str) else {}
        plain[str(number)] = {**step, **scheme, "model": model, "options": options, "student": student}
    return plain
