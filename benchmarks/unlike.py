"""Students of another architecture than their teacher: CNN to ViT, ViT to CNN, CNN to MLP-mixer, by nine objectives.

    PAREWELL_DATA=... python -m benchmarks.unlike
    python -m benchmarks.unlike --images DIR

The data are MNIST's 10,000 test images, or a directory of ten classes of images (read in color, 32 x 32), in an order
that seed 0 gives: the teacher learns from the first 60%, students from the first 10% of all, which the teacher has seen
too; the next 10% choose learning rates and the last 20% are what is reported. Nets have 13,000 to 28,000 parameters and
three stages, which are the exits, and the states that `hidden` and `cka` compare. Constants of objectives are fixed
beforehand; the learning rate, of two, is the one with the better accuracy on the validation rows at seed 0, and is then
used with three seeds, of the student's weights and of the order of rows. There is one teacher of each kind. The claim
under test: OFA with exits beats KD and CKA between unlike architectures (OFA-KD, arXiv:2310.19444, by smaller
branches).
"""

from __future__ import annotations

import argparse
import gzip
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import record
from calib.data.labeled_images import read_image_folder
from calib.model.factory import drawn_module, fill_module, weights_file
from calib.stats.classification import calibration_error
from compressor import Distill, distill

CLASSES, WIDTH, TOKENS, BATCH = 10, 32, 16, 32


class Net(nn.Module):
    """A stem, three stages, and a linear map to the classes from the mean over places or tokens."""

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], width: int, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.stages, self.head, self.dims = stem, nn.ModuleList(stages), nn.Linear(width, CLASSES), dims

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(x.mean(self.dims))
        return logits


class Patches(nn.Module):
    """Sixteen patches, with a place each.  (n, C, H, W) -> (n, 16, WIDTH)."""

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, WIDTH, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.project(x).flatten(2).mT
        return tokens + self.places


