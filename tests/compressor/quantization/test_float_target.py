"""Rounding towards the float model: its least squares, and the sums that they come from, on real blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calib.blockwise.hooks import observe_inputs
from calib.blockwise.linears import Linear, put_together
from calib.blockwise.model import BlockwiseModel, Params
from calib.blockwise.row_states import RowStates
from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.model.task import Task
from calib.model.weights import Weights
from calib.probe.find import found_parts
from calib.quant.grid import fit_activations, on_grid
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from calib.stats.moments import Moments
from calib.stats.perplexity import Quality
from compressor import quantize
from compressor.engine.blockwise_runs import embed_rows
from compressor.engine.input_statistics import advance
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.quantization.calibrate import calibration_pass, quality, quantization_pass, transformed_outer
from compressor.quantization.float_target import (
    PairedMoments,
    Passing,
    _matched,
    least_squares,
    one_after_the_other,
    paired_moments,
    stages,
)
from compressor.quantization.gptq import NotPositive
from compressor.quantization.job import validate_quantization
from compressor.quantization.quantized_model import QuantizedModel, Splits
from compressor.quantization.rounding import RoundedBlock, RoundedBlocks, Rounder, nearest_linear
from tests import tasks, tiny
from tests.compressor.quantization.test_quantize import SMALL

N, IN, OUT = 40, 7, 5


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    """X and X~ (n, in)."""
    exact = drawn(N, IN, seed=0)
    return exact, exact + 0.3 * drawn(N, IN, seed=1)


def paired(exact: Tensor, rounded: Tensor) -> PairedMoments:
    return PairedMoments(Moments.zero(IN).add(rounded), exact.mT @ rounded)


def test_the_target_is_that_of_least_squares_with_a_ridge_towards_the_weight(inputs: tuple[Tensor, Tensor]) -> None:
    exact, rounded = inputs
    weight, damping = drawn(OUT, IN, seed=2), 0.1
    found = least_squares({"w": weight}, paired(exact, rounded), damping)["w"]
    root = (damping * (rounded.square().sum(0)).mean()).sqrt() * torch.eye(IN, dtype=torch.float64)
    wanted = torch.cat([exact @ weight.mT, root @ weight.mT])
    oracle = torch.linalg.lstsq(torch.cat([rounded, root]), wanted).solution.mT
    torch.testing.assert_close(found, oracle)


def test_where_inputs_are_the_float_models_the_target_is_the_weight(inputs: tuple[Tensor, Tensor]) -> None:
    weight = drawn(OUT, IN, seed=2)
    torch.testing.assert_close(least_squares({"w": weight}, paired(inputs[0], inputs[0]), 0.01)["w"], weight)


def test_a_rounded_weight_costs_its_distance_from_the_target_beyond_it(inputs: tuple[Tensor, Tensor]) -> None:
    """What GPTQ on the target takes down is all that codes decide about."""
    exact, rounded = inputs
    weight, codes = drawn(OUT, IN, seed=2), drawn(OUT, IN, seed=3).round()
    target = least_squares({"w": weight}, paired(exact, rounded), 0.0)["w"]

    def cost(w: Tensor) -> Tensor:
        return (exact @ weight.mT - rounded @ w.mT).square().sum()

    torch.testing.assert_close(cost(codes), cost(target) + (rounded @ (target - codes).mT).square().sum())


def test_an_input_that_never_fires_keeps_its_weights(inputs: tuple[Tensor, Tensor]) -> None:
    exact, rounded = inputs[0], inputs[1].clone()
    rounded[:, 3] = 0
    weight = drawn(OUT, IN, seed=2)
    found = least_squares({"w": weight}, paired(exact, rounded), 0.0)["w"]
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 3], weight[:, 3])


def test_without_a_ridge_inputs_that_depend_on_each_other_are_refused(inputs: tuple[Tensor, Tensor]) -> None:
    rounded = inputs[1].clone()
    rounded[:, 3] = 0
    gram = rounded.mT @ rounded
    gram[3, 3] = -1.0
    sums = PairedMoments(Moments(N, gram.sum(0), gram, gram.sum(0)), gram.clone())
    with pytest.raises(NotPositive, match="damping 0"):
        least_squares({"w": drawn(OUT, IN, seed=2)}, sums, 0.0)


# On blocks.


def model_of(tmp_path: Path, model_type: str) -> BlockwiseModel:
    model = tiny.model_of(tiny.config_of(model_type), dtype=torch.float32)
    return BlockwiseModel(model.config, Weights(tiny.save(model, tmp_path / model_type)), torch.device("cpu"))


def test_stages_are_in_the_order_in_which_data_meets_them(tmp_path: Path) -> None:
    stream = model_of(tmp_path, "llama")
    groups = stages(stream.linears(0), list(found_parts(stream).blocks[0].matrices))
    names = [[one.name.rpartition(".")[2] for one in group] for group in groups]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    backwards = stages(list(reversed(stream.linears(0))), list(found_parts(stream).blocks[0].matrices))
    assert [{one.name for one in group} for group in backwards] == [{one.name for one in group} for group in groups]


def test_experts_are_rounded_together_at_each_of_their_steps(tmp_path: Path) -> None:
    stream = model_of(tmp_path, "mixtral")
    *attention, entering, leaving = stages(stream.linears(0), list(found_parts(stream).blocks[0].matrices))
    experts = stream.config.num_local_experts
    assert len(attention) == 2 and len(entering) == 2 * experts and len(leaving) == experts
    assert {one.step for one in entering} == {"in"} and {one.step for one in leaving} == {"down"}


@pytest.fixture(params=["llama", "mixtral"])
def streamed(request: pytest.FixtureRequest, tmp_path: Path) -> BlockwiseModel:
    return model_of(tmp_path, request.param)


def states_of(stream: BlockwiseModel, rows: Corpus, context: RunContext, noise: float) -> RowStates:
    states = embed_rows(stream, rows, stream.read_outer(), context)
    whole = slice(0, len(states))
    states[whole] = states[whole] + noise * torch.randn(states.shape, generator=torch.Generator().manual_seed(5))
    return states


Seen = dict[str, dict[int, Tensor]]  # by linear and token, what enters


def inputs_of(stream: BlockwiseModel, params: Params, states: RowStates, linears: Sequence[Linear]) -> Seen:
    """A slow oracle: the block is run to its end, and every token looked at by itself."""
    seen = Seen({one.name: {} for one in linears})

    def look(one: Linear, x: Tensor, tokens: Tensor | None) -> None:
        flat = x.flatten(0, -2)
        for place, token in enumerate(range(len(flat)) if tokens is None else tokens.tolist()):
            seen[one.name][token] = flat[place].double()

    ((everything, batch),) = states.batches
    with observe_inputs(stream.blocks[0], {one: partial(look, one) for one in linears if one.name == one.site}):
        stream.run(0, params, states[everything], batch)
    return seen


def test_sums_are_those_of_the_inputs_of_whole_blocks(streamed: BlockwiseModel, rows: Corpus, journal: Journal) -> None:
    """Group after group, with what was rounded before, over real tokens; an expert's with the same token's in the float
    model, or, where that sends it elsewhere, with itself.  And the float model's states come out as the block makes
    them."""
    stream, context, plain = streamed, RunContext(journal, 10**9), RuntimeTransforms()
    rows.mask[3, 12:] = False
    real = set(rows.mask.flatten().nonzero()[:, 0].tolist())
    params, part, linears = stream.read_block(0), RoundedBlock({}, {}), stream.linears(0)
    exact, calibration, begun = (states_of(stream, rows, context, noise) for noise in (0.0, 1.0, 0.0))
    floats, strangers = inputs_of(stream, params, begun, linears), 0
    for group, sums in one_after_the_other(stream, 0, Passing(params, plain, exact), calibration, rows.mask, part):
        mixed = {one.name: part.linears[one.name].weight() for one in linears if one.name in part.linears}
        mixed = {one.name: mixed.get(one.name, one.of(params)) for one in linears}
        rounded = inputs_of(stream, {**params, **put_together(linears, mixed)}, calibration, group)
        for name, pair in sums.items():
            tokens = sorted(real & set(rounded[name]))
            width = len(pair.cross)
            own = torch.stack([rounded[name][t] for t in tokens]) if tokens else torch.zeros(0, width).double()
            target = [floats[name].get(t, rounded[name][t]) for t in tokens]
            other = torch.stack(target) if tokens else own
            strangers += sum(t not in floats[name] for t in tokens)
            torch.testing.assert_close(pair.rounded.gram, own.mT @ own, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(pair.cross, other.mT @ own, rtol=1e-4, atol=1e-4)
            assert pair.rounded.count == len(tokens)
        for one in group:
            part.linears[one.name] = nearest_linear(one.of(params), Grid(2), torch.float32)
    assert part.linears.keys() == {one.name for one in linears}
    assert (strangers > 0) == (linears[-1].expert is not None)
    advance(stream, 0, params, begun, plain)
    torch.testing.assert_close(exact[slice(0, len(exact))], begun[slice(0, len(begun))])


def test_sums_of_equal_models_are_the_gram_matrix(streamed: BlockwiseModel, rows: Corpus, journal: Journal) -> None:
    stream, context, plain = streamed, RunContext(journal, 10**9), RuntimeTransforms()
    params = stream.read_block(0)
    exact, calibration = (states_of(stream, rows, context, 0.0) for _ in range(2))
    for group in stages(stream.linears(0), list(found_parts(stream).blocks[0].matrices)):
        floats, rounded = (Passing(params, plain, states) for states in (exact, calibration))
        for pair in paired_moments(stream, 0, group, floats, rounded, rows.mask, advance=False).values():
            torch.testing.assert_close(pair.cross, pair.rounded.gram, rtol=1e-4, atol=1e-4)


def test_the_float_model_rounds_no_activations(tmp_path: Path, rows: Corpus, journal: Journal) -> None:
    stream, context, grid = model_of(tmp_path, "llama"), RunContext(journal, 10**9), Grid(4)
    params = stream.read_block(0)
    exact, calibration, begun = (states_of(stream, rows, context, 0.0) for _ in range(3))
    whole = slice(0, len(begun))
    entering = inputs_of(stream, params, begun, [stream.linears(0)[0]])[stream.linears(0)[0].name]
    x = torch.stack([entering[token] for token in range(len(entering))]).float()
    passing = Passing(params, RuntimeTransforms(activations=grid), exact)
    ((_, first), *_) = one_after_the_other(stream, 0, passing, calibration, rows.mask, rounded_part(stream, params))
    (pair,) = first.values()
    own = on_grid(x, *fit_activations(x, grid), grid)
    torch.testing.assert_close(pair.cross, (x.mT @ own).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pair.rounded.gram, (own.mT @ own).double(), rtol=1e-4, atol=1e-4)
    advance(stream, 0, params, begun, RuntimeTransforms())
    torch.testing.assert_close(exact[whole], begun[whole])


def rounded_part(stream: BlockwiseModel, params: Params) -> RoundedBlock:
    linears = stream.linears(0)
    return RoundedBlock({one.name: nearest_linear(one.of(params), Grid(2), torch.float32) for one in linears}, {})


def test_an_expert_that_the_float_model_sends_nothing_to_has_its_own_inputs_as_targets() -> None:
    x, tokens = drawn(3, IN, seed=0), torch.tensor([4, 1, 0])
    nothing = torch.empty(0, IN), torch.empty(0, dtype=torch.int64)
    for other in (None, nothing):
        assert torch.equal(_matched(x, tokens, other, 6), x)
    found = _matched(x, tokens, (torch.ones(1, IN, dtype=torch.float64), torch.tensor([1])), 6)
    assert torch.equal(found[1], torch.ones(IN)) and torch.equal(found[::2], x[::2])


OPTIONS = replace(SMALL.without_learning(), init="none")


def test_a_job_that_was_stopped_between_blocks_goes_on_to_the_same_codes(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float model's states pass the blocks that are rounded already, too."""
    options = replace(OPTIONS, data=text_file, float_target=True)
    quantize(tiny_folder, tmp_path / "whole", options)
    quantize(tiny_folder, tmp_path / "alone", replace(options, float_target=None))
    write = RoundedBlocks.write

    def stopping(self: RoundedBlocks, index: int, part: RoundedBlock, notes: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        write(self, index, part, notes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RoundedBlocks, "write", stopping)
        quantize(tiny_folder, tmp_path / "out", options)
    quantize(tiny_folder, tmp_path / "out", options, resume=True)
    whole, alone, out = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "alone", "out"))
    assert out == whole != alone


