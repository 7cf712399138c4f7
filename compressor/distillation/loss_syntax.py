"""The losses of a distillation as they are written, such as `0.5*ce + forward-kl + 0.1*sinkhorn(0.05)`: their names,
weights and arguments, and what goes with what.

What they compute stands in `compressor.distillation.loss_expression`; a job's options are understood, or refused,
without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from calib import BadInput
from compressor.on_policy.options import F_DIVERGENCES

# Of each loss the arguments that may stand in parentheses, by what the loss is of (see
# `compressor.distillation.loss_expression`).
FAITHFUL: dict[str, tuple[str, ...]] = {
    "forward-kl": (), "reverse-kl": (), "js": ("beta",), "skew-kl": ("alpha",), "skew-reverse-kl": ("alpha",),
    "alpha-beta": ("alpha", "beta"), "total-variation": (), "hellinger": (), "chi-square": (), "cauchy-schwarz": (),
    "jeffreys": (), "softened-reverse-kl": (), "bd-kd": ("heavier",), "dac-nucleus": ("mass",),
}  # fmt: skip
LEARNED: dict[str, tuple[str, ...]] = {"dac": ()}
LABELED: dict[str, tuple[str, ...]] = {"ce": (), "nkd": ("gamma", "lam"), "ofa": ("e",), "uskd": ()}
ON_POLICY: dict[str, tuple[str, ...]] = {"k2": (), "k3": ()}
REWARDED: dict[str, tuple[str, ...]] = {"grpo": (), "kdrl": (), "f-dpg": ("divergence",)}
SETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("sinkhorn", "sinkhorn-sharp", "sinkhorn-sequence", "sinkhorn-sequence-sharp", "sinkd"),
        ("eps", "tau", "sweeps"),
    ),
    "sinkhorn-hidden": ("eps", "sweeps"),
}
SPANS: dict[str, tuple[str, ...]] = {"spans": ()}
STATES: dict[str, tuple[str, ...]] = {"hidden": (), "cka": (), "gram": ("bandwidth",), "attention": (), "align": ("k",)}
EXITS: dict[str, tuple[str, ...]] = {"ofa-exits": ("e",)}
BIDIRECTIONAL: dict[str, tuple[str, ...]] = {"bico": ("share",)}
RELATIONS: dict[str, tuple[str, ...]] = {"attention-relations": ("heads", "layer")}
UNMATCHED: dict[str, tuple[str, ...]] = {"uld": ()}
OF_NUMBERS: dict[str, tuple[str, ...]] = {"mse": ()}
LOSS_ARGUMENTS = (
    FAITHFUL
    | LEARNED
    | LABELED
    | ON_POLICY
    | REWARDED
    | SETS
    | SPANS
    | STATES
    | EXITS
    | BIDIRECTIONAL
    | RELATIONS
    | UNMATCHED
    | OF_NUMBERS
)
LOSS_NAMES = ("ce", *sorted(LOSS_ARGUMENTS.keys() - {"ce"}))
# Of a classifier: a row is one answer, a batch is a set.
FEATURES = {"hidden", "cka", "gram"}  # of states at --exits and --teacher-exits
CLASSIFYING = {*FAITHFUL, *LEARNED, *LABELED, *OF_NUMBERS, "sinkhorn", "sinkhorn-sharp", "sinkd", *EXITS, *FEATURES}

# Where an argument means something, and single precision is enough for it. JS and skew KL are exact at 0 and 1 too.
WITHIN: dict[str, tuple[float, float]] = {
    "eps": (1e-3, 1e3), "tau": (1e-2, 1e2), "sweeps": (1, 1e4), "heavier": (1, 1e2), "mass": (1e-2, 1),
    "bandwidth": (1e-2, 1e2), "gamma": (0, 1e2), "lam": (1e-1, 1e2), "e": (1e-1, 10), "alpha": (1e-2, 1 - 1e-2),
    "beta": (1e-2, 1 - 1e-2), "k": (1, 64), "share": (1e-2, 0.9), "heads": (1, 512), "layer": (1, 512),
}  # fmt: skip

COUNTS = {"heads", "layer"}  # arguments that are whole numbers
WORD_ARGUMENTS = {"divergence": F_DIVERGENCES}  # arguments that are no numbers, and what they may be

_TERM = re.compile(r"(?:(\d+\.?\d*(?:e-?\d+)?|\.\d+)\s*\*\s*)?([a-z][a-z0-9-]*)(?:\(([^()]*)\))?")


@dataclass(frozen=True)
class WrittenTerm:
    """A loss of a sum as it was written: its text, its name, its weight, and its arguments by name."""

    label: str
    name: str
    weight: float
    arguments: Mapping[str, float | str]


def read_terms(text: str) -> list[WrittenTerm]:
    """Raises BadInput where a name is unknown, a weight is not positive or an argument is no number."""
    found: list[WrittenTerm] = []
    for part in re.split(r"\s*\+\s*", text.strip()):
        match = _TERM.fullmatch(part)
        name = match[2] if match else part
        if match is None or name not in LOSS_NAMES:
            parts = [one for one in LOSS_NAMES if name in one.split("-")]  # kl: forward-kl
            near = parts or get_close_matches(name, LOSS_NAMES, 1)
            meant = f"is {near[0]} meant? there are" if near else "choose from"
            raise BadInput(f"loss '{name}' is unknown; {meant} {', '.join(LOSS_NAMES)}, as in 0.5*ce+0.5*forward-kl")
        weight = float(match[1] or 1)
        if not 0 < weight < math.inf:
            raise BadInput(f"loss {part}: its weight is {weight:g}; it must be positive and finite")
        label = f"{name}({match[3]})" if match[3] else name
        found.append(WrittenTerm(label, name, weight, _arguments(LOSS_ARGUMENTS[name], match[3], part)))
    if len({one.label for one in found}) < len(found):
        raise BadInput(f"loss '{text}': names one loss twice; add up its weights")
    return found


def rewarded_term(terms: Sequence[WrittenTerm]) -> WrittenTerm | None:
    """The one term of a sum that goes by rewards, if there is one."""
    return next((term for term in terms if term.name in REWARDED), None)


def _arguments(names: Sequence[str], given: str | None, part: str) -> dict[str, float | str]:
    """What stands in parentheses, by name."""
    if not given:
        return {}
    if names and names[0] in WORD_ARGUMENTS:
        if (word := given.strip()) not in WORD_ARGUMENTS[names[0]]:
            raise BadInput(
                f"loss {part}: {names[0]} '{word}' is unknown; choose from {', '.join(WORD_ARGUMENTS[names[0]])}"
            )
        return {names[0]: word}
    try:
        values = [float(value) for value in given.split(",")]
    except ValueError as error:
        raise BadInput(f"loss {part}: '{given}' should be numbers, separated by commas") from error
    if len(values) > len(names):
        raise BadInput(f"loss {part}: takes {', '.join(names) or 'no numbers'}; {len(values)} were given")
    arguments = dict(zip(names, values, strict=False))
    for name, value in arguments.items():
        low, high = WITHIN[name]
        exact = (0, 1) if name in ("alpha", "beta") else ()
        if not (low <= value <= high or value in exact):
            also = "0, 1 or " if exact else ""
            raise BadInput(f"loss {part}: {name} is {value:g}; it must be {also}from {low:g} to {high:g}")
        if name in COUNTS and value != int(value):
            raise BadInput(f"loss {part}: {name} is {value:g}; it must be a whole number")
    return dict(arguments)


def check_terms(
    terms: Sequence[WrittenTerm],
    *,
    teacher: str,
    temperature: float,
    on_policy: float,
    force: bool,
    classify: bool = False,
) -> None:
    """Raises BadInput where a loss cannot be had from what the teacher says: "online", "top-k" or "drawn"."""
    names = {term.name for term in terms}
    if classify and (beyond := sorted(names - CLASSIFYING)):
        raise BadInput(f"loss {beyond[0]}: is for language models; choose from {', '.join(sorted(CLASSIFYING))}")
    if not classify and "uskd" in names:
        raise BadInput("loss uskd: measures itself by its batch, as classifiers do; it is for classifiers")
    if not classify and "mse" in names:
        raise BadInput("loss mse: compares the numbers of regressors; it is for classifiers")
    by_row = FAITHFUL.keys() | LEARNED.keys() | LABELED.keys() | ON_POLICY.keys() | REWARDED.keys() | {"hidden"}
    if names & SETS.keys() and not names & by_row and not force:
        raise BadInput(
            "loss: sinkhorn is blind to which row got which answer; add a loss of each row, such as "
            "forward-kl+0.1*sinkhorn, or --force it"
        )
    if teacher != "online":
        hears = {"ce"} | (FAITHFUL.keys() | LEARNED.keys() if teacher == "top-k" else {"forward-kl"})
        for name in sorted(names - hears):
            raise BadInput(f"loss {name}: cannot be had from a teacher kept as {teacher}; use --teacher online")
        if temperature != 1:
            raise BadInput("temperature: what is kept of a teacher was said at 1; use --teacher online")
        if on_policy:
            raise BadInput("on-policy: the teacher must answer what the student says; use --teacher online")
    if (own := sorted(names & ON_POLICY.keys())) and on_policy != 1:
        raise BadInput(f"loss {own[0]}: is for the student's own tokens; add --on-policy 1")
