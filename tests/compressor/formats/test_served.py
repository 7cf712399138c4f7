"""`quantize --serve vllm`: what is written is what vLLM and compressed-tensors read, transformers refuses it, and the
rotation that it describes gives what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from calib import BadInput
from calib.model.config import read_json
from calib.quant.grid import fit_activations, on_grid
from calib.quant.scheme import Scheme
from cli.replay import replay_recipe
from compressor import Quantize, load, quantize
from compressor.engine.load import open_checkpoint
from compressor.quantization.job import validate_quantization
from compressor.storage.compressed_tensors import compressed_tensors_config
from compressor.storage.transform_config import can_be_served, with_hadamard
from tests import tiny
from tests.compressor.test_vllm import scheme_of_vllm

WIDE = {"hidden_size": 48, "intermediate_size": 64, "head_dim": 12, "attention_bias": False, "mlp_bias": False}
IDS = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.model_of(tiny.config_of("llama", **WIDE), dtype=torch.float32)
    return tiny.save(made, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def small(text_file: Path) -> Quantize:
    return Quantize(scheme="w4a8-g16", data=text_file, samples=2, held_out=1, length=16, learn=False, serve="vllm")


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def float_model(out: Path) -> Any:
    """A float model with the values that OUT's codes stand for."""
    config = read_json(out / "config.json")
    config.pop("quantization_config")
    checkpoint = open_checkpoint(out, torch.device("cpu"))
    plain = AutoModelForCausalLM.from_config(checkpoint.stream.config).float().eval()
    stream = checkpoint.stream
    stored = {name: stream.read_stored([name])[name] for name in stream.expected}
    missing, unexpected = plain.load_state_dict(stored, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return plain


@pytest.mark.parametrize("scheme", ["w4a8-g16", "w8a8", "w4a4-g16"])
def test_the_rotation_that_is_described_gives_what_was_measured(
    scheme: str, model: Path, small: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compressed-tensors' own library turns the inputs of the stored weights, and inputs are rounded after that: the
    logits of parewell.load, in the library's order of sums.  The largest value of a token, on which its scale is set,
    lies half way between two levels, so that another order rounds some tokens otherwise."""
    library = pytest.importorskip("compressed_tensors.transform", reason="needs the extra")
    quantize(model, tmp_path / "out", replace(small, scheme=scheme))
    plain, grid = float_model(tmp_path / "out"), Scheme.parse(scheme).activations
    assert grid is not None
    described = read_json(tmp_path / "out/config.json")["quantization_config"]["transform_config"]
    (group,) = described["config_groups"].values()
    online = {**group, "apply": [one for one in group["apply"] if one["location"] == "input"]}  # as the rest is stored
    dropped = answers(plain)
    library.apply_transform_config(plain, library.TransformConfig.model_validate({"config_groups": {"R4": online}}))
    turned = [name for name, _ in plain.named_parameters() if "R4" in name]
    assert turned and all(".mlp.down_proj." in name for name in turned)
    exact = answers(plain)
    for name, module in plain.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, x: (on_grid(x[0], *fit_activations(x[0], grid), grid),))
    theirs, ours = answers(plain), answers(load(tmp_path / "out"))
    assert (theirs - ours).norm() < 0.1 * ours.norm() < (dropped - exact).norm()
    matrix = torch.from_numpy(scipy.linalg.hadamard(64)).float()
    monkeypatch.setattr("compressor.engine.runtime_transforms.apply_hadamard", lambda x: x @ matrix / 8)
    ours = answers(load(tmp_path / "out"))
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max()


def test_vllm_takes_it_and_transformers_does_not(model: Path, small: Quantize, tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors", reason="needs the extra")
    report = quantize(model, tmp_path / "out", small)
    config = read_json(tmp_path / "out/config.json")["quantization_config"]
    assert scheme_of_vllm(config) == "WNA8Int"
    found = library.transform.TransformConfig.model_validate(config["transform_config"]).config_groups["R4"]
    assert [(one.location, one.inverse, one.is_online()) for one in found.apply] == [
        ("input", False, True), ("weight_input", True, False),
    ]  # fmt: skip
    for one in found.apply:
        assert library.utils.is_match("model.layers.1.mlp.down_proj", nn.Linear(2, 2), one.targets, one.ignore)
        for other in ("model.layers.1.mlp.up_proj", "model.layers.1.self_attn.o_proj", "lm_head", "mlp.down_projector"):
            assert not library.utils.is_match(other, nn.Linear(2, 2), one.targets, one.ignore)
    with pytest.raises(ValueError, match="rotates_as_it_runs"):
        library.quantization.QuantizationConfig.model_validate(config)
    with pytest.raises(ValueError, match="rotates_as_it_runs"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report["loaders"]["loaders"] == ["parewell.load", "vLLM"]
    notes = " ".join(report["loaders"]["notes"])
    assert all(text in notes for text in ("one GPU", "transformers drops", "SGLang 0.5.10 drop the rotation"))
    assert replay_recipe(tmp_path / "out", tmp_path / "again").agrees


def test_it_is_the_folder_that_parewell_alone_runs_but_for_what_others_read(
    model: Path, small: Quantize, tmp_path: Path
) -> None:
    quantize(model, tmp_path / "out", small)
    quantize(model, tmp_path / "alone", replace(small, serve=None, online=True))
    names = ("model.safetensors", "tokenizer.json")
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "alone" / n).read_bytes() for n in names)
    served, alone = (read_json(tmp_path / n / "config.json") for n in ("out", "alone"))
    found = [config.pop("quantization_config") for config in (served, alone)]
    assert served == alone and scheme_of_vllm(found[0]) and not scheme_of_vllm(found[1])
    plain = compressed_tensors_config(Scheme.parse(small.scheme), plain=True)
    assert found[0] == with_hadamard(plain, ["mlp.down_proj"])


REFUSED = [
    ({"scheme": "w4a4kv4"}, "goes with keys and values in 16 bits alone; leave out kv4,"),
    ({"scheme": "w4a16-g16"}, "which w4a16-g16 does without"),
    ({"scheme": "wfp8afp8"}, "which wfp8afp8 does without"),
    ({"online": False}, "--no-online leaves out"),
    ({"init": "none"}, "--init none leaves out"),
    ({"scheme": "w4a4-g16-asym"}, "no scheme of vLLM's fits w4a4-g16-asym"),
    ({"scheme": "w4a6-g16"}, "no scheme of vLLM's fits w4a6-g16"),
    ({"lm_head": "w8"}, "embedding and head in 16 bits"),
    ({"ignore": ("re:.*down_proj",)}, "which --ignore leaves as it is"),
    ({"format": "gptq"}, "rounds or rotates as it runs"),
    ({"rounding": "none"}, "rounding none leaves a plain model"),
    ({"serve": "sglang"}, "choose from vllm"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_what_vllm_cannot_run_is_refused(
    options: dict[str, Any], reason: str, model: Path, small: Quantize, tmp_path: Path
) -> None:
    with pytest.raises(BadInput) as refused:
        validate_quantization(model, tmp_path / "out", replace(small, **options))
    assert reason in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("kind", "sizes", "reason"), [
    ("llama", {**WIDE, "intermediate_size": 96}, "has 96 inputs, and vLLM's Hadamard matrices have powers of two"),
    ("llama", {**WIDE, "mlp_bias": True}, "has a bias, which vLLM refuses"),
    ("mixtral", WIDE, "in a mixture of experts"),
    ("gemma2", {**WIDE, "tie_word_embeddings": True}, None),
])  # fmt: skip
def test_models_that_vllm_cannot_rotate_are_refused(
    kind: str, sizes: dict[str, Any], reason: str | None, small: Quantize, tmp_path: Path
) -> None:
    folder = tiny.save(tiny.model_of(tiny.config_of(kind, **sizes), dtype=torch.float32), tmp_path / "model")
    if reason is None:  # whose tied embedding stays one table, as nothing turns the residual stream
        validate_quantization(folder, tmp_path / "out", small)
        return
    with pytest.raises(BadInput, match=reason):
        validate_quantization(folder, tmp_path / "out", small)


def test_widths_of_vllm_s_kernel() -> None:
    assert [n for n in range(1, 70) if can_be_served(n)] == [2, 4, 8, 16, 32, 64]
    assert can_be_served(32768) and not can_be_served(65536)
