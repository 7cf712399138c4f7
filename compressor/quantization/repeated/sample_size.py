"""Whether more calibration rows would help: seen from what half of them cost.

A model with p free parameters, fitted to n tokens, is by p / 2n nats a token worse than the best of its kind, to
leading order; with n / 2 tokens by p / n. So what half of the rows cost is p / 2n if theory holds, and what twice as
many would win back is half of what half of them cost, whether it holds or not, as long as the loss is L + c / n
(arXiv:2105.08947; for exponential families the next term is of order n^-2). The verdict is stated in the tell-apart
rate, 1/2 + TV / 2, whose excess over 1/2 goes with the root of the KL: its square is taken to be L + c / n too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from calib.data.corpus import Corpus

KlAndRate = tuple[float, float | None]  # KL in nats per token, and the tell-apart rate where it is known


@dataclass(frozen=True)
class SampleSizeEstimate:
    """`parameters` were fitted to `tokens`. KL from the float model on held-out rows, in nats per token, of the job
    with all rows and with each half of them; and the tell-apart rates of the three, where they are known."""

    parameters: int
    tokens: int
    whole: float
    halves: tuple[float, float]
    tell_apart: tuple[float, float, float] | None = None

    def asdict(self) -> dict[str, Any]:
        """The estimate as JSON has it: `risk` p / 2n, the `change` that half of the rows make, what twice as many would
        `win`, and the standard error of each of the two as far as two halves tell it; the tell-apart rate as it is, and
        with `twice` the rows."""
        change, spread = sum(self.halves) / 2 - self.whole, abs(self.halves[0] - self.halves[1]) / 2
        return {
            "parameters": self.parameters, "tokens": self.tokens, "whole": self.whole, "halves": list(self.halves),
            "risk": self.parameters / (2 * self.tokens), "change": change, "change_error": spread,
            "win": change / 2, "win_error": spread / 2, "tell_apart": self.tell_apart and self.tell_apart[0],
            "tell_apart_twice": self._with_twice(),
        }  # fmt: skip

    def _with_twice(self) -> float | None:
        """The tell-apart rate with twice as many rows."""
        if self.tell_apart is None:
            return None
        whole, *halves = ((rate - 0.5) ** 2 for rate in self.tell_apart)
        return 0.5 + max(0.0, whole - (sum(halves) / 2 - whole) / 2) ** 0.5


def estimate_sample_size(
    calibration: Corpus, whole: KlAndRate, parameters: int, loss: Callable[[Corpus, str], KlAndRate]
) -> SampleSizeEstimate:
    """`loss` runs the job on some of the rows, under a name; there must be two rows or more."""
    middle = len(calibration.ids) // 2
    every = whole, loss(calibration[:middle], "first"), loss(calibration[middle : 2 * middle], "second")
    rates = [rate for _, rate in every if rate is not None]
    apart = (rates[0], rates[1], rates[2]) if len(rates) == len(every) else None
    return SampleSizeEstimate(parameters, int(calibration.mask.sum()), whole[0], (every[1][0], every[2][0]), apart)
