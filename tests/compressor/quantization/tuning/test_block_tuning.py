"""Tuning of one block on its own outputs, against the library's own layer and plain autograd."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calib import Diverged
from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.model.config import read_json
from calib.quant.codebooks import CODEBOOKS
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from compressor import Quantize, quantize
from compressor.engine.blockwise_runs import embed_rows
from compressor.engine.input_statistics import advance
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.quantization.calibrate import quantization_pass, transformed_outer
from compressor.quantization.objective import kept_back
from compressor.quantization.quantized_model import QuantizedModel, Splits
from compressor.quantization.rounding import RoundedBlock, RoundedBlocks, Rounder
from compressor.quantization.tuning.block_tuning import BlockStates, BlockTuning, _Work, tune_block, tuned_states
from tests import tiny

NONE = RuntimeTransforms(None, None)
HOW = BlockTuning(steps=30, batch=8, factors=0.01, rounding=0.16, seed=0)
GRIDS = {
    "three bits": Grid(3),
    "groups": Grid(3, group=8),
    "zero points": Grid(3, symmetric=False, group=8),
    "a table": Grid(4, group=8, table=CODEBOOKS["nf4"]()),
}


class Case:
    """The second block of the tiny model, after a first one that is rounded."""

    def __init__(self, stream: BlockwiseModel, rows: Corpus, journal: Journal, grid: Grid) -> None:
        self.stream, self.rows, context = stream, rows, RunContext(journal, 10**9)
        outer = transformed_outer(stream, None)
        blocks = RoundedBlocks(journal, Scheme(grid), stream)
        model = QuantizedModel(stream, Scheme(grid), outer, None, [NONE] * stream.layers)
        quantization_pass(model, Splits(rows, rows), blocks, Rounder("gptq", 0.01, offsets=True), context)
        self.block = blocks.read(1)
        self.inputs, self.targets = (embed_rows(stream, rows, outer, context) for _ in range(2))
        advance(stream, 0, blocks.read(0).params(stream.linears(0), stream.dtype), self.inputs, NONE)
        for i in range(2):
            advance(stream, i, stream.read_block(i), self.targets, NONE)

    def states(self, config: BlockTuning = HOW) -> BlockStates:
        return tuned_states(self.stream, self.rows, self.inputs, self.targets, config)

    def tuned(self, config: BlockTuning = HOW) -> tuple[RoundedBlock, dict[str, Any]]:
        return tune_block(self.stream, 1, self.block, NONE, self.states(config), config)

    def layer(self, block: RoundedBlock) -> torch.nn.Module:
        """The library's layer, with the weights of a block."""
        model = tiny.model_of(tiny.config_of("llama"), dtype=torch.float32).requires_grad_(True)
        layer: torch.nn.Module = model.model.layers[1]
        with torch.no_grad():
            for name, value in block.params(self.stream.linears(1), torch.float32).items():
                layer.get_parameter(name).copy_(value)
        self.rotary = model.model.rotary_emb
        return layer

    def loss(self, layer: torch.nn.Module, some: slice) -> Tensor:
        """Squared error of its outputs as a share of what the float block adds, of every token in units of its target's
        energy."""
        before, target = self.inputs[some], self.targets[some]
        positions = torch.arange(before.shape[1])[None].expand(len(before), -1)
        mask = torch.full((before.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        out = layer(before, attention_mask=mask, position_embeddings=self.rotary(before, positions))
        out = out[0] if isinstance(out, tuple) else out
        real = self.rows.mask[some]
        energy = target.square().sum(-1, keepdim=True)
        return ((out - target).square() / energy)[real].sum() / ((before - target).square() / energy)[real].sum()


@pytest.fixture(params=list(GRIDS))
def case(request: pytest.FixtureRequest, stream: BlockwiseModel, rows: Corpus, journal: Journal) -> Case:
    return Case(stream, rows, journal, GRIDS[request.param])


@pytest.fixture
def rows() -> Corpus:
    """More than the weights of a row could learn by heart; every second one is padded."""
    ids = torch.randint(tiny.VOCAB, (96, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::2, 13:] = False
    return Corpus(ids, mask, "random", None)


def test_at_rates_of_zero_a_block_stays_as_it_was_rounded(case: Case) -> None:
    tuned, notes = case.tuned(replace(HOW, steps=2, factors=0.0, rounding=1e-9))
    for name, linear in case.block.linears.items():
        one = tuned.linears[name]
        assert torch.equal(one.codes, linear.codes) and torch.equal(one.scale, linear.scale)
        assert torch.equal(one.zero, linear.zero)
        assert one.offset is not None and linear.offset is not None
        assert torch.allclose(one.offset.float(), linear.offset.float(), atol=2e-3)
    assert notes["codes_changed"] == 0 and notes["after"] == pytest.approx(notes["before"])


def test_the_loss_is_that_of_the_library_s_layer_on_rows_kept_back(case: Case) -> None:
    """As a share of what the float block adds; padding counts nowhere."""
    tuned, notes = case.tuned()
    first = len(case.rows.ids) - kept_back(len(case.rows.ids))
    with torch.no_grad():
        for when, block in (("before", case.block), ("after", tuned)):
            expected = float(case.loss(case.layer(block), slice(first, None)))
            assert notes[when] == pytest.approx(expected, rel=1e-4)
    assert notes["kept"] and notes["after"] < notes["before"] and 0 < notes["codes_changed"] < 0.5


def test_a_step_goes_down_the_gradient_that_autograd_finds(case: Case) -> None:
    """dL/dV = scale * dL/dW where V is on the grid; at first each V moves by one length against its sign."""
    config = replace(HOW, steps=1, batch=88, factors=0.0, rounding=0.3)
    layer = case.layer(case.block)
    case.loss(layer, slice(0, 88)).backward()  # all rows but those kept back
    tuned, notes = case.tuned(config)
    assert notes["kept"]
    for one in case.stream.linears(1):
        before, after = case.block.linears[one.name], tuned.linears[one.name]
        assert before.offset is not None and after.offset is not None
        grid, gradient = before.grid, layer.get_parameter(one.parameter).grad
        assert gradient is not None
        start, end = (grid.levels(x.codes.float()) + x.offset.float() for x in (before, after) if x.offset is not None)
        sure = gradient.abs() > 1e-2 * gradient.abs().max()
        whole = config.rounding * grid.spacing / math.sqrt(gradient.shape[-1])
        inside = (start > grid.ends[0] + whole) & (start < grid.ends[1] - whole)
        assert (sure & inside).float().mean() > 0.2
        moved, expected = (end - start)[sure & inside], -whole * gradient.sign()[sure & inside]
        assert torch.allclose(moved, expected, atol=4e-3)


def test_a_block_that_got_worse_is_the_one_that_was_given(case: Case) -> None:
    tuned, notes = case.tuned(replace(HOW, steps=3, factors=2.0))
    assert tuned is case.block and not notes["kept"] and notes["codes_changed"] == 0
    assert notes["after"] > notes["before"]


def test_where_codes_stay_factors_alone_are_learned(case: Case) -> None:
    tuned, notes = case.tuned(replace(HOW, rounding=0.0))
    assert notes["kept"] and notes["after"] < notes["before"] and notes["codes_changed"] == 0
    for name, linear in case.block.linears.items():
        assert torch.equal(tuned.linears[name].codes, linear.codes)
        assert not torch.equal(tuned.linears[name].scale, linear.scale)


def test_rows_kept_back_are_in_no_batch(stream: BlockwiseModel, rows: Corpus, journal: Journal) -> None:
    case = Case(stream, rows, journal, Grid(3))
    for batch in (1, 5, 8, 88, 500):
        states = case.states(replace(HOW, batch=batch))
        steps = [_rows(of) for of in states.learned]
        assert [row for step in steps for row in step] == list(range(88))
        assert _rows(states.judged) == list(range(88, 96))
        assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1) and 0 < len(steps[-1]) <= batch


def _rows(parts: Iterable[tuple[slice, Any]]) -> list[int]:
    return [row for some, _ in parts for row in range(some.start, some.stop)]


@pytest.mark.parametrize("rows_", [1, 3])
def test_too_few_rows_to_keep_any_back_still_judge_a_block(
    stream: BlockwiseModel, rows: Corpus, journal: Journal, rows_: int
) -> None:
    case = Case(stream, rows[:rows_], journal, Grid(3))
    assert kept_back(rows_) == 0 and _rows(case.states().judged) == list(range(rows_))
    tuned, notes = case.tuned(replace(HOW, steps=3, factors=2.0))
    assert tuned is case.block and notes["after"] > notes["before"]


def test_a_step_is_the_same_however_few_of_its_rows_pass_together(
    stream: BlockwiseModel, rows: Corpus, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, config = Case(stream, rows, journal, Grid(3)), replace(HOW, steps=2, batch=20)
    whole, notes = case.tuned(config)
    monkeypatch.setattr("calib.blockwise.model.TOKENS_AT_ONCE", 60)  # three rows of twenty
    assert [len(step) for step in case.states(config).learned] == [7, 7, 7, 7, 3]
    parted, again = case.tuned(config)
    assert again["after"] == pytest.approx(notes["after"], rel=1e-4)
    for name, linear in whole.linears.items():
        assert torch.allclose(parted.linears[name].scale, linear.scale, rtol=1e-5)
        assert (parted.linears[name].codes == linear.codes).float().mean() > 0.999


def test_what_is_no_number_any_more_is_said(stream: BlockwiseModel, rows: Corpus, journal: Journal) -> None:
    case = Case(stream, rows, journal, Grid(3))
    with pytest.raises(Diverged, match=r"layers.1: tuning ends with errors that are (nan|inf); lower --lr-tune"):
        case.tuned(replace(HOW, steps=75, factors=30.0))


def test_later_blocks_make_up_for_what_is_rounded_before_them(
    stream: BlockwiseModel, rows: Corpus, journal: Journal
) -> None:
    """Of the whole pass: the last states are nearer to the float model's than those of GPTQ alone."""
    errors = list[float]()
    for number, tuning in enumerate((None, HOW)):
        outer, context = transformed_outer(stream, None), RunContext(Journal(journal.folder, f"{number}-"), 10**9)
        blocks = RoundedBlocks(context.journal, Scheme(Grid(3)), stream)
        model = QuantizedModel(stream, Scheme(Grid(3)), outer, None, [NONE] * stream.layers)
        final, _ = quantization_pass(model, Splits(rows, rows), blocks, Rounder("gptq", 0.01), context, tuning)
        exact = embed_rows(stream, rows, outer, context)
        for i in range(stream.layers):
            advance(stream, i, stream.read_block(i), exact, NONE)
            assert all(one.offset is None for one in blocks.read(i).linears.values()), "nothing comes after"
        errors.append(float(((final[:] - exact[:]).square() / exact[:].square().sum(-1, keepdim=True)).sum()))
        for notes in blocks.notes(1).values():
            assert ("block" in notes) == (tuning is not None)
    assert errors[1] < 0.8 * errors[0]


def test_what_was_pushed_over_the_edge_comes_back_at_once(case: Case) -> None:
    """However often a gradient pushed a variable: one step the other way is a step from the edge."""
    work = _Work(case.stream, 1, case.block, NONE, case.states(), HOW)
    for step, push in enumerate((*[-1.0] * 40, 1.0)):
        for v in work._variables.values():
            v.grad = torch.full_like(v, push)
        work._move(0.75 * math.sqrt(24), step)
    for name, linear in case.block.linears.items():
        grid, v = linear.grid, linear.grid.split(work._variables[name].detach())
        edge, length = grid.ends[1] - linear.zero[..., None] + (0 if grid.table else 0.498), 0.75 * grid.spacing
        assert torch.allclose(v, (edge - length * math.sqrt(24 / linear.codes.shape[-1])).expand_as(v), atol=1e-4)


def test_a_gradient_that_became_small_moves_less(case: Case) -> None:
    """A step is the gradient over the root of the mean of its squares, the latest of which counts most."""
    work = _Work(case.stream, 1, case.block, NONE, case.states(), HOW)
    starts = {name: v.detach().clone() for name, v in work._variables.items()}
    for step, push in enumerate((1.0, 0.1)):
        for v in work._variables.values():
            v.grad = torch.full_like(v, push)
        work._move(1e-2, step)
    lengths = 1.0, 0.1 / math.sqrt((0.95 * 1.0 + 0.1**2) / 1.95)
    for name, linear in case.block.linears.items():
        v, grid = work._variables[name].detach(), linear.grid
        expected = starts[name] - sum(lengths) * 1e-2 * grid.spacing / math.sqrt(v.shape[-1])
        least = grid.ends[0] - linear.zero[..., None] - (0 if grid.table else 0.498)
        assert torch.allclose(v, grid.split(expected).maximum(least).flatten(-2), atol=1e-5)


def test_a_job_says_what_it_did_to_its_blocks(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = Quantize(
        scheme="w3a16-channel", data=text_file, samples=16, held_out=3, length=32, block_steps=3, tune_steps=0
    )
    report = quantize(tiny_folder, tmp_path / "out", options, allow_damage=True)
    assert len(report["blocks"]) == read_json(tiny_folder / "config.json")["num_hidden_layers"]
    assert all(one["before"] > 0 and one["after"] > 0 for one in report["blocks"])
    assert "Blocks were tuned on their own outputs: on rows kept back" in (tmp_path / "out/report.html").read_text()
    again = quantize(tiny_folder, tmp_path / "plain", options.without_learning(), allow_damage=True)
    assert "blocks" not in again
    assert "tuned on their own" not in (tmp_path / "plain/report.html").read_text()