def test_it_is_the_default_where_nothing_can_be_tuned_unless_activations_have_few_bits(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    tasks.save("bert", Task.EMBEDDING, tmp_path / "embedding")
    rows = tasks.rows_file(tmp_path)

    def asked(folder: Path, data: Path, scheme: str = "w4a16-channel", **options: Any) -> bool:
        job = validate_quantization(
            folder, tmp_path / "out", replace(OPTIONS, data=data, scheme=scheme, samples=2, length=8, **options)
        )
        assert job.rounder.float_target == job.float_target
        return job.float_target

    assert not asked(tiny_folder, text_file) and asked(tiny_folder, text_file, float_target=True)
    assert asked(tmp_path / "embedding", rows) and asked(tmp_path / "embedding", rows, "w4a8-channel")
    assert not asked(tmp_path / "embedding", rows, "w4a4-channel")
    assert not asked(tmp_path / "embedding", rows, float_target=False)
    assert not asked(tmp_path / "embedding", rows, rounding="rtn")


def rounded_kl(stream: BlockwiseModel, rows: Corpus, folder: Path, rounder: Rounder) -> float:
    folder.mkdir()
    journal = Journal(folder)
    both, context, scheme = Splits(rows, rows), RunContext(journal, 10**9), Scheme(Grid(2, group=8))
    _, float_final = calibration_pass(stream, both, 0, context)
    plain = [RuntimeTransforms()] * stream.layers
    model = QuantizedModel(stream, scheme, transformed_outer(stream, None), None, plain)
    final, _ = quantization_pass(model, both, RoundedBlocks(journal, scheme, stream), rounder, context)
    found = quality(stream, rows, model.outer, final, float_final)
    assert isinstance(found, Quality) and found.kl is not None
    return found.kl


def test_a_model_that_is_rounded_towards_the_float_one_is_nearer_to_it(
    streamed: BlockwiseModel, rows: Corpus, tmp_path: Path
) -> None:
    alone, aimed = (
        rounded_kl(streamed, rows, tmp_path / str(aims), Rounder("gptq", 0.01, float_target=aims))
        for aims in (False, True)
    )
    assert aimed < 0.9 * alone
