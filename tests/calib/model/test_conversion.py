"""What people have instead of a plain folder, compared with what transformers and peft make of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from calib import BadInput
from calib.model.checkpoint import find_model, read_tokenizer
from compressor import Evaluate, evaluate, load
from compressor.engine.load import open_checkpoint
from tests import tiny, walked

IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.model_of(tiny.config_of("qwen3"), dtype=torch.float32), tmp_path_factory.mktemp("qwen3"))


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


def streamed(folder: Path) -> Tensor:
    """The same by the walk over blocks."""
    stream = open_checkpoint(folder, torch.device("cpu")).stream
    return walked.logits_of(stream, IDS)


def renamed(source: Path, to: Path, pairs: dict[str, str], start: str = "") -> Path:
    shutil.copytree(source, to)
    tensors = load_file(to / "model.safetensors")
    for old, new in pairs.items():
        tensors = {name.replace(old, new): t for name, t in tensors.items()}
    save_file({start + name: t for name, t in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("pairs", "start"),
    [
        ({"model.": ""}, ""),  # as embedding models are stored
        ({}, "_orig_mod."),
        ({"model.layers": "model._orig_mod.layers"}, ""),
        ({}, "module."),
        ({"q_proj.weight": "q_proj.base_layer.weight"}, "base_model.model."),
    ],
)
def test_names_that_tools_wrap_are_those_of_the_model(
    pairs: dict[str, str], start: str, qwen: Path, tmp_path: Path
) -> None:
    folder = renamed(qwen, tmp_path / "x", pairs, start)
    want = logits_of(AutoModelForCausalLM.from_pretrained(qwen))
    assert torch.equal(logits_of(load(folder)), want)
    torch.testing.assert_close(streamed(folder), want, atol=2e-5, rtol=1e-4)


def test_adapters_that_stand_among_the_weights_are_refused(qwen: Path, tmp_path: Path) -> None:
    folder = renamed(qwen, tmp_path / "x", {})
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.zeros(2, 24)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"lora_A.*is of adapters that are not merged; merge them"):
        load(folder)


def test_a_stored_head_counts_whatever_the_config_says(qwen: Path, tmp_path: Path) -> None:
    folder = renamed(qwen, tmp_path / "x", {})
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(tensors["model.embed_tokens.weight"].shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    want = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(streamed(folder), want, atol=2e-5, rtol=1e-4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(folder, torch.device("cpu")).stream.config.tie_word_embeddings


def test_a_config_that_says_null_is_of_a_float_model(qwen: Path, tmp_path: Path) -> None:
    folder = renamed(qwen, tmp_path / "x", {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    torch.testing.assert_close(streamed(folder), logits_of(load(qwen)), atol=2e-5, rtol=1e-4)


def adapters(base: Path, to: Path, **config: object) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", **config)
    )
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn(p.shape)
    model.save_pretrained(to)
    return to


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_adapters_are_merged_into_their_base(kind: str, qwen: Path, tmp_path: Path) -> None:
    options = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}}.get(kind, {})
    folder = adapters(qwen, tmp_path / "adapters", **options)
    want = logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen), folder))
    merged = find_model(folder)
    torch.testing.assert_close(logits_of(load(merged)), want, atol=1e-4, rtol=1e-4)
    assert find_model(folder) == merged and merged.name == "adapters"
    assert read_tokenizer(merged) is not None


def test_bases_are_given_where_adapters_name_none(qwen: Path, tmp_path: Path) -> None:
    folder = adapters(qwen, tmp_path / "adapters")
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, message in ((None, "does not name their base"), ("/no/such/base", "not to be had|cannot be had")):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(BadInput, match=rf"{message}.*--base-model"):
            find_model(folder)
    data = tmp_path / "text.txt"
    data.write_text("some words of a text " * 20)
    found = evaluate(folder, Evaluate(base_model=qwen, data=data, length=16))
    assert found.tokens > 0


def test_adapters_of_another_model_are_refused(qwen: Path, tiny_folder: Path, tmp_path: Path) -> None:
    folder = adapters(qwen, tmp_path / "adapters", exclude_modules=["q_proj"])
    other = tiny.save(
        tiny.model_of(tiny.config_of("qwen3", intermediate_size=48), dtype=torch.float32), tmp_path / "other"
    )
    with pytest.raises(BadInput, match=r"cannot be merged into|do not fit"):
        find_model(folder, base_model=other)


def test_a_whole_model_beside_adapters_is_refused(qwen: Path, tmp_path: Path) -> None:
    folder = adapters(qwen, tmp_path / "adapters")
    shutil.copytree(qwen, folder, dirs_exist_ok=True)
    with pytest.raises(BadInput, match="a whole model and adapters beside it"):
        find_model(folder)
    with pytest.raises(BadInput, match=r"base-model: .* is no folder of adapters"):
        find_model(qwen, base_model=qwen)


def fp8(source: Path, to: Path) -> Path:
    """As fine-grained FP8 checkpoints are stored: e4m3 values and a scale for each block of 128 x 128."""
    shutil.copytree(source, to)
    tensors = load_file(source / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if name.endswith("proj.weight"):
            scale = t.abs().max() / 448
            stored[name] = (t / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
        else:
            stored[name] = t.bfloat16()
    save_file(stored, to / "model.safetensors", {"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    options = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (to / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
    return to


def test_few_bits_become_floats_where_that_is_asked(qwen: Path, tmp_path: Path) -> None:
    folder = fp8(qwen, tmp_path / "fp8")
    with pytest.raises(BadInput, match=r"is quantized already \(fp8\).*--dequantize"):
        evaluate(folder, Evaluate(length=16))
    plain = find_model(folder, dequantize=True)
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    was, now = load_file(qwen / "model.safetensors"), load_file(plain / "model.safetensors")
    assert was.keys() == now.keys()
    for name, t in was.items():
        assert float((now[name].float() - t).abs().max()) <= 0.07 * float(t.abs().max()), name
    with pytest.raises(BadInput, match="is a float model already"):
        find_model(qwen, dequantize=True)


def test_what_the_library_makes_no_floats_of_is_refused(qwen: Path, tmp_path: Path) -> None:
    folder = renamed(qwen, tmp_path / "x", {})
    config = json.loads((folder / "config.json").read_text())
    options = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
    with pytest.raises(BadInput, match=r"quantized by gptq, of which the library makes no floats"):
        find_model(folder, dequantize=True)


def test_gguf_files_become_floats_where_that_is_asked(data: Path, tmp_path: Path) -> None:
    """Of a real model, written by our own export."""
    from compressor import Export, export

    export(data / "stories260k", tmp_path / "gguf", Export(to="gguf", held_out=0))
    for place in (tmp_path / "gguf", tmp_path / "gguf" / "model.gguf"):
        with pytest.raises(BadInput, match=r"model\.gguf: is a GGUF file; add --dequantize"):
            find_model(place)
        plain = find_model(place, dequantize=True)
        want = logits_of(load(data / "stories260k"))
        torch.testing.assert_close(logits_of(load(plain)), want, atol=0.15, rtol=0.02)
        assert read_tokenizer(plain) is not None


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"is a file; give the folder"):
        find_model(tmp_path / "model.bin")


@pytest.mark.filterwarnings("ignore")  # peft's, where the adapters are made
@pytest.mark.parametrize("saved", [["embed_tokens"], ["embed_tokens", "lm_head"], ["lm_head"]])
def test_embeddings_that_were_trained_beside_adapters(saved: list[str], qwen: Path, tmp_path: Path) -> None:
    """Of more tokens than the base has, and with a head of its own where the base has them tied."""
    model = AutoModelForCausalLM.from_pretrained(qwen)
    if "embed_tokens" in saved:
        model.resize_token_embeddings(70)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
    torch.manual_seed(1)
    for p in model.parameters():
        p.data = p.data + 0.3 * torch.randn(p.shape) * p.requires_grad
    model.save_pretrained(tmp_path / "adapters")
    want = logits_of(model.eval())
    for merged in (load(find_model(tmp_path / "adapters")), find_model(tmp_path / "adapters")):
        got = streamed(merged) if isinstance(merged, Path) else logits_of(merged)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_adapters_in_folders_of_their_own_are_named(qwen: Path, tmp_path: Path) -> None:
    for name in ("default", "other"):
        adapters(qwen, tmp_path / "adapters" / name)
    with pytest.raises(BadInput, match=r"in the folders default, other; give one of them, such as .*/default"):
        find_model(tmp_path / "adapters")


def test_a_stale_index_beside_a_whole_file_is_refused(qwen: Path, tmp_path: Path) -> None:
    """The library would read the one, other loaders the other."""
    folder = tmp_path / "model"
    shutil.copytree(qwen, folder)
    tensors = load_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    torch.testing.assert_close(streamed(folder), logits_of(load(qwen)), atol=1e-4, rtol=1e-4)
    save_file(tensors, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}))
    with pytest.raises(BadInput, match=r"both model.safetensors and an index of other shards"):
        streamed(folder)
