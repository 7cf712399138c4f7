"""Learning and tuning, on a tiny model where everything can be checked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus
from calib.data.teacher_cache import TeacherCache
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from cli.main import run_cli
from compressor.quantization.learn_transforms import Transforms, initial_transforms
from compressor.quantization.learn_transforms import learn_transforms as learn_from
from compressor.quantization.objective import CalibrationData, LearningResult, Objective

HOW = Objective(steps=8, batch=3, loss="tail", cross_entropy=0.0, seed=0)


Learn = Callable[..., tuple[Transforms, LearningResult]]


@pytest.fixture
def learn(stream: BlockwiseModel, rows: Corpus, teacher: TeacherCache, tmp_path: Path) -> Learn:
    def run(start: Transforms, grid: Grid, config: Objective, lr_rotation: float = 0.05, lr_scale: float = 0.02) -> Any:
        return learn_from(
            stream, CalibrationData(rows, teacher), start, Scheme(grid), config,
            RunContext(Journal(tmp_path), 10**9), lr_rotation=lr_rotation, lr_scale=lr_scale,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("scheme", ["w3a16-channel", "w4a4kv4-asym"])
@pytest.mark.parametrize("loss", ["tail", "partial", "renormalised"])
def test_learning_lowers_the_loss_and_rotations_come_out_orthogonal(
    stream: BlockwiseModel, learn: Learn, scheme: str, loss: str
) -> None:
    s = Scheme.parse(scheme)
    start = initial_transforms(stream, "hadamard", s, online=True, seed=1)
    options = replace(HOW, steps=40, batch=9, loss=loss, seed=1)
    transforms, matched = learn(start, s.weights, options, 0.02, 0.01)
    assert sum(matched.curve[-4:]) < 0.97 * sum(matched.curve[:4])
    rotations = [transforms.residual, *(r for t in transforms.blocks for r in t.pair_rotations.values())]
    rotations += [o.key_rotation for o in transforms.online if o.key_rotation is not None]
    assert len(rotations) == (5 if s.kv else 3)
    for r in rotations:
        assert r.dtype == torch.float64
        assert torch.allclose(r @ r.mT, torch.eye(r.shape[-1], dtype=torch.float64), atol=1e-12)
    for before, after in zip(start.blocks, transforms.blocks, strict=True):
        for kind in ("norm_scales", "pair_scales", "plane_scales"):
            for name, scale in after.kinds[kind].items():
                assert (scale > 0).all() and not torch.equal(scale, before.kinds[kind][name])
        assert len(after.norm_scales) == 2 == len(after.pair_scales)
        assert all(angle.abs().max() > 0 for angle in after.plane_angles.values()) and after.plane_angles


def test_without_rounding_there_is_nothing_to_learn(stream: BlockwiseModel, learn: Learn) -> None:
    """Transforms leave the function alone: on an all but continuous grid the loss starts at zero and stays there."""
    start = initial_transforms(stream, "womi", Scheme.parse("w8a16-channel"), online=True, seed=0)
    _, matched = learn(start, Grid(20), HOW)
    assert max(matched.curve) < 1e-4


def test_the_same_seed_learns_the_same(stream: BlockwiseModel, learn: Learn) -> None:
    start = initial_transforms(stream, "hadamard", Scheme.parse("w3a16-channel"), online=False, seed=3)
    a, b = (learn(start, Grid(3), HOW)[0].residual for _ in range(2))
    assert a is not None and b is not None and torch.equal(a, b)


@pytest.mark.parametrize("init", ["hadamard", "identity"])
def test_a_block_as_wide_as_the_stream_is_the_whole_rotation(stream: BlockwiseModel, learn: Learn, init: str) -> None:
    scheme, results = Scheme.parse("w3a16-channel"), []
    for width in (None, stream.hidden):
        start = initial_transforms(stream, init, scheme, online=False, seed=3, rotation_block=width)
        results.append(learn(start, scheme.weights, HOW))
    (one, curve), (other, same) = ((transforms.residual, matched.curve) for transforms, matched in results)
    assert one is not None and other is not None and torch.allclose(one, other, atol=1e-3)
    assert not torch.allclose(one, initial_transforms(stream, init, scheme, online=False, seed=3).residual, atol=1e-2)
    assert curve == pytest.approx(same, rel=1e-3)


def test_rotations_learned_in_blocks_turn_nothing_across_them(stream: BlockwiseModel, learn: Learn) -> None:
    scheme, width = Scheme.parse("w3a16-channel"), stream.hidden // 4
    start = initial_transforms(stream, "hadamard", scheme, online=False, seed=3, rotation_block=width)
    residual = learn(start, scheme.weights, replace(HOW, steps=20, batch=9), 0.02)[0].residual
    assert residual is not None and start.residual is not None
    assert torch.allclose(residual @ residual.mT, torch.eye(stream.hidden, dtype=torch.float64), atol=1e-12)
    learned = (start.residual.mT @ residual).unflatten(0, (4, width)).unflatten(-1, (4, width))
    for i in range(4):
        for j in range(4):
            turned = learned[i, :, j] - torch.eye(width, dtype=torch.float64) * (i == j)
            assert turned.abs().max() < 1e-6 if i != j else turned.abs().max() > 1e-2


def test_cross_entropy_is_added_with_its_weight(stream: BlockwiseModel, learn: Learn) -> None:
    start = initial_transforms(stream, "hadamard", Scheme.parse("w3a16-channel"), online=False, seed=0)

    def first(weight: float) -> float:
        options = replace(HOW, steps=1, cross_entropy=weight)
        return learn(start, Grid(3), options, 0.0, 0.0)[1].curve[0]

    assert first(0.5) - first(0.0) == pytest.approx(first(1.0) - first(0.5), rel=1e-3)
    assert first(0.5) > first(0.0)


def test_starts(stream: BlockwiseModel) -> None:
    scheme = Scheme.parse("w4a4kv4-sym")
    for init in ("identity", "hadamard", "womi"):
        t = initial_transforms(stream, init, scheme, online=True, seed=0)
        assert torch.allclose(t.residual @ t.residual.mT, torch.eye(24, dtype=torch.float64), atol=1e-10)
        assert t.online[0].hadamard and t.online[0].key_rotation is not None
    assert torch.equal(
        initial_transforms(stream, "identity", scheme, online=False, seed=0).residual, torch.eye(24).double()
    )
    assert initial_transforms(stream, "hadamard", scheme, online=False, seed=0).online[0].key_rotation is None


def test_a_failed_cholesky_names_the_layer_and_the_damping_to_try(
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Eight tokens cannot span 24 inputs: without damping the Gram matrix is singular."""
    command = [
        "quantize",
        str(tiny_folder),
        str(tmp_path / "out"),
        "--scheme",
        "w4a16-channel",
        "--data",
        str(text_file),
    ]
    options = ["--samples", "1", "--length", "8", "--damping", "0", "--no-learn"]
    monkeypatch.setattr(sys, "argv", ["parewell", *command, *options])
    with pytest.raises(SystemExit) as stop:
        run_cli()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "model.layers.0.self_attn.q_proj" in error and "--damping 0.01" in error
    assert not list(tmp_path.iterdir())
