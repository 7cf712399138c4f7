from __future__ import annotations

import pytest

from calib import BadInput
from calib.quant.scheme import PRESETS, Grid, Scheme


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_and_keep_their_meaning(name: str) -> None:
    scheme = Scheme.parse(name)
    assert Scheme.parse(scheme.name) == scheme


def test_what_the_last_part_speaks_of() -> None:
    assert Scheme.parse("w4a16-g64-asym").weights == Grid(4, False, 64)
    assert Scheme.parse("w4a4-asym") == Scheme(Grid(4), Grid(4, False))
    assert Scheme.parse("w4a4kv4-sym") == Scheme(Grid(4), Grid(4), Grid(4, False))
    assert Scheme.parse("w8a8") == Scheme.parse("w8a8-sym")


@pytest.mark.parametrize("name", ["", "w4", "w1a16", "w9a16", "w4a17", "w4a16-g0", "w4a16-g64-", "W4A16", "int4"])
def test_unknown_names_are_refused_with_examples(name: str) -> None:
    with pytest.raises(BadInput, match=r"is unknown.*w4a16-g64"):
        Scheme.parse(name)


def test_a_group_that_does_not_divide_names_layer_width_and_what_fits() -> None:
    with pytest.raises(BadInput, match=r"group size 64 .* 172 of 'mlp.down_proj'; sizes that fit every layer: none"):
        Scheme.parse("w4a16-g64").check_widths([("q", 64), ("mlp.down_proj", 172)])
    with pytest.raises(BadInput, match=r"'down'.*every layer: 8, 16, 32, 64;"):
        Scheme.parse("w4a16-g128").check_widths([("q", 128), ("down", 64 * 9)])
    Scheme.parse("w4a16").check_widths([("odd", 7)])


@pytest.mark.parametrize(
    ("name", "bits"),
    [("w4a16-g128", 4.125), ("w4a16-g128-asym", 4.15625), ("w3a16-g64", 3.25)],
)
def test_bits_per_weight(name: str, bits: float) -> None:
    assert Scheme.parse(name).bits_per_weight("", 4096) == bits
