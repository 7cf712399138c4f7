"""FP4 and MX: codes and scales against compressed-tensors' own, searches against slow ones, folders against
transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from calib import BadInput
from calib.quant.codebooks import e2m1
from calib.quant.floating import exponents, of_exponents, pack_float4, power_of_two, unpack_float4
from calib.quant.grid import (
    NEIGHBOURS,
    decode,
    encode,
    fit_activations,
    fit_clipped,
    on_grid,
    outer_scale,
    storable,
)
from calib.quant.scheme import Scheme
from compressor import Quantize, load, quantize
from compressor.quantization.cost import estimate_quantization
from compressor.quantization.job import validate_quantization
from tests import tiny

NAMES = ("wnvfp4a16", "wmxfp4a16", "wmxfp8a16")


def test_what_is_nearest_in_fp4_is_nearest_and_ties_go_to_the_even_place() -> None:
    """The place is what is stored, and its lowest bit the mantissa."""
    grid, levels = Scheme.parse("wmxfp4a16").weights, torch.tensor(e2m1())
    x = torch.arange(-448, 449) / 64
    found = grid.nearest_(x[None, None].clone())[0, 0]
    apart = (x[:, None] - levels).abs()
    assert torch.equal((x - grid.levels(found)).abs(), apart.amin(1))
    tied = (apart == apart.amin(1, keepdim=True)).sum(1) == 2
    assert tied.sum() == 14 and (found[tied] % 2 == 0).all()


def test_codes_of_fp4_are_packed_as_compressed_tensors_packs_them() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers", reason="needs the extra")
    grid = Scheme.parse("wnvfp4a16").weights
    codes = torch.randint(-7, 8, (5, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack_float4(codes)
    assert torch.equal(packed, helpers.pack_fp4_to_uint8(grid.levels(codes.float())))
    assert torch.equal(unpack_float4(packed), codes)


@given(st.floats(2.0**-100, 2.0**100), st.sampled_from([4, 8]))
def test_powers_of_two_of_activations_are_those_of_compressed_tensors(largest: float, bits: int) -> None:
    utils = pytest.importorskip("compressed_tensors.quantization.utils.mxfp_utils", reason="needs the extra")
    x = torch.tensor([largest])
    found = power_of_two(x, {4: 6.0, 8: 448.0}[bits])
    assert torch.equal(exponents(found).float(), utils.generate_mx_scales(x, bits))
    assert torch.equal(of_exponents(exponents(found)), found)


def test_a_power_of_two_for_what_is_zero_keeps_it_zero() -> None:
    for name in ("wmxfp4amxfp4", "wmxfp8amxfp8"):
        grid = Scheme.parse(name).activations
        assert grid is not None
        x = torch.zeros(2, 64)
        x[1, 40] = 1.0
        assert torch.equal(on_grid(x, *fit_activations(x, grid), grid), x)


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_few_and_the_best_of_those_near_by(name: str) -> None:
    """Against all scales that can be stored, one by one; the largest there are serve outliers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 64, generator=generator) * torch.rand(6, 1, generator=generator)
    weight[0], weight[1, :32] = 0, 0
    grid, importance = Scheme.parse(name).weights, torch.rand(64, generator=generator) + 0.1
    outer = outer_scale([weight], grid)
    scale, zero = fit_clipped(weight, grid, torch.bfloat16, outer, importance)
    assert torch.equal(storable(scale, grid, outer), scale) and (scale > 0).all() and not zero.any()
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    tried = 2.0 ** torch.arange(-12, 4) if outer is None else every * outer
    of_groups = grid.split(importance.expand_as(weight))

    def error(s: Tensor) -> Tensor:
        wrong = decode(encode(weight, s, zero, grid), s, zero, grid) - weight
        return (grid.split(wrong).square() * of_groups).sum(-1)

    least = torch.stack([error(s.expand_as(scale).contiguous()) for s in tried]).amin(0)
    if name == "wmxfp8a16":  # covers all of a group, as FP8 does
        most = grid.split(weight).abs().amax(-1)
        assert (most <= 448 * scale).all() and ((most > 224 * scale) | (most == 0)).all()
    else:
        assert torch.allclose(error(scale), least, rtol=1e-5) and len(NEIGHBOURS) == 2


