"""`quantize --format`: the same bytes as quantize and export, whatever happens on the way; what a format cannot say is
refused before any work."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calib import BadInput, Unstored
from calib.jobs.recipe import read_recipe
from calib.model.config import read_json
from cli.replay import replay_recipe
from compressor import Export, Quantize, export, quantize
from compressor.exporters import gptq_layout
from compressor.exporters.options import EXPORT_FORMATS
from compressor.quantization.cost import estimate_quantization
from compressor.quantization.job import validate_quantization
from tests import tiny
from tests.cli.conftest import Refusal, refusal
from tests.kills import alone, digest

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "attention_bias": False, "mlp_bias": False}
__all__ = ["refusal"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.model_of(tiny.config_of("llama", **WIDE), dtype=torch.bfloat16)
    return tiny.save(made, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def small(text_file: Path) -> Quantize:
    return Quantize(scheme="w4a16-g32", data=text_file, samples=2, held_out=1, length=16, learn=False)


@pytest.mark.parametrize(("scheme", "to"), [
    ("w4a16-g32", "gptq"), ("w4a16-g32", "awq"), ("w3a16-channel", "mlx"), ("w8a16-g32-asym", "onnx"),
    ("q4_0", "gguf"), ("w4a16-g32", "safetensors"), ("w4a16-g32", "compressed-tensors"), ("nf4", "bnb-nf4"),
])  # fmt: skip
def test_out_is_what_export_makes_of_the_default_output(
    scheme: str, to: str, model: Path, small: Quantize, tmp_path: Path
) -> None:
    for package in EXPORT_FORMATS[to].packages if to in EXPORT_FORMATS else ():
        pytest.importorskip(package, reason=f"needs the extra {EXPORT_FORMATS[to].extra}")
    out, options = tmp_path / "out", replace(small, scheme=scheme)
    report = quantize(model, out, options)
    if "export" in quantize(model, tmp_path / "other", replace(options, format=to)):
        report = export(out, tmp_path / "exported", Export(to=to))
        shutil.rmtree(out)
        again = quantize(model, out, replace(options, format=to))
        first = report.pop("source")
        assert first["job"] == "quantize" and len(first["layers"]) == len(again["layers"])
        assert again["export"] == report and report | {"source": first} == read_json(out / "report.json")
        assert (again["loaders"], again["bytes"]["after"]) == (report["loaders"], report["bytes"]["after"])
        assert digest(out) == digest(tmp_path / "exported")
        assert [step["job"] for step in read_recipe(out)] == ["quantize", "export"]
    else:
        assert to in ("compressed-tensors", "bnb-nf4") and digest(out) == digest(tmp_path / "other")
    assert {p.name for p in tmp_path.iterdir()} <= {"out", "exported", "other"}


def test_it_can_be_replayed(model: Path, small: Quantize, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", replace(small, format="gptq"))
    assert replay_recipe(tmp_path / "out", tmp_path / "again").agrees


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_and_resumed_it_ends_with_the_same_bytes(model: Path, small: Quantize, tmp_path: Path) -> None:
    """Killed as soon as codes are chosen, and again while the intermediate folder is there; always in the same place,
    whose name the recipe has."""
    out, options = tmp_path / "out", replace(small, format="mlx")
    quantize(model, out, options)
    whole = digest(out)
    shutil.rmtree(out)
    for sign in (".out.journal/rounded.page", ".out.partial/quantized/out/config.json"):
        if (process := os.fork()) == 0:
            alone(lambda: quantize(model, out, options, resume=True))
        while not (tmp_path / sign).exists():
            assert os.waitpid(process, os.WNOHANG) == (0, 0), f"over before there was {sign}"
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL and not out.exists()
    quantize(model, out, options, resume=True)
    assert digest(out) == whole and {p.name for p in tmp_path.iterdir()} == {"out"}


def test_killed_while_it_exports_it_leaves_nothing(
    model: Path, small: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        assert list((tmp_path / ".out.partial/quantized/out").iterdir())
        raise KeyboardInterrupt

    options = replace(small, format="gptq")
    with monkeypatch.context() as patch:
        patch.setattr("compressor.exporters.export.copy_companions", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, tmp_path / "out", options)
    assert {p.name for p in tmp_path.iterdir()} == {".out.journal"}
    quantize(model, tmp_path / "out", options, resume=True)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    resumed = digest(tmp_path / "out")
    quantize(model, tmp_path / "out", options)
    assert digest(tmp_path / "out") == resumed


def test_what_a_format_cannot_hold_in_the_end_goes_into_another_without_work(
    model: Path, small: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale beyond half precision is found when all is done: codes stay in the journal, and another format takes
    them."""

    def beyond(*_: Any) -> None:
        raise BadInput("to gptq: scales of 'x' go from 1 to 1e9, which float16 cannot hold; export to safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(gptq_layout, "scale_in", beyond)
        with pytest.raises(Unstored, match=r"^format gptq: scales of 'x' .* cannot hold; the codes are kept: take ano"):
            quantize(model, tmp_path / "out", replace(small, format="gptq"))
    assert {p.name for p in tmp_path.iterdir()} == {".out.journal"}
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["compressor.quantization.stages"], "quantization_pass", None)  # not called again
        quantize(model, tmp_path / "out", replace(small, format="mlx"), resume=True)
    assert read_json(tmp_path / "out/report.json")["to"] == "mlx"


