"""Attribution of a classifier on CPU: examples a second and linear datamodeling score, beside `traker` and `dattri`.

    python -m benchmarks.attribution [--rounds 3]     # pip install traker; pip install --no-deps dattri==0.3.0

Digits, 1,400 rows for 397 points, an MLP of 64-128-64-10 (17,000 parameters), five checkpoints, one torch thread. Ours
and dattri's LoGra project each of three layers to 13 x 13 numbers, 507 in all; the two TRAKs project to 512. Scores are
held against margins of models trained on 100 random halves, the mean of three seeds each. Time is that of everything
between trained models and scores; rounds take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import record
from benchmarks.digits import digits
from calib.model.per_example_gradients import linear_layers, projections
from unlearn.datamodels.datamodel import fidelity
from unlearn.datamodels.influence import Attribution, Seen, second_moment
from unlearn.datamodels.trak import trak_scores
from unlearn.model.ensemble import Ensemble, initial_ensemble, of_module, subsets, train_ensemble
from unlearn.model.examples import Examples, plain_examples
from unlearn.model.margins import margins
from unlearn.model.model import TrainableModel
from unlearn.model.training_recipe import Training

CHECKPOINTS, SUBSETS, SEEDS = 5, 100, 3
WIDTH, WHOLE = 13, 512
HOW = Training(epochs=20, batch=64, lr=0.1)
Score = Callable[[nn.Module, dict[str, Tensor], Examples, Examples, int], Tensor]  # -> (n, m)


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def ours(module: nn.Module, params: dict[str, Tensor], rows: Examples, asked: Examples, seed: int) -> Tensor:
    linears, forward = linear_layers(module), of_module(module)
    seen = Seen(forward, params, linears, projections(linears, WIDTH, seed), forward)
    own, drawn = seen.gradients(rows, seed)
    return Attribution.of(own, second_moment(drawn, seen.blocks), 0.1).scores(seen.of_outputs(asked)).float()


def by_traker(module: nn.Module, params: dict[str, Tensor], rows: Examples, asked: Examples, seed: int) -> Tensor:
    from trak.modelout_functions import ImageClassificationModelOutput

    trainable = TrainableModel("tensors", Path(), module, of_module(module), params, lambda s: {}, lambda into, p: None)
    return trak_scores(trainable, rows, asked, ImageClassificationModelOutput(), WHOLE, seed)


def by_dattri(
    kind: str, module: nn.Module, params: dict[str, Tensor], rows: Examples, asked: Examples, seed: int
) -> Tensor:
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    loaders = [
        DataLoader(TensorDataset(some.inputs[""], some.labels), batch_size=200, shuffle=False) for some in (rows, asked)
    ]
    if kind == "LoGra":

        def loss(model: nn.Module, batch: Any, device: str) -> Tensor:
            return cross_entropy(model(batch[0]), batch[1])

        # dattri looks at the first example of a batch alone to learn the layers' widths, so an example must have rows.
        loaders = [
            DataLoader(TensorDataset(some.inputs[""][:, None], some.labels), batch_size=200) for some in (rows, asked)
        ]
        flat = nn.Sequential(*module.children(), nn.Flatten())
        task = AttributionTask(loss_func=loss, model=flat, checkpoints=params)
        attributor: Any = LoGraAttributor(task, proj_dim=WIDTH**2, damping=1e-3, offload="none")
        attributor.cache(loaders[0])
        # Of losses: what raises the loss of a point lowers its margin; rows that lower it score above 0.
        return torch.as_tensor(attributor.attribute(loaders[0], loaders[1]))

    def said(p: Any, pair: Any) -> Tensor:
        return functional_call(module, p, (pair[0].unsqueeze(0),))

    def margin(p: Any, pair: Any) -> Tensor:
        return margins(said(p, pair), pair[1].unsqueeze(0))[0]

    def right(p: Any, pair: Any) -> Tensor:
        return (-cross_entropy(said(p, pair), pair[1].unsqueeze(0))).exp()

    task = AttributionTask(loss_func=margin, model=module, checkpoints=params)
    options = {"proj_dim": WHOLE, "proj_max_batch_size": 32, "proj_seed": seed, "device": "cpu", "proj_type": "normal"}
    attributor = TRAKAttributor(task, right, projector_kwargs=options, device="cpu", regularization=1e-3)
    attributor.cache(loaders[0])
    return torch.as_tensor(attributor.attribute(loaders[1]))


PEERS: dict[str, Score] = {
    "parewell": ours,
    "traker": by_traker,
    "dattri, LoGra": partial(by_dattri, "LoGra"),
    "dattri, TRAK": partial(by_dattri, "TRAK"),
}


def truth(rows: Examples, asked: Examples) -> tuple[Tensor, Tensor]:
    """Which rows models were trained without (M, n), and their margins (M, m)."""
    masks = subsets(SUBSETS, len(rows), 0.5, 1)
    total = torch.zeros(SUBSETS, len(asked))
    for k in range(SEEDS):
        seeds = [1000 * (k + 1) + i for i in range(SUBSETS)]
        said = train_ensemble(initial_ensemble(make, seeds), rows, masks, seeds, HOW).logits(asked)
        total += margins(said, asked.labels) / SEEDS
    return ~masks, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    x, y, trained = digits()
    rows, asked = plain_examples(x[:trained], y[:trained]), plain_examples(x[trained:], y[trained:])
    deleted, said = truth(rows, asked)
    everything = torch.ones(CHECKPOINTS, trained, dtype=torch.bool)
    models: Ensemble = train_ensemble(
        initial_ensemble(make, range(CHECKPOINTS)), rows, everything, range(CHECKPOINTS), HOW
    )
    seconds: dict[str, list[float]] = {name: [] for name in PEERS}
    scores = dict[str, Tensor]()
    for _ in range(args.rounds):
        for name, peer in PEERS.items():
            total = torch.zeros(len(rows), len(asked))
            began = time.perf_counter()
            for k in range(CHECKPOINTS):
                module, params = make(), {n: p[k] for n, p in models.params.items()}
                module.load_state_dict(params)
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    total += peer(module, params, rows, asked, k).view(len(rows), -1) / CHECKPOINTS
            seconds[name].append(time.perf_counter() - began)
            scores[name] = total
    own = median(seconds["parewell"])
    table = []
    for name in PEERS:
        predicted = -deleted.float() @ scores[name]
        found = fidelity(predicted - predicted.mean(0), said - said.mean(0))
        took = median(seconds[name])
        table.append(
            {
                "tool": name,
                "examples a second": round(CHECKPOINTS * (len(rows) + len(asked)) / took),
                "times ours": round(took / own, 1),
                "linear datamodeling score": round(found.score, 3),
                "slope of truth": f"{found.slope:.3g}",
                "seconds, each round": ", ".join(f"{s:.2f}" for s in seconds[name]),
            }
        )
    record.write("attribution", table, str(__doc__).split("\n")[0])


if __name__ == "__main__":
    main()
