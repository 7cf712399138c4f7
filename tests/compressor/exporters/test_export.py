"""Every export is loaded back by the runtime that it is for, and says what `parewell.load` says."""

from __future__ import annotations

import contextlib
import html
import importlib
import io
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from calib import BadInput, Failed
from calib.data.load import load_corpus
from calib.jobs.recipe import read_recipe
from calib.model.checkpoint import read_tokenizer
from calib.model.config import as_configured
from calib.runtime.memory import available_memory
from compressor import Export, Quantize, export, load, quantize
from compressor.engine.load import CAPPED
from compressor.exporters.onnx_check import check_graph, logits_on, rows_to_try
from tests import any_type, tiny

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # multiples of 64 and 32
IDS = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(0))


def folder_of(where: Path, model_type: str = "llama", **more: Any) -> Path:
    return tiny.save(tiny.model_of(tiny.config_of(model_type, **(WIDE | more)), dtype=torch.float32), where)


def quantized(model: Path, out: Path, text: Path, scheme: str, *, allow_damage: bool = False, **more: Any) -> Path:
    options = {"samples": 4, "held_out": 2, "length": 16, "learn": False} | more
    quantize(model, out, Quantize(scheme=scheme, data=text, **options), allow_damage=allow_damage)
    return out


def logits(model: Any) -> Tensor:
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        return model(input_ids=IDS).logits.float()


def plain(folder: Path, **more: Any) -> Any:
    """As any user of transformers loads it who minds what the report says."""
    options = as_configured(json.loads((folder / "config.json").read_text())) | more
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options).eval()


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


def weights(folder: Path) -> int:
    return sum(t.nbytes for file in folder.glob("*.safetensors") for t in load_file(file).values())