def test_the_outer_scale_leaves_room_for_scales_half_again_as_large() -> None:
    grid = Scheme.parse("wnvfp4a16").weights
    for largest in (1e-4, 0.7, 6 * 256, 6 * 256 * 1.0001, 3e5):
        outer = outer_scale([torch.zeros(2, 16), torch.full((1, 16), -largest)], grid)
        assert outer is not None and torch.frexp(outer).mantissa == 0.5
        assert 128 < largest / 6 / outer <= 256
    assert outer_scale([torch.zeros(2, 16)], grid) == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wnvfp4a16-g32", "has groups of 16"),
        ("wmxfp4a16-channel", "has groups of 32"),
        ("wmxfp8a8", "write wmxfp8a16 or wmxfp8amxfp8"),
        ("w4amxfp4", "write wmxfp4a16 or wmxfp4amxfp4"),
        ("wnvfp4a16-tensor", "has groups of 16"),
        ("wmxfp4a16-asym", "no zero points"),
    ],
)
def test_what_no_loader_knows_is_refused(name: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        Scheme.parse(name)


def test_names_of_others_mean_what_others_mean() -> None:
    for theirs, ours in (("NVFP4A16", "wnvfp4a16"), ("MXFP4A16", "wmxfp4a16"), ("mxfp4", "wmxfp4amxfp4"),
                         ("MXFP8", "wmxfp8amxfp8"), ("mxfp8a16", "wmxfp8a16")):  # fmt: skip
        assert Scheme.parse(theirs).name == ours == Scheme.parse(ours).name
    with pytest.raises(BadInput, match="take wfp8a16"):
        Scheme.parse("wnvfp4a16").check_widths([("up_proj", 40)])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nvfp4a16", {"block_steps": 0, "tune_steps": 0}),
        ("nvfp4a16", {"rounding": "rtn", "block_steps": 0, "tune_steps": 0}),
        ("nvfp4a16", {"block_steps": 2, "tune_steps": 2, "init": "hadamard"}),
        ("nvfp4a16", {"block_steps": 0, "tune_steps": 2, "learn": True, "steps": 2, "batch": 2}),
        ("mxfp4a16", {"block_steps": 2, "tune_steps": 0}),
        ("nvfp4", {"block_steps": 2, "tune_steps": 2}),
        ("nvfp4", {"rounding": "rtn", "block_steps": 0, "tune_steps": 0}),
        ("mxfp4", {"block_steps": 0, "tune_steps": 0}),
        ("mxfp8", {}),
        ("mxfp8a16", {"rounding": "gptq"}),
    ],
)
def test_transformers_answers_as_parewell_does(
    name: str, options: dict[str, object], folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """It unpacks to bfloat16, which holds every weight of these grids, and is widened for the comparison."""
    pytest.importorskip("compressed_tensors", reason="needs the extra")
    job = Quantize(scheme=name, data=text_file, samples=6, held_out=2, length=32, **options)  # type: ignore[arg-type]
    report = quantize(folder, tmp_path / "out", job, allow_damage=True)
    assert any("bfloat16" in note for note in report["loaders"]["notes"])
    ours = load(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    theirs(torch.zeros(1, 2, dtype=torch.long))  # on the first call it unpacks
    theirs = torch.nn.Module.float(theirs)
    theirs.model.rotary_emb.inv_freq = ours.model.rotary_emb.inv_freq  # whose table was bfloat16 as well
    for ending in ("self_attn.v_proj.weight", "mlp.down_proj.weight"):
        weight = f"model.layers.1.{ending}"
        assert torch.equal(theirs.get_parameter(weight), ours.get_parameter(weight))
    assert torch.equal(tiny.answers(theirs), tiny.answers(ours))


def test_linears_that_readers_fuse_share_a_global_scale(text_file: Path, tmp_path: Path) -> None:
    """vLLM takes the largest of what it puts together, and warns.  Alone, the larger ones would have others."""
    model = tiny.model_of(tiny.config_of("llama", **tiny.BY_128), dtype=torch.float32)
    with torch.no_grad():
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            model.get_submodule(f"model.layers.1.{name}").weight.mul_(8)
    folder = tiny.save(model, tmp_path / "uneven")
    job = Quantize(scheme="nvfp4", data=text_file, samples=6, held_out=2, length=32, block_steps=0, tune_steps=0)
    quantize(folder, tmp_path / "out", job, allow_damage=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for together in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
        first, second = (
            [stored[f"model.layers.{i}.{name}_proj.weight_global_scale"].item() for name in together] for i in (0, 1)
        )
        assert len({*first}) == len({*second}) == 1 and first[0] > second[0]
        assert len({stored[f"model.layers.1.{name}_proj.input_global_scale"].item() for name in together}) == 1


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4a16", "mxfp8a16"])
def test_its_size_is_foretold_and_what_is_no_number_refused(
    name: str, folder: Path, text_file: Path, tmp_path: Path
) -> None:
    job = Quantize(scheme=name, data=text_file, samples=6, held_out=2, length=32, rounding="rtn", tune_steps=0,
                   block_steps=0)  # fmt: skip
    cost = estimate_quantization(folder, tmp_path / "out", job)
    report = quantize(folder, tmp_path / "out", job, allow_damage=True)
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    assert report["bytes"]["after"] == sum(x.nbytes for x in stored.values()) == cost.out_bytes
    scale = stored["model.layers.0.mlp.down_proj.weight_scale"].view(torch.uint8)
    scale[0, 0] = 255
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(BadInput, match=r"down_proj' does not fit together \(NaN\)"):
        load(tmp_path / "out")


def test_whole_numbers_are_what_is_tuned_in_a_few_scales(folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Tuning moves codes, and leaves scales that are few where they were."""
    made = dict[int, dict[str, Tensor]]()
    for steps in (0, 20):
        job = Quantize(scheme="nvfp4a16", data=text_file, samples=6, held_out=2, length=32, init="none",
                       block_steps=steps, tune_steps=0)  # fmt: skip
        quantize(folder, tmp_path / str(steps), job, allow_damage=True)
        made[steps] = load_file(tmp_path / str(steps) / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(made[0][f"{name}.weight_scale"].float(), made[20][f"{name}.weight_scale"].float())
    assert not torch.equal(made[0][f"{name}.weight_packed"], made[20][f"{name}.weight_packed"])


def test_no_start_is_tried_where_activations_are_rounded(text_file: Path, tmp_path: Path) -> None:
    """A rotation would cost a tied model a second table there."""
    config = tiny.config_of("llama", **tiny.BY_128, tie_word_embeddings=True)
    tied = tiny.save(tiny.model_of(config, dtype=torch.bfloat16), tmp_path / "tied")
    for name, tries in (("nvfp4", False), ("nvfp4a16", False), ("mxfp4", False)):
        job = validate_quantization(tied, tmp_path / "out", Quantize(scheme=name, data=text_file, samples=6, held_out=2,
                                                                     length=32))  # fmt: skip
        assert job.tries_starts == tries
    config = tiny.config_of("llama", **tiny.BY_128, tie_word_embeddings=False)
    untied = tiny.save(tiny.model_of(config, dtype=torch.bfloat16), tmp_path / "untied")
    for name, tries in (("nvfp4", False), ("nvfp4a16", True)):
        options = Quantize(scheme=name, data=text_file, samples=16, held_out=2, length=32)
        assert validate_quantization(untied, tmp_path / "out", options).tries_starts == tries


def test_tables_stay_where_no_reader_knows_them(text_file: Path) -> None:
    for scheme in ("nvfp4", "mxfp4a16", "mxfp8"):
        for table in ("w8", "q6_k"):
            with pytest.raises(BadInput, match="goes with whole numbers and FP8 alone"):
                Quantize(scheme=scheme, data=text_file, embedding=table)


@pytest.mark.parametrize(("name", "served"), [("mxfp4a16", True), ("nvfp4a16", False), ("fp8_block", False)])
def test_experts_are_read_as_written_or_refused(name: str, served: bool, text_file: Path, tmp_path: Path) -> None:
    """transformers drops the global scales of experts, and rounds no inputs of theirs."""
    pytest.importorskip("compressed_tensors", reason="needs the extra")
    folder = tiny.save(
        tiny.model_of(tiny.config_of("mixtral", **tiny.BY_128), dtype=torch.bfloat16), tmp_path / "experts"
    )
    job = Quantize(scheme=name, data=text_file, samples=6, held_out=2, length=32, rounding="rtn", block_steps=0,
                   tune_steps=0)  # fmt: skip
    report = quantize(folder, tmp_path / "out", job, allow_damage=True)
    ours, plain = load(tmp_path / "out").state_dict(), load(folder).state_dict()
    experts = "model.layers.0.mlp.experts.down_proj"
    assert (ours[experts] - plain[experts]).norm() < 0.2 * plain[experts].norm()
    assert any("transformers" in loader for loader in report["loaders"]["loaders"]) == served
    if not served:
        with pytest.raises(ValueError, match="format"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        return
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(theirs.state_dict()[experts].float(), ours[experts])