class Mixer(nn.Module):
    """A block of an MLP-mixer (arXiv:2105.01601): across tokens, then across channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.tokens = nn.Sequential(nn.Linear(TOKENS, 2 * TOKENS), nn.GELU(), nn.Linear(2 * TOKENS, TOKENS))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norms[0](x).mT).mT
        mixed: Tensor = x + self.channels(self.norms[1](x))
        return mixed


def _convolution(given: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(given, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def _cnn(channels: int) -> nn.Module:
    stages = [_convolution(12, 16, 2), _convolution(16, 24, 2), _convolution(24, 32, 1)]
    return Net(_convolution(channels, 12, 2), stages, 32, (2, 3))


def _vit(channels: int, patch: int) -> nn.Module:
    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)

    return Net(Patches(channels, patch), [block() for _ in range(3)], WIDTH, (1,))


def _mixer(channels: int, patch: int) -> nn.Module:
    return Net(Patches(channels, patch), [Mixer() for _ in range(3)], WIDTH, (1,))


def gray_cnn() -> nn.Module:
    return _cnn(1)


def gray_vit() -> nn.Module:
    return _vit(1, 7)


def gray_mixer() -> nn.Module:
    return _mixer(1, 7)


def color_cnn() -> nn.Module:
    return _cnn(3)


def color_vit() -> nn.Module:
    return _vit(3, 8)


def color_mixer() -> nn.Module:
    return _mixer(3, 8)


PAIRS = (("cnn", "vit"), ("vit", "cnn"), ("cnn", "mixer"))
EXITS: dict[str, Any] = {"exits": "stages.*"}
STATES = EXITS | {"teacher_exits": "stages.*"}


OBJECTIVES: dict[str, dict[str, Any]] = {
    "CE alone": {"loss": "ce"},
    "KD": {"loss": "0.5*ce+0.5*forward-kl", "temperature": 4.0},
    "CKA": {"loss": "ce+cka"} | STATES,
    "hidden": {"loss": "ce+hidden", "project": True} | STATES,
    "OFA with exits": {"loss": "ce+ofa(1.5)+ofa-exits(1.5)"} | EXITS,
    "NKD": {"loss": "ce+nkd(1.5,1)"},
    "USKD, weak head": {"loss": "ce+uskd", "exits": "stages.1"},
    "BD-KD": {"loss": "ce+bd-kd(2)"},
    "BD-KD together": {"loss": "ce+bd-kd(2)", "teacher": "together", "teacher_lr": 3e-4},
}
RATES = (2e-3, 6e-3)


def mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """10,000 images (n, 1, 28, 28) in [-1, 1] and their digits."""
    raw = [
        gzip.decompress((folder / f"t10k-{name}.gz").read_bytes())
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    images = torch.frombuffer(bytearray(raw[0][16:]), dtype=torch.uint8).view(-1, 1, 28, 28)
    return images / 127.5 - 1, torch.frombuffer(bytearray(raw[1][8:]), dtype=torch.uint8).long()


def pictures(folder: Path) -> tuple[Tensor, Tensor]:
    """A directory of ten classes as (n, 3, 32, 32) in [-1, 1] and class numbers."""
    from PIL import Image

    names = sorted(place.name for place in folder.iterdir() if place.is_dir())
    if len(names) != CLASSES:
        raise SystemExit(f"{folder}: has {len(names)} classes; give ten, such as CIFAR-10's")
    rows = read_image_folder(folder, {name: i for i, name in enumerate(names)})
    flat = [bytearray(Image.open(file).convert("RGB").resize((32, 32)).tobytes()) for file in rows.inputs]
    whole = torch.stack([torch.frombuffer(one, dtype=torch.uint8) for one in flat])
    return whole.view(-1, 32, 32, 3).permute(0, 3, 1, 2) / 127.5 - 1, rows.labels


class Run:
    """The data, the teachers, and how one job is done."""

    def __init__(self, images: Tensor, labels: Tensor, folder: Path, steps: int) -> None:
        self.folder, self.kind, self.steps = folder, "gray" if images.shape[1] == 1 else "color", steps
        order, n = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)), len(labels)
        parts = {"teach": (0, 0.6), "learn": (0, 0.1), "choose": (0.6, 0.7), "report": (0.8, 1)}
        self.rows = {name: order[int(a * n) : int(b * n)] for name, (a, b) in parts.items()}
        self.images, self.labels = images, labels
        for name, rows in self.rows.items():
            save_file({"inputs": images[rows].contiguous(), "labels": labels[rows]}, folder / f"{name}.safetensors")

    def factory(self, net: str) -> str:
        return f"benchmarks.unlike:{self.kind}_{net}"

    def teacher(self, net: str) -> Path:
        """Train a teacher from scratch; a net of its kind stands where its own teacher would."""
        save_file(drawn_module(self.factory(net), 0).state_dict(), self.folder / f"{net}.safetensors")
        options = Distill(
            factory=self.factory(net), student_factory=self.factory(net), data=self.folder / "teach.safetensors",
            held_out_data=self.folder / "choose.safetensors", loss="ce", lr=3e-3, steps=4 * self.steps, batch=BATCH,
            warmup=20, precision="float32", device="cpu",
        )  # fmt: skip
        distill(self.folder / f"{net}.safetensors", self.folder / f"teacher-{net}", options, allow_damage=True)
        return self.folder / f"teacher-{net}"

    def student(self, pair: tuple[str, str], seed: int, options: dict[str, Any]) -> tuple[dict[str, Any], Path]:
        """Train a student.  -> the report, and where it is."""
        job = Distill(
            factory=self.factory(pair[0]), student_factory=self.factory(pair[1]),
            data=self.folder / "learn.safetensors", held_out_data=self.folder / "choose.safetensors", seed=seed,
            steps=self.steps, batch=BATCH, warmup=20, precision="float32", device="cpu", **options,
        )  # fmt: skip
        out = self.folder / "student"
        report = distill(self.folder / f"teacher-{pair[0]}", out, job, resume=False, allow_damage=True)
        return report, out

    @torch.no_grad()
    def scored(self, net: str, place: Path) -> tuple[float, float]:
        """Accuracy and calibration error (15 bins) on the rows that are reported."""
        module = drawn_module(self.factory(net), 0)
        fill_module(module, weights_file(place))
        rows = self.rows["report"]
        logits = torch.cat([module(self.images[some]) for some in rows.split(500)])
        right = (logits.argmax(-1) == self.labels[rows]).double().mean()
        return float(right), calibration_error(logits.softmax(-1), self.labels[rows])


def compared(run: Run, pair: tuple[str, str], name: str, seeds: int) -> dict[str, Any]:
    """Choose an objective's learning rate on the validation rows, and score it on the others by every seed."""
    best: tuple[float, dict[str, Any]] = (-1.0, {})
    first: list[tuple[float, ...]] = []
    for rate in RATES:
        options = OBJECTIVES[name] | {"lr": rate}
        report, out = run.student(pair, 0, options)
        if report["quality"]["accuracy"] > best[0]:
            best, first = (report["quality"]["accuracy"], options), [_figures(run, pair, out)]
    found = first + [_figures(run, pair, run.student(pair, seed, best[1])[1]) for seed in range(1, seeds)]
    own = best[1]
    row: dict[str, Any] = {
        "pair": " -> ".join(pair), "objective": name, "loss": own["loss"], "temperature": own.get("temperature", 1.0),
        "lr": own["lr"], "accuracy": _spread([of[0] for of in found]), "ECE": _spread([of[1] for of in found]),
        "of seeds": ", ".join(f"{of[0]:.4f}" for of in found),
    }  # fmt: skip
    if "teacher" in own:
        row["teacher after"] = f"{_spread([of[2] for of in found])}, ECE {_spread([of[3] for of in found])}"
    print(row, flush=True)
    return row


