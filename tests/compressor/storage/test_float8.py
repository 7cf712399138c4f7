"""FP8: codes against torch's own cast, scales against closed forms, folders against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from calib import BadInput
from calib.jobs.recipe import read_recipe
from calib.quant.codebooks import e4m3
from calib.quant.floating import as_float8, codes_of_float8, float8_of_codes
from calib.quant.grid import decode, encode, fit_activations, fit_clipped, fixed_scale, on_grid
from calib.quant.scheme import FP8_BLOCK, Scheme
from compressor import Quantize, load, quantize
from compressor.quantization.job import validate_quantization
from tests import tiny

EVERY = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def test_levels_are_all_numbers_of_the_type() -> None:
    numbers = EVERY.float()
    assert list(e4m3()) == sorted(set(numbers[~numbers.isnan()].tolist()))


def test_codes_are_places_in_the_table_and_come_back() -> None:
    numbers = EVERY[~EVERY.float().isnan()]
    codes = codes_of_float8(numbers)
    assert torch.equal(torch.tensor(e4m3())[codes.long() + 126], numbers.float())
    assert torch.equal(float8_of_codes(codes).float(), numbers.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_nearest_is_what_the_cast_gives_ties_and_ends_included(dtype: torch.dtype) -> None:
    grid, levels = Scheme.parse("wfp8a16").weights, torch.tensor(e4m3(), dtype=dtype)
    ties = (levels[1:] + levels[:-1]) / 2
    x = torch.cat([levels, ties, ties * (1 + 1e-6), ties * (1 - 1e-6), levels.new_tensor([449, 1e6, -1e6, torch.inf])])
    found = grid.levels(grid.nearest_(x[None, None].clone()))[0, 0]
    assert torch.equal(found, x.clamp(-448, 448).to(torch.float8_e4m3fn).to(dtype))
    even = as_float8(ties).view(torch.uint8)
    assert ((even & 1) == 0).all()


@pytest.mark.parametrize(("name", "rows", "columns"), [("wfp8a16", 1, 256), ("wfp8afp8-b128", FP8_BLOCK, FP8_BLOCK)])
def test_scales_hold_the_largest_of_what_shares_them(name: str, rows: int, columns: int) -> None:
    """Of the last blocks, too, which have fewer rows; a block of zeros has a scale like any other."""
    weight, grid = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)), Scheme.parse(name).weights
    weight[: rows * 2, :columns] = 0
    scale, zero = fit_clipped(weight, grid, torch.bfloat16)
    for top in range(0, 300, rows):
        for left in range(0, 256, columns):
            own = scale[top : top + rows, left // columns]
            most = weight[top : top + rows, left : left + columns].abs().max()
            assert (own == own[0]).all() and own[0] > 0
            assert not most or own[0] == (most / 448).bfloat16()
    spread = scale.float().repeat_interleave(columns, 1)
    expected = as_float8(weight / spread).float() * spread
    codes = encode(weight, scale.float(), zero, grid)
    assert torch.equal(decode(codes, scale.float(), zero, grid), expected)


@pytest.mark.parametrize(("name", "group"), [("wfp8afp8", 256), ("wfp8afp8-b128", 128), ("w4afp8", 256)])
def test_activations_are_rounded_by_token_or_by_groups_of_a_token(name: str, group: int) -> None:
    x, grid = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)), Scheme.parse(name).activations
    assert grid is not None
    x[2] = 0
    parts = x.unflatten(-1, (-1, group))
    scale = parts.abs().amax(-1, keepdim=True) / 448
    expected = torch.where(scale > 0, as_float8(parts / scale.clamp(min=1e-9)).float() * scale, 0.0).flatten(-2)
    assert torch.equal(on_grid(x, *fit_activations(x, grid), grid), expected)


def test_one_scale_for_all_holds_the_largest_and_is_one_of_nothing() -> None:
    x, grid = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)), Scheme.parse("fp8").weights
    scale, zero = fit_clipped(x, grid, torch.bfloat16)
    assert scale.dtype == torch.bfloat16 and (scale == (x.abs().max() / 448).bfloat16()).all()
    expected = as_float8(x / scale.float()).float() * scale.float()
    assert torch.equal(decode(encode(x, scale.float(), zero, grid), scale.float(), zero, grid), expected)
    assert fixed_scale(torch.zeros(256), grid, torch.bfloat16) == 1  # of inputs that never fired, such as an expert's


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wfp8a16-g64", "leave out -g64, or write -b128"),
        ("wfp8a8", "no loader takes FP8 weights with integer activations"),
        ("wfp8a16-b128", "blocks go with activations in FP8"),
        ("w4a16-b128", "blocks of 128 x 128 are of FP8 weights"),
        ("wfp8afp8-asym", "FP8 has no zero points"),
        ("w4afp8-g128-asym", "FP8 has no zero points"),
        ("wfp8a16-tensor", "write wfp8a16"),
        ("w4a16-tensor", "one scale per weight is of FP8 weights"),
        ("wfp8a8-tensor", "no loader takes FP8 weights with integer activations"),
    ],
)
def test_what_no_loader_knows_is_refused(name: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        Scheme.parse(name)


def test_what_learning_is_for_is_left_out_unless_it_is_asked_for() -> None:
    job = Quantize(scheme="FP8_DYNAMIC")
    assert (job.scheme, job.rounding, job.rotations, job.tuned, job.block_tuned) == ("wfp8afp8", "rtn", "none", 0, 0)
    assert not job.calibrates
    asked = Quantize(scheme="wfp8afp8", rounding="gptq", block_steps=3)
    assert (asked.rounding, asked.block_tuned) == ("gptq", 3)
    for options, why in (({"target_bits": 4.5}, "has 8 bits for every weight"), ({"group_size": "64"}, "has its own")):
        with pytest.raises(BadInput, match=why):
            Quantize(scheme="wfp8a16", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fp8_dynamic", {}),
        ("fp8_block", {}),
        ("fp8", {}),
        ("fp8", {"rounding": "gptq", "block_steps": 2, "tune_steps": 2, "init": "hadamard"}),
        ("wfp8a16", {}),
        ("wfp8afp8", {"rounding": "gptq"}),
        ("wfp8a16", {"block_steps": 2, "tune_steps": 2, "learn_rounding": True}),
        ("fp8_dynamic", {"rounding": "gptq", "block_steps": 2}),
        ("w4afp8-g32", {"block_steps": 2, "tune_steps": 2}),
    ],
)
def test_transformers_answers_as_parewell_does(
    name: str, options: dict[str, object], folder: Path, text_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the extra")
    job = Quantize(scheme=name, data=text_file, samples=6, held_out=2, length=32, **options)  # type: ignore[arg-type]
    report = quantize(folder, tmp_path / "out", job, allow_damage=True)
    assert "transformers (with the compressed-tensors package)" in report["loaders"]["loaders"]
    assert "vLLM" in report["loaders"]["loaders"] or name == "w4afp8-g32"
    ours = tiny.answers(load(tmp_path / "out"))
    theirs = tiny.answers(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert torch.equal(theirs, ours)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    weight = stored.get("model.layers.0.mlp.down_proj.weight")
    assert (weight is not None and weight.dtype == torch.float8_e4m3fn) == (name != "w4afp8-g32")
    assert read_recipe(tmp_path / "out")[-1]["scheme"] == Scheme.parse(name).name


def test_one_scale_is_of_all_that_readers_fuse_and_one_of_their_inputs(
    folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """The largest weight of queries, keys and values, and of gate and up, over 448; the largest input, too, that the
    float model's first block has on the calibration rows."""
    job = Quantize(scheme="FP8", data=text_file, samples=6, held_out=2, length=32)
    assert (job.scheme, job.rounding, job.calibrates) == ("wfp8afp8-tensor", "rtn", True)
    ids = validate_quantization(folder, tmp_path / "out", job).rows.calibration.ids
    quantize(folder, tmp_path / "out", job, allow_damage=True)
    stored, plain = load_file(tmp_path / "out" / "model.safetensors"), load(folder)
    seen, block = list[Tensor](), "model.layers.0"
    reader = plain.get_submodule(f"{block}.self_attn.q_proj")
    reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max()))
    plain(ids)
    for module, together in (("self_attn", "qkv"), ("self_attn", "o"), ("mlp", ("gate", "up")), ("mlp", ("down",))):
        of = [f"{block}.{module}.{one}_proj" for one in together]
        weights = torch.cat([plain.get_parameter(f"{one}.weight") for one in of])
        for one in of:
            assert stored[f"{one}.weight_scale"].tolist() == [(weights.abs().max() / 448).bfloat16().item()]
            assert stored[f"{one}.input_scale"].shape == (1,)
            assert stored[f"{one}.input_scale"] == stored[f"{of[0]}.input_scale"]
    assert stored[f"{block}.self_attn.q_proj.input_scale"] == (seen[0] / 448).bfloat16()


