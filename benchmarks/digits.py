"""Small images, an MLP: how far 100 unlearned models are from 100 that never saw the forget set.

    python -m benchmarks.digits [--data digits] [--sets cluster random10 random100] [--sets mislabelled]
    python -m benchmarks.digits --data mnist --mnist DIR --sets cluster mislabelled --related 400 --halves 200

P95 (mean) of KLoM, binned and Gaussian, on the forget set, on what is retained and on validation images; cost in
percent of a retrain (rows that pass in training), datamodels not counted, and seconds for all models of a side.
"cluster" is the 50 neighbours of one class that lie farthest from the rest of it, "mislabelled" 50 with a wrong label.
Hyper-parameters have the least mean on forget plus P95 on retain against other oracles than those that score.
Datamodels: ridge regression on random halves (as it is, times their share, with a fitted scale), nearness among
deletions of related rows (and of those alone that hold at most half of the forget set), gradients of each model, TRAK
of five. Scales are fitted to 20 other deletions of related rows.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from functools import partial as with_
from itertools import product
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import record
from calib import BadInput, Diverged
from calib.model.per_example_gradients import linear_layers, projections
from unlearn.audit.klom import FEWEST, klom_summaries
from unlearn.datamodels.datamodel import GaussianProcessConfig, bends, gp_weights, regress, shares, spread
from unlearn.datamodels.estimators import Scale, scale_of
from unlearn.datamodels.influence import Attribution, Seen, second_moment
from unlearn.datamodels.trak import output_of, trak_scores
from unlearn.methods.baselines import BaselineConfig, forget
from unlearn.methods.gradient import GRADIENT_LOSSES
from unlearn.methods.matching import MatchingConfig, match
from unlearn.methods.preference import PREFERENCE_LOSSES
from unlearn.model.ensemble import Ensemble, initial_ensemble, of_module, partial, related, subsets, train_ensemble
from unlearn.model.examples import Examples, plain_examples
from unlearn.model.margins import margins
from unlearn.model.model import TrainableModel
from unlearn.model.training_recipe import Training
from unlearn.options.methods import MICRO_BATCH_TOKENS

CHECKPOINTS = 5
BASELINES = ("ascent", "retain", "difference", "scrub", "npo", "npo-js", "simnpo")
Shift = Callable[[Tensor], Tensor]  # rows that go, bool (n,) -> change of all outputs (points, C)


@dataclass(frozen=True)
class Size:
    """Of a benchmark: models a side, models trained without related rows, on random halves, and without rows that
    scales of predictions are fitted to; `group` models are trained together, at once where they are `stacked`, and
    `at_once` rows pass through them."""

    models: int = 100
    related: int = 3000
    halves: int = 1000
    options: Training = field(default_factory=lambda: Training(epochs=20, batch=64, lr=0.1))
    width: tuple[int, ...] = (64, 64, 64, 10)
    net: Callable[[], nn.Module] | None = None  # default: a perceptron of `width`
    held_out: int = 20
    group: int = 100
    stacked: bool = True
    at_once: int = MICRO_BATCH_TOKENS
    device: str = "cpu"

    def make(self) -> nn.Module:
        if self.net is not None:
            return self.net().eval()
        layers: list[nn.Module] = []
        for a, b in zip(self.width, self.width[1:], strict=False):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


class Family:
    """Images, models trained on all of them, and on parts."""

    def __init__(self, points: Examples, trained: int, size: Size) -> None:
        """points: training rows, then validation rows."""
        self.points, self.trained, self.size = points, trained, size
        self.rows, self.placed = points[:trained], points.to(torch.device(size.device))
        full = torch.ones(size.models, trained, dtype=torch.bool)
        self.originals = self.of(full, range(size.models))
        self.before = self.logits_of(self.originals)
        self.nats = torch.stack([cross_entropy(z[:trained], self.rows.labels, reduction="none") for z in self.before])
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self.targeted = list[list[int]]()  # forget sets that models may be trained without parts of

    def of(self, masks: Tensor, seeds: Sequence[int]) -> Ensemble:
        size, parts = self.size, []
        for i in range(0, len(masks), size.group):
            some = list(seeds[i : i + size.group])
            drawn = initial_ensemble(size.make, some)
            params = {name: p.to(size.device) for name, p in drawn.params.items()}
            drawn = replace(drawn, params=params, stacked=size.stacked, at_once=size.at_once)
            rows = self.placed[: self.trained]
            parts.append(train_ensemble(drawn, rows, masks[i : i + size.group], some, size.options))
        whole = parts[0]
        for part in parts[1:]:
            whole = whole | part
        return whole

    def logits_of(self, models: Ensemble) -> Tensor:
        """Logits of all models at all points, (M, points, C)."""
        group = self.size.group
        return torch.cat([models[i : i + group].logits(self.placed).cpu() for i in range(0, len(models), group)])

    def seeds(self, count: int) -> list[int]:
        return [k % self.size.models for k in range(count)]

    def changes(self, name: str, forget: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Deletions (D, n), and what they changed of the outputs of models of the same seed (D, points, C); "partial"
        ones are of a forget set."""
        key = name if forget is None else f"{name} {forget.tolist()}"
        if key not in self._kept:
            flat, mean = self.rows.inputs[""].flatten(1), self.nats.mean(0)
            masks = {
                "related": lambda: related(flat, self.rows.labels, mean, self.size.related, 7),
                "held out": lambda: related(flat, self.rows.labels, mean, self.size.held_out, 8, each=1),
                "halves": lambda: subsets(self.size.halves, self.trained, 0.5, 7),
                "partial": lambda: partial(flat, forget, self.trained, self.size.related // 4, 7),  # type: ignore[arg-type]
            }[name]()
            seeds = self.seeds(len(masks))
            parts = [self.logits_of(self.of(masks[i : i + 100], seeds[i : i + 100])) for i in range(0, len(masks), 100)]
            self._kept[key] = (~masks, torch.cat(parts) - self.before[seeds])
        return self._kept[key]


@dataclass(frozen=True)
class Problem:
    """A forget set in a family."""

    family: Family
    forgotten: Tensor

    @property
    def deleted(self) -> Tensor:
        deleted = torch.zeros(self.family.trained, dtype=torch.bool)
        deleted[self.forgotten] = True
        return deleted

    @property
    def retained(self) -> Tensor:
        return (~self.deleted).nonzero().flatten()

    def oracles(self, first_seed: int, count: int = 0) -> Tensor:
        count = count or self.family.size.models
        masks = (~self.deleted).expand(count, -1)
        return self.family.logits_of(self.family.of(masks, range(first_seed, first_seed + count)))

    @property
    def binned(self) -> bool:
        """Whether there are enough models a side for bins; else KLoM is the Gaussian one."""
        return self.family.size.models >= FEWEST

    def scores(self, said: Tensor, oracles: Tensor) -> dict[str, Any]:
        y = self.family.points.labels
        validation = torch.arange(self.family.trained, len(y))
        groups = {"forget": self.forgotten, "retain": self.retained, "validation": validation}
        return dict(klom_summaries(margins(said, y), margins(oracles, y), groups, binned=self.binned))


def digits() -> tuple[Tensor, Tensor, int]:
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[shuffled].float() / 16, y[shuffled].clone(), 1400


def mnist(folder: Path) -> tuple[Tensor, Tensor, int]:
    """The 10,000 test images: 4,000 to train on, 1,000 to validate."""
    raw = {
        name: gzip.decompress((folder / f"t10k-{name}-ubyte.gz").read_bytes())
        for name in ("images-idx3", "labels-idx1")
    }
    x = torch.frombuffer(bytearray(raw["images-idx3"][16:]), dtype=torch.uint8).view(-1, 784).float() / 255
    y = torch.frombuffer(bytearray(raw["labels-idx1"][8:]), dtype=torch.uint8).long()
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:5000]
    return x[some], y[some], 4000


