from __future__ import annotations

from pathlib import Path

import torch

from calib.stream import Stream
from calib.weights import Weights
from compressor.online import Online
from compressor.rounding import input_moments
from tests import tiny


def test_padding_is_not_counted(tiny_folder: Path) -> None:
    """Statistics of padded rows are those of the same rows without padding, whatever lies in it."""
    stream = Stream(tiny.config_of("llama"), Weights(tiny_folder), torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, 24, generator=g)  # more rows than one micro-batch
    padded = torch.cat([hidden, 50 * torch.randn(9, 3, 24, generator=g)], 1)
    params = stream.read_block(0)
    want = input_moments(stream, 0, params, hidden, torch.ones(9, 5, dtype=torch.bool), Online())
    real = (torch.arange(8) < 5).expand(9, 8)
    got = input_moments(stream, 0, params, padded, real, Online())
    for site, moments in want.items():
        assert got[site].count == moments.count == 45
        assert torch.allclose(got[site].gram, moments.gram, rtol=1e-4, atol=1e-3)
        assert torch.allclose(got[site].absmax, moments.absmax, rtol=1e-4)