def _figures(run: Run, pair: tuple[str, str], out: Path) -> tuple[float, ...]:
    moved = run.scored(pair[0], out / "teacher") if (out / "teacher").is_dir() else ()
    return (*run.scored(pair[1], out), *moved)


def _spread(values: Sequence[float]) -> str:
    error = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """What becomes of the claim, from the accuracies of the same seeds."""
    said = []
    for pair in dict.fromkeys(row["pair"] for row in rows):
        of = {r["objective"]: [float(v) for v in r["of seeds"].split(",")] for r in rows if r["pair"] == pair}
        for other in ("KD", "CKA", "hidden", "CE alone"):
            if "OFA with exits" in of and other in of:
                gaps = [a - b for a, b in zip(of["OFA with exits"], of[other], strict=True)]
                said.append(f"{pair}, OFA with exits less {other}: {_spread(gaps)}")
    return "Differences of accuracy, seed by seed: " + "; ".join(said) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a directory of ten classes of images, instead of MNIST")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--name", default="unlike")
    args = parser.parse_args()
    torch.set_num_threads(1)
    read: Callable[[], tuple[Tensor, Tensor]] = (
        (lambda: pictures(args.images)) if args.images else (lambda: mnist(Path(os.environ["PAREWELL_DATA"]) / "mnist"))
    )
    with tempfile.TemporaryDirectory() as place:
        run, rows = Run(*read(), Path(place), args.steps), list[dict[str, Any]]()
        scores = {net: run.scored(net, run.teacher(net)) for net in ("cnn", "vit")}
        said = ", ".join(f"{net} {accuracy:.4f} (ECE {ece:.4f})" for net, (accuracy, ece) in scores.items())
        for pair in PAIRS:
            rows += [compared(run, pair, name, args.seeds) for name in args.objectives]
            notes = (
                f"Accuracy and calibration error on {len(run.rows['report']):,} rows that chose nothing, mean and "
                f"standard deviation over {args.seeds} seeds; students learn from {len(run.rows['learn']):,} rows in "
                f"{args.steps} steps of {BATCH}. Teachers: {said}. {verdict(rows)}"
            )
            record.write(args.name, rows, notes)


if __name__ == "__main__":
    main()
