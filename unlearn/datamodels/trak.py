"""TRAK's attribution (arXiv:2303.14186) through the `traker` package, for classifiers that it can run.

One target of TRAK is one number, so all logits take a pass each. Its scores are known up to a constant factor only, as
the package divides them by one: they are of use here with a scale that is fitted to deletions.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from calib import BadInput, Failed
from unlearn.datamodels.estimators import Estimator, PredictionJob, Shift, one_shift
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel
from unlearn.options.unlearning import Unlearn

LAMBDA = 1e-3  # of its ridge, without which fewer rows than projected numbers give garbage
BATCH = 100


def check_trak(trainable: TrainableModel, options: Unlearn) -> None:
    """Raises BadInput where the package is missing, or cannot run the model."""
    if find_spec("trak") is None:
        raise BadInput("traker: is not installed; pip install 'parewell[trak]'")
    if trainable.task not in ("tensors", "image-classification"):
        raise BadInput(
            "estimator trak: is for classifiers of tensors or images, as its package takes gradients row by row under "
            "vmap, which attention masks of texts do not pass; use --estimator gradients"
        )
    if options.width**2 <= 128:
        raise BadInput(f"width {options.width}: TRAK projects to width squared numbers, which must be more than 128")
    if len(trainable.module.state_dict()) != len(trainable.state):
        raise BadInput("estimator trak: takes no model with tied weights; use --estimator gradients")


def trak_scores(
    trainable: TrainableModel, rows: Examples, asked: Examples, outputs: Any, size: int, seed: int
) -> Tensor:
    """Scores (n, m) of training rows for asked ones; `outputs` is TRAK's model output.  Norms stay in evaluation
    mode, with the running statistics that the model has."""
    from trak import TRAKer  # not everyone has it
    from trak.projectors import BasicProjector

    name = next(iter(rows.inputs))
    module, state, home = trainable.module, trainable.state, trainable.device
    if home.type != "cuda":  # the package knows CUDA and CPUs
        cpu = torch.device("cpu")
        module, state = deepcopy(module).to(cpu), {name: t.to(cpu) for name, t in state.items()}
        rows, asked = rows.to(cpu), asked.to(cpu)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # bars of its own
        device = next(module.parameters()).device
        grad_dim = sum(p.numel() for p in module.parameters())
        projector = BasicProjector(grad_dim, size, seed, "rademacher", device, block_size=min(128, size), dtype=torch.float32)  # fmt: skip  # noqa: E501
        traker = TRAKer(
            module, outputs, len(rows), save_dir=folder, device=str(device), projector=projector, proj_dim=size,
            use_half_precision=False, lambda_reg=LAMBDA, logging_level=logging.ERROR,
        )  # fmt: skip
        traker.load_checkpoint(state, model_id=0)
        for batch in _batches(rows, name):
            traker.featurize(batch, num_samples=len(batch[1]))
        try:
            traker.finalize_features()
        except RuntimeError as error:
            raise Failed(f"estimator trak: its kernel is singular ({error}); change --width") from error
        traker.start_scoring_checkpoint("asked", state, model_id=0, num_targets=len(asked))
        for batch in _batches(asked, name):
            traker.score(batch, num_samples=len(batch[1]))
        return torch.as_tensor(traker.finalize_scores("asked")).clone().to(home)


def _batches(rows: Examples, name: str) -> Iterable[tuple[Tensor, Tensor]]:
    for i in range(0, len(rows), BATCH):
        part = rows[i : i + BATCH]
        yield part.inputs[name], part.labels


def by_trak(trainable: TrainableModel, rows: Examples, points: Tensor, options: Unlearn) -> Shift:
    """`points` are the rows that will be asked about."""
    check_trak(trainable, options)
    asked = rows[points]
    with torch.no_grad():
        classes = trainable.forward(trainable.state, asked[:1]).shape[1]
    scores = torch.stack(
        [
            trak_scores(trainable, rows, asked, output_of(c, trainable), options.width**2, options.seed)
            for c in range(classes)
        ],
        -1,
    )
    where = {int(row): i for i, row in enumerate(points.tolist())}

    def shift(deleted: Tensor, some: Tensor) -> Tensor:
        return -torch.tensordot(deleted.to(scores), scores[:, [where[row] for row in some.tolist()]], 1)

    return shift


def output_of(column: int, trainable: TrainableModel) -> Any:
    """TRAK's view of one logit: the margin says how much each training row has learned, the logit what is asked."""
    from trak.modelout_functions import AbstractModelOutput

    name = "pixel_values" if trainable.task == "image-classification" else None

    def said(model: Any, weights: Any, buffers: Any, x: Tensor) -> Tensor:
        made = functional_call(model, (weights, buffers), (x,) if name is None else (), {name: x} if name else {})
        logits: Tensor = made if isinstance(made, Tensor) else made.logits
        return logits

    class Logit(AbstractModelOutput):  # type: ignore[misc]
        """The package asks for a class of its own."""

        def __init__(self) -> None: ...

        def get_output(self, model: Any, weights: Any, buffers: Any, x: Tensor, label: Tensor) -> Tensor:
            return said(model, weights, buffers, x.unsqueeze(0))[0, column]

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            x, label = batch
            right = torch.nn.functional.one_hot(label, said(model, weights, buffers, x).shape[1])[:, column]
            gap = right - said(model, weights, buffers, x).softmax(-1)[:, column]
            return gap.clone().detach().unsqueeze(-1)

    return Logit()


def _shift(job: PredictionJob) -> Shift:
    return by_trak(job.trainable, job.rows, job.asked, job.options)


ENTRIES = {"trak": Estimator(one_shift(_shift), lambda trainable, rows, options: check_trak(trainable, options))}