# Merged 16 bit.


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma2", "mixtral"])
@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_the_codes_values(model_type: str, tied: bool, text_file: Path, tmp_path: Path) -> None:
    model = folder_of(tmp_path / "model", model_type, tie_word_embeddings=tied)
    out = quantized(model, tmp_path / "out", text_file, "w4a16-g32")
    report = export(out, tmp_path / "dst", Export(dtype="float32"))
    assert (CAPPED in report["loaders"]["notes"]) == (model_type == "gemma2")
    untied = tied and not json.loads((tmp_path / "dst" / "config.json").read_text())["tie_word_embeddings"]
    assert far(logits(plain(tmp_path / "dst")), logits(load(out))) < 1e-5  # no value was rounded
    assert weights(tmp_path / "dst") == 4 * sum(p.numel() for p in load(model).parameters()) + 4 * (
        61 * 64 if untied else 0
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_in_sixteen_bits(dtype: str, tmp_path: Path, text_file: Path) -> None:
    out = quantized(folder_of(tmp_path / "model"), tmp_path / "out", text_file, "w4a16-g32")
    export(out, tmp_path / "dst", Export(dtype=dtype))
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["dtype"] == dtype
    exact = load(out)
    for p in exact.parameters():
        p.data = p.data.to(getattr(torch, dtype)).float()
    assert far(logits(plain(tmp_path / "dst", dtype=torch.float32)), logits(exact)) < 1e-5


def test_an_exported_folder_is_an_input_again(tmp_path: Path, text_file: Path) -> None:
    out = quantized(folder_of(tmp_path / "model"), tmp_path / "out", text_file, "w4a16-g32", tied="untie")
    export(out, tmp_path / "dst")
    again = quantized(tmp_path / "dst", tmp_path / "again", text_file, "w8a16-channel", init="hadamard")
    assert far(logits(load(again)), logits(load(tmp_path / "dst"))) < 0.05
    steps = read_recipe(tmp_path / "dst")
    assert [step["job"] for step in steps] == ["quantize", "export"]
    options = {"to": "safetensors", "dtype": None, "held_out": 8, "data": None, "length": None}
    assert steps[1]["options"] == options | {"base_model": None, "dequantize": False}
    assert steps[1]["quality"]["bits_per_weight"] == 16 and 0 < steps[1]["quality"]["kl"] < 0.05


# Transformed, not rounded.


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma2", "mixtral", "qwen3_moe"])
def test_transforms_alone_leave_the_answers_alone(model_type: str, text_file: Path, tmp_path: Path) -> None:
    width = {"moe_intermediate_size": 64} if model_type == "qwen3_moe" else {}
    model = folder_of(tmp_path / "model", model_type, **width)
    options = {"learn": True, "steps": 2, "batch": 2, "rounding": "none"}
    out = quantized(model, tmp_path / "out", text_file, "w4a16-g32", **options)
    assert far(logits(plain(out)), logits(plain(model))) < 1e-4
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    before, after = (load_file(f / "model.safetensors") for f in (model, out))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert (before[name] - after[name]).abs().max() > 0.1


# bitsandbytes.


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Without its short cut on CPUs with AVX-512 BF16: products in bfloat16, of linears with 32 n outputs only."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    found = pytest.importorskip("bitsandbytes", reason="needs the extra eight-bit")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    return found


@pytest.mark.parametrize("to", ["bnb-nf4", "bnb-fp4", "bnb-int8"])
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_stored_as_the_library_would_store_it(to: str, model_type: str, bitsandbytes: Any, tmp_path: Path) -> None:
    """Codes, scales and answers are those of transformers loading the float model with a BitsAndBytesConfig."""
    from transformers import BitsAndBytesConfig

    model = folder_of(tmp_path / "model", model_type, tie_word_embeddings=False, intermediate_size=144)
    export(model, tmp_path / "dst", Export(to=to, dtype="float32"))
    eight = to == "bnb-int8"
    config = BitsAndBytesConfig(
        load_in_8bit=eight, load_in_4bit=not eight, bnb_4bit_quant_type=to[4:] if not eight else "nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs, ours = plain(model, quantization_config=config, dtype=torch.float32), plain(tmp_path / "dst")
    assert type(ours.lm_head) is torch.nn.Linear
    assert far(logits(ours), logits(theirs)) < (1e-3 if eight else 1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    want, have = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "dst"))
    assert want.keys() == have.keys()
    for n in want:
        if "quant_state" in n:
            assert json.loads(bytes(want[n].tolist())) == json.loads(bytes(have[n].tolist()))
        elif n.endswith("proj.weight"):
            differing = (levels(want, n) - levels(have, n)).abs() > 1e-4
            assert differing.sum() <= 1, n  # a value between two levels, to the last digit
        else:
            assert torch.allclose(want[n].float(), have[n].float(), atol=2e-7), n


def levels(stored: dict[str, Tensor], name: str) -> Tensor:
    """In units of the scale.  FP4 has two numbers for zero."""
    codes = stored[name]
    if codes.dtype == torch.int8:
        return codes.float()
    return stored[f"{name}.quant_map"][torch.cat([codes >> 4, codes & 15], 1).long()]


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_a_grid_of_bitsandbytes_is_written_by_quantize(
    scheme: str, bitsandbytes: Any, text_file: Path, tmp_path: Path
) -> None:
    model = folder_of(tmp_path / "model", "llama")
    out = quantized(
        model, tmp_path / "out", text_file, scheme, learn=True, steps=2, batch=2, block_steps=2, tune_steps=1
    )
    ours, theirs = load(out), plain(out)
    assert type(theirs.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    assert far(logits(theirs), logits(ours)) < 1e-5
    bits = 4 + 32 / 64
    linear = sum(p.numel() for n, p in ours.named_parameters() if "proj.weight" in n)
    stored = load_file(out / "model.safetensors")
    counted = sum(t.nbytes for n, t in stored.items() if "proj.weight" in n and "quant" not in n)
    assert counted == linear * bits / 8


def test_our_own_loader_reads_rows_of_whole_blocks(text_file: Path, tmp_path: Path) -> None:
    model = folder_of(tmp_path / "model")
    out = quantized(model, tmp_path / "out", text_file, "nf4", rounding="none")
    report = export(out, tmp_path / "dst", Export(to="bnb-nf4", dtype="float32"))
    assert "parewell.load" in report["loaders"]["loaders"] and report["bits_per_weight"] == 4.5
    from calib.quant.round_to_nearest import round_weight

    by_hand = load(out)
    for name, p in by_hand.named_parameters():
        if "proj.weight" in name:
            p.data = round_weight(p.data, "nf4").values
    assert far(logits(load(tmp_path / "dst")), logits(by_hand)) < 1e-5
    assert [step["job"] for step in read_recipe(tmp_path / "dst")] == ["quantize", "export"]
    assert report["loaders"]["notes"] == []
    odd = folder_of(tmp_path / "odd", intermediate_size=144)
    report = export(odd, tmp_path / "dst2", Export(to="bnb-nf4"))
    assert "AVX-512" in report["loaders"]["notes"][0] and "parewell.load" not in report["loaders"]["loaders"]


# What the runtime says.


def test_figures_are_those_of_another_reckoning(bitsandbytes: Any, text_file: Path, tmp_path: Path) -> None:
    """KL and perplexity of what the library runs, beside both models run whole."""
    model = folder_of(tmp_path / "model")
    report = export(model, tmp_path / "dst", Export(to="bnb-nf4", held_out=3, data=text_file, length=16))
    assert "bitsandbytes" in report["runtime"] and report["data"]["held_out"]["rows"] == 3
    ids = load_corpus(text_file, read_tokenizer(model), vocab=61, length=16).ids[:3]
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for m in (load(model), plain(tmp_path / "dst", dtype=torch.float32)))  # fmt: skip  # noqa: E501
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert report["quality"]["kl"] == pytest.approx(kl, rel=1e-4) and kl > 1e-4
    nats = float(-q.gather(-1, ids[:, 1:, None]).mean())
    assert report["quality"]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    assert read_recipe(tmp_path / "dst")[-1]["quality"]["kl"] == report["quality"]["kl"]
    assert json.loads((tmp_path / "dst" / "report.json").read_text()) == report


@pytest.mark.parametrize("to", ["safetensors", "onnx", "gguf"])
def test_a_runtime_is_asked(to: str, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "gguf": "gguf"}.get(to, "torch"))
    more, dtype = {"attention_bias": False, "mlp_bias": False}, "float32" if to == "safetensors" else None
    out = quantized(folder_of(tmp_path / "model", **more), tmp_path / "out", text_file, "w8a16-g32")
    report = export(out, tmp_path / "dst", Export(to=to, data=text_file, length=16, dtype=dtype))
    assert report["runtime"].startswith({"safetensors": "parewell", "onnx": "onnxr", "gguf": "transf"}[to])
    assert -1e-6 < report["quality"]["kl"] < 1e-4 and report["quality"]["top1_agreement"] > 0.95
    page = (tmp_path / "dst" / "report.html").read_text()
    for snippet in re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL):
        if "vllm" not in snippet and "llama-cli" not in snippet:
            exec(html.unescape(snippet).replace('"OUT', f'"{tmp_path / "dst"}'), {})


