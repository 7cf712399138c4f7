"""Keys and values in FP8: scales against what passes, folders against transformers, which rounds on the way into its
cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from calib import BadInput
from calib.blockwise.activation_store import ActivationStore
from calib.blockwise.model import BlockwiseModel
from calib.blockwise.row_states import RowStates
from calib.model.weights import Weights
from calib.quant.grid import fit_activations, on_grid
from calib.quant.scheme import Scheme
from calib.stats.perplexity import Quality
from compressor import Distill, Evaluate, Quantize, distill, evaluate, load, quantize
from compressor.engine.input_statistics import key_value_ranges
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.quantization.cost import estimate_quantization
from compressor.quantization.job import validate_quantization
from tests import any_type, tiny

QUICK: dict[str, Any] = {"samples": 6, "held_out": 2, "length": 32}


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("w4a16-kvfp8", "w4a16kvfp8-g128"),
        ("W4A16-G64-KVFP8", "w4a16kvfp8-g64"),
        ("w4a4kvfp8", "w4a4kvfp8-g128"),
        ("w8a8_kvfp8", "w8a8kvfp8"),
        ("FP8_DYNAMIC-kvfp8", "wfp8afp8kvfp8"),
        ("fp8-kvfp8", "wfp8afp8kvfp8-tensor"),
        ("nvfp4a16-kvfp8", "wnvfp4a16kvfp8"),
        ("nvfp4a16-kvfp8-head", "wnvfp4a16kvfp8-head"),
        ("W4A16-KVFP8_HEAD", "w4a16kvfp8-head-g128"),
        ("w4a4-kv4", "w4a4kv4"),
    ],
)
def test_what_is_said_of_keys_may_stand_behind_a_hyphen(name: str, canonical: str) -> None:
    scheme = Scheme.parse(name)
    assert scheme.name == canonical and Scheme.parse(canonical) == scheme
    assert Scheme.recorded_name(canonical) == canonical
    assert scheme.has_fixed_keys == (not scheme.has_own_keys) == ("kvfp8" in name.lower())


def test_of_weights_alone_there_are_no_keys() -> None:
    for name in ("q4_k-kvfp8", "nf4-kv4"):
        with pytest.raises(BadInput, match="is of weights alone; leave out kv"):
            Scheme.parse(name)
    with pytest.raises(BadInput, match="is unknown"):
        Scheme.parse("w4a16kvfp8kvfp8")


def test_values_past_the_scale_s_end_are_clamped_and_others_rounded_to_the_type() -> None:
    grid, scale = Scheme.parse("w4a16kvfp8").kv, torch.tensor([0.02])
    assert grid is not None
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)) * 5
    expected = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(on_grid(x, *fit_activations(x, grid, outer=scale), grid), expected)
    assert expected.abs().max() == 448 * scale < x.abs().max()


def _job(name: str, text_file: Path, **options: Any) -> Quantize:
    return Quantize(scheme=name, data=text_file, **(QUICK | options))


def _step_by_step(model: Any) -> torch.Tensor:
    """Logits of nine tokens, the last four one at a time on what is in the cache."""
    ids, cache, found = torch.arange(9)[None] * 5 % 30, DynamicCache(), list[torch.Tensor]()
    with torch.no_grad():
        for some in (ids[:, :5], *ids[:, 5:].split(1, 1)):
            found.append(model(some, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("w4a16-kvfp8-g32", {"block_steps": 2, "tune_steps": 2}),
        ("w4a16kvfp8-g32", {"block_steps": 0, "tune_steps": 2, "init": "hadamard", "learn": True, "steps": 2}),
        ("w8a8kvfp8", {"rounding": "gptq", "float_target": True, "block_steps": 0, "tune_steps": 0}),
        ("w8a16-channel-kvfp8", {"learn": False, "ignore": ("re:.*layers.0.",)}),
        ("wfp8afp8kvfp8", {}),
        ("fp8_block-kvfp8", {}),
        ("w4a4kvfp8-g32", {"online": False, "block_steps": 2, "tune_steps": 0}),
        ("fp8-kvfp8", {"rounding": "gptq", "block_steps": 2, "tune_steps": 2}),
        ("w4a16kvfp8-head-g32", {"block_steps": 2, "tune_steps": 2}),
        ("w8a8kvfp8-head", {"learn": False}),
    ],
)
def test_transformers_answers_as_parewell_does(
    name: str, options: dict[str, Any], folder: Path, text_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the extra")
    report = quantize(folder, tmp_path / "out", _job(name, text_file, **options), allow_damage=True)
    loaders = report["loaders"]["loaders"]
    assert "transformers (with the compressed-tensors package)" in loaders and "vLLM" in loaders
    ours, theirs = load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(tiny.answers(theirs), tiny.answers(ours))
    assert torch.equal(_step_by_step(theirs), _step_by_step(ours))
    for module in theirs.modules():
        if hasattr(module, "k_scale"):
            module.k_scale.data *= 3
    assert not torch.equal(tiny.answers(theirs), tiny.answers(ours))  # so that it is there that keys are rounded


def test_nvfp4_beside_them_and_bfloat16(folder: Path, text_file: Path, tmp_path: Path) -> None:
    """In bfloat16 transformers divides, rounds to bfloat16 and then to FP8, where a runtime's kernel, as parewell,
    divides in single precision: what lies near a tie may differ by a level."""
    pytest.importorskip("compressed_tensors", reason="needs the extra")
    job = _job("nvfp4a16-kvfp8", text_file, rounding="rtn", block_steps=0, tune_steps=0)
    report = quantize(folder, tmp_path / "out", job, allow_damage=True)
    assert report["loaders"]["loaders"][1:] == ["transformers (with the compressed-tensors package)", "vLLM"]
    ours = load(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    theirs(torch.zeros(1, 2, dtype=torch.long))  # on the first call it unpacks
    theirs = torch.nn.Module.float(theirs)
    theirs.model.rotary_emb.inv_freq = ours.model.rotary_emb.inv_freq  # whose table was bfloat16 as well
    assert torch.equal(tiny.answers(theirs), tiny.answers(ours))


@pytest.mark.parametrize("name", ["w4a16kvfp8-g32", "w4a16kvfp8-head-g32"])
def test_scales_are_of_keys_after_the_rotary_embedding_and_of_values(
    name: str, folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """The largest that transformers' own cache holds on the calibration rows, of all heads or of each, over 448: of the
    float model in the first block, and in the second of its float weights on what the rounded block before it gives."""
    options, each = _job(name, text_file, init="none", block_steps=0, tune_steps=0), "head" in name
    ids = validate_quantization(folder, tmp_path / "out", options).rows.calibration.ids
    quantize(folder, tmp_path / "out", options, allow_damage=True)
    stored, plain, mixed = load_file(tmp_path / "out" / "model.safetensors"), load(folder), load(tmp_path / "out")
    mixed.model.layers[1].load_state_dict(plain.model.layers[1].state_dict())
    for layer, model in enumerate((plain, mixed)):
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values.layers[layer]
        for kind, held in (("k", cache.keys), ("v", cache.values)):
            scale = stored[f"model.layers.{layer}.self_attn.{kind}_scale"]
            most = held.abs().amax((0, 2, 3))[:, None, None] if each else held.abs().max()[None]
            assert torch.equal(scale, (most / 448).bfloat16())
            assert not each or len(scale.unique()) > 1


def test_padding_has_no_say_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model_of(tiny.config_of("llama"), dtype=torch.float32)
    stream = BlockwiseModel(model.config, Weights(tiny.save(model, tmp_path)), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, 24, generator=generator)
    padded = torch.cat([hidden, torch.randn(9, 40, 24, generator=generator)], 1)
    monkeypatch.setattr("calib.blockwise.model.TOKENS_AT_ONCE", 200)
    found = list[torch.Tensor]()
    for states, real in (
        (hidden, torch.ones(9, 5)),
        (padded, torch.arange(45).expand(9, 45) < 5),
        (padded, torch.ones(9, 45)),
    ):
        store = ActivationStore(tuple(states.shape), states.dtype, 10**9, Path())
        store[:] = states
        rows = RowStates(store, stream.batches(torch.zeros(states.shape[:2], dtype=torch.int64)))
        online = RuntimeTransforms(kv=Scheme.parse("w4a16kvfp8").kv)
        found.append(key_value_ranges(stream, 0, stream.read_block(0), rows, real.bool(), online)["self_attn"])
    assert torch.allclose(found[0], found[1], rtol=1e-5)
    assert (found[2] > found[0]).any()


def test_its_size_is_foretold_and_what_is_no_scale_refused(folder: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("w4a16kvfp8-g32", "w4a16kvfp8-head-g32", "fp8-kvfp8"):
        job = _job(name, text_file, rounding="rtn", block_steps=0, tune_steps=0)
        cost = estimate_quantization(folder, tmp_path / name, job)
        report = quantize(folder, tmp_path / name, job, allow_damage=True)
        stored = load_file(tmp_path / name / "model.safetensors")
        assert report["bytes"]["after"] == sum(x.nbytes for x in stored.values()) == cost.out_bytes
    file, scale = tmp_path / "fp8-kvfp8" / "model.safetensors", "model.layers.1.self_attn.v_scale"
    for wrong, why in ((-1.0, "is no scale"), (float("nan"), "is no scale"), (None, "is not stored as parewell.json")):
        changed = {n: x for n, x in stored.items() if n != scale}
        save_file(changed if wrong is None else changed | {scale: torch.tensor([wrong])}, file, {"format": "pt"})
        with pytest.raises(BadInput, match=rf"{scale}' {why}"):
            load(tmp_path / "fp8-kvfp8")


def test_with_hadamards_at_run_time_it_is_parewell_s_alone(folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Keys are not rotated, as FP8 has room for their outliers; what is stored is what was measured."""
    job = _job("w4a4kvfp8-g32", text_file, held_out_data=text_file, block_steps=2, tune_steps=2)
    report = quantize(folder, tmp_path / "out", job, allow_damage=True)
    assert report["loaders"]["loaders"] == ["parewell.load"]
    assert not (tmp_path / "out" / "parewell.safetensors").exists()
    again = evaluate(tmp_path / "out", Evaluate(data=text_file, rows=2, length=32))
    assert isinstance(again, Quality)
    assert again.perplexity == pytest.approx(report["quality"]["perplexity"], rel=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["type"] == "float" and "only" in config["config_groups"]["group_0"]["weights"]


def test_transformers_is_not_named_where_it_would_leave_keys_alone(
    folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """With dequantize=True, which it needs for zero points and a quantized embedding, it drops the cache's scheme."""
    for more in (
        {"scheme": "w4a16kvfp8-g32-asym"},
        {"scheme": "w8a16kvfp8-channel", "embedding": "w8", "lm_head": "w8"},
    ):
        job = Quantize(data=text_file, **(QUICK | {"rounding": "rtn", "block_steps": 0, "tune_steps": 0} | more))
        report = quantize(folder, tmp_path / "out", job, allow_damage=True)["loaders"]
        assert report["loaders"] == ["parewell.load", "vLLM"]
        assert any("it leaves keys and values alone" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("kind", "scheme", "why"),
    [
        ("gpt2", "w8a16kvfp8-channel", "none of the types with a cache"),
        ("doge", "w8a16kvfp8-channel", "reads values again"),
        ("deepseek_v3", "w8a16kvfp8-channel", "as one latent state"),
        ("mimo_v2_flash", "w8a16kvfp8-head-channel", "of other numbers of heads than num_key_value_heads"),
    ],
)
def test_models_whose_loaders_would_drop_scales_are_refused(
    kind: str, scheme: str, why: str, text_file: Path, tmp_path: Path
) -> None:
    folder = tiny.save(any_type.model_of(kind).float(), tmp_path / "model")
    with pytest.raises(BadInput, match=rf"loaders have no place for scales of keys and values.*{why}"):
        quantize(folder, tmp_path / "out", _job(scheme, text_file))


def test_students_are_not_trained_with_them(folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"found by calibration.*take one without kvfp8"):
        distill(folder, tmp_path / "student", Distill(data=text_file, student_scheme="w4a16kvfp8-g32"))
    quantize(folder, tmp_path / "out", _job("w4a16kvfp8-g32", text_file, rounding="rtn"), allow_damage=True)
    with pytest.raises(BadInput, match=r"found by calibration.*give one without kvfp8"):
        distill(folder, tmp_path / "student", Distill(data=text_file, student=tmp_path / "out"))
