"""Methods that prefer an alternative answer to the forgotten one, pair by pair, beside CE on retained rows.

dpo       -log s(b [f'(u_w) - f'(u_l)]), u_w the ratio of the alternative answer's probability now and before, u_l that
          of the forgotten one, s the logistic function; f'(u) = log u + 1 (DPO, arXiv:2305.18290)
dpo-js, dpo-forward-kl, dpo-alpha   the f' of another f-divergence (f-DPO, arXiv:2309.16240): see `SCORES`

Ratios are of whole answers. Those of the model as it was are a constant: no reference model is in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn.functional import logsigmoid

from unlearn.methods.baselines import baseline
from unlearn.methods.losses import LossInputs, LossPair, label_cross_entropy
from unlearn.methods.preference import SCORES
from unlearn.options.unlearning import Unlearn

PAIR_SCORES: dict[str, Callable[[Tensor], Tensor]] = {  # f'(u) of r = log u, up to a constant, which cancels
    "dpo": lambda r: r,
    **{f"dpo-{name}": score for name, score in SCORES.items()},
}


def dpo(rows: LossInputs, beta: float = 0.1, score: Callable[[Tensor], Tensor] = PAIR_SCORES["dpo"]) -> Tensor:
    """Direct preference optimization, a mean over pairs: rows (2 b) are forgotten answers and their alternatives, in
    turn."""
    forgotten, alternative = score(rows.log_ratio).view(-1, 2).unbind(1)
    return -logsigmoid(beta * (alternative - forgotten)).mean()


def _losses_of(score: Callable[[Tensor], Tensor]) -> Callable[[Unlearn], LossPair]:
    return lambda options: LossPair(partial(dpo, beta=options.beta, score=score), label_cross_entropy, by_row=True)


ENTRIES = {name: baseline(_losses_of(score)) for name, score in PAIR_SCORES.items()}