def test_what_cannot_be_run_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    model = folder_of(tmp_path / "model")

    def refused(**more: Any) -> str:
        report = export(model, tmp_path / "dst", Export(**{"to": "onnx"} | more))
        assert "quality" not in report and report["not_run"] in (tmp_path / "dst" / "report.html").read_text()
        assert read_recipe(tmp_path / "dst")[-1]["quality"].keys() == {"bytes", "bits_per_weight"}
        return str(report["not_run"])

    assert refused(held_out=0) == "held-out is 0"
    with monkeypatch.context() as patch:
        patch.setattr("compressor.exporters.runtimes.find_spec", lambda name: None)
        assert refused() == "onnxruntime is not installed"
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["compressor.exporters.export"], "available_memory", lambda: 10**5)
        assert refused() == "it would take 0.00 GB of memory; 0.00 are free"
    with monkeypatch.context() as patch:
        patch.setattr("compressor.exporters.runtimes.onnxruntime_answers", lambda folder: lambda ids: 1 / 0)
        assert "does not run it (division by zero)" in refused()
        patch.setattr("compressor.exporters.runtimes.onnxruntime_answers", lambda folder: 1 / 0)
        assert "onnxruntime does not open it (division by zero)" in refused()
        patch.setattr("compressor.exporters.runtimes.onnxruntime_answers", no_memory)
        assert "onnxruntime does not open it (there is not enough memory)" in refused()
    one = folder_of(tmp_path / "one", max_position_embeddings=1)
    assert export(one, tmp_path / "dst", Export(to="onnx"))["not_run"] == "the model has positions for 1 token"
    (model / "tokenizer.json").write_text("{")
    assert refused(held_out=0) == "held-out is 0"
    assert "its tokenizer cannot be read" in refused()
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer for the embedded text" in refused()


