"""Learning rates that a short search on retained rows allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calib import Diverged
from calib.jobs.journal import Journal
from calib.runtime.progress import stage
from unlearn.model.ensemble import Ensemble
from unlearn.model.examples import Examples

RATES = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
NORMED_RATE = 1e-4  # the greatest of them at which models with running statistics are matched, as they were published
TRIAL_STEPS = 20  # of the job, that each rate is tried for
ROWS, SHARE = 64, 5  # retained rows that rates are judged by: so many, at most a fifth of all
_PAGE = "rate"


def divided(retained: Tensor, seed: int, measured: int, search: bool) -> tuple[Tensor, Tensor]:
    """Numbers of retained rows that figures are taken on, and, with `search`, of others that rates are judged by; both
    drawn by the seed, in order, of the first at most `measured`."""
    drawn = retained[torch.randperm(len(retained), generator=torch.Generator().manual_seed(seed))]
    count = min(ROWS, max(len(drawn) // SHARE, int(len(drawn) > 1))) if search else 0
    at = min(measured, len(drawn) - count)
    return drawn[:at].sort().values, drawn[at : at + count].sort().values


def rate_loss_bound(task: str, most: float) -> float:
    """Nats per target position that the loss may rise by: of a language model `most`; of a classifier, which may lose
    that share of its accuracy, what losing that share of every probability costs."""
    return most if task == "causal-lm" else -math.log1p(-min(most, 0.99))


def rates_for(*, normed: bool, matched: bool) -> tuple[float, ...]:
    """Learning rates to search, from the greatest: matching of models whose norms keep running statistics begins at
    1e-4, that of DMM's published runs (arXiv:2410.23232), as these statistics are frozen and no longer fit weights that
    went far."""
    return tuple(lr for lr in RATES if lr <= NORMED_RATE or not (normed and matched))


def search_rate(
    moved: Callable[[float, int], Ensemble], before: Ensemble, rows: Examples, bound: float, journal: Journal,
    rates: Sequence[float] = RATES,
) -> dict[str, Any]:  # fmt: skip
    """The largest of `rates` (from the greatest on) after TRIAL_STEPS of which, from the model as it is, the nats of
    `rows` rose by less than `bound`; else the least.

    moved(rate, steps) gives the model after the first steps of the job at that rate. -> {"lr", "tried": one {"lr",
    "nats"} for each rate that was tried, "before": nats before, "rows", "steps", "bound"}, kept in the journal.
    """
    if _PAGE in journal:
        return journal.notes(_PAGE)
    tried, start = list[dict[str, float | None]](), nats(before, rows)
    with stage("search a rate", len(rates), "rates") as done:
        for lr in rates if len(rows) else rates[-1:]:
            try:
                found = nats(moved(lr, TRIAL_STEPS), rows) if len(rows) else start
            except Diverged:
                found = math.inf
            tried.append({"lr": lr, "nats": found if math.isfinite(found) else None})  # JSON has no infinity
            done(f"{lr:g}")
            if found - start < bound:
                break
    result = {
        "lr": tried[-1]["lr"],
        "tried": tried,
        "before": start,
        "rows": len(rows),
        "steps": TRIAL_STEPS,
        "bound": bound,
    }
    journal.write(_PAGE, {}, result)
    return result


@torch.no_grad()
def nats(model: Ensemble, rows: Examples) -> float:
    """Mean over target positions of one model's nats; 0 of no rows."""
    return float(model.nats(rows).double().mean()) if len(rows) else 0.0
