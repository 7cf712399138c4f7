"""The fewest bits that keep a tell-apart rate: a job tried in several mean widths, each rounded and measured for real.

An optimal observer names the writer of one token, the float model or the quantized one, with probability 1/2 + TV / 2
in the mean over contexts (`calib.stats.tell_apart`; arXiv:2105.08947 calibrates a criterion by such a Bayes error, the
search is ours). The rate is measured on held-out rows: on others it may be another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

STEP = 0.25  # of a bit, between two candidates


@dataclass(frozen=True)
class Candidate:
    """A candidate: mean bits asked for and allocated, the tell-apart rate that was measured with its standard error
    (None of one row), and whether it was made in full or, quickly, without learning."""

    target_bits: float
    mean_bits: float
    rate: float
    error: float | None
    whole: bool

    def asdict(self) -> dict[str, Any]:
        """The candidate as JSON has it."""
        return asdict(self)


Measure = Callable[[float, bool], Candidate]  # of a candidate's mean bits, and whether to make it in full


def bit_targets(widths: Sequence[int]) -> list[float]:
    """Mean bits to try, STEP apart, from the least of `widths` (ascending) to the greatest."""
    return [widths[0] + STEP * i for i in range(round((widths[-1] - widths[0]) / STEP) + 1)]


def cheapest_bits(targets: Sequence[float], rate: float, measure: Measure, *, quick: bool) -> Candidate | None:
    """Find the cheapest candidate that was made in full and keeps a tell-apart rate.

    Bisection, on quick trials where there are such; then full ones from there, down as long as they keep the rate, or
    up until one does. The candidate a step below the one found was measured as well, in full, and does not keep it.

    Args:
        targets: mean bits of the candidates, ascending.
        rate: the rate to keep.
        measure: makes and measures a candidate; called again for one that it knows.
        quick: whether quick trials are another, cheaper thing than full ones.

    Returns:
        The trial of the candidate; None where even the last of them does not keep the rate.
    """
    below, at = -1, len(targets) - 1
    while at - below > 1:
        middle = (below + at) // 2
        if measure(targets[middle], not quick).rate <= rate:
            at = middle
        else:
            below = middle
    found = measure(targets[at], True)
    if found.rate <= rate:
        while at > 0 and (cheaper := measure(targets[at - 1], True)).rate <= rate:
            at, found = at - 1, cheaper
        return found
    return next((one for t in targets[at + 1 :] if (one := measure(t, True)).rate <= rate), None)


def tries(targets: Sequence[float]) -> int:
    """How many candidates bisection measures at most."""
    return (len(targets) - 1).bit_length()