def no_memory(folder: Path) -> None:
    raise MemoryError


def test_padding_is_left_out(bitsandbytes: Any, text_file: Path, tmp_path: Path) -> None:
    """INT8 takes scales over all tokens of a row, so that what follows its end would enter the figures."""
    model, ids = folder_of(tmp_path / "model"), torch.randint(3, 30, (2, 8))
    figures = []
    for name, width in (("short", 8), ("long", 40)):
        mask = torch.arange(width).expand(2, width) < 8
        rows = torch.where(mask, torch.nn.functional.pad(ids, (0, width - 8)), torch.tensor(60))
        save_file({"input_ids": rows, "attention_mask": mask.long()}, tmp_path / f"{name}.safetensors")
        options = Export(to="bnb-int8", dtype="float32", data=tmp_path / f"{name}.safetensors")
        figures.append(export(model, tmp_path / "dst", options)["quality"])
    assert figures[0]["tokens"] == figures[1]["tokens"] == 14
    assert figures[0]["kl"] == pytest.approx(figures[1]["kl"], rel=1e-4)


def test_memory_that_is_free() -> None:
    """Less than the machine has, more than nothing; what is taken is no longer there."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    before = available_memory()
    held = torch.ones(2**26)
    assert 0 < available_memory() < before < machine and held.sum() > 0


def test_answers_that_are_no_numbers_leave_nothing(text_file: Path, tmp_path: Path) -> None:
    model = tiny.model_of(tiny.config_of("llama", **WIDE), dtype=torch.float32)
    model.get_parameter("model.norm.weight").data[:] = 3e38
    folder = tiny.save(model, tmp_path / "model")
    with pytest.raises(Failed, match=r"answers of parewell are no numbers"):
        export(folder, tmp_path / "dst", Export(data=text_file, length=16, dtype="float32"))
    assert not (tmp_path / "dst").exists()
    export(folder, tmp_path / "dst", Export(held_out=0, dtype="float32"))


# ONNX.


def ran(folder: Path) -> Callable[[Tensor, Tensor], Tensor]:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(session.run(["logits"], given)[0])

    return run


def differs(folder: Path, model: Any) -> float:
    """Over rows of several shapes, one of them padded on the left."""
    run, worst = ran(folder), 0.0
    for shape in ((2, 7), (3, 11), (1, 1)):
        ids = torch.randint(3, 30, shape, generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[0, : shape[1] // 3] = 0
        with torch.no_grad():
            want = model(input_ids=ids, attention_mask=mask).logits
        real = mask.bool()
        worst = max(worst, far(run(ids, mask)[real], want[real]))
    return worst


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "qwen3"])
def test_onnx_of_floats(model_type: str, tmp_path: Path) -> None:
    model = folder_of(tmp_path / "model", model_type)
    export(model, tmp_path / "dst", Export(to="onnx"))
    assert differs(tmp_path / "dst", load(model)) < 1e-4


def saved(model: Any, folder: Path) -> Path:
    model.float().save_pretrained(folder)
    return folder


def rows_in(folder: Path) -> Path:
    ids = torch.randint(3, 150, (8, 16), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    return folder / "ids.safetensors"


@pytest.mark.parametrize("model_type", ["smollm3", "olmo3", "gpt2"])
def test_onnx_of_types_that_no_table_names(model_type: str, tmp_path: Path) -> None:
    """Without rotary embedding in some blocks, with windows, and of weights that lie as (in, out)."""
    model = saved(any_type.model_of(model_type), tmp_path / "model")
    out = quantized(model, tmp_path / "out", rows_in(tmp_path), "w4a16-g32", allow_damage=True)
    export(out, tmp_path / "dst", Export(to="onnx", held_out=0))
    assert differs(tmp_path / "dst", load(out)) < 1e-4


def test_onnx_that_is_not_the_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    model, dst = folder_of(tmp_path / "model"), tmp_path / "dst"
    export(model, dst, Export(to="onnx", held_out=0))
    ours = load(model)
    answers = [(given, logits_on(ours, *given)) for given in rows_to_try(ours.config)]
    check_graph(dst, "llama", answers)
    (given, right), *others = answers
    with pytest.raises(BadInput, match=r"answers otherwise on rows of other lengths \(by 1e-02\)"):
        check_graph(dst, "llama", [(given, right + 0.01 * right.abs().max()), *others])
    folder = saved(any_type.model_of("glm4"), tmp_path / "glm4")
    with pytest.raises(BadInput, match="torch cannot trace a model of type glm4"):
        export(folder, tmp_path / "none", Export(to="onnx", held_out=0))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("to", ["bnb-nf4", "onnx"])
def test_a_model_that_sees_images_is_run_as_what_it_is(to: str, bitsandbytes: Any, tmp_path: Path) -> None:
    """In the library's class of it; of the graph is said that it is of text."""
    torch.manual_seed(0)
    config = any_type.config_of("mistral3")
    model = any_type.drawn_anew(AutoModelForImageTextToText.from_config(config))
    options = Export(to=to, data=rows_in(tmp_path), held_out=2, length=16)
    report = export(saved(model, tmp_path / "model"), tmp_path / "dst", options)
    assert report["quality"]["kl"] < (1e-5 if to == "onnx" else 0.1)
    if to == "onnx":
        assert any("images are no input" in note for note in report["loaders"]["notes"])
    else:
        assert "AutoModelForImageTextToText" in (tmp_path / "dst" / "report.html").read_text()


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("llama4_text", r"weights of llama4_text are kept as \(in, out\)"),
        ("xlstm", "xlstm: tried, and transformers stops"),
    ],
)
def test_bitsandbytes_of_what_its_library_does_not_load_is_refused(
    model_type: str, reason: str, tmp_path: Path
) -> None:
    folder = saved(any_type.model_of(model_type), tmp_path / "model")
    with pytest.raises(BadInput, match=f"to bnb-nf4: .*{reason}"):
        export(folder, tmp_path / "dst", Export(to="bnb-nf4"))


