"""Methods whose losses are likelihoods or divergences from the model before.

ascent       -CE on the forget set
retain       CE on retained rows alone
difference   both (gradient difference)
scrub        -KL(before || now) on the forget set in the first half of the epochs, in all of them KL + CE on retained
             rows (arXiv:2302.09880). One published version descends on the frozen teacher's parameters, so that its
             student never moves.
"""

from __future__ import annotations

from torch import Tensor

from unlearn.methods.baselines import baseline
from unlearn.methods.losses import LossInputs, LossPair, kl_to_reference, label_cross_entropy


def gradient_ascent(rows: LossInputs) -> Tensor:
    """Negative cross-entropy, a mean over target positions."""
    return -rows.nats.mean()


def negative_kl(rows: LossInputs) -> Tensor:
    """Negative KL(before || now), a mean over target positions."""
    return -rows.kl.mean()


def scrub_retain(rows: LossInputs) -> Tensor:
    """KL(before || now) + CE."""
    return kl_to_reference(rows) + label_cross_entropy(rows)


GRADIENT_LOSSES = {
    "ascent": LossPair(gradient_ascent, None, unbounded=True),
    "retain": LossPair(None, label_cross_entropy),
    "difference": LossPair(gradient_ascent, label_cross_entropy, unbounded=True),
    "scrub": LossPair(negative_kl, scrub_retain, apart=True),
}
ENTRIES = {name: baseline(losses) for name, losses in GRADIENT_LOSSES.items()}