def chosen(kind: str, x: Tensor, y: Tensor, trained: int) -> tuple[Tensor, Tensor]:
    """Rows to forget, and the labels."""
    g, y = torch.Generator().manual_seed(1), y.clone()
    if kind.startswith("random"):
        return torch.randperm(trained, generator=g)[: int(kind.removeprefix("random"))], y
    if kind == "mislabelled":
        deleted = torch.randperm(trained, generator=g)[:50]
        y[deleted] = (y[deleted] + torch.randint(1, 10, (50,), generator=g)) % 10
        return deleted, y
    farthest, deleted = -1.0, y[:0]
    for digit in range(10):
        rows = (y[:trained] == digit).nonzero().flatten()
        apart = torch.cdist(x[rows], x[rows])
        for near in apart.argsort(-1)[:, :50]:
            others = torch.ones(len(rows), dtype=torch.bool)
            others[near] = False
            distance = float(apart[near][:, others].amin(1).mean())
            if distance > farthest:
                farthest, deleted = distance, rows[near]
    return deleted, y


# Estimators: each a function of which rows go.


def by_nearness(family: Family, most: float = 1.0) -> Shift:
    """`most`: deletions that hold more than this share of what is asked for are left out."""

    def shift(deleted: Tensor) -> Tensor:
        seen, changes = family.changes("related")
        forget = deleted.nonzero().flatten()
        some = shares(seen, forget) <= most
        seen, changes = seen[some], changes[some]
        if forget.tolist() in family.targeted and not bends(seen, forget, GaussianProcessConfig()):
            more, theirs = family.changes("partial", forget)
            seen, changes = torch.cat([seen, more]), torch.cat([changes, theirs])
        weights, _ = gp_weights(seen, forget, GaussianProcessConfig())
        return torch.tensordot(weights.float(), changes, 1)

    return shift