@pytest.mark.parametrize(
    "scheme",
    [
        "w4a16-g64",
        "w4a16-g32-asym",
        "w4a16-channel",
        "w4a16-channel-asym",
        "w8a16-channel",
        "w8a16-g16-asym",
        "w3a16-g64",
    ],
)
def test_onnx_on_our_codes(scheme: str, tmp_path: Path, text_file: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    width = 192 if "-g" in scheme else 136  # which no block divides
    model = folder_of(tmp_path / "model", "phi3" if scheme == "w4a16-g64" else "llama", intermediate_size=width)
    out = quantized(model, tmp_path / "out", text_file, scheme)
    report = export(out, tmp_path / "dst", Export(to="onnx"))
    assert differs(tmp_path / "dst", load(out)) < 1e-4
    graph = onnx.load(tmp_path / "dst" / "model.onnx").graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 2 * (4 if scheme == "w4a16-g64" else 7)
    parts = {name for node in products for name in node.input[1:]}
    bits = 8 * sum(len(i.raw_data) for i in graph.initializer if i.name in parts)
    count = sum(next(a.i for a in n.attribute if a.name == "K") * next(a.i for a in n.attribute if a.name == "N")
                for n in products)  # fmt: skip
    assert bits / count == pytest.approx(report["bits_per_weight"], rel=1e-9)


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_onnx_of_every_rotary_scaling(kind: str, tmp_path: Path) -> None:
    """On both sides of the original length, and of the model's own, where frequencies may change."""
    rope = {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}}
    more = {"original_max_position_embeddings": 16} if kind == "longrope" else {}
    rope["rope_parameters"] |= {"partial_rotary_factor": 0.75} if kind == "longrope" else {}
    model = folder_of(
        tmp_path / "model", "phi3" if kind == "longrope" else "llama", max_position_embeddings=32, sliding_window=None,
        head_dim=16, **rope, **more,
    )  # fmt: skip
    export(model, tmp_path / "dst", Export(to="onnx", held_out=0))
    run = ran(tmp_path / "dst")
    for length in (7, 15, 16, 17, 31, 33, 80):
        ids = torch.randint(3, 30, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            want = plain(model)(input_ids=ids).logits  # anew, as the library remembers the longest it has seen
        assert far(run(ids, torch.ones_like(ids)), want) < 1e-4, length


@pytest.mark.parametrize(
    ("more", "tables"),
    [
        ({}, {"model.model.embed_tokens.weight"}),
        ({"embedding": "w8"}, {"model.model.embed_tokens.weight"}),
        ({"embedding": "w8", "lm_head": "w8"}, {"model.model.embed_tokens.weight", "head"}),
    ],
)
def test_onnx_of_a_quantized_embedding_and_head(
    more: dict[str, str], tables: set[str], text_file: Path, tmp_path: Path
) -> None:
    """What is one table there is one in the graph, which answers as our loader does."""
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    out = quantized(folder_of(tmp_path / "model"), tmp_path / "out", text_file, "w4a16-g32", rounding="rtn", **more)
    report = export(out, tmp_path / "dst", Export(to="onnx", held_out=0))
    assert differs(tmp_path / "dst", load(out)) < 1e-4
    stored = onnx.load(tmp_path / "dst" / "model.onnx").graph.initializer
    sizes = [i.ByteSize() for i in stored if sorted(i.dims) == sorted((61, WIDE["hidden_size"]))]
    assert len(sizes) == len(tables) and report["bytes"]["after"] > sum(sizes)


@pytest.mark.parametrize("to", ["safetensors", "gguf"])
def test_quantized_tables_become_the_values_that_they_stand_for(to: str, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip({"gguf": "gguf"}.get(to, "torch"))
    model = folder_of(tmp_path / "model", attention_bias=False, mlp_bias=False)
    tables = {"embedding": "w8", "lm_head": "w8"}
    out = quantized(model, tmp_path / "out", text_file, "w4a16-g32", rounding="rtn", **tables)
    report = export(out, tmp_path / "dst", Export(to=to, dtype="float32", length=16))
    assert report["quality"]["kl"] < {"safetensors": 1e-6, "gguf": 1e-4}[to]  # where scales are float16


def test_onnx_keeps_one_table_of_a_tied_model_and_all_files_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    model = folder_of(tmp_path / "model", "llama")
    export(model, tmp_path / "dst", Export(to="onnx", held_out=0))
    assert differs(tmp_path / "dst", load(model)) < 1e-4
    stored = onnx.load(tmp_path / "dst" / "model.onnx").graph.initializer
    tables = [i.name for i in stored if sorted(i.dims) == sorted((61, WIDE["hidden_size"]))]
    assert tables == ["model.model.embed_tokens.weight"]

    def scattered(scratch: Path, folder: Path, checkpoint: Any) -> None:
        for name, size in {"model.onnx": 7, "onnx__MatMul_12": 100, "model.norm.weight": 20}.items():
            (scratch / name).write_bytes(bytes(size))

    monkeypatch.setattr("compressor.exporters.onnx.write_onnx", scattered)
    report = export(model, tmp_path / "scattered", Export(to="onnx", held_out=0))
    assert report["bytes"]["after"] == 127


# GGUF.


def test_gguf_of_llama_3_has_the_factors_of_its_rotary_scaling(tmp_path: Path, text_file: Path) -> None:
    """By which the runtime divides the frequencies of the plain embedding: what is left are the library's own."""
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **ROPES["llama3"], "original_max_position_embeddings": 64}
    model = folder_of(
        tmp_path / "model", "llama", attention_bias=False, mlp_bias=False, head_dim=16, rope_parameters=rope
    )
    report = export(model, tmp_path / "dst", Export(to="gguf", dtype="float32", data=text_file, length=16))
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "dst" / "model.gguf").tensors}
    factors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    assert factors.shape == (8,) and tensors["rope_freqs.weight"].tensor_type.name == "F32"
    theirs = plain(model).model.rotary_emb.inv_freq
    assert torch.allclose(5e5 ** -(torch.arange(8) / 8) / factors, theirs, rtol=1e-5)
    assert factors[0] == 1 and factors[-1] == 8 and ((factors > 1.01) & (factors < 7.99)).any()
    # The library drops them, unless it is given the config: so the report says, and so it was run.
    config = AutoConfig.from_pretrained(tmp_path / "dst")
    with_config = plain(tmp_path / "dst", gguf_file="model.gguf", config=config, dtype=torch.float32)
    ids = torch.randint(3, 30, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, have = plain(model)(input_ids=ids).logits, with_config(input_ids=ids).logits
    assert far(have, want) < 1e-5
    assert report["quality"]["kl"] < 1e-6
    assert not any(loader.endswith("(gguf_file='model.gguf')") for loader in report["loaders"]["loaders"])
    assert "config=config" in (tmp_path / "dst" / "report.html").read_text()


def test_gguf_keeps_every_chat_template(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    model = folder_of(tmp_path / "model", "llama", attention_bias=False, mlp_bias=False)
    (model / "chat_template.jinja").write_text("plain {{ messages }}")
    export(model, tmp_path / "one", Export(to="gguf", held_out=0))
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/rag.jinja").write_text("rag {{ messages }}")
    export(model, tmp_path / "two", Export(to="gguf", held_out=0))
    fields = [gguf.GGUFReader(tmp_path / name / "model.gguf").fields for name in ("one", "two")]
    for found in fields:
        assert found["tokenizer.chat_template"].contents() == "plain {{ messages }}"
    assert fields[1]["tokenizer.chat_template.rag"].contents() == "rag {{ messages }}"
    assert (tmp_path / "two/additional_chat_templates/rag.jinja").read_text() == "rag {{ messages }}"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("scheme", [None, "w4a16-g32", "w8a16-g32"])
def test_gguf_is_read_by_transformers(model_type: str, scheme: str | None, tmp_path: Path, text_file: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    more = {"attention_bias": False, "mlp_bias": False, "sliding_window": None}
    more |= (
        {"head_dim": 128} if model_type == "qwen3" else {}
    )  # which transformers does not read, and takes for granted
    model = folder_of(tmp_path / "model", model_type, tie_word_embeddings=model_type != "qwen2", **more)
    out = quantized(model, tmp_path / "out", text_file, scheme) if scheme else model
    export(out, tmp_path / "dst", Export(to="gguf"))
    ours = load(out)
    for name, p in ours.named_parameters():
        if p.ndim == 2 and (scheme is None or "proj" not in name):
            p.data = p.data.half().float()
    read = plain(tmp_path / "dst", gguf_file="model.gguf", dtype=torch.float32)
    # Scales of a float32 model lose digits in half precision; everything else is exact.
    assert far(logits(read), logits(ours)) < (1e-5 if scheme is None else 2e-2)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "dst" / "model.gguf").tensors}
    kind = {None: "F16", "w4a16-g32": "Q4_0", "w8a16-g32": "Q8_0"}[scheme]
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == kind
    assert tensors["blk.1.ffn_norm.weight"].tensor_type.name == "F32"


def test_gguf_keeps_the_codes(tmp_path: Path, text_file: Path) -> None:
    """Half-precision scales are kept as they are, so that weights are equal to the last bit."""
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    config = tiny.config_of("llama", **WIDE, attention_bias=False, mlp_bias=False)
    model = tiny.save(tiny.model_of(config, dtype=torch.float16), tmp_path / "model")
    out = quantized(model, tmp_path / "out", text_file, "w4a16-g32")
    export(out, tmp_path / "dst", Export(to="gguf"))
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "dst" / "model.gguf").tensors}
    held = tensors["blk.0.ffn_down.weight"]
    value = torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type))
    assert torch.equal(value, load(out).get_parameter("model.layers.0.mlp.down_proj.weight"))


