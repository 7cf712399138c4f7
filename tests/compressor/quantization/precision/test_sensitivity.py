"""What rounding costs, predicted from one backward pass: closed forms, and gradients of the library's own model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import bisect
from torch import Tensor
from transformers import AutoModelForCausalLM

from calib import BadInput
from calib.blockwise.model import BlockwiseModel, Params
from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.losses.divergences import dense, forward_kl
from calib.model.weights import Weights
from calib.quant.grid import decode, encode, fit_clipped
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme
from calib.stats.moments import Moments
from compressor import Quantize, quantize
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.quantization.precision.sensitivity import (
    _BackwardPass,
    drawn_tokens,
    gradient_factor,
    kl_together,
    predict_groups,
    predicted_kl,
    profile_rank_correlation,
    unforeseen,
)
from compressor.quantization.quantized_model import QuantizedModel
from compressor.quantization.rounding import Rounder
from tests import tiny
from tests.compressor.quantization.precision.test_mixed_precision import MIXED, some_parts

SCHEME = Scheme.parse("w8a16-channel")


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
def test_of_a_gaussian_linear_it_is_the_kl_itself(seed: int, out: int, into: int) -> None:
    """y ~ N(W x, S): KL(W || W + D) is quadratic in D, and G = S^-1, as g = S^-1 (y - W x)."""
    g = torch.Generator().manual_seed(seed)
    x, weight, error = (torch.randn(n, m, generator=g).double() for n, m in ((9, into), (out, into), (out, into)))
    root = torch.randn(out, out, generator=g).double() + 3 * torch.eye(out)
    noise = root @ root.mT
    one = torch.distributions.MultivariateNormal(x @ weight.mT, noise)
    other = torch.distributions.MultivariateNormal(x @ (weight + error).mT, noise)
    kl = torch.distributions.kl_divergence(one, other).mean()
    found = predicted_kl(torch.linalg.inv(noise), error, x.mT @ x / len(x))
    assert found == pytest.approx(float(kl), rel=1e-6, abs=1e-9)


def test_tokens_are_drawn_from_the_distribution() -> None:
    """Evenly spaced draws give each token its share, but for one draw."""
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, -40.0])
    uniform = (torch.arange(1000).double() + 0.5) / 1000
    drawn = drawn_tokens(logits.expand(1000, 5), uniform).bincount(minlength=5)
    assert ((drawn - 1000 * logits.softmax(-1)).abs() <= 1).all() and drawn[4] == 0
    assert drawn_tokens(logits[None], torch.tensor([1 - 1e-17], dtype=torch.float64)).item() < 5


def model_of(folder: Path, model_type: str) -> QuantizedModel:
    stream = BlockwiseModel(tiny.config_of(model_type), Weights(folder), torch.device("cpu"))
    return QuantizedModel(stream, SCHEME, stream.read_outer(), None, [RuntimeTransforms()] * stream.layers)


@pytest.fixture
def rows() -> Corpus:
    ids = torch.randint(3, tiny.VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    return Corpus(ids, torch.arange(12) < torch.tensor([12, 5, 9])[:, None], "here")


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_factors_are_those_of_the_library_s_model(model_type: str, rows: Corpus, tmp_path: Path) -> None:
    """Gradients of the log-likelihood of the same tokens, by autograd through the whole model; fused weights and those
    that are kept as (in, out) too.  And what each part costs is predicted from them."""
    folder = tiny.save(tiny.model_of(tiny.config_of(model_type), dtype=torch.float32), tmp_path / "model")
    model = model_of(folder, model_type)
    stream, found = model.stream, dict[str, tuple[Tensor, Tensor]]()

    def visit(i: int, params: Params, inputs: Mapping[str, Moments], gradients: Mapping[str, Moments]) -> None:
        for one in stream.linears(i):
            sums = inputs[one.module]
            assert sums.count == int(rows.mask.sum())
            found[one.name] = gradient_factor(one, gradients), sums.gram / sums.count

    _BackwardPass(model, rows, 7).run(visit, RunContext(Journal(tmp_path), 10**9))
    whole, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), dict[str, list[Tensor]]()
    names = {f"{stream.block_name(i)}.{one.module}" for i in range(stream.layers) for one in stream.linears(i)}

    def keep(name: str, given: Tensor, made: Tensor) -> None:
        made.retain_grad()
        seen[name] = [given.detach(), made]

    for name in names:
        whole.get_submodule(name).register_forward_hook(lambda _, given, made, name=name: keep(name, given[0], made))
    logits = whole(rows.ids, attention_mask=rows.mask.long()).logits
    draws = torch.rand(rows.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))[rows.mask]
    labels = drawn_tokens(logits.detach()[rows.mask], draws)
    torch.nn.functional.cross_entropy(logits[rows.mask], labels, reduction="sum").backward()
    asked = Quantize(scheme="w4a16-channel", target_bits=4, candidate_bits="3,8", seed=7, limit=True)
    told = predict_groups(model, rows, asked, Rounder("rtn", 0.0), RunContext(Journal(tmp_path), 0))
    costs = told.groups
    assert told.tokens == int(rows.mask.sum()) and told.limit is not None
    kl = {name: part.kl[3] for part in costs for name in part.linears[:1]}
    powers = list[Tensor]()
    for i in range(stream.layers):
        for one in stream.linears(i):
            given, made = seen[f"{stream.block_name(i)}.{one.module}"]
            assert made.grad is not None
            x, g = given[rows.mask].double(), made.grad[rows.mask].double()
            g = g if one.rows is None else g[:, slice(*one.rows)]
            gradients, inputs = found[one.name]
            torch.testing.assert_close(gradients, g.mT @ g / len(g), rtol=1e-3, atol=1e-4 * float(g.square().mean()))
            torch.testing.assert_close(inputs, x.mT @ x / len(x), rtol=1e-3, atol=1e-4 * float(x.square().mean()))
            a, b = (torch.linalg.eigvalsh(z.mT @ z / len(z)).clamp(min=0) for z in (x, g))
            powers.append(torch.outer(b, a).flatten() * one.of(stream.read_block(i)).double().square().mean())
            if (part := next(p for p in costs if one.name in p.linears)).linears == (one.name,):
                weight = one.of(stream.read_block(i))
                scale, zero = fit_clipped(weight, Grid(3), torch.float32)
                error = (decode(encode(weight, scale, zero, Grid(3)), scale, zero, Grid(3)) - weight).double()
                expected = 0.5 * torch.einsum("to,oi,ni->tn", g, error, x).square().mean()
                assert kl[one.name] == pytest.approx(float(expected), rel=1e-3)
                assert part.kl[8] < part.kl[3] / 100
    power, (kl, bits) = torch.cat(powers), told.limit[len(told.limit) // 2]
    level = bisect(lambda log: float(power.clamp(max=2**log).sum()) / 2 - kl, -80, 20)
    assert bits == pytest.approx(float((power / 2**level).log2().clamp(min=0).sum()) / 2 / len(power), rel=1e-2)


@torch.no_grad()
def test_all_together_are_measured_on_the_library_s_model(rows: Corpus, tmp_path: Path) -> None:
    folder = tiny.save(tiny.model_of(tiny.config_of("llama"), dtype=torch.float32), tmp_path / "model")
    model = model_of(folder, "llama")
    linears = [one for i in range(model.stream.layers) for one in model.stream.linears(i)]
    bits = {one.name: 3 + (".0." in one.name) for one in linears}
    context = RunContext(Journal(tmp_path), 10**9)
    found = kl_together(model, rows[:1], rows, bits, Rounder("rtn", 0.0), context)
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    for name, width in bits.items():
        weight, grid = after.get_parameter(f"{name}.weight").data, Grid(width)
        scale, zero = fit_clipped(weight, grid, torch.float32)
        weight.copy_(decode(encode(weight, scale, zero, grid), scale, zero, grid))
    p, q = (one(rows.ids).logits[rows.mask] for one in (before, after))
    assert found == pytest.approx(float(dense(forward_kl, p, q).mean()), rel=1e-3)


def test_ranks() -> None:
    measured = some_parts([1, 1, 1], [[3, 2, 1], [6, 5, 1], [9, 1, 2]])
    predicted = some_parts([1, 1, 1], [[1, 4, 1], [2, 9, 1], [3, 2, 0]])
    assert profile_rank_correlation(measured, predicted) == {"2": 1.0, "3": 1.0, "4": pytest.approx(-1.0)}


def test_what_is_foretold_is_anchored_to_what_is_measured(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """A factor for all, so that the sum at the allocated bits is the KL that was measured; beside a measured profile
    stands how well it was predicted."""
    options = replace(MIXED, data=text_file, profile="sensitivity", limit=True)
    found = quantize(tiny_folder, tmp_path / "out", options)["precision"]
    about, parts = found["profile"], found["parts"]
    assert about["method"] == "sensitivity" and about["why"] is None and about["predicted"] > 0
    assert sum(part["kl"][str(part["bits"])] for part in parts) == pytest.approx(about["measured"])
    measured = quantize(tiny_folder, tmp_path / "measured", replace(options, profile="measured"))["precision"][
        "profile"
    ]
    assert measured["method"] == "measured" and measured["why"] is None
    assert measured["rank_correlation"].keys() == parts[0]["kl"].keys() and measured["predicted"] > 0
    assert 0 < about["limit"]["bits"] < found["mean_bits"] and len(about["limit"]["curve"]) > 10
    for folder, text in (("out", "one backward pass (K-FAC)"), ("out", "any Gaussian code"), ("measured", "rank corr")):
        assert text in " ".join((tmp_path / folder / "report.html").read_text().split())


def test_experts_are_measured_and_the_report_says_why(text_file: Path, tmp_path: Path) -> None:
    config = tiny.config_of("mixtral")
    folder = tiny.save(tiny.model_of(config, dtype=torch.float32), tmp_path / "model")
    assert "experts" in str(unforeseen(BlockwiseModel(config, Weights(folder), torch.device("cpu"))))
    options: Quantize = replace(MIXED, data=text_file, profile="sensitivity", rounding="rtn", candidate_bits="3,4")
    report = quantize(folder, tmp_path / "out", options)
    assert report["precision"]["profile"]["method"] == "measured"
    assert "experts" in report["precision"]["profile"]["why"]
    with pytest.raises(BadInput, match="limit: needs gradients"):
        quantize(folder, tmp_path / "other", replace(options, limit=True))
    with pytest.raises(BadInput, match="limit: changes nothing without --target-bits"):
        Quantize(limit=True)
    with pytest.raises(BadInput, match="profile"):
        Quantize(target_bits=4, profile="guessed")
    with pytest.raises(BadInput, match="profile: changes nothing"):
        Quantize(profile="measured")
