"""Whether more calibration rows would help: seen from what half of them cost.

A model with p free parameters, fitted to n tokens, is by p / 2n nats a token worse than the best of its kind, to
leading order; with n / 2 tokens by p / n. So what half of the rows cost is p / 2n if theory holds, and what twice as
many would win back is half of what half of them cost, whether it holds or not, as long as the loss is L + c / n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from calib.data.corpus import Corpus


@dataclass(frozen=True)
class SampleSizeEstimate:
    """`parameters` were fitted to `tokens`. KL from the float model on held-out rows, in nats per token, of the job
    with all rows and with each half of them."""

    parameters: int
    tokens: int
    whole: float
    halves: tuple[float, float]

    def asdict(self) -> dict[str, Any]:
        """The estimate as JSON has it: `risk` p / 2n, the `change` that half of the rows make, what twice as many would
        `win`, and the standard error of each of the two as far as two halves tell it."""
        change, spread = sum(self.halves) / 2 - self.whole, abs(self.halves[0] - self.halves[1]) / 2
        return {
            "parameters": self.parameters, "tokens": self.tokens, "whole": self.whole, "halves": list(self.halves),
            "risk": self.parameters / (2 * self.tokens), "change": change, "change_error": spread,
            "win": change / 2, "win_error": spread / 2,
        }  # fmt: skip


def estimate_sample_size(
    calibration: Corpus, whole: float, parameters: int, loss: Callable[[Corpus, str], float]
) -> SampleSizeEstimate:
    """`loss` runs the job on some of the rows, under a name; there must be two rows or more."""
    middle = len(calibration.ids) // 2
    halves = loss(calibration[:middle], "first"), loss(calibration[middle : 2 * middle], "second")
    return SampleSizeEstimate(parameters, int(calibration.mask.sum()), whole, halves)
