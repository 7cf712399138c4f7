"""Bad input of `parewell export`: one line, exit status 2, nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from calib import Failed
from compressor import Distill, Export, Quantize, distill, export, quantize
from compressor.exporters.options import EXPORT_FORMATS
from tests import tiny
from tests.cli.conftest import Refusal


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A float model and what can be made of it."""
    root = tmp_path_factory.mktemp("folders")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "attention_bias": False, "mlp_bias": False}
    for name, kind in (("float", "llama"), ("cohere", "cohere"), ("mixtral", "mixtral")):
        tiny.save(tiny.model_of(tiny.config_of(kind, **sizes)).float(), root / name)
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 1.5}
    for name, kind, options in (("qwen-llama3", "qwen2", rope), ("llama-yarn", "llama", yarn)):
        tiny.save(tiny.model_of(tiny.config_of(kind, **sizes, rope_parameters=options)).float(), root / name)
    gemma = tiny.config_of("gemma3_text", **sizes)
    gemma.rope_parameters["full_attention"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    tiny.save(tiny.model_of(gemma).float(), root / "gemma-dynamic")
    for name, scheme in {
        "w4a16-g64": "w4a16-g64", "w4a16-g8": "w4a16-g8", "w8a8": "w8a8", "online": "w4a4kv4-asym", "nf4": "nf4",
    }.items():  # fmt: skip
        quick = Quantize(scheme=scheme, data=text_file, samples=2, held_out=1, length=16, learn=False, rounding="rtn")
        quantize(root / "float", root / name, quick)
    foreign = shutil.copytree(root / "float", root / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    return root


@pytest.mark.parametrize(
    ("folder", "options", "what"),
    [
        ("float", ["--to", "tflite"], f"choose from {', '.join(EXPORT_FORMATS)}"),
        ("float", ["--to", "compressed-tensors"], "is what parewell quantize writes"),
        ("float", ["--to", "onnx", "--dtype", "float16"], "computes in float32"),
        ("float", ["--held-out", "-1"], "held-out is -1; it must be at least 0"),
        ("float", ["--held-out", "0", "--data", "x.txt"], "held-out is 0, so that --data and --length change nothing"),
        ("float", ["--held-out", "0", "--length", "64"], "held-out is 0, so that --data and --length change nothing"),
        ("float", ["--data", "missing.txt"], "missing.txt: "),
        ("missing", [], "no such folder"),
        ("foreign", [], "by another tool; add --dequantize"),
        ("w8a8", [], "rounds or rotates as it runs (w8a8)"),
        ("online", ["--to", "onnx"], "a folder of scheme w4a16-channel can be exported"),
        ("w4a16-g64", ["--to", "bnb-nf4"], "quantize the float model with --scheme nf4"),
        ("nf4", ["--to", "bnb-nf4"], "as bitsandbytes has it already"),
        ("nf4", ["--to", "onnx"], "MatMulNBits knows even grids only"),
        ("w4a16-g8", ["--to", "onnx"], "groups of 8 do not fit MatMulNBits"),
        ("w4a16-g64", ["--to", "gguf"], "quantize to a block type such as q4_k"),
        ("cohere", ["--to", "gguf"], "cohere is not known here"),
        ("gemma-dynamic", ["--to", "gguf"], "rope scaling 'dynamic', which llama.cpp computes otherwise"),
        ("mixtral", ["--to", "bnb-nf4"], "cannot hold the experts"),
        ("mixtral", ["--to", "onnx"], "cannot trace the experts"),
        ("qwen-llama3", ["--to", "gguf"], "rope scaling 'llama3', which llama.cpp computes otherwise"),
        ("llama-yarn", ["--to", "gguf"], "options of YaRN beside its usual ones"),
        ("gemma-dynamic", ["--to", "onnx"], "frequencies of rope type 'dynamic' that differ by the kind of layer"),
        (
            "float",
            ["--to", "gptq"],
            "is not quantized, and the format is one of codes; make them with parewell quantize",
        ),
        ("nf4", ["--to", "awq"], "holds even grids only, not nf4; quantize to another scheme, such as w4a16-g128"),
        ("w8a8", ["--to", "mlx"], "rounds or rotates as it runs (w8a8), which mlx cannot say"),
        ("online", ["--to", "gptq"], "a folder of scheme w4a16-channel can be exported"),
        ("w4a16-g8", ["--to", "mlx"], "its groups are 32, 64 or 128 weights, which groups of 8"),
        ("w4a16-g64", ["--to", "awq", "--allow-recovery"], "rounds nothing, so nothing can be recovered"),
    ],
)
def test_what_a_format_cannot_say(
    folder: str, options: list[str], what: str, folders: Path, tmp_path: Path,
    refusal: Refusal,
) -> None:  # fmt: skip
    assert what in refusal("export", folders / folder, tmp_path / "dst", *options)


def test_more_than_one_file_of_onnx_holds(
    folders: Path, tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.exporters.onnx.MAX_ONNX_BYTES", 1000)
    line = refusal("export", folders / "float", tmp_path / "dst", "--to", "onnx")
    assert "do not fit into one file" in line


def test_destinations(folders: Path, tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "thesis.txt").write_text("mine")
    assert "was not written by parewell" in refusal("export", folders / "float", tmp_path / "dst")
    assert "lies inside the model" in refusal("export", folders / "float", folders / "float" / "dst")


@pytest.mark.parametrize(("to", "package"), [("onnx", "onnxscript"), ("gguf", "gguf")])
def test_missing_package(
    to: str, package: str, folders: Path, tmp_path: Path,
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    module = sys.modules["compressor.exporters.export"]
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else object())
    line = refusal("export", folders / "float", tmp_path / "dst", "--to", to)
    assert f"{package}: is not installed; pip install 'parewell[{to}]'" in line


def test_weights_too_large_for_half_precision(folders: Path, tmp_path: Path) -> None:
    model = tiny.model_of(tiny.config_of("llama")).float()
    model.get_parameter("model.layers.0.mlp.down_proj.weight").data[0, 0] = 1e6
    folder = tiny.save(model, tmp_path / "model")
    with pytest.raises(Failed, match=r"down_proj.weight': has values up to 1e\+06, which float16 cannot hold"):
        export(folder, tmp_path / "dst", Export(dtype="float16"))
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"scheme": "w4a4-channel-sym"}, "take --scheme w4a16-channel"),
        ({"tune_steps": 5}, "no scales to tune"),
        ({"init": "none", "learn": False}, "would change nothing"),
        ({"online": True}, "leave out --online"),
    ],
)
def test_rounding_none_asks_for_nothing_that_needs_codes(options: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Quantize(rounding="none", **options)


def test_nf4_of_experts_and_of_students(folders: Path, tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(ValueError, match="cannot hold the experts of mixtral"):
        quantize(folders / "mixtral", tmp_path / "out", Quantize(scheme="nf4", data=text_file, learn=False))
    with pytest.raises(ValueError, match="students are trained on even grids"):
        distill(folders / "float", tmp_path / "out", Distill(student_scheme="nf4", data=text_file))
    with pytest.raises(ValueError, match="students are trained on even grids"):
        distill(folders / "float", tmp_path / "out", Distill(student=str(folders / "nf4"), data=text_file))
