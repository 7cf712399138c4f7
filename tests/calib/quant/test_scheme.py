from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib import BadInput
from calib.quant.grid_types import Grid
from calib.quant.scheme import PRESETS, Scheme


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_and_keep_their_meaning(name: str) -> None:
    scheme = Scheme.parse(name)
    assert Scheme.parse(scheme.name) == scheme


def test_what_the_last_part_speaks_of() -> None:
    assert Scheme.parse("w4a16-g64-asym").weights == Grid(4, False, 64)
    assert Scheme.parse("w4a4-channel-asym") == Scheme(Grid(4), Grid(4, False))
    assert Scheme.parse("w4a4kv4-sym") == Scheme(Grid(4), Grid(4), Grid(4, False))
    assert Scheme.parse("w8a8") == Scheme.parse("w8a8-sym")


@pytest.mark.parametrize(
    "name", ["", "w4", "w1a16", "w9a16", "w4a17", "w4a16-g0", "w4a16-g64-", "w4a16-g64-channel", "int4"]
)
def test_unknown_names_are_refused_with_examples(name: str) -> None:
    with pytest.raises(BadInput, match=r"is unknown.*w4a16-g64"):
        Scheme.parse(name)


def test_a_group_that_does_not_divide_names_layer_width_and_what_fits() -> None:
    with pytest.raises(BadInput, match=r"group size 64 .* 172 of 'mlp.down_proj'; the nearest .* is w4a16-channel"):
        Scheme.parse("w4a16-g64").check_widths([("q", 64), ("mlp.down_proj", 172)])
    with pytest.raises(BadInput, match=r"'down'.*every layer is w4a16-g64 .*--group-size auto"):
        Scheme.parse("W4A16").check_widths([("q", 128), ("down", 64 * 9)])
    Scheme.parse("w4a16-channel").check_widths([("odd", 7)])


def test_names_mean_what_compressed_tensors_means_by_them() -> None:
    """Of every preset of integers that the library has: bits, groups and symmetry, in upper and lower case."""
    presets = pytest.importorskip("compressed_tensors.quantization.quant_scheme").PRESET_SCHEMES
    seen = 0
    for name, preset in presets.items():
        weights, inputs = preset.get("weights"), preset.get("input_activations")
        if weights is None or any(args is not None and str(args.type) != "int" for args in (weights, inputs)):
            continue
        activations = None if inputs is None else Grid(inputs.num_bits, inputs.symmetric)
        expected = Scheme(Grid(weights.num_bits, weights.symmetric, weights.group_size), activations)
        assert Scheme.parse(name) == Scheme.parse(name.lower()) == expected, name
        seen += 1
    assert seen >= 18


@given(
    st.sampled_from("2345678"), st.sampled_from(["2", "4", "8", "16"]), st.sampled_from(["", "kv4"]),
    st.sampled_from(["", "-g32", "-g128", "-channel"]), st.sampled_from(["", "-sym", "-asym"]),
)  # fmt: skip
def test_the_full_name_says_all_of_it(w: str, a: str, kv: str, group: str, symmetry: str) -> None:
    """A scheme's own name gives it back, also where a recipe says it; names of old recipes had no groups by default."""
    name = f"w{w}a{a}{kv}{group}{symmetry}"
    scheme = Scheme.parse(name)
    assert Scheme.parse(scheme.name) == scheme
    assert Scheme.recorded_name(scheme.name) == scheme.name
    old = Scheme.read({"scheme": name})
    assert old == (scheme if group else scheme.with_group(None))
    assert Scheme.says_group(name) == bool(group)


@given(st.lists(st.integers(1, 40).map(lambda n: 8 * n), min_size=1, max_size=4), st.sampled_from([16, 64, 128]))
def test_auto_takes_the_largest_group_that_fits(widths: list[int], group: int) -> None:
    found = Scheme.parse(f"w4a16-g{group}").fitted(widths).weights.group
    fitting = [g for g in range(8, group + 1) if all(w % g == 0 for w in widths)]
    assert found == max(fitting)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("w4a16-g128", 4.125), ("w4a16-g128-asym", 4.15625), ("w3a16-g64", 3.25)],
)
def test_bits_per_weight(name: str, bits: float) -> None:
    assert Scheme.parse(name).bits_per_weight("", 4096) == bits
