"""Methods that take the forget set for answers that are not preferred, beside CE on retained rows.

npo       -(2 / b) log s(-b r), r = log u the log-ratio of a forgotten row's probability now and before, s the logistic
          function (NPO, arXiv:2404.05868; one published version takes raw logits for log-probabilities); npo-js,
          npo-forward-kl and npo-alpha take f'(u) of another f-divergence for r (f-DPO, arXiv:2309.16240): log s(r),
          -1 / u, (u^(a - 1) - 1) / (a - 1)
simnpo    the same of the row's nats a token now alone: -(2 / b) log s(b (l - delta)) (arXiv:2410.07163)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn.functional import logsigmoid

from unlearn.methods.baselines import baseline
from unlearn.methods.losses import LOG_RATIO_BOUND, Loss, LossInputs, LossPair, label_cross_entropy


def npo(rows: LossInputs, beta: float = 0.1, score: Callable[[Tensor], Tensor] = lambda r: r) -> Tensor:
    """Negative preference optimization, a mean over rows."""
    return -2 / beta * logsigmoid(-beta * score(rows.log_ratio)).mean()


def simnpo(rows: LossInputs, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    """NPO without a reference, by each row's mean nats a token; a mean over rows."""
    nats = rows.of.sums(rows.nats) / rows.of.counts
    return -2 / beta * logsigmoid(beta * (nats - delta)).mean()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {  # f'(u) of r = log u, less what it is at u = 1
    "js": lambda r: logsigmoid(r) + math.log(2),  # at most log 2, however likely a row becomes
    "forward-kl": lambda r: 1 - (-r).clamp(max=LOG_RATIO_BOUND).exp(),
    "alpha": lambda r: 2 - 2 * (-0.5 * r).clamp(max=LOG_RATIO_BOUND).exp(),  # a = 0.5
}
_FORMS: dict[str, Loss] = {
    "npo": npo,
    **{f"npo-{name}": partial(npo, score=score) for name, score in SCORES.items()},
    "simnpo": simnpo,
}
PREFERENCE_LOSSES = {name: LossPair(form, label_cross_entropy, by_row=True) for name, form in _FORMS.items()}
ENTRIES = {name: baseline(losses) for name, losses in PREFERENCE_LOSSES.items()}