# Real models.


@pytest.fixture
def stories(data: Path) -> Path:
    return data / "stories260k"


def test_sizes_are_what_the_bits_say_and_answers_what_they_were(
    stories: Path, data: Path, bitsandbytes: Any, tmp_path: Path
) -> None:
    """Tolerances, in units of the largest logit: float formats to single or half precision, the others to what the
    runtime adds, as the reference rounds the same weights; int8 rounds activations too."""
    text = data / "text" / "tinystories-a-clean.txt"
    four = quantized(stories, tmp_path / "four", text, "w4a16-g4", length=64)
    plain_out = quantized(stories, tmp_path / "plain", text, "w4a16-g4", length=64, rounding="none")
    with_grid = quantized(stories, tmp_path / "channel", text, "w4a16-channel", length=64)
    ours = {folder: logits(load(folder)) for folder in (four, plain_out, with_grid)}
    for source, to, dtype, within in (
        (four, "safetensors", "bfloat16", 2e-2),
        (plain_out, "bnb-int8", "float32", 5e-2),
        (plain_out, "gguf", "float16", 2e-3),
        (with_grid, "onnx", None, 1e-4),
    ):
        report = export(source, tmp_path / to, Export(to=to, dtype=dtype))
        if to == "onnx":
            have = ran(tmp_path / to)(IDS, torch.ones_like(IDS))
        else:
            more = {"gguf_file": "model.gguf"} if to == "gguf" else {}
            have = logits(plain(tmp_path / to, dtype=torch.float32, **more))
        assert far(have, ours[source]) < within, to
        said = expected(source, report["bits_per_weight"], 16 if dtype in ("bfloat16", "float16") else 32)
        assert abs(contents(tmp_path / to) / said - 1) < 0.03, to
        assert report["bytes"]["after"] >= contents(tmp_path / to)


def contents(folder: Path) -> int:
    """Bytes of all tensors: small models' headers and tokenizers weigh too much to be left in."""
    if (folder / "model.gguf").exists():
        return sum(t.n_bytes for t in importlib.import_module("gguf").GGUFReader(folder / "model.gguf").tensors)
    if (folder / "model.onnx").exists():
        graph = importlib.import_module("onnx").load(folder / "model.onnx").graph
        return sum(len(i.raw_data) for i in graph.initializer)
    return weights(folder)


def expected(source: Path, bits: float, others: int) -> float:
    """Bytes, by hand: linears at so many bits a weight, all else at `others`."""
    model = load(source)
    linear = sum(p.numel() for n, p in model.named_parameters() if "proj.weight" in n)
    rest = sum(p.numel() for n, p in model.named_parameters() if "proj.weight" not in n)
    return (linear * bits + rest * others) / 8