def by_halves(family: Family, times: float) -> Shift:
    model = regress(*family.changes("halves"), penalty=1e-2)
    return lambda deleted: times * model.change(deleted).float()


def by_gradients(family: Family, which: int) -> Shift:
    """Of one of the original models."""
    seen, attribution = attributed(family, which)
    return lambda deleted: seen.along(attribution.direction(deleted), family.placed).cpu()


@cache
def attributed(family: Family, which: int) -> tuple[Seen, Attribution]:
    """Gradients of one of the original models at all training rows, and their curvature."""
    module, params = family.size.make(), {n: p[which] for n, p in family.originals.params.items()}
    module.to(family.size.device).load_state_dict(params)
    linears, forward = linear_layers(module), of_module(module)
    projected = projections(linears, 16, 0, torch.device(family.size.device))
    seen = Seen(forward, params, linears, projected, forward, family.size.at_once)
    rows, own, moments = family.placed[: family.trained], list[Tensor](), list[Tensor]()
    for i, some in enumerate(seen.chunks(rows)):
        found, drawn = seen.gradients(rows[some], which + 1000 * i)
        own.append(found)
        more = second_moment(drawn, seen.blocks)
        moments = [a + b for a, b in zip(moments, more, strict=True)] if moments else more
    return seen, Attribution.of(torch.cat(own), moments, 0.1)


def by_trak(family: Family) -> Shift:
    """Of the mean of some of the original models."""
    logging.disable(logging.INFO)
    total = torch.zeros(family.trained, len(family.points), family.before.shape[-1])
    for k in range(CHECKPOINTS):
        module, params = family.size.make(), {n: p[k] for n, p in family.originals.params.items()}
        module.load_state_dict(params)
        trainable = TrainableModel(
            "tensors", Path(), module, of_module(module), params, lambda seed: {}, lambda into, p: None
        )
        for c in range(total.shape[-1]):
            total[..., c] += (
                trak_scores(trainable, family.rows, family.points, output_of(c, trainable), 512, k) / CHECKPOINTS
            )
    return lambda deleted: -torch.tensordot(deleted.float(), total, 1)


def scaled(family: Family, shift: Shift) -> tuple[Scale, dict[str, Any]]:
    """The scale of predictions on held-out deletions of related rows, of margins, and how good they were there."""
    deleted, changes = family.changes("held out")
    said, y = family.before[family.seeds(len(deleted))], family.points.labels
    true = margins(said + changes, y) - margins(said, y)
    predicted = torch.stack([margins(z + shift(g), y) - margins(z, y) for z, g in zip(said, deleted, strict=True)])
    own = torch.zeros_like(true, dtype=torch.bool)
    own[:, : family.trained] = deleted
    scale = scale_of(predicted, true, own)
    found = scale.asdict()
    raw = {f"{k}, raw": v for k, v in found["raw"].items()}
    fitted = {f"{k}, scaled": v for k, v in found["held_out"].items() if k != "slope"}
    return scale, raw | fitted | {"scale, own": scale.own, "scale, others": scale.others}


