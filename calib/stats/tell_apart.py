"""How surely two models are told apart by what they write: a distance in a unit that needs no explanation.

An optimal observer knows both distributions of the next token, p and q, is shown one token that either wrote with equal
chance, and names the writer. It is right with probability 1/2 + TV(p, q) / 2: 0.5 is guessing. Pinsker's inequality
bounds the mean over contexts by 1/2 + sqrt(KL / 2) / 2. Shown more tokens, it is sure sooner or later (Wald's identity,
and Stein's lemma).
"""

from __future__ import annotations

import math

from torch import Tensor

from calib.runtime.precision import upcast

ODDS = 20  # to one, at which an observer is 95% sure


def tell_apart_rate(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """The share of single tokens whose writer an optimal observer names: 1/2 + TV(softmax p, softmax q) / 2.

    (..., V), (..., V) -> (...), from 0.5 (the same distribution) to 1 (nothing in common).
    """
    apart = upcast(p_logits).softmax(-1).sub_(upcast(q_logits).softmax(-1)).abs_()
    return 0.5 + apart.sum(-1) / 4


def tokens_to_tell(kl: float) -> int | None:
    """How many tokens an optimal observer reads until it is 95% sure of the writer: log(20) / KL, rounded up.

    kl: mean KL(writer || other) in nats per token. That many take the writer's log-odds to 20 to 1 in the mean; how far
    the last token goes beyond it (less than the largest log-ratio over KL) is not counted. None where KL is not above
    0: never.
    """
    return max(1, math.ceil(math.log(ODDS) / kl)) if kl > 0 else None
