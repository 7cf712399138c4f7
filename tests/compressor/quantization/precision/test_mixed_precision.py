"""What parts of a model suffer, and bits by which it is least: brute force, closed forms, the library's own model."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import wasserstein_distance
from transformers import AutoModelForCausalLM

from calib import BadInput, embedded
from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import sample_rows
from calib.data.load import Sample, load_corpus
from calib.jobs.recipe import read_recipe
from calib.losses.divergences import dense, forward_kl
from calib.model.checkpoint import read_tokenizer
from calib.model.config import as_configured
from calib.model.weights import Weights
from calib.quant.grid import decode, encode, fit_clipped
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from calib.stats.perplexity import compare
from compressor import Distill, Export, Quantize, distill, export, load, quantize
from compressor.quantization.learn_transforms import LearnedModel, initial_transforms
from compressor.quantization.precision.mixed_precision import (
    LayerGroup,
    allocate_bits,
    frontier,
    mean_bits,
    wasserstein,
)
from tests import tiny
from tests.architectures import ARCHITECTURES
from tests.compressor.quantization.test_quantize import SMALL, logits

MIXED = SMALL.without_learning(target_bits=3.5, profile_rows=2, profile="measured")
IDS = torch.randint(3, tiny.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
GRIDS = ("w4a16-g8", "w4a8-channel", "w4a16-g8-asym")
HELD = [  # every architecture on one grid, and one of each kind, dense and of experts, on all
    (model_type, scheme)
    for i, model_type in enumerate(sorted(ARCHITECTURES))
    for scheme in (GRIDS if model_type in ("llama", "mixtral") else [GRIDS[i % 3]])
]


def some_parts(sizes: list[int], losses: list[list[float]]) -> list[LayerGroup]:
    return [
        LayerGroup((f"{i}",), size, dict(zip((2, 3, 4), nats, strict=True)), {})
        for i, (size, nats) in enumerate(zip(sizes, losses, strict=True))
    ]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
    st.data(),
    st.floats(2, 4),
)
def test_no_other_choice_within_the_budget_loses_less(sizes: list[int], data: st.DataObject, target: float) -> None:
    """Losses that do not fall with bits are none of its business."""
    nats = st.lists(st.floats(0, 10), min_size=3, max_size=3)
    parts = some_parts(sizes, [data.draw(nats) for _ in sizes])

    def loss(bits: Any) -> float:
        return sum(part.kl[b] for part, b in zip(parts, bits, strict=True))

    found = allocate_bits(parts, target)
    assert mean_bits(parts, found) <= target + 1e-6
    allowed = [bits for bits in product((2, 3, 4), repeat=len(parts)) if mean_bits(parts, bits) <= target]
    assert loss(found) <= min(map(loss, allowed)) + 1e-5 * max(max(part.kl.values()) for part in parts)


def test_a_whole_number_of_bits_may_be_uniform() -> None:
    """Parts that all suffer alike, and less with every bit by a constant factor: nothing is gained by differences."""
    parts = some_parts([7] * 6, [[1.0, 0.25, 0.0625]] * 6)
    assert (
        allocate_bits(parts, 3) == [3] * 6 and allocate_bits(parts, 2) == [2] * 6 and allocate_bits(parts, 4) == [4] * 6
    )
    bits, nats = zip(*frontier(parts), strict=True)
    assert list(bits) == sorted(bits) and list(nats) == sorted(nats, reverse=True)
    assert (bits[0], bits[-1], nats[0], nats[-1]) == (2, 4, 6.0, 0.375)


def test_bits_go_where_they_help() -> None:
    parts = some_parts([10, 10, 20], [[9, 3, 1], [1, 0.3, 0.1], [1, 0.3, 0.1]])
    assert allocate_bits(parts, 2.5) == [4, 2, 2]


@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 4))
def test_wasserstein_is_scipy_s_channel_by_channel(seed: int, n: int, d: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)
    spread = float((a - a.mean(0)).abs().mean())
    expected = np.mean([wasserstein_distance(a[:, i], b[:, i]) for i in range(d)])
    assert wasserstein(a, b) * spread == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert wasserstein(a, a[torch.randperm(n, generator=g)]) == 0
    assert wasserstein(a, a + 3) * spread == pytest.approx(3, rel=1e-4)
    assert wasserstein(5 * a, 5 * b) == pytest.approx(wasserstein(a, b), rel=1e-4), "of no unit"


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "phi3", "mixtral"])
def test_a_part_s_losses_are_those_of_the_library_s_model_with_that_part_rounded(
    model_type: str, text_file: Path, tmp_path: Path
) -> None:
    source = tiny.save(tiny.model_of(tiny.config_of(model_type), dtype=torch.float32), tmp_path / "model")
    options = replace(MIXED, data=text_file, init="none", rounding="rtn")
    report = quantize(source, tmp_path / "out", options)
    rows = sample_rows(load_corpus(text_file, read_tokenizer(source), vocab=tiny.VOCAB, length=32), 9, seed=0)[:2]
    parts = {part["linears"][0]: part for part in report["precision"]["parts"]}
    assert len(parts) == 8
    sizes = {name: t.numel() for name, t in load_file(source / "model.safetensors").items()}
    for part in parts.values():
        assert part["weights"] == sum(sizes[f"{name}.weight"] for name in part["linears"])
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before = whole(rows.ids, output_hidden_states=True)
    name = {"phi3": "model.layers.0.self_attn.qkv_proj"}.get(model_type, "model.layers.0.self_attn.q_proj")
    for bits, nats in parts[name]["kl"].items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        for linear in parts[name]["linears"]:
            weight, grid = model.get_parameter(f"{linear}.weight").data, Grid(int(bits))
            scale, zero = fit_clipped(weight, grid, torch.float32)
            weight.copy_(decode(encode(weight, scale, zero, grid), scale, zero, grid))
        after = model(rows.ids, output_hidden_states=True)
        assert float(dense(forward_kl, before.logits, after.logits).mean()) == pytest.approx(nats, rel=1e-3, abs=1e-7)
        far = wasserstein(before.hidden_states[1].flatten(0, 1), after.hidden_states[1].flatten(0, 1))
        assert far == pytest.approx(parts[name]["wasserstein"][bits], rel=1e-3, abs=1e-6)
    assert report["precision"]["tokens"] == rows.ids.numel()


@torch.no_grad()
def test_parts_are_rounded_as_the_job_rounds(tmp_path: Path) -> None:
    """By GPTQ where it rounds by GPTQ, whose losses are not those of rounding to nearest, and less over all parts."""
    losses = dict[str, list[float]]()
    for rounding in ("gptq", "rtn"):
        options = replace(MIXED, init="none", rounding=rounding, samples=8, length=64, candidate_bits="3,4")
        report = quantize(embedded.MODEL, tmp_path / rounding, options, allow_damage=True)
        losses[rounding] = [part["kl"]["3"] for part in report["precision"]["parts"]]
    assert sum(losses["gptq"]) < 0.95 * sum(losses["rtn"])


def test_what_fills_up_short_rows_counts_for_nothing(tmp_path: Path) -> None:
    """Neither in the answers nor in what a block puts out."""
    source = tiny.save(tiny.model_of(tiny.config_of("llama"), dtype=torch.float32), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": "the quick fox "[: 3 + i]}) + "\n" for i in range(9))
    )
    options = replace(
        MIXED, data=tmp_path / "rows.jsonl", by_document=True, init="none", rounding="rtn", profile_rows=6
    )
    part = quantize(source, tmp_path / "out", options)["precision"]["parts"][1]
    assert options.data is not None
    rows = load_corpus(
        options.data, read_tokenizer(source), vocab=tiny.VOCAB, length=32, by_document=True, rows=Sample(9, 0)
    )
    shown = sample_rows(rows, 9, seed=0)[:6]
    assert not shown.mask.all()
    before, after = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32) for _ in range(2))
    weight = after.get_parameter(f"{part['linears'][0]}.weight").data
    scale, zero = fit_clipped(weight, Grid(3), torch.float32)
    weight.copy_(decode(encode(weight, scale, zero, Grid(3)), scale, zero, Grid(3)))
    with torch.no_grad():
        p, q = (model(shown.ids, output_hidden_states=True) for model in (before, after))
    nats = dense(forward_kl, p.logits, q.logits)[shown.mask].mean()
    assert float(nats) == pytest.approx(part["kl"]["3"], rel=1e-3)
    far = wasserstein(p.hidden_states[1][shown.mask], q.hidden_states[1][shown.mask])
    assert far == pytest.approx(part["wasserstein"]["3"], rel=1e-3)


def test_while_it_is_learned_every_linear_lies_on_its_own_grid(tmp_path: Path) -> None:
    source = tiny.save(tiny.model_of(tiny.config_of("phi3"), dtype=torch.float32), tmp_path / "model")
    stream = BlockwiseModel(tiny.config_of("phi3"), Weights(source), torch.device("cpu"))
    widths = {"self_attn.qkv_proj": 2, "self_attn.o_proj": 3, "mlp.gate_up_proj": 4, "mlp.down_proj": 5}
    names = {f"model.layers.{i}.{name}": bits - i for i in range(2) for name, bits in widths.items()}
    scheme = Scheme.parse("w8a16-channel").with_bits(names | {"model.layers.1.self_attn.qkv_proj": 8})
    model = LearnedModel(stream, initial_transforms(stream, "hadamard", scheme, online=False, seed=0), scheme, 10**9)
    model.begin(0)
    for i in range(2):
        params = model.prepare(i, stream.read_block(i))
        for linear in stream.linears(i):
            levels = max(len(row.unique()) for row in linear.of(params).detach())
            bits = scheme.bits[linear.name]
            assert 2 ** (bits - 1) < levels <= 2**bits or bits == 8, linear.name


@pytest.mark.parametrize(("model_type", "scheme"), HELD)
def test_every_architecture_holds_what_was_measured(
    model_type: str, scheme: str, text_file: Path, tmp_path: Path
) -> None:
    """In our loader and, where it loads plainly, in the library; what runtimes put together has the same bits."""
    source = tiny.save(tiny.model_of(tiny.config_of(model_type), dtype=torch.float32), tmp_path / "model")
    report = quantize(source, tmp_path / "out", replace(MIXED, scheme=scheme, data=text_file, learn=True, tune_steps=1))
    (step,) = read_recipe(tmp_path / "out")
    shapes, bits = {n: t.numel() for n, t in load_file(source / "model.safetensors").items()}, step["bits"]
    mean = sum(shapes[f"{name}.weight"] * b for name, b in bits.items()) / sum(shapes[f"{n}.weight"] for n in bits)
    assert mean == pytest.approx(report["precision"]["mean_bits"]) and 2.5 < mean <= 3.5
    assert len(set(bits.values())) > 1
    for first, second in (("q_proj", "v_proj"), ("gate_proj", "up_proj")):
        assert all(b == bits[n.replace(first, second)] for n, b in bits.items() if n.endswith(first))
    model = load(tmp_path / "out")
    rows = load_corpus(text_file, read_tokenizer(source), vocab=tiny.VOCAB, length=32)
    held_out = sample_rows(rows, 9, seed=0)[6:]
    said = logits(model, held_out.ids)
    measured = compare(held_out, tiny.VOCAB, lambda row, positions: said[row, positions])
    assert measured.perplexity == pytest.approx(report["quality"]["perplexity"], rel=1e-4)
    if report["loaders"]["loaders"] == ["parewell.load"]:
        assert model_type in ("mixtral", "qwen3_moe") or scheme.endswith("asym")
        with pytest.raises(Exception, match="load_with_parewell"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        options = as_configured(model.config.to_dict())
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **options)
        assert (logits(theirs, IDS) - logits(model, IDS)).abs().max() < 1e-4


def test_the_file_is_as_large_as_the_mean_bits_say(tmp_path: Path) -> None:
    options = Quantize(
        scheme="w8a16-channel",
        target_bits=5.0,
        candidate_bits="3,4,8",
        samples=2,
        held_out=1,
        length=64,
        init="none",
        learn=False,
        rounding="rtn",
        profile_rows=1,
    )
    report = quantize(embedded.MODEL, tmp_path / "out", options)
    stored = load_file(tmp_path / "out/model.safetensors")
    packed = sum(t.nbytes for name, t in stored.items() if name.endswith("weight_packed"))
    weights = sum(part["weights"] for part in report["precision"]["parts"])
    assert 8 * packed / weights == pytest.approx(report["precision"]["mean_bits"], rel=0.01)
    assert {part["bits"] for part in report["precision"]["parts"]} <= {3, 4, 8}
    assert any(abs(bits - 5) < 0.005 for bits, _ in report["precision"]["frontier"]), "a width that no part has"
    assert json.loads((tmp_path / "out/report.json").read_text())["precision"] == json.loads(
        json.dumps(report["precision"])
    )


def test_bits_in_the_recipe_that_are_not_the_folder_s(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny_folder, out, replace(MIXED, data=text_file))
    recipe = json.loads((out / "parewell.json").read_text())
    good = recipe["recipe"][0]["bits"]
    name = next(iter(good))
    for bits, why in (
        ({}, "asks? for"),
        ({n: b for n, b in good.items() if n != name}, "other linears"),
        (good | {"model.layers.9.mlp": 4}, "other linears"),
        (good | {name: 9}, "from 2 to 8"),
        (good | {name: "4"}, "from 2 to 8"),
        ([4], "from 2 to 8"),
        (good | {name: 8 if good[name] != 8 else 4}, "asks? for"),
    ):
        recipe["recipe"][0]["bits"] = bits
        (out / "parewell.json").write_text(json.dumps(recipe))
        with pytest.raises(BadInput, match=why):
            load(out)


def test_mixed_models_are_exported_and_taught(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """On the grids they have: a student stays on them, and teaches."""
    config = tiny.config_of("llama", hidden_size=64, intermediate_size=96, attention_bias=False, mlp_bias=False)
    model = tiny.save(tiny.model_of(config, dtype=torch.float32), tmp_path / "model")
    options = replace(MIXED, scheme="w4a16-g32", target_bits=6.0, candidate_bits="4,8", data=text_file)
    quantize(model, tmp_path / "out", options)
    ours = logits(load(tmp_path / "out"), IDS)
    export(tmp_path / "out", tmp_path / "merged", Export(dtype="float32"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged, IDS) - ours).abs().max() < 1e-4
    report = export(tmp_path / "out", tmp_path / "onnx", Export(to="onnx"))
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    session = runtime.InferenceSession(tmp_path / "onnx/model.onnx")
    given = {"input_ids": IDS.numpy(), "attention_mask": torch.ones_like(IDS).numpy()}
    assert np.abs(session.run(None, given)[0] - ours.numpy()).max() < 1e-3
    assert 5 < report["bits_per_weight"] <= 7  # 32-bit scales, one for each 32 weights
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    export(tmp_path / "out", tmp_path / "gguf", Export(to="gguf"))
    tensors = gguf.GGUFReader(tmp_path / "gguf/model.gguf").tensors
    assert {t.tensor_type.name for t in tensors if "ffn" in t.name and "norm" not in t.name} == {"Q4_0", "Q8_0"}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    assert (logits(read, IDS) - ours).abs().max() < 2e-2 * ours.abs().max()

    small = {"data": text_file, "samples": 6, "held_out": 2, "length": 32, "steps": 3, "batch": 2}
    distill(model, tmp_path / "student", Distill(student=tmp_path / "out", **small))  # type: ignore[arg-type]
    before, after = (read_recipe(tmp_path / name)[-1]["bits"] for name in ("out", "student"))
    assert before == after and not torch.equal(logits(load(tmp_path / "student"), IDS), ours)
    distill(tmp_path / "student", tmp_path / "taught", Distill(student=model, **small))  # type: ignore[arg-type]


def test_refused(tiny_folder: Path, tmp_path: Path) -> None:
    for more, why in (
        ({"target_bits": 1.5}, "between 2 and 8"),
        ({"target_bits": 4.0, "candidate_bits": "4"}, "two or more"),
        ({"target_bits": 4.0, "candidate_bits": "four,8"}, "two or more"),
        ({"target_bits": 4.0, "candidate_bits": "1,8"}, "two or more"),
        ({"target_bits": 3.5, "candidate_bits": "4,8"}, "between 4 and 8"),
        ({"candidate_bits": "4,8"}, "--target-bits"),
        ({"profile_rows": 2}, "--target-bits"),
        ({"target_bits": 4.0, "scheme": "nf4"}, "nf4"),
        ({"target_bits": 4.0, "rounding": "none"}, "rounding none"),
        ({"target_bits": 4.0, "profile_rows": 0}, "profile-rows"),
        ({"target_bits": float("nan")}, "target-bits"),
    ):
        with pytest.raises(BadInput, match=why):
            Quantize(**more)  # type: ignore[arg-type]


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS does on these, past Python, where a pipeline reads JSON."""
    sizes = np.random.default_rng(2).integers(1, 50, 60)
    parts = []
    for i, size in enumerate(sizes):
        nats = sorted(np.random.default_rng(2000 + i).uniform(0, 1, 4), reverse=True)
        parts.append(LayerGroup((str(i),), int(size), dict(zip((2, 3, 4, 8), map(float, nats), strict=True)), {}))
    frontier(parts)
    print("still heard")
    assert capfd.readouterr().out == "still heard\n"