class Bench:
    """Rows of a table, as they are measured: against oracles that score, beside others, and by settings that are
    chosen against a third ensemble, or against those others where no seed of a third is given."""

    def __init__(self, kind: str, problem: Problem, seeds: Sequence[int] = (1000, 2000, 3000)) -> None:
        self.kind, self.p, self.rows = kind, problem, list[dict[str, Any]]()
        made = [problem.oracles(seed) for seed in seeds]
        self.scoring, self.other, self.tuning = made[0], made[1], made[-1]

    @cached_property
    def mean(self) -> Tensor:
        """Answers of oracles, averaged over three times as many as there are models a side."""
        more = self.p.oracles(4000, 2 * self.p.family.size.models)
        return torch.cat([self.tuning, more]).mean(0)

    def add(self, name: str, answers: Tensor, cost: float | None = None, note: str = "") -> None:
        row: dict[str, Any] = {"set": self.kind, "row": name}
        found = self.p.scores(answers, self.scoring)
        row |= {g: f"{d.p95:.2f} ({d.mean:.2f})" for g, d in found.items()}
        if self.p.binned:
            row |= {f"{g}, Gaussian": f"{d.gaussian_p95:.2f} ({d.gaussian_mean:.2f})" for g, d in found.items()}
        row |= {
            "attack": f"{found['forget'].attack or 0:.2f}",
            "cost": "" if cost is None else f"{cost:.0f}%",
            "with": note,
        }
        self.rows.append(row)
        print(row, flush=True)

    def tuned(self, name: str, grid: Sequence[Any], run: Callable[[Any], Ensemble]) -> None:
        best: tuple[float, Any, Tensor, float] | None = None
        for options in grid:
            began = time.monotonic()
            try:
                answers = self.p.family.logits_of(run(options))
                found = self.p.scores(answers, self.tuning)
            except (Diverged, BadInput):  # no number in the descent, or in what came of it
                continue
            score = found["forget"].mean + found["retain"].p95  # the former's P95 cannot tell bad from worse
            if best is None or score < best[0]:
                best = (score, options, answers, time.monotonic() - began)
        assert best is not None, name
        _, options, answers, seconds = best
        forget, size = len(self.p.forgotten), self.p.family.size
        passed = options.epochs * forget * (getattr(options, "forget_multiplier", 1) + options.retain_multiplier)
        note = f"{options.epochs} epochs of {options.batch}, rate {options.lr:g}, "
        note += f"{options.retain_multiplier:.3g} retained for each, {seconds:.0f} s"
        self.add(name, answers, 100 * passed / size.options.epochs / self.p.family.trained, note)

    def most_retained(self, epochs: int, forget_multiplier: int) -> float:
        """Retained rows for each forgotten one in an epoch, of a run at a fifth of a retrain."""
        family, forget = self.p.family, len(self.p.forgotten)
        return max(0.5, 0.2 * family.size.options.epochs * family.trained / epochs / forget - forget_multiplier)

    def matched(self, name: str, targets: Tensor, grid: Sequence[MatchingConfig] = ()) -> None:
        """At a fifth of a retrain, at most, by settings of `grid` or of this function."""
        p, family, most = self.p, self.p.family, self.most_retained(10, 2)
        grid = grid or [
            MatchingConfig(epochs=10, batch=8, lr=lr, forget_multiplier=2, retain_multiplier=min(most, kept))
            for lr, kept in ((1e-2, most), (1e-2, most / 2), (5e-3, most))
        ]
        placed = targets.to(family.size.device)
        run = with_(match, family.originals, family.placed, placed, p.forgotten, p.retained)
        self.tuned(name, grid, run)


