from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib.blockwise.activation_store import ActivationStore
from calib.blockwise.model import BlockwiseModel
from calib.blockwise.row_states import RowStates
from calib.model.weights import Weights
from compressor.engine.input_statistics import input_moments
from compressor.engine.runtime_transforms import RuntimeTransforms
from tests import tiny


def at_rest(stream: BlockwiseModel, hidden: Tensor) -> RowStates:
    states = ActivationStore(tuple(hidden.shape), hidden.dtype, 10**9, Path())
    states[:] = hidden
    return RowStates(states, stream.batches(torch.zeros(hidden.shape[:2], dtype=torch.int64)))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_padding_is_not_counted(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of padded rows are those of the same rows without padding, whatever lies in it."""
    model = tiny.model_of(tiny.config_of(model_type), dtype=torch.float32)
    stream = BlockwiseModel(model.config, Weights(tiny.save(model, tmp_path)), torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, 24, generator=g)  # more rows than one micro-batch
    padded = torch.cat([hidden, 50 * torch.randn(9, 3, 24, generator=g)], 1)
    params = stream.read_block(0)
    monkeypatch.setattr("calib.blockwise.model.TOKENS_AT_ONCE", 20)
    want = input_moments(
        stream, 0, params, at_rest(stream, hidden), torch.ones(9, 5, dtype=torch.bool), RuntimeTransforms()
    )
    real = (torch.arange(8) < 5).expand(9, 8)
    got = input_moments(stream, 0, params, at_rest(stream, padded), real, RuntimeTransforms())
    for site, moments in want.items():
        assert got[site].count == moments.count and ("moe" in model_type or moments.count == 45)
        assert torch.allclose(got[site].gram, moments.gram, rtol=1e-4, atol=1e-3)
        assert torch.allclose(got[site].absmax, moments.absmax, rtol=1e-4)
