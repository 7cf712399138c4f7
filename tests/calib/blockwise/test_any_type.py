"""Any causal type of the installed library, block by block, against the library's own forward and its own loader."""

from __future__ import annotations

import datetime
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from calib import BadInput
from calib.blockwise.linears import put_together
from calib.blockwise.model import BlockwiseModel
from calib.model.config import read_config
from calib.model.weights import Weights
from compressor import Export, Quantize, export, load, quantize
from tests import any_type, walked

CPU = torch.device("cpu")
FAMILIES = [
    "gpt2", "opt", "bloom", "falcon", "gpt_neox", "phi", "cohere2", "gemma4_text", "deepseek_v3", "gpt_oss",
    "qwen3_next", "bamba", "llama4_text", "lfm2", "mamba", "granitemoe", "glm4", "zaya",
]  # fmt: skip
SKIPPED = {  # what the small config cannot be built of, by no fault of ours: sizes that the library wants otherwise
    "blt", "cohere_compass_text", "dbrx", "dots3_note", "dots3_note_text", "gemma3n", "gemma3n_text",
    "gemma4_assistant",
    "gemma4_unified_assistant", "inkling2_text", "musicgen", "musicgen_melody", "qwen4_exp", "qwen4_exp_text", "xglm",
    "falcon_h1", "xmod", "zamba", "zamba2", "emu3", "mllama", "recurrent_gemma", "longcat_flash", "reformer",
}  # fmt: skip
REFUSED = {  # with the words of the refusal
    "xlnet": "hidden states are not", "cpmant": "hidden states are not", "prophetnet": "hidden states are not",
    "rwkv": "cannot run this model",
}  # fmt: skip
REST = [name for name in any_type.TYPES if name not in {*FAMILIES, *SKIPPED, *REFUSED}]
TODAY = random.Random(datetime.date.today().toordinal()).sample(REST, 5)  # others every day


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model: Any = any_type.model_of(request.param).float()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def library_logits(folder: Path, ids: Tensor) -> Tensor:
    """Of the library's own model, in double precision."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("folder", [*FAMILIES, *TODAY], indirect=True)
def test_a_model_run_block_by_block_is_the_library_s_own(folder: Path) -> None:
    """Read from its checkpoint one block at a time, with the names that the library writes; parts of some models are in
    single precision whatever the rest is in."""
    stream = BlockwiseModel(read_config(folder), Weights(folder), CPU, torch.float64)
    ids = torch.randint(3, any_type.VOCAB - 4, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = library_logits(folder, ids)
    assert (walked.logits_of(stream, ids) - expected).abs().max() < 1e-6 * expected.abs().max().clamp(min=1)


def saved_and_walked(model: Any, folder: Path) -> tuple[BlockwiseModel, Tensor, Tensor]:
    """A model with weights drawn anew -> opened from `folder`, ids and its logits of them."""
    ids = torch.randint(3, any_type.VOCAB - 10, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (p.dim() == 1))
        expected = model.eval()(input_ids=ids, use_cache=False).logits
    model.save_pretrained(folder)
    return BlockwiseModel(read_config(folder), Weights(folder), CPU), ids, expected


def test_blocks_that_keep_keys_and_values_for_later_ones(tmp_path: Path) -> None:
    """Also where those that keep them are of a kind that came before."""
    config: Any = any_type.config_of("gemma4_text")
    config.num_hidden_layers, config.num_kv_shared_layers = 6, 2
    config.layer_types = ["sliding_attention", "full_attention"] * 3
    torch.manual_seed(0)
    stream, ids, expected = saved_and_walked(AutoModelForCausalLM.from_config(config), tmp_path)
    torch.testing.assert_close(walked.logits_of(stream, ids), expected, rtol=1e-4, atol=1e-4)


def test_a_tower_is_initialized_by_its_own_config(tmp_path: Path) -> None:
    """A wrapper's config says nothing of how its text tower's experts are initialized."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(any_type.config_of("qwen3_5_moe"))
    stream, ids, expected = saved_and_walked(model, tmp_path)
    torch.testing.assert_close(walked.logits_of(stream, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_linears_are_all_that_a_block_multiplies_by_and_are_put_together_again(folder: Path) -> None:
    """Bit by bit; what is left of the matrices are routers, gates and convolutions."""
    stream, left, every = BlockwiseModel(read_config(folder), Weights(folder), CPU), 0, 0
    for i in range(stream.layers):
        params, linears = stream.read_block(i), stream.linears(i)
        assert len({one.name for one in linears}) == len(linears) > 0
        again = put_together(linears, {one.name: one.of(params) for one in linears})
        assert all(torch.equal(again[name], params[name]) for name in again)
        matrices = {name: p.numel() for name, p in params.items() if p.dim() >= 2}
        every += sum(matrices.values())
        left += sum(count for name, count in matrices.items() if name not in again)
    most = {"zaya": 0.65, "mamba": 0.3, "bamba": 0.1}.get(stream.config.model_type, 0.08)
    assert left <= most * every


@pytest.mark.parametrize("folder", ["gpt2", "bloom", "deepseek_v3", "gpt_oss", "lfm2", "gemma4_text"], indirect=True)
def test_a_quantized_model_is_what_was_measured_in_our_loader_and_in_the_library(folder: Path, tmp_path: Path) -> None:
    ids = torch.arange(3, 35).view(2, 16)
    report = quantize(folder, tmp_path / "out", words_of(tmp_path), allow_damage=True)
    ours = load(tmp_path / "out")
    with torch.no_grad():
        logits = ours(input_ids=ids, use_cache=False).logits
    assert logits.isfinite().all() and report["layers"]
    if any("compressed-tensors" in loader for loader in report["loaders"]["loaders"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        with torch.no_grad():
            theirs = plain(input_ids=ids, use_cache=False).logits
        assert (logits - theirs).abs().max() < 1e-4 * logits.abs().max()


def words_of(folder: Path) -> Quantize:
    """Options for a short job on rows of tokens."""
    ids = torch.randint(3, any_type.VOCAB - 4, (12, 16), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    options = Quantize(scheme="w4a16-g8", samples=6, held_out=4, length=16, data=folder / "ids.safetensors")
    return options.without_learning()


@pytest.mark.parametrize("folder", ["gpt_oss", "gpt2"], indirect=True)
def test_an_export_in_floats_has_the_library_s_own_names(folder: Path, tmp_path: Path) -> None:
    """Also of what only we tell apart, or keep the other way round, in few bits."""
    quantize(folder, tmp_path / "out", words_of(tmp_path), allow_damage=True)
    export(tmp_path / "out", tmp_path / "plain", Export(to="safetensors", data=tmp_path / "ids.safetensors", length=16))
    ids, ours = torch.arange(3, 15).view(1, 12), load(tmp_path / "out")
    plain, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values())
    with torch.no_grad():
        one, other = (model(input_ids=ids, use_cache=False).logits for model in (ours, plain))
    apart = (one - other).abs().amax(-1).flatten()  # of bfloat16, but for tokens that it sends to another expert
    assert apart.median() < 0.02 * one.abs().max() and (apart > 0.1 * one.abs().max()).sum() <= 2


@pytest.mark.parametrize("folder", ["hrm_text"], indirect=True)
def test_blocks_that_are_called_again_are_run_and_not_quantized(folder: Path, tmp_path: Path) -> None:
    stream = BlockwiseModel(read_config(folder), Weights(folder), CPU)
    assert len({stream.block_name(i) for i in range(stream.layers)}) < stream.layers
    with pytest.raises(BadInput, match="calls its blocks more than once"):
        quantize(folder, tmp_path / "out", words_of(tmp_path))


@pytest.mark.parametrize("folder", ["gemma4_text"], indirect=True)
def test_what_is_not_tuned_is_said_or_refused(folder: Path, tmp_path: Path) -> None:
    options = words_of(tmp_path)
    with pytest.raises(BadInput, match="tune-steps: of gemma4_text there is no tuning"):
        quantize(folder, tmp_path / "out", replace(options, block_steps=0, tune_steps=3))
    report = quantize(folder, tmp_path / "out", Quantize(**{**vars(options), "learn": True}), allow_damage=True)
    assert "learning_and_tuning" in report["left_out"] and "transforms" in report["left_out"]


@pytest.mark.parametrize("folder", ["gpt2", "bloom", "mamba"], indirect=True)
def test_what_a_type_does_not_admit_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    """Weights as (in, out) in bitsandbytes, keys and values of attention that nobody sees into, or of none."""
    options, model_type = words_of(tmp_path), read_config(folder).model_type
    kv = replace(options, scheme="w4a16kv8-g8")
    if model_type == "gpt2":
        with pytest.raises(BadInput, match=r"kept as \(in, out\)"):
            quantize(folder, tmp_path / "out", replace(options, scheme="nf4"))
        assert quantize(folder, tmp_path / "out", kv, allow_damage=True)["quality"]["kl"] < 1
    else:
        with pytest.raises(BadInput, match=f"keys and values of {model_type} cannot be rounded"):
            quantize(folder, tmp_path / "out", kv)


@pytest.mark.parametrize(("model_type", "words"), REFUSED.items())
def test_what_cannot_be_run_block_by_block_is_refused(model_type: str, words: str, tmp_path: Path) -> None:
    model: Any = any_type.model_of(model_type)
    model.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=words):
        BlockwiseModel(read_config(tmp_path), Weights(tmp_path), CPU)
