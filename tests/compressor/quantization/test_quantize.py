"""The whole job on tiny and on real checkpoints, loaded back by the real library."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaForCausalLM

from calib import BadInput, embedded
from calib.data.corpus import sample_rows
from calib.data.load import load_corpus
from calib.model.checkpoint import read_tokenizer
from calib.model.config import as_configured
from calib.stats.perplexity import compare
from compressor import Quantize, load, quantize
from tests import tiny
from tests.architectures import ARCHITECTURES
from tests.kills import digest

SMALL = Quantize(
    scheme="w4a16-channel",
    samples=6,
    held_out=3,
    length=32,
    steps=3,
    batch=2,
    top_k=8,
    block_steps=0,
    tune_steps=0,
    precision="float32",
)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, tiny.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    "scheme",
    [
        "w4a16-channel",
        "w3a16-channel",
        "w4a16-g8",
        "w2a16-channel",
        "w5a16-g8",
        "w8a16-channel",
        "w8a8",
        "w4a8-channel",
        "w4a4-channel-sym",
        "w4a4-channel-asym",
    ],
)
def test_plain_transformers_answers_as_we_measured(
    scheme: str, tiny_folder: Path, text_file: Path, tmp_path: Path, ids: Tensor
) -> None:
    options = SMALL.without_learning(scheme=scheme, data=text_file, online=False)
    report = quantize(tiny_folder, tmp_path / "out", options)
    ours = logits(load(tmp_path / "out"), ids)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(theirs, ids) - ours).abs().max() < 1e-4
    assert any("transformers" in loader for loader in report["loaders"]["loaders"])


@pytest.mark.parametrize("scheme", ["w4a16-g8", "w8a8"])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_loads_in_plain_transformers_or_refuses_to(
    model_type: str, scheme: str, text_file: Path, tmp_path: Path, ids: Tensor
) -> None:
    source = tiny.save(tiny.model_of(tiny.config_of(model_type), dtype=torch.float32), tmp_path / "model")
    report = quantize(source, tmp_path / "out", SMALL.without_learning(scheme=scheme, data=text_file))
    if len(report["loaders"]["loaders"]) == 1:
        assert model_type in ("mixtral", "qwen3_moe") and scheme == "w8a8"
        with pytest.raises(Exception, match="load_with_parewell"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        return
    ours = load(tmp_path / "out")
    options = as_configured(ours.config.to_dict())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **options)
    assert (logits(theirs, ids) - logits(ours, ids)).abs().max() < 1e-4


def test_zero_points_load_with_the_documented_switch(
    tiny_folder: Path, text_file: Path, tmp_path: Path, ids: Tensor
) -> None:
    options = replace(SMALL, scheme="w4a16-g8-asym", data=text_file)
    report = quantize(tiny_folder, tmp_path / "out", options)
    with pytest.warns(UserWarning, match="dequantize|quantization_config"):
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    assert (logits(theirs, ids) - logits(load(tmp_path / "out"), ids)).abs().max() < 1e-4
    assert any("dequantize=True" in note for note in report["loaders"]["notes"])


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("scheme", ["w4a16-g8", "w4a4kv4-asym"])
def test_the_folder_holds_what_was_measured(model_type: str, scheme: str, text_file: Path, tmp_path: Path) -> None:
    """The report's perplexity, found while streaming, is that of the loaded model, online parts and all."""
    source = tiny.save(tiny.model_of(tiny.config_of(model_type), dtype=torch.float32), tmp_path / "model")
    options = replace(SMALL, scheme=scheme, data=text_file, block_steps=2, tune_steps=2)
    report = quantize(source, tmp_path / "out", options)
    rows = load_corpus(text_file, read_tokenizer(source), vocab=tiny.VOCAB, length=32)
    held_out = sample_rows(rows, 9, seed=0)[6:]
    model = load(tmp_path / "out")
    with torch.no_grad():
        said = model(held_out.ids).logits
    measured = compare(held_out, tiny.VOCAB, lambda row, positions: said[row, positions])
    assert measured.perplexity == pytest.approx(report["quality"]["perplexity"], rel=1e-4)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert report["untied"] == (not config["tie_word_embeddings"]) == ("residual_rotation" not in report["left_out"])


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM])
def test_what_needs_a_run_time_part_is_refused_by_plain_loading(
    loader: type, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    report = quantize(tiny_folder, tmp_path / "out", SMALL.without_learning(scheme="w4a4-channel-sym", data=text_file))
    assert report["loaders"]["loaders"] == ["parewell.load"]
    with pytest.raises(Exception, match="load_with_parewell"):
        loader.from_pretrained(tmp_path / "out")


def test_without_transforms_tied_weights_stay_tied(
    tiny_folder: Path, text_file: Path, tmp_path: Path, ids: Tensor
) -> None:
    options = SMALL.without_learning(data=text_file, init="none", scheme="w8a16-channel")
    report = quantize(tiny_folder, tmp_path / "out", options)
    assert not report["untied"]
    stored = load_file(tmp_path / "out/model.safetensors")
    assert "lm_head.weight" not in stored
    assert torch.equal(
        stored["model.embed_tokens.weight"], load_file(tiny_folder / "model.safetensors")["model.embed_tokens.weight"]
    )
    model = load(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    "scheme",
    ["w2a16-channel", "w3a16-channel", "w4a16-channel", "w5a16-channel", "w8a16-channel", "w4a16-g64-asym", "w8a8"],
)
def test_the_file_is_as_large_as_the_bits_say(scheme: str, tmp_path: Path) -> None:
    options = Quantize(scheme=scheme, samples=2, held_out=1, length=64, learn=False, rounding="rtn")
    quantize(embedded.MODEL, tmp_path / "out", options)
    bits = {"w4a16-g64-asym": 4 + 16 / 64 + 4 / 64}.get(scheme, int(scheme[1]))
    hidden, ffn, layers, vocab = 128, 384, 8, 2048
    per_layer = [(128, hidden)] * 1 + [(64, hidden)] * 2 + [(hidden, 128)] + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    codes = layers * sum(rows * columns for rows, columns in per_layer) * bits / 8
    scales = 0 if "g64" in scheme else layers * sum(rows for rows, _ in per_layer) * 2
    tables = 1 if "a16" in scheme else 2  # a tied embedding is stored twice where activations need the rotation
    rest = 2 * (tables * vocab * hidden + (2 * layers + 1) * hidden)  # embedding, head, gains: 16-bit
    assert (tmp_path / "out/model.safetensors").stat().st_size == pytest.approx(codes + scales + rest, rel=0.03)


@pytest.mark.parametrize("scheme", ["w4a16-g8", "w4a4kv4-sym"])
def test_the_same_job_twice_gives_the_same_bytes(
    scheme: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options = replace(SMALL, scheme=scheme, data=text_file, block_steps=2, tune_steps=2)
    quantize(tiny_folder, tmp_path / "a", options)
    quantize(tiny_folder, tmp_path / "b", options)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    quantize(tiny_folder, tmp_path / "b", replace(options, seed=1))  # replaces what we wrote ourselves
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


def test_states_on_disk_and_in_ram_give_the_same_bytes(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = SMALL.without_learning(data=text_file)
    quantize(tiny_folder, tmp_path / "a", options)
    quantize(tiny_folder, tmp_path / "b", replace(options, memory_budget=3e-6))
    for name in ("model.safetensors", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_learning_moves_every_transform_and_lowers_the_loss(tmp_path: Path) -> None:
    options = Quantize(
        scheme="w3a16-channel",
        samples=48,
        held_out=16,
        length=128,
        steps=30,
        batch=4,
        lr_scale=0.01,
        block_steps=0,
        tune_steps=0,
        tied="untie",
    )
    report = quantize(embedded.MODEL, tmp_path / "learned", options)
    fixed = quantize(embedded.MODEL, tmp_path / "fixed", options.without_learning())
    curve = report["curves"]["learn"]
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    assert report["quality"]["kl"] < fixed["quality"]["kl"]
    gains = load_file(tmp_path / "learned/model.safetensors")
    for name in ("input_layernorm", "post_attention_layernorm"):
        gain = gains[f"model.layers.3.{name}.weight"]
        assert (gain > 0).all() and gain.float().std() > 1e-3, "scales are learned and cannot cross zero"


def test_learning_rates_that_no_scale_should_survive_keep_scales_positive(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Published scalings are free parameters: a step of 1.5 takes one from 1 to -0.5. Ours are exponentials."""
    options = replace(SMALL, data=text_file, steps=2, lr_scale=1.5, tied="untie")  # else gains stay as they are
    quantize(tiny_folder, tmp_path / "out", options)
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        if name.endswith("layernorm.weight"):
            assert (tensor > 0).all() and tensor.isfinite().all()


def test_the_recipe_and_the_report_say_what_was_done(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    report = quantize(tiny_folder, tmp_path / "out", replace(SMALL, data=text_file))
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    (step,) = json.loads((tmp_path / "out/parewell.json").read_text())["recipe"]
    assert step["options"]["scheme"] == "w4a16-channel" and step["versions"]["torch"] == version("torch")
    page = (tmp_path / "out/report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    for layer in report["layers"]:
        assert layer["name"] in page
        for when in ("before", "after"):
            assert 0 <= layer[when]["weights"]["ratio"] <= 1 + 1e-9


def test_stories(data: Path, tmp_path: Path) -> None:
    """A real model: at 4 bits per channel, 30 steps of learning beat the same seed's fixed rotation."""
    text = data / "text/tinystories-a-clean.txt"
    stories = [s.strip() for s in text.read_text().split("<|endoftext|>") if s.strip()]
    calibration = tmp_path / "calibration.jsonl"
    calibration.write_text("".join(json.dumps({"text": s}) + "\n" for s in stories[:60]))
    options = Quantize(
        scheme="w4a16-channel",
        data=calibration,
        by_document=True,
        samples=40,
        held_out=16,
        steps=30,
        batch=6,
        block_steps=0,
        tune_steps=0,
    )
    learned = quantize(data / "stories260k", tmp_path / "learned", options)
    fixed = quantize(data / "stories260k", tmp_path / "fixed", options.without_learning())
    assert 4.0 < learned["quality"]["reference_perplexity"] < 6.0
    assert learned["quality"]["kl"] < fixed["quality"]["kl"]


def test_a_model_in_several_shards(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    model.save_pretrained(tmp_path / "model", max_shard_size="5KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tiny_folder / name).read_bytes())
    options = SMALL.without_learning(data=text_file)
    quantize(tiny_folder, tmp_path / "one", options)
    quantize(tmp_path / "model", tmp_path / "several", options)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "several/model.safetensors").read_bytes()


def test_a_tied_head_that_is_stored_all_the_same(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model/model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tiny_folder / name).read_bytes())
    options = SMALL.without_learning(data=text_file)
    one, other = quantize(tiny_folder, tmp_path / "a", options), quantize(tmp_path / "model", tmp_path / "b", options)
    assert one == other


def test_what_rounding_to_nearest_costs_is_told_from_what_tuning_made_of_it(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    plain = Quantize(
        scheme="w3a16-channel", data=text_file, samples=8, held_out=3, length=32, rounding="rtn", init="none",
        block_steps=0, tune_steps=0,
    )  # fmt: skip
    found = [
        quantize(tiny_folder, tmp_path / name, replace(plain, block_steps=steps), allow_damage=True)["quality_by_stage"]
        for name, steps in (("plain", 0), ("tuned", 10))
    ]
    assert found[0]["nearest"] == found[0]["rounded"]
    assert found[1]["nearest"]["kl"] == pytest.approx(found[0]["nearest"]["kl"], rel=1e-5)
    assert found[1]["rounded"]["kl"] != pytest.approx(found[1]["nearest"]["kl"], rel=1e-3)


@pytest.mark.parametrize("option", [{"loss": "partial"}, {"top_k": 8}, {"cross_entropy": 0.5}])
def test_what_is_about_the_models_answers_needs_something_that_descends_on_them(option: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="changes nothing without --learn or --tune-steps"):
        Quantize(tune_steps=0, **option)
    Quantize(tune_steps=0, learn=True, **option)
    Quantize(tune_steps=0, batch=2)
