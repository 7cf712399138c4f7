from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from compressor.storage.compressed_tensors import CompressedTensors, compressed_tensors_config, pack, unpack
from compressor.storage.quantized_linear import Rounded
from tests import oracles

bits = st.integers(2, 8)


@given(bits, st.integers(1, 70), st.integers(0, 1000))
def test_packed_integers_come_back_and_are_the_long_integer_s_words(b: int, width: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (b - 1)), 2 ** (b - 1), (3, width), generator=g).to(torch.int8)
    words = pack(codes, b)
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, b, width), codes)
    for row in range(3):
        assert [w % 2**32 for w in words[row].tolist()] == oracles.pack(codes[row].tolist(), b)


def test_published_words() -> None:
    def words(codes: list[int], b: int) -> list[str]:
        return [f"{w % 2**32:#010x}" for w in pack(torch.tensor([codes], dtype=torch.int8), b)[0].tolist()]

    assert words([-8, -7, -1, 0, 1, 2, 6, 7], 4) == ["0xfea98710"]
    assert words([-4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2, -1], 3) == ["0x88fac688", "0x00000006"]
    assert words([-2, -1, 0, 1] * 4, 2) == ["0xe4e4e4e4"]


@pytest.mark.parametrize(
    "name", ["w4a16-channel", "w3a16-g8-asym", "w5a16-g8", "w8a8", "w4a8-channel", "w7a16-channel-asym"]
)
def test_what_is_stored_can_be_restored(name: str) -> None:
    scheme = Scheme.parse(name)
    grid, groups = scheme.weights, scheme.weights.groups(24)
    low, high = grid.low, grid.high + 1
    zero = torch.zeros(10, groups) if grid.symmetric else torch.randint(low, high, (10, groups)).float()
    rounded = Rounded(torch.randint(low, high, (10, 24)).to(torch.int8), torch.rand(10, groups) + 0.1, zero, grid)
    stored = CompressedTensors().encode("x", rounded, scheme)
    assert set(stored) == set(CompressedTensors().names("x", scheme))
    back = CompressedTensors().decode("x", stored, scheme)
    assert torch.equal(back.codes, rounded.codes) and torch.equal(back.zero, rounded.zero)
    assert torch.equal(back.weight(), rounded.weight())


@given(bits, st.sampled_from([None, 7]), st.booleans(), st.integers(0, 1000))
def test_the_library_of_the_format_unpacks_the_same(b: int, group: int | None, symmetric: bool, seed: int) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason="needs the extra")
    g, grid = torch.Generator().manual_seed(seed), Grid(b, symmetric, group)
    scheme = Scheme(grid)
    shape = torch.Size((6, 21))
    zeros = torch.Size((6, grid.groups(21)))
    codes = torch.randint(grid.low, grid.high + 1, shape, generator=g).to(torch.int8)
    zero = torch.randint(grid.low, grid.high + 1, zeros, generator=g).float()
    stored = CompressedTensors().encode("x", Rounded(codes, torch.ones(zeros), zero, grid), scheme)
    assert torch.equal(library.unpack_from_int32(stored["x.weight_packed"], b, shape), codes)
    if not symmetric:
        unpacked = library.unpack_from_int32(stored["x.weight_zero_point"], b, zeros, packed_dim=0)
        assert torch.equal(unpacked.float(), zero)


def test_group_size_in_the_config_and_no_unknown_keys() -> None:
    config = compressed_tensors_config(Scheme.parse("w4a16-g64"), plain=True)
    group = config["config_groups"]["group_0"]
    assert group["weights"]["group_size"] == 64 and group["weights"]["strategy"] == "group"
    assert set(group) == {"targets", "weights", "input_activations", "output_activations"}
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="needs the extra")
    for name in ("w4a16-g64", "w8a8", "w4a4-channel-asym", "w3a16-channel"):
        quantization.QuantizationConfig.model_validate(compressed_tensors_config(Scheme.parse(name), plain=True))
    with pytest.raises(ValueError, match="load_with_parewell"):
        quantization.QuantizationConfig.model_validate(
            compressed_tensors_config(Scheme.parse("w4a16-channel"), plain=False)
        )


def test_bits_do_not_change_meaning_with_the_grid() -> None:
    assert Grid(4).low == -8 and Grid(4).high == 7
