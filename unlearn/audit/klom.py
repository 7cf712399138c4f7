"""How far models that unlearned are from models that never saw the data, example by example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from calib import BadInput

BINS, CLIP, FLOOR = 20, 100.0, 1e-5  # of the reference estimator
FEWEST = 50  # models, with which bins still tell more than noise


def klom(unlearned: Tensor, oracles: Tensor, *, bins: int = BINS, clip: float = CLIP, floor: float = FLOOR) -> Tensor:
    """KL of margins (KLoM, arXiv:2410.23232): KL(unlearned || oracles) of binned margins, per example, in nats.

    (N, n), (M, n) -> (n,) float64.  Margins are clipped to [-clip, clip]; the bins are even from the least to the
    greatest of both sets, the last one closed. Where the oracles have nothing and the unlearned have something, the
    oracles' share counts as `floor`, without renormalising. Identical sets give 0, disjoint ones at most ln(1 / floor).

    Published code leaves the greatest margin out of every bin, and so calls disjoint sets equal where all unlearned
    margins are alike; other revisions take the KL the other way round. Raises BadInput where a margin is no number,
    or infinite, or where there are so few models that the bins tell only of noise: then `gaussian_klom` does better.
    """
    least = min(len(unlearned), len(oracles))
    if least < FEWEST:
        raise BadInput(
            f"klom: {least} models are too few for {bins} bins, which want {FEWEST}; use the Gaussian estimator"
        )
    p_margins, q_margins = (_checked(m, clip) for m in (unlearned, oracles))
    low = torch.minimum(p_margins.amin(0), q_margins.amin(0))
    high = torch.maximum(p_margins.amax(0), q_margins.amax(0))
    high = torch.where(high == low, low + 1, high)
    p, q = (_shares(m, low, high, bins) for m in (p_margins, q_margins))
    return torch.where(p > 0, p * (p / q.clamp(min=floor)).log(), 0.0).sum(0)


def gaussian_klom(unlearned: Tensor, oracles: Tensor, *, clip: float = CLIP) -> Tensor:
    """KLoM between normal distributions fitted to both sets, for few models: (N, n), (M, n) -> (n,) float64.

    ln(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2, with unbiased variances. Not to be compared with `klom`.
    Raises BadInput with fewer than two models on a side.
    """
    if min(len(unlearned), len(oracles)) < 2:
        raise BadInput("gaussian klom: a spread needs at least two models on each side")
    p, q = (_checked(m, clip) for m in (unlearned, oracles))
    tiny = 1e-12  # where all models agree, to the last digit that could matter
    p_var, q_var = (m.var(0).clamp(min=tiny) for m in (p, q))
    return 0.5 * ((q_var / p_var).log() + (p_var + (p.mean(0) - q.mean(0)).square()) / q_var - 1)


def _checked(values: Tensor, clip: float) -> Tensor:
    values = values.double()
    if not values.isfinite().all():
        model, example = (~values.isfinite()).nonzero()[0].tolist()
        raise BadInput(
            f"margins: model {model} has {values[model, example]} at example {example}; a model that broke is no model "
            "to score"
        )
    return values.clamp(-clip, clip)


def _shares(values: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Of the values (N, n), in even bins from low (n,) to high, the last one closed.  -> (bins, n)."""
    index = ((values - low) / (high - low) * bins).floor().long().clamp(0, bins - 1)
    counts = torch.zeros(bins, values.shape[1], dtype=torch.float64, device=values.device)
    return counts.scatter_add_(0, index, torch.ones_like(values)) / len(values)


def lira(unlearned: Tensor, oracles: Tensor) -> Tensor:
    """Accuracy of an attacker who tells, from one margin per example, an unlearned model from an oracle (U-LiRA,
    arXiv:2403.01218): likelihoods of two normal distributions are compared, each margin judged by fits to all others.
    (N, n), (M, n) -> (n,) float64; 0.5 is perfect unlearning.

    Raises BadInput with fewer than three models on a side.
    """
    if min(len(unlearned), len(oracles)) < 3:
        raise BadInput("lira: a fit to all other models needs at least three on each side")
    p, q = (_checked(m, CLIP) for m in (unlearned, oracles))
    guesses = []
    for own, other in ((p, q), (q, p)):
        mean, var = _without_each(own)
        log_unlearned = _log_normal(own, mean, var)
        log_oracle = _log_normal(own, other.mean(0), other.var(0).clamp(min=1e-12))
        guesses.append((log_unlearned > log_oracle).double() + 0.5 * (log_unlearned == log_oracle).double())
    return 0.5 * (guesses[0].mean(0) + guesses[1].mean(0))


def _without_each(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all others, for each of values (N, n)."""
    count = len(values) - 1
    mean = (values.sum(0) - values) / count
    total = (values - values.mean(0)).square().sum(0)
    spread = total - (values - values.mean(0)).square() * (count + 1) / count
    return mean, (spread / (count - 1)).clamp(min=1e-12)


def _log_normal(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return -0.5 * ((x - mean).square() / var + var.log())


@dataclass(frozen=True)
class KlomSummary:
    """KLoM of a group of examples: percentiles and the mean, by the estimator that was asked for and by the Gaussian
    one beside it, and the accuracy of the attack, mean and at the 95th percentile of examples."""

    p50: float
    p95: float
    p99: float
    mean: float
    gaussian_p95: float
    gaussian_mean: float
    attack: float | None  # not known of fewer than three models
    attack_p95: float | None

    def asdict(self) -> dict[str, float | None]:
        """The summary by name."""
        return asdict(self)


def klom_summaries(
    unlearned: Tensor, oracles: Tensor, groups: Mapping[str, Tensor], *, binned: bool
) -> dict[str, KlomSummary]:
    """Summarize KLoM (N, n), (M, n) by group of examples, int (n_g,) each."""
    gaussian = gaussian_klom(unlearned, oracles)
    each = klom(unlearned, oracles) if binned else gaussian
    attack = lira(unlearned, oracles) if min(len(unlearned), len(oracles)) > 2 else None

    def of(rows: Tensor) -> KlomSummary:
        p50, p95, p99 = (float(each[rows].quantile(q)) for q in (0.5, 0.95, 0.99))
        known = None if attack is None else attack[rows]
        return KlomSummary(
            p50, p95, p99, float(each[rows].mean()), float(gaussian[rows].quantile(0.95)), float(gaussian[rows].mean()),
            None if known is None else float(known.mean()), None if known is None else float(known.quantile(0.95)),
        )  # fmt: skip

    return {name: of(rows) for name, rows in groups.items() if len(rows)}
