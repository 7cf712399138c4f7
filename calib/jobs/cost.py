"""What a job says of its cost before it runs: which stages cost most, and what to leave out of one that takes more than
an hour."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from calib import BadInput

HOUR = 3600.0  # seconds
OF_TENSOR, OF_STEP = 90, 45  # bytes of a tensor in a file's header, beside its name; of a loss in a report
MARK = 0.95  # of the time, above which a job is hardly shorter

How = TypeVar("How", bound=Any)  # options of a job, a dataclass
Changes = Mapping[str, Any]  # options by name


@dataclass(frozen=True)
class StageCost:
    """A stage and its seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class PresetCost:
    """Cost of a job by a preset: seconds, peak memory of the whole process, and bytes of all files of the output."""

    seconds: float
    peak_bytes: int
    folder_bytes: int


@dataclass(frozen=True)
class Saving:
    """Options that make a job shorter, as on the command line, and what it then takes, in seconds."""

    options: str
    seconds: float


def costliest(seconds: Mapping[str, float], most: int = 2) -> list[str]:
    """Names of the stages that cost most, the costliest first."""
    return sorted((name for name, each in seconds.items() if each > 0), key=lambda name: -seconds[name])[:most]


def savings(config: How, alternatives: Iterable[Changes], seconds: Callable[[How], float]) -> list[Saving]:
    """Suggest what would make a job of more than an hour shorter.

    `alternatives` are changes of its options, the least harmful first; `seconds` foretells a job. -> each change that
    saves anything, alone; where none of them gets the job under an hour, the first ones that do together, or all.
    """
    whole = seconds(config)
    if whole <= HOUR:
        return []
    useful, found = list[Changes](), list[Saving]()
    for changes in alternatives:
        alone = _after(config, changes, seconds)
        if alone is not None and alone < MARK * whole:
            useful.append(changes)
            found.append(Saving(as_options(config, changes), alone))
    if len(found) < 2 or min(saving.seconds for saving in found) <= HOUR:
        return found
    together, last = dict[str, Any](), whole
    for changes in useful:
        if last > HOUR and (more := _after(config, {**together, **changes}, seconds)) is not None:
            together, last = {**together, **changes}, more
    return [*found, Saving(as_options(config, together), last)]


def fewer(config: How, name: str, value: int, least: int, seconds: Callable[[How], float]) -> Changes:
    """The option `name` at a half, a quarter or an eighth of what it is: the first that gets the job under an hour, or
    the last that leaves `least`.  No change where none does."""
    smaller = [value // 2**i for i in (1, 2, 3) if value // 2**i >= least]
    for each in smaller:
        found = _after(config, {name: each}, seconds)
        if found is not None and found <= HOUR:
            return {name: each}
    return {name: smaller[-1]} if smaller else {}


def _after(config: How, changes: Changes, seconds: Callable[[How], float]) -> float | None:
    """None where options do not go together so, or nothing changes."""
    if not as_options(config, changes):
        return None
    try:
        return seconds(replace(config, **changes))
    except BadInput:
        return None


def as_options(options: Any, changes: Changes) -> str:
    """Spell changes of options as on the command line, those that differ from the job's own."""
    words = list[str]()
    for name, value in changes.items():
        flag = name.replace("_", "-")
        if value == getattr(options, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"without --{flag}" if value is None else f"--{flag} {value}")
    return " ".join(words)
