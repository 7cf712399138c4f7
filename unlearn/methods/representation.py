"""RMU (arXiv:2403.03218): hidden states of forgotten rows move to a random direction, those of retained rows stay."""

from __future__ import annotations

import torch
from torch import Tensor

from calib import BadInput
from unlearn.methods.baselines import baseline
from unlearn.methods.losses import LossInputs, LossPair
from unlearn.model.ensemble import Forward
from unlearn.model.model import TrainableModel, blocks_of
from unlearn.options.unlearning import Unlearn


def rmu_forget(rows: LossInputs, times: float = 2.0) -> Tensor:
    """Mean squares from a random direction that is the seed's, `times` as long as states were."""
    assert rows.size is not None
    width = rows.now.shape[-1]
    direction = torch.rand(width, generator=torch.Generator().manual_seed(rows.seed)).to(rows.now)
    return (rows.now - times * rows.size * direction / direction.norm()).square().mean()


def rmu_retain(rows: LossInputs) -> Tensor:
    """Mean squares from the states that there were."""
    assert isinstance(rows.before, Tensor)
    return (rows.now - rows.before).square().mean()


def steered_states(trainable: TrainableModel, options: Unlearn) -> Forward:
    """The function that gives the states of the block that is steered.  Raises BadInput for a model without any."""
    if trainable.states is None:
        raise BadInput(f"method {options.method}: is for language models, whose blocks have states; choose another")
    blocks = blocks_of(trainable)
    layer = len(blocks) // 2 if options.layer is None else options.layer
    if not 0 <= layer < len(blocks):
        raise BadInput(f"layer {layer}: the model has blocks 0 to {len(blocks) - 1}")
    return trainable.states(blocks[layer])


REPRESENTATION_LOSSES = {"rmu": LossPair(rmu_forget, rmu_retain, on_states=True)}
ENTRIES = {name: baseline(losses, steered_states) for name, losses in REPRESENTATION_LOSSES.items()}