def test_in_bfloat16_inputs_are_divided_as_kernels_do_it(folder: Path, text_file: Path, tmp_path: Path) -> None:
    """In single precision, and rounded to FP8 once: transformers on a CPU has the quotient in bfloat16, so that some
    inputs near a tie become the next level.  Weights are the same."""
    pytest.importorskip("compressed_tensors", reason="needs the extra")
    quantize(folder, tmp_path / "out", Quantize(scheme="FP8", data=text_file, samples=2, length=32), allow_damage=True)
    ours = load(tmp_path / "out", dtype=torch.bfloat16).get_submodule("model.layers.0.mlp.up_proj")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    model(torch.zeros(1, 2, dtype=torch.long))  # on the first call it unpacks
    theirs, x = model.model.layers[0].mlp.up_proj, torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x, scale = x.bfloat16(), theirs.input_scale
    in_float32 = ((x / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale.float()).bfloat16()
    in_bfloat16 = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).bfloat16() * scale
    assert torch.equal(ours(x), torch.nn.functional.linear(in_float32, ours.weight, ours.bias))
    assert torch.equal(theirs(x), torch.nn.functional.linear(in_bfloat16, ours.weight, ours.bias))
    assert 0 < (in_float32 != in_bfloat16).float().mean() < 0.05