def rows_of(kind: str, p: Problem, estimators: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything that is measured on one forget set."""
    bench, family, f = Bench(kind, p), p.family, p.forgotten
    family.targeted.append(sorted(f.tolist()))
    before = family.before
    bench.add("do nothing", before)
    bench.add("oracles against oracles", bench.other)
    shift = bench.mean - before.mean(0)
    bench.add("perfect shift, direct", before + shift)
    wide = before.clone()
    wide[:, f] = before.mean(0)[f] + (before - before.mean(0))[:, f] * (bench.other.std(0) / before.std(0))[f]
    bench.add("perfect shift and spread on the forget set, direct", wide + shift)
    bench.matched("perfect shift, matched", before + shift)
    bench.matched("oracle matching, mean", bench.tuning.mean(0).expand_as(before))
    bench.matched("oracle matching, one each", bench.tuning)
    for name, (made, scale) in estimators.items():
        if name == "gradients":  # of each model its own
            change = torch.stack([by_gradients(family, k)(p.deleted) for k in range(family.size.models)])
        else:
            change = made(p.deleted)
        if scale is not None:
            times = torch.full((len(family.points), 1), scale.others)
            times[: family.trained][p.deleted] = scale.own
            change = times * change
        bench.add(f"DM-Direct, {name}", before + change)
        bench.matched(f"DMM, {name}", before + change)
        if name in ("random halves times share", "nearness, at most half"):
            continue
        only = before.clone()
        only[:, f] = (before + change)[:, f]
        bench.matched(f"DMM, {name}, forget points shifted only", only)
        if name == "nearness":
            deleted, changes = family.changes("related")
            said = changes[:, f] + before[family.seeds(len(deleted))][:, f]
            apart = before - before.mean(0)
            apart[:, f] *= spread(deleted, said, before[:, f], f)
            held = shares(deleted, f)
            most, all_but = (int((held >= share).sum()) for share in (0.9, 0.95))
            note = f"of {len(deleted)} deletions {most} hold 90% of the set, {all_but} 95%"
            bench.add("DM-Direct, nearness, with spread", before.mean(0) + change + apart, None, note)
            bench.matched("DMM, nearness, with spread", before.mean(0) + change + apart)
    grid = [
        BaselineConfig(epochs=epochs, batch=8, lr=lr, retain_multiplier=5.0, weight=weight)
        for epochs, lr, weight in product((5, 10), (3e-4, 1e-3, 3e-3, 1e-2), (0.2, 1.0))
    ]
    for name in BASELINES:
        losses = GRADIENT_LOSSES.get(name) or PREFERENCE_LOSSES[name]
        run = with_(forget, losses, family.originals, family.placed, p.forgotten, p.retained)
        bench.tuned(name, grid, run)
    return bench.rows


def estimators_of(family: Family) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Each with its scale, where one is fitted; and how good they are."""
    made: dict[str, tuple[Shift, bool]] = {
        "random halves": (by_halves(family, 1.0), False),
        "random halves times share": (by_halves(family, 0.5), False),
        "random halves, scaled": (by_halves(family, 0.5), True),
        "nearness": (by_nearness(family), False),
        "nearness, at most half": (by_nearness(family, 0.5), False),
        "gradients": (by_gradients(family, 0), True),
        "TRAK": (by_trak(family), True),
    }
    found, table = {}, []
    for name, (shift, fitted) in made.items():
        scale, quality = scaled(family, shift)
        found[name] = (shift, scale if fitted else None)
        table.append({"estimator": name} | quality)
        print(table[-1], flush=True)
    return found, table


def family_of(data: tuple[Tensor, Tensor, int], kind: str, size: Size) -> tuple[Family, Tensor]:
    x, y, trained = data
    deleted, labels = chosen(kind, x, y, trained)
    return Family(plain_examples(x, labels), trained, size), deleted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--sets", nargs="+", default=["cluster", "random10", "random100"])
    parser.add_argument("--related", type=int, default=3000)
    parser.add_argument("--halves", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    size = Size(related=args.related, halves=args.halves)
    data = digits() if args.data == "digits" else mnist(args.mnist)
    if args.data == "mnist":
        size = replace(size, options=Training(epochs=10, batch=64, lr=0.1), width=(784, 32, 10))
    rows, quality = list[dict[str, Any]](), list[dict[str, Any]]()
    name = f"digits-{'' if args.data == 'digits' else 'mnist-'}{'-'.join(args.sets)}"
    for mislabelled in (False, True):
        sets = [kind for kind in args.sets if (kind == "mislabelled") == mislabelled]
        if not sets:
            continue
        family, deleted = family_of(data, sets[0], size)
        estimators, table = estimators_of(family)
        quality += [{"labels": "50 wrong" if mislabelled else "as they are"} | row for row in table]
        record.write(f"{name}-estimators", quality, "Predicted changes of margins against true ones, 20 deletions")
        for kind in sets:
            forgotten = deleted if kind == sets[0] else chosen(kind, *data)[0]
            rows += rows_of(kind, Problem(family, forgotten), estimators)
            record.write(name, rows, f"{str(__doc__).split(chr(10))[0]} {(time.monotonic() - began) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
