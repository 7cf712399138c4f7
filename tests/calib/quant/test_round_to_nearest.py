from __future__ import annotations

import pytest
import torch

from calib import BadInput
from calib.quant.codebooks import nf4
from calib.quant.round_to_nearest import check_form, round_weight

FORMS = ("w8a16-channel", "w4a16-channel", "w4a16-g32", "w3a16-channel-asym", "nf4")


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(12, 96, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_rounded_once_stays_where_it_is(form: str) -> None:
    once = round_weight(weight(), form)
    again = round_weight(once.values, form, weight())
    assert torch.equal(once.codes, again.codes) and torch.allclose(once.values, again.values, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_no_other_code_is_nearer(form: str) -> None:
    w, found = weight(), round_weight(weight(), form)
    of_code = dict[tuple[int, int, int], float]()
    for row in range(12):
        for place in range(96):
            group = place // 32 if form == "w4a16-g32" else (row * 96 + place) // 64 if form == "nf4" else 0
            of_code[row if form != "nf4" else -1, group, int(found.codes[row, place])] = float(found.values[row, place])
    for row, place in ((0, 0), (3, 40), (11, 95)):
        group = place // 32 if form == "w4a16-g32" else (row * 96 + place) // 64 if form == "nf4" else 0
        others = [v for (r, g, _), v in of_code.items() if g == group and r == (row if form != "nf4" else -1)]
        nearest = min(others, key=lambda v: abs(v - float(w[row, place])))
        assert abs(nearest - float(w[row, place])) >= abs(float(found.values[row, place] - w[row, place])) - 1e-6


def test_nf4_is_the_library_s() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    codes, state = functional.quantize_4bit(weight(), quant_type="nf4", blocksize=64)
    assert torch.allclose(torch.tensor(nf4()), state.code, atol=1e-6)
    # Not its dequantize_4bit: on CPUs with AVX-512 that (0.50.2) takes wrong scales for rows that 64 does not divide.
    levels = state.code[torch.stack([codes >> 4, codes & 15], -1).flatten().long()]
    values = (levels * state.absmax.repeat_interleave(64)).view_as(weight())
    assert torch.allclose(round_weight(weight(), "nf4").values, values, atol=1e-5)


def test_nf4_of_what_64_does_not_divide() -> None:
    w = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    found = round_weight(w, "nf4")
    assert found.values.shape == w.shape and (found.values - w).abs().max() < 0.16 * w.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_on_the_scales_of_another_weight_codes_can_be_compared(form: str) -> None:
    """A move of a hundredth of a step changes few codes, none at all changes none, a move of many steps most."""
    before = round_weight(weight(), form)
    flips = [
        float((round_weight(weight() + move, form, weight()).codes != before.codes).float().mean())
        for move in (0.0, 2e-4, 1.0)
    ]
    assert flips[0] == 0 and flips[1] < 0.05 and flips[2] > 0.6


def test_forms_that_are_none() -> None:
    for form, said in (("w4a4-channel", "weights alone"), ("w4a16kv4", "weights alone"), ("int4", "is unknown")):
        with pytest.raises(BadInput, match=said):
            check_form(form, [])
    with pytest.raises(BadInput, match="group size 64 does not divide the input width 100 of 'a'"):
        check_form("w4a16-g64", [("a", 100)])
    check_form("w4a16-g50", [("a", 100)])
