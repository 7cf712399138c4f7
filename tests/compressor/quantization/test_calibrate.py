"""The walks of a quantization: what they run, and which rows their profiles are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from compressor import Quantize, quantize
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.quantization.calibrate import (
    TOKENS_A_CHANNEL,
    calibration_pass,
    profiled_rows,
    quantization_pass,
    transformed_outer,
)
from compressor.quantization.quantized_model import QuantizedModel, Splits
from compressor.quantization.rounding import RoundedBlocks, Rounder
from tests import tiny

LENGTH = 20


@pytest.fixture
def many() -> Corpus:
    ids = torch.randint(tiny.VOCAB, (40, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 3:] = False
    return Corpus(ids, mask, "random", None)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that each run of a block has; few of them go through a block together."""
    seen, run = list[int](), BlockwiseModel.run

    def counting(self: BlockwiseModel, index: int, params: dict[str, Tensor], hidden: Tensor, batch: object) -> Tensor:
        seen.append(hidden.shape[0] * hidden.shape[1])
        return run(self, index, params, hidden, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockwiseModel, "run", counting)
    monkeypatch.setattr("calib.blockwise.model.TOKENS_AT_ONCE", LENGTH)
    return seen


def rounded(stream: BlockwiseModel, rows: Splits, context: RunContext) -> RoundedBlocks:
    scheme, plain = Scheme(Grid(4)), [RuntimeTransforms()] * stream.layers
    model = QuantizedModel(stream, scheme, transformed_outer(stream, None), None, plain)
    blocks = RoundedBlocks(context.journal, scheme, stream)
    quantization_pass(model, rows, blocks, Rounder("gptq", 0.01), context)
    return blocks


def test_profiled_rows_have_four_tokens_for_each_channel_of_the_widest_input(
    stream: BlockwiseModel, many: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are whole batches of those that pass through a block together."""
    widest = max(one.shape[1] for one in stream.linears(0))
    for together in (1, 3):
        monkeypatch.setattr("calib.blockwise.model.TOKENS_AT_ONCE", together * LENGTH)
        few = profiled_rows(stream, many)
        assert many.mask[:few].sum() >= TOKENS_A_CHANNEL * widest > many.mask[: few - together].sum()
        assert few % together == 0 and profiled_rows(stream, many[:2]) == 2


def test_without_learning_the_float_model_runs_no_more_than_is_looked_at(
    stream: BlockwiseModel, many: Corpus, journal: Journal, ran: list[int]
) -> None:
    """Twice through each block for GPTQ: inputs, of which the first few are profiled on the way, and answers of what
    was rounded. Where nothing is transformed there is no profile before that, and the float model runs held-out rows
    alone."""
    few, held_out = profiled_rows(stream, many), many[:3]
    assert few < len(many.ids) / 2
    context = RunContext(journal, 10**9)
    calibration_pass(stream, Splits(many, held_out), 0, context)
    assert sum(ran) == stream.layers * LENGTH * (few + 3)
    ran.clear()
    rounded(stream, Splits(many, held_out), context)
    assert sum(ran) == stream.layers * LENGTH * (2 * len(many.ids) + 3)
    ran.clear()
    calibration_pass(stream, Splits(many, held_out), 16, RunContext(Journal(journal.folder, "taught-"), 10**9))
    assert sum(ran) == stream.layers * LENGTH * (len(many.ids) + 3)  # the teacher answers every row
    for taught, rows in ((0, 3), (16, len(many.ids) + 3)):
        ran.clear()
        plain = RunContext(Journal(journal.folder, f"plain-{taught}-"), 10**9)
        profiles, final = calibration_pass(stream, Splits(many, held_out), taught, plain, profiled=False)
        assert sum(ran) == stream.layers * LENGTH * rows and profiles == []
        assert torch.equal(final, calibration_pass(stream, Splits(many, held_out), 0, context)[1])


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("taught", [0, 16])
def test_profiles_before_and_after_are_of_the_same_first_rows(
    stream: BlockwiseModel, many: Corpus, journal: Journal, monkeypatch: pytest.MonkeyPatch, taught: int, together: int
) -> None:
    monkeypatch.setattr("calib.blockwise.model.TOKENS_AT_ONCE", together * LENGTH)
    few = many[: profiled_rows(stream, many)]
    pages = iter("abcd")

    def context() -> RunContext:
        return RunContext(Journal(journal.folder, f"{next(pages)}-"), 10**9)

    one, other = (calibration_pass(stream, Splits(some, many[:3]), taught, context())[0] for some in (many, few))
    assert one == other
    notes = [rounded(stream, Splits(some, many[:3]), context()).notes(0) for some in (many, few)]
    for name, note in notes[0].items():
        assert note["activations"] == notes[1][name]["activations"] == one[0][name]["activations"]
        assert note["tokens"] == many.tokens


@pytest.mark.parametrize("squares", [False, True], ids=["", "an imatrix is written"])
def test_where_nothing_is_transformed_before_is_after(text_file: Path, tmp_path: Path, squares: bool) -> None:
    model = tiny.save(tiny.model_of(tiny.config_of("llama"), dtype=torch.float32), tmp_path / "model")
    for init in ("none", "hadamard"):
        written = tmp_path / f"{init}.gguf" if squares else None
        options = Quantize(
            scheme="w3a16-channel", samples=12, held_out=4, length=32, learn=False, init=init, precision="float32",
            imatrix_out=written,
        )  # fmt: skip
        layers = quantize(model, tmp_path / init, options, allow_damage=True)["layers"]
        assert all(set(one["after"]) == {"activations", "weights"} for one in layers)
        assert all(one["before"] == one["after"] for one in layers) == (init == "none")