REFUSED = [
    ("w4a16-g48", {}, "gptq", "no reader knows groups of 48", ["compressed-tensors", "onnx", "safetensors"]),
    ("w8a8", {}, "gptq", "rounds or rotates as it runs (w8a8)", ["compressed-tensors"]),
    ("w4a16-g32", {"online": True, "init": "hadamard"}, "mlx", "rounds or rotates as it runs", ["compressed-tensors"]),
    ("nf4", {}, "compressed-tensors", "knows no block types", ["bnb-nf4", "safetensors"]),
    ("q4_0", {}, "awq", "holds even grids only", ["gguf", "safetensors"]),
    ("w4a16-g32", {"target_bits": 4.5}, "gptq", "holds codes of 2, 3, 4, 8 bits, and here are some of 5, 6",
     ["compressed-tensors", "mlx", "onnx", "safetensors"]),
    ("w4a16-g32", {}, "bnb-nf4", "is rounded already", ["compressed-tensors", "awq", "gguf", "gptq", "mlx", "onnx",
                                                       "safetensors"]),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "more", "to", "reason", "others"), REFUSED)
def test_what_a_format_cannot_say_is_refused_with_those_that_can(
    scheme: str, more: dict[str, Any], to: str, reason: str, others: list[str], small: Quantize, tmp_path: Path
) -> None:
    """Those that are named are taken, and no other is."""
    for package in ("gguf", "onnx", "onnxscript", "optimum"):
        pytest.importorskip(package, reason="needs the extras gguf and onnx")
    sizes = WIDE | ({"hidden_size": 96, "intermediate_size": 96, "head_dim": 24} if "48" in scheme else {})
    folder = tiny.save(tiny.model_of(tiny.config_of("llama", **sizes), dtype=torch.bfloat16), tmp_path / "model")
    options = replace(small, scheme=scheme, **more)
    with pytest.raises(BadInput) as refused:
        validate_quantization(folder, tmp_path / "out", replace(options, format=to))
    line = str(refused.value)
    assert line.startswith(f"format {to}: {reason}") and line.endswith(f" can be stored as {', '.join(others)}")
    for other in ("compressed-tensors", *EXPORT_FORMATS):
        if other in others:
            validate_quantization(folder, tmp_path / "out", replace(options, format=other))
        elif other not in ("bnb-int8", to):
            with pytest.raises(BadInput, match="can be stored as"):
                validate_quantization(folder, tmp_path / "out", replace(options, format=other))


def test_the_command_refuses_before_any_work(model: Path, text_file: Path, tmp_path: Path, refusal: Refusal) -> None:
    words = ("quantize", model, tmp_path / "out", "--data", text_file, "--samples", 2, "--length", 16)
    assert "w8a8 can be stored as" in refusal(*words, "--scheme", "w8a8", "--format", "gptq")
    assert "bnb-int8" in refusal(*words, "--format", "bnb-int8")
    assert "rounding none leaves none" in refusal(*words, "--rounding", "none", "--format", "gguf")


@pytest.mark.parametrize(("scheme", "to", "more"), [
    ("w4a16-g32", "gptq", {}), ("w4a16-g64-asym", "awq", {}), ("w3a16-channel", "mlx", {}),
    ("w4a16-g32", "gptq", {"init": "hadamard", "tied": "untie"}), ("w4a16-g32", "safetensors", {}),
    ("w4a16-g32", "mlx", {"target_bits": 4.0, "candidate_bits": "4,8"}),
])  # fmt: skip
def test_a_dry_run_says_what_it_weighs(
    scheme: str, to: str, more: dict[str, Any], model: Path, small: Quantize, tmp_path: Path
) -> None:
    """To the byte, where bits are not allocated; the folder to 2%."""
    options = replace(small, scheme=scheme, format=to, **more)
    cost = estimate_quantization(model, tmp_path / "out", options)
    assert not list(tmp_path.iterdir())
    quantize(model, tmp_path / "out", options)
    size = sum(t.nbytes for t in load_file(tmp_path / "out/model.safetensors").values())
    assert cost.out_bytes == size and cost.out_parts == cost.choices == {}


def test_a_dry_run_says_what_gguf_weighs_with_its_tables(model: Path, small: Quantize, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    options = replace(small, scheme="q4_0", embedding="q8_0", format="gguf")
    cost = estimate_quantization(model, tmp_path / "out", options)
    quantize(model, tmp_path / "out", options)
    from gguf import GGUFReader

    matrices = [t for t in GGUFReader(tmp_path / "out/model.gguf").tensors if len(t.shape) == 2]
    norms = (2 * 2 + 1) * WIDE["hidden_size"] * 2  # in 16 bits, as they are counted
    assert cost.out_bytes == sum(int(t.n_bytes) for t in matrices) + norms
