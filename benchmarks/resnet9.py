"""ResNet-9 with batch norm, where datamodel matching was measured (arXiv:2410.23232): its nets, its three kinds of
forget sets, two sizes.

    python -m benchmarks.resnet9 --size cpu [--images DIR | --mnist DIR] [--sets pca50 random10 random100]
    python -m benchmarks.resnet9 --size cpu --rows 1000 --epochs 8 --sets pca50    # a process for each set, or core
    python -m benchmarks.resnet9 --size gpu --images DIR

P95 (mean) of KLoM on the forget set, on what is retained and on validation images, binned from 50 models a side on,
else Gaussian; cost in percent of a retrain (rows that pass in training; models that estimators learn from not counted),
and seconds for all models of a side. `--images` has a directory of images for each of ten classes, such as CIFAR-10's;
without it the images are MNIST's test digits, from `--mnist` or PAREWELL_DATA/mnist. "pca50" are the 50 rows with the
greatest score on the first principal component of the influence of training rows on each other. Models are trained from
scratch, by running statistics of their own; whatever forgets keeps these statistics. Hyper-parameters have the least
mean on forget plus P95 on retain against other oracles than those that score; oracle matching takes these others as its
targets, one for each model. "gradients" are influence functions of each model, scaled by deletions of related rows;
"nearness" is a Gaussian process over `--related` models that were trained without other rows.

Size cpu: width 16, images of 16 pixels, 5,000 of them (a fifth validates), 4 epochs, 10 models a side, one thread. Size
gpu: width 64, 32 pixels, 6 epochs; it has not been timed. No set is begun that may end after `--minutes` (110 and 9):
size cpu wants two processes, one for pca50 and one for the others, and an hour or somewhat more on two cores.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial as with_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.digits import Bench, Family, Problem, Size, attributed, by_gradients, by_nearness, chosen, scaled
from benchmarks.unlike import CLASSES, mnist, pictures
from unlearn.methods.baselines import BaselineConfig, forget
from unlearn.methods.gradient import GRADIENT_LOSSES
from unlearn.methods.matching import MatchingConfig
from unlearn.methods.preference import PREFERENCE_LOSSES
from unlearn.model.examples import plain_examples
from unlearn.model.training_recipe import Training

SETS = ("pca50", "random10", "random100")
BASELINES = ("retain", "ascent", "difference", "scrub", "npo")
EPOCHS, BATCH = 5, 16  # of whatever forgets
RATES = (1e-4, 1e-3)  # both as published


class Residual(nn.Module):
    """x + two convolutions of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(normalized(width, width), normalized(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Scores(nn.Module):
    """A fifth of a linear map of the greatest value of each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 0.2 * self.head(x.amax((2, 3)))


def normalized(ins: int, outs: int, size: int = 3, stride: int = 1, padding: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(ins, outs, size, stride, padding, bias=False), nn.BatchNorm2d(outs), nn.ReLU())


def resnet9(width: int, channels: int) -> nn.Module:
    """Eight convolutions with batch norm and a linear head; width 64 is that of the paper."""
    return nn.Sequential(
        normalized(channels, width), normalized(width, 2 * width, 5, 2, 2), Residual(2 * width),
        normalized(2 * width, 4 * width), nn.MaxPool2d(2), Residual(4 * width),
        normalized(4 * width, 2 * width, 3, 1, 0), Scores(2 * width),
    )  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """What a size of the benchmark is, apart from what the command says."""

    width: int
    pixels: int
    models: int
    related: int
    training: Training
    stacked: bool
    group: int
    at_once: int
    minutes: float


SCALES = {
    "cpu": Scale(16, 16, 10, 40, Training(epochs=4, batch=64, lr=0.2), False, 100, 512, 110),
    "gpu": Scale(64, 32, 10, 0, Training(epochs=6, batch=256, lr=0.4), True, 10, 256, 9),
}


def images_of(args: argparse.Namespace, pixels: int) -> tuple[Tensor, Tensor]:
    """Images (n, channels, pixels, pixels) in [-1, 1] and their classes, in a drawn order."""
    if args.images is not None:
        x, y = pictures(args.images)
    else:
        data = os.environ.get("PAREWELL_DATA")
        if args.mnist is None and data is None:
            raise SystemExit("images: give --images DIR, or --mnist DIR, or set PAREWELL_DATA")
        x, y = mnist(args.mnist or Path(str(data)) / "mnist")
    if len(x) < args.rows * 5 // 4:
        raise SystemExit(f"images: there are {len(x)}, and {args.rows * 5 // 4} were asked for; lower --rows")
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: args.rows * 5 // 4]
    small = nn.functional.interpolate(x[some], size=(pixels, pixels), mode="bilinear", antialias=True)
    return small, y[some]


def pca_cluster(family: Family, count: int) -> Tensor:
    """The rows with the greatest score on the first principal component of the influence of each training row on the
    loss of each other, in the first of the original models."""
    attribution = attributed(family, 0)[1]
    influence = -attribution.scores(attribution.gradients)
    influence -= influence.mean(0)
    component = torch.linalg.eigh(influence @ influence.mT).eigenvectors[:, -1].cpu()
    if component[component.abs().argmax()] < 0:
        component = -component
    return component.argsort(descending=True)[:count]


def forget_set(kind: str, family: Family) -> Tensor:
    if kind.startswith("pca"):
        return pca_cluster(family, int(kind.removeprefix("pca")))
    return chosen(kind, family.rows.inputs[""].flatten(1), family.rows.labels, family.trained)[0]


def estimators_of(family: Family) -> tuple[dict[str, Callable[[Tensor], Tensor]], list[dict[str, Any]]]:
    """How answers of all models change (M or 1, points, C) when rows go, by estimator; and how good it was on held-out
    deletions."""
    scale, found = scaled(family, by_gradients(family, 0))
    table = [{"estimator": "gradients"} | found]

    def gradients(deleted: Tensor) -> Tensor:
        times = torch.full((len(family.points), 1), scale.others)
        times[: family.trained][deleted] = scale.own
        return torch.stack([times * by_gradients(family, k)(deleted) for k in range(family.size.models)])

    made: dict[str, Callable[[Tensor], Tensor]] = {"gradients": gradients}
    if family.size.related:
        nearness = by_nearness(family)
        table.append({"estimator": "nearness"} | scaled(family, nearness)[1])
        made["nearness"] = nearness
    return made, table


def measured(kind: str, problem: Problem, estimators: dict[str, Callable[[Tensor], Tensor]]) -> list[dict[str, Any]]:
    """Everything that is measured on one forget set."""
    bench, family, f = Bench(kind, problem, (1000, 2000)), problem.family, problem.forgotten
    family.targeted.append(sorted(f.tolist()))
    most = bench.most_retained(EPOCHS, 1)
    grid = [MatchingConfig(epochs=EPOCHS, batch=BATCH, lr=lr, retain_multiplier=most) for lr in RATES]
    bench.add("do nothing", family.before)
    bench.add("oracles against oracles (floor)", bench.other)
    bench.matched("oracle matching", bench.tuning, grid)
    for name, change_of in estimators.items():
        targets = family.before + change_of(problem.deleted)
        bench.add(f"DM-Direct, {name}", targets)
        bench.matched(f"DMM, {name}", targets, grid)
    for name in BASELINES:
        losses = GRADIENT_LOSSES.get(name) or PREFERENCE_LOSSES[name]
        run = with_(forget, losses, family.originals, family.placed, f, problem.retained)
        options = [
            BaselineConfig(epochs=EPOCHS, batch=BATCH, lr=lr, retain_multiplier=0.0 if name == "ascent" else most)
            for lr in (1e-5, *RATES)
        ]
        bench.tuned(name, options, run)
    return bench.rows


def accuracy(family: Family) -> float:
    """Share of the validation images that the original models tell, on average."""
    rows = slice(family.trained, None)
    return float((family.before[:, rows].argmax(-1) == family.points.labels[rows]).float().mean())


def write(name: str, rows: Sequence[dict[str, Any]], args: argparse.Namespace, family: Family, began: float) -> None:
    scale, about = SCALES[args.size], f"{'images' if args.images else 'MNIST'}"
    notes = (
        f"ResNet-9 of width {scale.width}, {args.rows} training rows of {about} at {scale.pixels} pixels, "
        f"{family.size.models} models a side (KLoM {'binned' if family.size.models >= 50 else 'Gaussian'}), "
        f"{scale.training.epochs} epochs; the original models tell {accuracy(family):.1%} of the validation images. "
        f"{(time.monotonic() - began) / 60:.0f} minutes."
    )
    record.write(name, rows, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SCALES), default="cpu")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--rows", type=int, default=4000, help="training rows; a fourth of them more validate")
    parser.add_argument("--models", type=int, help="a side")
    parser.add_argument("--related", type=int, help="models for the estimator nearness; 0: without it")
    parser.add_argument("--epochs", type=int, help="of training")
    parser.add_argument("--minutes", type=float, help="no set is begun that may end later")
    args = parser.parse_args()
    began, scale = time.monotonic(), SCALES[args.size]
    minutes = scale.minutes if args.minutes is None else args.minutes
    if args.size == "cpu":
        torch.set_num_threads(1)
    else:
        torch.set_float32_matmul_precision("high")
    x, y = images_of(args, scale.pixels)
    training = scale.training if args.epochs is None else Training(**vars(scale.training) | {"epochs": args.epochs})
    size = Size(
        models=args.models or scale.models, related=scale.related if args.related is None else args.related,
        options=training, net=with_(resnet9, scale.width, x.shape[1]), held_out=8, group=scale.group,
        stacked=scale.stacked, at_once=scale.at_once, device="cuda" if args.size == "gpu" else "cpu",
    )  # fmt: skip
    family = Family(plain_examples(x, y), args.rows, size)
    name = f"resnet9-{args.size}-{'images' if args.images else 'mnist'}-{'-'.join(args.sets)}"
    print(f"originals: {accuracy(family):.1%}, {time.monotonic() - began:.0f} s", flush=True)
    estimators, quality = estimators_of(family)
    write(f"{name}-estimators", quality, args, family, began)
    rows, longest = list[dict[str, Any]](), 0.0
    for kind in args.sets:
        start = time.monotonic()
        if start - began + longest > 60 * minutes:
            print(f"{kind} and what follows is left out: {minutes:g} minutes would not do", flush=True)
            break
        rows += measured(kind, Problem(family, forget_set(kind, family)), estimators)
        longest = max(longest, time.monotonic() - start)
        write(name, rows, args, family, began)


if __name__ == "__main__":
    main()
