"""Weights of several losses that need not be guessed: from the sizes of their gradients, or from how they have fared.

Neither looks at values of losses as such: a loss times a constant is the same loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def by_gradient(norms: Sequence[float], weights: Sequence[float], floor: float = 1e-3) -> list[float]:
    """Factors that make each loss's gradient as long as its share of `weights`.

    From the norm of the gradient of each loss alone: factor times norm is weight over the sum of weights, so that the
    gradient of the whole is never longer than 1. Balance by value would not do: gradients of equal values differ by
    orders of magnitude (SinKD's beside KL's). A norm counts as at least `floor` of the largest: what has converged is
    not blown up until its noise leads. Where all are 0 the factors are the shares.

    Raises ValueError for a norm that is negative or no number and for a weight that is not positive.
    """
    if len(norms) != len(weights):
        raise ValueError(f"{len(norms)} norms, but {len(weights)} weights")
    if not all(math.isfinite(n) and n >= 0 for n in norms) or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ValueError(f"norms {list(norms)} must be finite, weights {list(weights)} positive")
    total, least = math.fsum(weights), floor * max(norms, default=0)
    return [w / total / (max(n, least) or 1) for n, w in zip(norms, weights, strict=True)]


class Recap:
    """Weights by how losses have changed lately (after RECAP, arXiv:2510.21978).

    Of the last two windows of W steps, with m the mean of a loss over the later, m' over the earlier and s its
    deviation within the later:

        convergence  c = m / m'        one less the relative decrease: below 1 it falls, at 1 it stands; at most 2
        instability  i = s / (m + m')
        weight         = K softmax((c + unrest i) / temperature) over the K losses, a sum of K

    and what is used moves towards it by 1 - `keep` a step. All are 1 until two windows are full.

    c, i and the softmax are the paper's, as its authors' code and a summary of it have them (they do not agree on how c
    and i are joined; this is the summary's). Ours: `unrest` -1, less weight to what is unstable, where the paper has 1,
    the other way round; temperature 0.5 where it has 5, at which a loss that halves and one that stands differ by 10%;
    `keep`; the bound on c.
    """

    def __init__(
        self, losses: int, window: int = 10, *, temperature: float = 0.5, unrest: float = -1.0, keep: float = 0.9
    ) -> None:
        if losses < 1 or window < 2 or temperature <= 0 or not 0 <= keep < 1:
            raise ValueError(
                f"losses {losses} must be at least 1, window {window} at least 2, "
                f"temperature {temperature} positive, keep {keep} in [0, 1)"
            )
        self.window, self.temperature, self.unrest, self.keep = window, temperature, unrest, keep
        self._history = torch.zeros(2 * window, losses, dtype=torch.float64)
        self._seen = torch.zeros((), dtype=torch.int64)
        self._weights = torch.ones(losses, dtype=torch.float64)

    def state(self) -> dict[str, Tensor]:
        """The running state, as tensors that are changed in place."""
        return {"history": self._history, "seen": self._seen, "weights": self._weights}

    @property
    def weights(self) -> list[float]:
        """Positive, their sum the number of losses."""
        weights: list[float] = self._weights.tolist()
        return weights

    def step(self, values: Sequence[float]) -> list[float]:
        """Take in a step's unweighted losses, the same in every process.  -> the weights for the next one.

        Raises ValueError for one that is negative or no number.
        """
        if len(values) != len(self._weights) or not all(math.isfinite(v) and v >= 0 for v in values):
            raise ValueError(f"losses {list(values)} must be {len(self._weights)} numbers of at least 0")
        self._history.copy_(self._history.roll(-1, 0))
        self._history[-1] = torch.tensor(values, dtype=torch.float64)
        self._seen += 1
        if self._seen >= len(self._history):
            self._weights.lerp_(self._target_weights(), 1 - self.keep)
        return self.weights

    def _target_weights(self) -> Tensor:
        tiny = torch.finfo(torch.float64).tiny  # nothing over nothing stands still
        earlier, later = (half.mean(0) + tiny for half in self._history.split(self.window))
        convergence = (later / earlier).clamp(max=2)
        instability = self._history[self.window :].std(0, correction=0) / (earlier + later)
        score = (convergence + self.unrest * instability) / self.temperature
        return len(score) * score.softmax(0)
