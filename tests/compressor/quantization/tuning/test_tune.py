"""Tuning after rounding: codes, scales, zero points and gains, on a tiny model where everything can be checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calib.blockwise.linears import Linear
from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus
from calib.data.teacher_cache import TeacherCache
from calib.jobs.context import RunContext
from calib.jobs.journal import CheckpointSlot, Journal
from calib.losses.top_k import KL_TOP
from calib.quant.codebooks import CODEBOOKS
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from compressor.engine.blockwise_runs import run_blocks
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.quantization import objective
from compressor.quantization.calibrate import calibration_pass, quality, quantization_pass, transformed_outer
from compressor.quantization.objective import CalibrationData, LearningResult, Objective
from compressor.quantization.quantized_model import QuantizedModel, Splits
from compressor.quantization.rounding import RoundedBlock, RoundedBlocks, Rounder
from compressor.quantization.tuning.learned_rounding import LearnedRounding
from compressor.quantization.tuning.scale_factors import ScaleFactors
from compressor.quantization.tuning.tune import TunedBlocks, TuningRates, tune
from compressor.storage.quantized_linear import Rounded
from tests import tiny

HOW = Objective(steps=20, batch=9, loss="tail", cross_entropy=0.0, seed=0)
GRIDS = {
    "three bits": Grid(3),
    "groups": Grid(3, group=8),
    "zero points": Grid(3, symmetric=False, group=8),
    "eight bits": Grid(8),
    "a table": Grid(4, group=8, table=CODEBOOKS["nf4"]()),
}


class Job:
    """The tiny model, rounded by a method, with everything that tuning wants."""

    def __init__(
        self, stream: BlockwiseModel, rows: Corpus, journal: Journal, grid: Grid, method: str = "gptq"
    ) -> None:
        self.stream, self.rows, self.journal = stream, rows, journal
        both, context = Splits(rows, rows), RunContext(journal, 10**9)
        _, self.float_final = calibration_pass(stream, both, 16, context)
        plain = [RuntimeTransforms(None, None)] * stream.layers
        self.model = QuantizedModel(stream, Scheme(grid), transformed_outer(stream, None), None, plain)
        self.blocks = RoundedBlocks(journal, Scheme(grid), stream)
        quantization_pass(self.model, both, self.blocks, Rounder(method, 0.01, offsets=True), context)

    def tuned(
        self, rates: TuningRates, config: Objective = HOW, context: RunContext | None = None
    ) -> tuple[TunedBlocks, LearningResult]:
        data = CalibrationData(self.rows, TeacherCache(self.journal))
        return tune(self.model, data, self.blocks, config, context or RunContext(self.journal, 0), rates)

    def kl(self, some: list[RoundedBlock]) -> float:
        linears = self.stream.linears
        reading = lambda order: ((i, some[i].params(linears(i), torch.float32)) for i in order)  # noqa: E731
        final = run_blocks(
            self.stream, self.rows, self.model.outer, reading, self.model.online, RunContext(self.journal, 0)
        )
        value = quality(self.stream, self.rows, self.model.outer, final, self.float_final).kl
        assert value is not None
        return value


@pytest.fixture(params=list(GRIDS))
def job(request: pytest.FixtureRequest, stream: BlockwiseModel, rows: Corpus, journal: Journal) -> Job:
    return Job(stream, rows, journal, GRIDS[request.param])


def test_variables_begin_in_the_cells_of_the_codes(job: Job) -> None:
    """Whatever the grid: with nothing learned, what is worked in is what was rounded, code by code."""
    tuned, _ = job.tuned(TuningRates(factors=0.0, rounding=0.0), replace(HOW, steps=1))
    for i in range(2):
        before, after = job.blocks.read(i), tuned.read(i)
        for name, linear in before.linears.items():
            assert linear.offset is not None and linear.offset.abs().max() > 0
            assert torch.equal(after.linears[name].codes, linear.codes)
            assert torch.equal(after.linears[name].scale, linear.scale)
            assert torch.equal(after.linears[name].zero, linear.zero)


def test_a_step_goes_down_the_gradient_that_the_library_finds(job: Job) -> None:
    """dL/dV = scale * dL/dW wherever V is on the grid; every V moves by one length against its sign."""

    def variables(tuned: TunedBlocks) -> list[dict[str, Tensor]]:
        assert tuned.rounding is not None
        with torch.no_grad():
            return [dict(tuned.variables(i, job.blocks.read(i))) for i in range(2)]

    start = variables(TunedBlocks(job.blocks, *beginning(job)))
    tuned, _ = job.tuned(TuningRates(factors=0.0, rounding=0.25), replace(HOW, steps=1))
    moved = variables(tuned)
    gradients = gradients_by_the_library(job)
    spacing = job.model.scheme.weights.spacing
    for i in range(2):
        for name, linear in job.blocks.read(i).linears.items():
            gradient, change = gradients[name], moved[i][name] - start[i][name]
            sure = gradient.abs() > 1e-3 * gradient.abs().max()
            low, high = (end - linear.zero for end in linear.grid.ends)
            whole = 0.25 * spacing
            inside = linear.grid.split(start[i][name])
            inside = ((inside > low[..., None] + whole) & (inside < high[..., None] - whole)).flatten(-2)
            assert (sure & inside).float().mean() > 0.3
            expected = -whole * gradient.sign()
            assert torch.allclose(change[sure & inside], expected[sure & inside], atol=2e-3 * max(spacing, 0.2))


def beginning(job: Job) -> tuple[list[ScaleFactors], LearnedRounding]:
    factors = [
        ScaleFactors(job.blocks.read(i), job.stream.linears(i), {}, torch.float32, torch.device("cpu"))
        for i in range(2)
    ]
    return factors, LearnedRounding(job.model, job.blocks, RunContext(job.journal, 0))


def gradients_by_the_library(job: Job) -> dict[str, Tensor]:
    """dL/dW (out, in) of every rounded weight, by its name, of the mean loss of the rows that are descended on."""
    model = tiny.model_of(tiny.config_of("llama"), dtype=torch.float32)
    params, names = dict(model.requires_grad_(True).named_parameters()), dict[str, str]()
    with torch.no_grad():
        for i in range(2):
            made = job.blocks.read(i).params(job.stream.linears(i), torch.float32)
            for one in job.stream.linears(i):
                names[one.name] = f"model.layers.{i}.{one.parameter}"
                params[names[one.name]].copy_(made[one.parameter])
    cache, total = TeacherCache(job.journal), torch.zeros(())
    for row in range(9):  # the last three are kept back
        total = total + KL_TOP["tail"](cache.read(row), model(job.rows.ids[row : row + 1]).logits[0]).mean() / 9
    total.backward()
    return {name: grad for name, full in names.items() if (grad := params[full].grad) is not None}


def test_nothing_leaves_the_grid(job: Job) -> None:
    """Steps as long as cells: V waits at the grid's edge, and every code is one of the grid's."""
    tuned, _ = job.tuned(TuningRates(factors=0.0, rounding=1.0), replace(HOW, steps=4))
    grid = job.model.scheme.weights
    for i in range(2):
        block = job.blocks.read(i)
        for name, linear in tuned.read(i).linears.items():
            assert linear.codes.min() >= grid.low and linear.codes.max() <= grid.high
            v = grid.split(tuned.variables(i, block)[name])
            low, high = (end - linear.zero[..., None] for end in grid.ends)
            assert ((v >= low - 0.5) & (v <= high + 0.5)).all()


def test_what_was_pushed_over_the_edge_comes_back_at_once(job: Job) -> None:
    """However often a gradient pushed it: one step the other way is a step from the edge."""
    _, rounding = beginning(job)
    block, spacing = job.blocks.read(0), job.model.scheme.weights.spacing
    seen = dict[str, Tensor]()
    for push in (*[-1.0] * 2 * 2**job.model.scheme.weights.bits, 1.0, 0.0):
        seen = rounding.variables(0, block)
        for v in seen.values():
            v.grad = torch.full_like(v, push)
        rounding.finish(0)
        rounding.step(0.75)
    for name, linear in block.linears.items():
        grid, v = linear.grid, linear.grid.split(seen[name])
        edge = grid.ends[1] - linear.zero[..., None] + (0 if grid.table else 0.498)
        assert torch.allclose(v, (edge - 0.75 * spacing).expand_as(v), atol=1e-3 * 2**grid.bits)


Looks = dict[int, list[Mapping[str, Tensor]]]  # by steps done, the blocks as rows kept back see them


@pytest.mark.parametrize("rounding", [0.3, None], ids=["codes", "factors"])
@pytest.mark.parametrize("stopped", [None, 6, 13, 18])
def test_the_state_that_is_best_on_rows_kept_back_is_the_one_that_is_taken(
    stream: BlockwiseModel, rows: Corpus, journal: Journal, monkeypatch: pytest.MonkeyPatch, rounding: float | None,
    stopped: int | None,
) -> None:  # fmt: skip
    """Of four looks on the way, at twenty steps, and one at the end the second is best; also after a run that was
    stopped before it, right after it or later, and goes on from its page."""
    job, rates, looks = Job(stream, rows, journal, Grid(3)), TuningRates(factors=0.02, rounding=rounding), Looks()
    worth, real, done = {0: 9.0, 4: 3.0, 8: 2.0, 12: 5.0, 16: 4.0, 20: 2.5}, objective.loss_of, [0]

    def looking(model: Any, blocks: Any, data: Any, config: Any, some: Any, context: RunContext) -> float:
        looks[done[0]] = [blocks.prepare(i, raw) for i, raw in blocks.reading(range(blocks.layers))]
        assert real(model, blocks, data, config, some, context) > 0
        return worth[done[0]]

    def count(step: int, loss: float) -> None:
        done[0] = step + 1
        if step + 1 == stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(objective, "loss_of", looking)
    monkeypatch.setattr(CheckpointSlot, "due", True)
    if stopped is not None:
        with pytest.raises(KeyboardInterrupt):
            job.tuned(rates, HOW, RunContext(journal, 0).loop("tune", count))
        stopped, done[0] = None, 0
    tuned, result = job.tuned(rates, HOW, RunContext(journal, 0).loop("tune", count))
    assert (result.before, result.after, result.best, result.kept) == (9.0, 2.0, 8, True)
    again, resumed = job.tuned(rates, HOW, RunContext(journal, 0).loop("tune", count))
    assert resumed == result
    for one in (tuned, again):
        taken = [one.read(i).params(stream.linears(i), stream.dtype) for i in range(2)]
        same = {step for step, look in looks.items() if all(map(_equal, look, taken))}
        assert same == {8} and looks.keys() >= {0, 8, 20}


def _equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(some[name], others[name]) for name in some)


def test_moving_codes_wins_more_than_factors_alone(stream: BlockwiseModel, rows: Corpus, journal: Journal) -> None:
    job = Job(stream, rows, journal, Grid(3))
    rounded = [job.blocks.read(i) for i in range(2)]
    alone, fixed = job.tuned(TuningRates(factors=0.02, rounding=None))
    both, moved = job.tuned(TuningRates(factors=0.02, rounding=0.05))
    kls = [job.kl(some) for some in (rounded, [alone.read(0), alone.read(1)], [both.read(0), both.read(1)])]
    assert fixed.kept and moved.kept
    assert kls[1] < 0.9 * kls[0] and kls[2] < 0.9 * kls[1]


def test_zero_points_stay_where_they_are(stream: BlockwiseModel, rows: Corpus, journal: Journal) -> None:
    job = Job(stream, rows, journal, Grid(3, symmetric=False, group=8), "rtn")
    tuned, matched = job.tuned(TuningRates(factors=0.02, rounding=0.05))
    assert matched.codes_changed
    for i in range(2):
        for name, linear in job.blocks.read(i).linears.items():
            assert torch.equal(tuned.read(i).linears[name].zero, linear.zero)


def test_factors_alone_never_change_codes_or_signs(stream: BlockwiseModel, rows: Corpus, journal: Journal) -> None:
    job = Job(stream, rows, journal, Grid(3), "rtn")
    tuned, matched = job.tuned(TuningRates(factors=0.02, rounding=None))
    assert matched.curve[-1] < 0.9 * matched.curve[0]
    for i in range(2):
        old, new = job.blocks.read(i), tuned.read(i)
        for name, linear in old.linears.items():
            assert torch.equal(new.linears[name].codes, linear.codes)
            assert (new.linears[name].scale > 0).all() and not torch.equal(new.linears[name].scale, linear.scale)
        for name, tensor in old.rest.items():
            if name.endswith("bias"):
                assert torch.equal(new.rest[name], tensor)
            else:
                assert torch.equal(new.rest[name].sign(), tensor.sign())


def test_tuned_scales_are_what_the_stored_dtype_can_hold() -> None:
    scale = torch.full((2, 1), 0.3, dtype=torch.float16)
    linear = Rounded(torch.ones(2, 4, dtype=torch.int8), scale, torch.zeros(2, 1), Grid(4))
    block = RoundedBlock({"x": linear}, {"n.weight": torch.ones(4, dtype=torch.bfloat16)})
    linear_x = Linear("x", "x", "x", "x.weight", (2, 4))
    factors = ScaleFactors(block, [linear_x], {"n.weight": 0.0}, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        factors.scales["x"] += 0.1
        factors.gains["n.weight"] += 0.1
    stored = factors.applied(block, {})
    assert stored.linears["x"].scale.dtype == torch.float16
    assert torch.allclose(stored.linears["x"].weight(), torch.tensor(0.3 * 2.718281828**0.1), rtol=1e-3)
    assert stored.rest["n.weight"].dtype == torch.bfloat16