def test_what_can_be_exported_of_a_scheme_is_a_scheme() -> None:
    for name in ("wfp8afp8", "wfp8afp8-b128", "wfp8afp8-tensor", "w4afp8-g32", "w4a16kvfp8"):
        weights = Scheme.parse(name).weights_only()
        assert Scheme.parse(weights.name) == weights and weights.activations is weights.kv is None


def test_a_weight_that_is_no_number_is_refused(folder: Path, text_file: Path, tmp_path: Path) -> None:
    quantize(folder, tmp_path / "out", Quantize(scheme="wfp8a16", data=text_file, length=32), allow_damage=True)
    file, name = tmp_path / "out" / "model.safetensors", "model.layers.0.mlp.down_proj.weight"
    stored = load_file(file)
    stored[name].view(torch.uint8)[0, 0] = 127
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(BadInput, match=r"down_proj' does not fit together \(NaN\)"):
        load(tmp_path / "out")


def test_float8_that_parewell_did_not_write_is_no_weight(folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Its numbers mean something beside their scales alone."""
    quantize(folder, tmp_path / "out", Quantize(scheme="wfp8a16", data=text_file, length=32), allow_damage=True)
    (tmp_path / "out" / "parewell.json").unlink()
    config = (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "out" / "config.json").write_text(config.replace("quantization_config", "comment"))
    with pytest.raises(BadInput, match=r"has dtype F8_E4M3, whose scales are unknown, as config.json has no"):
        quantize(tmp_path / "out", tmp_path / "again", Quantize(data=text_file, length=32))
