"""The reverse walk against ordinary autograd through the whole model in one graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib.blockwise.activation_store import ActivationStore
from calib.blockwise.backward import backward
from calib.blockwise.model import BlockwiseModel
from calib.blockwise.walk import RowBatch
from calib.data.corpus import Corpus
from calib.data.teacher_cache import TeacherCache
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.losses.top_k import top_k
from calib.model.weights import Weights
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from compressor.quantization.learn_transforms import LearnedModel, initial_transforms
from compressor.quantization.objective import CalibrationData, Objective, calibration_gradients
from tests import tiny
from tests.architectures import ARCHITECTURES

Exact = Callable[[], None]
HOW = Objective(steps=1, batch=5, loss="tail", cross_entropy=0.3, seed=0)


class Case:
    """A learned model away from its start, on padded rows, with the answers of the float model."""

    block: int | None = None  # width of the residual rotation's blocks

    def __init__(self, model_type: str, folder: Path, dtype: torch.dtype, block: int | None = None) -> None:
        self.block = block
        model = tiny.model_of(tiny.config_of(model_type), dtype=dtype)
        self.stream = BlockwiseModel(
            model.config, Weights(tiny.save(model, folder / "model")), torch.device("cpu"), dtype
        )
        ids = torch.randint(tiny.VOCAB, (5, 11), generator=torch.Generator().manual_seed(1))
        mask = torch.arange(11) < torch.tensor([11, 4, 11, 7, 2])[:, None]
        self.rows = Corpus(ids, mask, "random", None)
        self.folder = folder
        self.teacher = TeacherCache(Journal(folder))
        for row in range(5):
            self.teacher.write(row, top_k(model(ids[row : row + 1]).logits[0], 9))

    def learned(self, budget: int = 10**9) -> LearnedModel:
        start = initial_transforms(
            self.stream, "hadamard", Scheme.parse("w3a16kv4"), online=True, seed=0, rotation_block=self.block
        )
        model = LearnedModel(self.stream, start, Scheme(Grid(3)), budget)
        torch.manual_seed(7)
        with torch.no_grad():
            for p in self.free(model):
                p += 0.1 * torch.randn_like(p)
            for r in model.rotations:
                r.retract()
        return model

    def free(self, model: LearnedModel) -> list[Tensor]:
        return [*(r.tangent for r in model.rotations), *(s for block in model.blocks for s in block.scales)]

    def streamed(self, *, budget: int, at_once: int, chunk: int | None) -> tuple[float, list[Tensor]]:
        model, options = self.learned(budget), replace(HOW, at_once=at_once, chunk=chunk)
        context = RunContext(Journal(self.folder), budget)
        gradients = calibration_gradients(model.function(), CalibrationData(self.rows, self.teacher), options, context)
        model.begin(0)
        loss = gradients(list(range(5)))
        return loss, [_gradient(p) for p in self.free(model)]

    def in_one_graph(self) -> tuple[float, list[Tensor]]:
        """Every block held, run once, and nothing recomputed: what anybody would write first."""
        from calib.losses.divergences import cross_entropy
        from calib.losses.top_k import KL_TOP

        model = self.learned()
        model.begin(0)
        function = model.function()
        batch = self.stream.batch(self.rows.ids)
        hidden = function.embed(batch)
        for i in range(self.stream.layers):
            hidden = model.run(i, model.prepare(i, self.stream.read_block(i)), hidden, batch)
        total = torch.zeros((), dtype=hidden.dtype)
        for row in range(5):
            logits, mask, ids = function.logits(hidden[row]), self.rows.mask[row], self.rows.ids[row]
            total = total + KL_TOP["tail"](self.teacher.read(row), logits)[mask].mean() / 5
            total = total + 0.3 * cross_entropy(ids[1:], logits[:-1])[mask[1:]].mean() / 5
        total.backward()
        model.end()
        return float(total.detach()), [_gradient(p) for p in self.free(model)]


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def close(one: list[Tensor], other: list[Tensor], tolerance: float) -> bool:
    scale = max(float(g.abs().max()) for g in other)
    assert scale > 1e-4, "gradients that vanish prove nothing"
    return all(float((a - b).abs().max()) <= tolerance * scale for a, b in zip(one, other, strict=True))


@pytest.mark.usefixtures("double_kept")
@pytest.mark.parametrize(("model_type", "block"), [("llama", 8), *((name, None) for name in sorted(ARCHITECTURES))])
def test_loss_and_every_gradient_are_those_of_one_graph(model_type: str, block: int | None, tmp_path: Path) -> None:
    case = Case(model_type, tmp_path, torch.float64, block)
    loss, gradients = case.in_one_graph()
    for budget, at_once, chunk in ((10**9, 1000, None), (0, 22, 3), (10**9, 1, 1)):
        streamed_loss, streamed = case.streamed(budget=budget, at_once=at_once, chunk=chunk)
        assert streamed_loss == pytest.approx(loss, rel=1e-10)
        assert close(streamed, gradients, 1e-10)


@pytest.mark.usefixtures("double_kept")
def test_disk_and_chunks_change_nothing_at_all(tmp_path: Path) -> None:
    """Spilling to disk gives the same bits; recomputed blocks repeat their forward pass."""
    case = Case("llama", tmp_path, torch.float64)
    one, other = (case.streamed(budget=budget, at_once=22, chunk=3) for budget in (10**9, 0))
    assert one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_recomputing_a_block_repeats_its_forward_pass(tmp_path: Path) -> None:
    """What a block makes of its inputs on the way back is, bit for bit, what it made of them on the way forward."""
    case = Case("gemma3_text", tmp_path, torch.float32)
    model = case.learned()
    model.begin(0)
    seen: dict[int, list[Tensor]] = {}
    walk = model.walk

    def run(i: int, params: dict[str, Tensor], hidden: Tensor, batch: RowBatch) -> Tensor:
        result = walk.run(i, params, hidden, batch)
        seen.setdefault(i, []).append(result.detach().clone())
        return result

    inputs = ActivationStore((2 * 5, 11, 24), torch.float32, 0, tmp_path)
    batches = case.stream.batches(case.rows.ids, at_once=1000)
    first = model.function().embed(case.stream.batch(case.rows.ids))
    backward(replace(walk, run=run), first, lambda rows, h: (0.0, torch.ones_like(h)), inputs, batches)
    forward, again = seen[0]
    assert torch.equal(forward, again) and len(seen[1]) == 1


def test_single_precision_on_a_real_model(data: Path, tmp_path: Path) -> None:
    """stories260k in float32: relative error of the whole gradient at most 1e-5."""
    from transformers import AutoConfig

    from compressor.quantization.calibrate import calibration_pass
    from compressor.quantization.quantized_model import Splits

    stream = BlockwiseModel(
        AutoConfig.from_pretrained(data / "stories260k"), Weights(data / "stories260k"), torch.device("cpu")
    )
    case = Case.__new__(Case)
    ids = torch.randint(3, 500, (5, 64), generator=torch.Generator().manual_seed(1))
    case.stream, case.folder, case.teacher = stream, tmp_path, TeacherCache(Journal(tmp_path))
    case.rows = Corpus(ids, torch.ones_like(ids, dtype=torch.bool), "random", None)
    calibration_pass(stream, Splits(case.rows, case.rows[:1]), 64, RunContext(Journal(tmp_path), 10**9))
    loss, gradients = case.in_one_graph()
    for budget, chunk in ((10**9, None), (0, 17)):
        streamed_loss, streamed = case.streamed(budget=budget, at_once=128, chunk=chunk)
        assert streamed_loss == pytest.approx(loss, rel=1e-5)
        one, other = (torch.cat([g.flatten() for g in some]) for some in (streamed, gradients))
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("budget", [0, 10**9])
def test_a_block_is_let_go_of_before_the_next_is_read(budget: int, tmp_path: Path) -> None:
    """Whatever is kept of a block, be it by a loop or by a graph, is kept of its weights too."""
    case = Case("llama", tmp_path, torch.float64)
    model = case.learned(budget)
    alive: list[weakref.ref[Tensor]] = []

    def reading(order: Iterable[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for i in order:
            assert not [weight for weight in alive if weight() is not None]
            yield i, watched(case.stream.read_block(i))

    def watched(params: dict[str, Tensor]) -> dict[str, Tensor]:
        alive[:] = [weakref.ref(p) for p in params.values()]
        return params

    walk = replace(model.walk, reading=reading)
    function, data = replace(model.function(), blocks=walk), CalibrationData(case.rows, case.teacher)
    gradients = calibration_gradients(function, data, HOW, RunContext(Journal(tmp_path), budget))
    model.begin(0)
    gradients(list(range(5)))
    assert alive
