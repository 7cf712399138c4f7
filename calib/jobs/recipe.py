"""The recipe that lies in every folder parewell writes: all steps that led to the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from calib import BadInput

if TYPE_CHECKING:  # the libraries are imported where they read; a folder that is not there is refused before that
    pass
from calib.model.config import RECIPE, read_json


def read_recipe(folder: Path) -> list[dict[str, Any]]:
    """Read a directory's recipe: its steps, oldest first.  A step whose model taught a given student has that model's
    steps as its "teacher", and each other model of a mean has its own as "recipe".  Raises BadInput where there is no
    recipe of parewell's."""
    steps = read_json(folder / RECIPE).get("recipe")
    try:
        sound = _are_steps(steps)
    except RecursionError:
        sound = False
    if not sound:
        raise BadInput(f"{folder / RECIPE}: is no recipe of parewell's; move it away, or make the folder again")
    return cast(list[dict[str, Any]], steps)


def _are_steps(found: Any) -> bool:
    parts = ("options", "data", "model", "versions", "quality")
    return (
        isinstance(found, list)
        and bool(found)
        and all(
            isinstance(step, dict)
            and "job" in step
            and all(isinstance(step.get(part), dict) for part in parts)
            and all(isinstance(step["model"].get(name), str) for name in ("name", "sha256"))
            and ("teacher" not in step or _are_steps(step["teacher"]))
            and all(not one.get("recipe") or _are_steps(one["recipe"]) for one in step.get("with", []))
            for step in found
        )
    )


def past_of(folder: Path) -> list[dict[str, Any]]:
    """The recipe of a folder; no steps where it has none, as models from elsewhere.  Raises BadInput."""
    return read_recipe(folder) if (folder / RECIPE).is_file() else []


def forgettings(folder: Path) -> list[dict[str, Any]]:
    """Steps of a folder's recipe, of its teachers' and of models that it is a mean of, in which rows were forgotten:
    what rounding may bring back.  Raises BadInput."""
    found = list[dict[str, Any]]()
    for step in _with_teachers(past_of(folder)):
        if step["job"] == "unlearn" and isinstance(of := step["data"].get("forget"), dict) and of.get("rows"):
            found += [step] if step not in found else []  # what student and teacher both come from
    return found


def _with_teachers(steps: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for step in steps:
        yield from _with_teachers(step.get("teacher", []))
        for other in step.get("with", []):
            yield from _with_teachers(other.get("recipe", []))
        yield step
