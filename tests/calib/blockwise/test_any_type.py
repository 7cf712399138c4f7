"""Any causal type of the installed library, block by block, against the library's own forward and its own loader."""

from __future__ import annotations

import datetime
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from calib import BadInput
from calib.blockwise.linears import put_together
from calib.blockwise.model import BlockwiseModel
from calib.model.config import read_config
from calib.model.weights import Weights
from compressor import Quantize, load, quantize
from tests import any_type, walked

CPU = torch.device("cpu")
FAMILIES = [
    "gpt2", "opt", "bloom", "falcon", "gpt_neox", "phi", "cohere2", "gemma4_text", "deepseek_v3", "gpt_oss",
    "qwen3_next", "falcon_h1", "llama4_text", "lfm2", "mamba", "granitemoe", "glm4", "zaya",
]  # fmt: skip
SKIPPED = {  # what the small config cannot be built of, by no fault of ours: sizes that the library wants otherwise
    "blt", "cohere_compass_text", "dbrx", "dots3_note", "dots3_note_text", "gemma3n", "gemma3n_text",
    "gemma4_assistant",
    "gemma4_unified_assistant", "inkling2_text", "musicgen", "musicgen_melody", "qwen4_exp", "qwen4_exp_text", "xglm",
    "xmod", "zamba", "zamba2", "emu3", "mllama", "recurrent_gemma", "longcat_flash",
}  # fmt: skip
REFUSED = {  # with the words of the refusal
    "xlnet": "hidden states are not", "cpmant": "hidden states are not", "prophetnet": "hidden states are not",
    "rwkv": "cannot run this model", "reformer": "",
}  # fmt: skip
REST = [name for name in any_type.TYPES if name not in {*FAMILIES, *SKIPPED, *REFUSED}]
TODAY = random.Random(datetime.date.today().toordinal()).sample(REST, 5)  # others every day


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model: Any = any_type.model_of(request.param)
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
    """Read from its checkpoint one block at a time, with the names that the library writes."""
    stream = BlockwiseModel(read_config(folder), Weights(folder), CPU, torch.float64)
    ids = torch.randint(3, any_type.VOCAB - 4, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = library_logits(folder, ids)
    assert (walked.logits_of(stream, ids) - expected).abs().max() < 1e-9 * expected.abs().max().clamp(min=1)


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
    most = {"llama4_text": 0.7, "zaya": 0.3, "mamba": 0.3, "falcon_h1": 0.1}.get(stream.config.model_type, 0.08)
    assert left <= most * every


@pytest.mark.parametrize("folder", [*FAMILIES, *TODAY[:2]], indirect=True)
def test_a_quantized_model_is_what_was_measured_in_our_loader_and_in_the_library(folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, any_type.VOCAB - 4, (12, 16), generator=generator)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    options = Quantize(scheme="w4a16-g8", samples=6, held_out=4, length=16, data=tmp_path / "ids.safetensors")
    report = quantize(folder, tmp_path / "out", options.without_learning(), allow_damage=True)
    ours = load(tmp_path / "out")
    with torch.no_grad():
        logits = ours(input_ids=ids[:2], use_cache=False).logits
    assert logits.isfinite().all() and report["layers"]
    if any("compressed-tensors" in loader for loader in report["loaders"]["loaders"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        with torch.no_grad():
            theirs = plain(input_ids=ids[:2], use_cache=False).logits
        assert (logits - theirs).abs().max() < 1e-4 * logits.abs().max()


@pytest.mark.parametrize(("model_type", "words"), REFUSED.items())
def test_what_cannot_be_run_block_by_block_is_refused(model_type: str, words: str, tmp_path: Path) -> None:
    model: Any = any_type.model_of(model_type)
    model.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=words):
        BlockwiseModel(read_config(tmp_path), Weights(tmp_path), CPU)
