from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calib.blockwise.activation_store import ActivationStore
from calib.blockwise.model import BlockwiseModel
from calib.model.weights import Weights
from tests import tiny, walked
from tests.architectures import ARCHITECTURES


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("tied", [True, False])
def test_block_by_block_is_the_library_s_own_model(model_type: str, tied: bool, tmp_path: Path) -> None:
    model = tiny.model_of(tiny.config_of(model_type, tie_word_embeddings=tied))
    tiny.save(model, tmp_path)
    stream = BlockwiseModel(model.config, Weights(tmp_path), torch.device("cpu"), torch.float64)
    ids = torch.randint(tiny.VOCAB, (2, 17))
    assert torch.allclose(walked.logits_of(stream, ids), model(ids).logits, atol=1e-12)


def test_sliding_windows_are_honoured(tmp_path: Path) -> None:
    """The tiny mistral looks back five tokens: a change further back must not reach the last of two blocks' outputs."""
    model = tiny.model_of(tiny.config_of("mistral"))
    tiny.save(model, tmp_path)
    stream = BlockwiseModel(model.config, Weights(tmp_path), torch.device("cpu"), torch.float64)
    a = torch.randn(1, 12, 24, dtype=torch.float64)
    b = a.clone()
    b[:, 0] += 1
    batch, params = stream.batch(torch.zeros(1, 12, dtype=torch.int64)), stream.read_block(0)
    assert torch.equal(stream.run(0, params, a, batch)[:, -1], stream.run(0, params, b, batch)[:, -1])


def test_windows_that_the_library_ignores_are_ignored(tmp_path: Path) -> None:
    model = tiny.model_of(tiny.config_of("llama", sliding_window=3))
    stream = BlockwiseModel(model.config, Weights(tiny.save(model, tmp_path)), torch.device("cpu"), torch.float64)
    ids = torch.randint(tiny.VOCAB, (1, 12))
    assert torch.allclose(walked.logits_of(stream, ids), model(ids).logits, atol=1e-12)


def test_padding_on_the_right_reaches_nothing_before_it(tiny_folder: Path) -> None:
    stream = BlockwiseModel(tiny.config_of("llama"), Weights(tiny_folder), torch.device("cpu"), torch.float64)
    generator = torch.Generator().manual_seed(0)
    hidden, more = (torch.randn(1, n, 24, generator=generator, dtype=torch.float64) for n in (9, 4))
    padded = torch.cat([hidden, more], 1)
    params = stream.read_block(0)
    short, long = (
        stream.run(0, params, x, stream.batch(torch.zeros(x.shape[:2], dtype=torch.int64))) for x in (hidden, padded)
    )
    assert torch.allclose(short, long[:, :9], atol=1e-10)


def test_a_forgotten_parameter_is_an_error_not_a_wrong_answer(tiny_folder: Path) -> None:
    stream = BlockwiseModel(tiny.config_of("llama"), Weights(tiny_folder), torch.device("cpu"))
    params = stream.read_block(0)
    del params["mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"up_proj\.weight"):
        stream.run(0, params, torch.randn(1, 3, 24), stream.batch(torch.zeros(1, 3, dtype=torch.int64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_beyond_the_budget_are_a_nameless_file(tmp_path: Path, dtype: torch.dtype) -> None:
    """In RAM or on disk: what is written is read, and what is read is the reader's own."""
    row = 4 * dtype.itemsize
    in_ram, on_disk = (
        ActivationStore((3, 4), dtype, 3 * row, tmp_path),
        ActivationStore((3, 4), dtype, 3 * row - 1, tmp_path),
    )
    assert not list(tmp_path.iterdir())
    assert in_ram.bytes_in_ram == 3 * row and on_disk.bytes_in_ram == 0
    for states in (in_ram, on_disk):
        states[:] = torch.arange(12).reshape(3, 4)
        states[1:2] = torch.full((1, 4), 7.0)
        read = states[1:]
        assert read.dtype == dtype and read.sum() == 28 + 8 + 9 + 10 + 11
        read.zero_()
        assert states[1:].sum() == 66 and states[:1].sum() == 6
