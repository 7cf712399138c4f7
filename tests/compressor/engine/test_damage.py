"""A job that made a model much worse fails, learning that ends worse is not kept, and gains stay where they are."""

from __future__ import annotations

import html
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from calib import Damaged, Failed, embedded
from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus
from calib.model.weights import Weights
from calib.quant.scheme import Scheme
from calib.stats.perplexity import compare, standard_error
from cli.main import run_cli
from compressor import Distill, Export, Quantize, distill, export, quantize
from compressor.engine.damage import advice_after, beyond_chance, export_damage, rounding_damage, training_damage
from compressor.quantization.calibrate import transformed
from compressor.quantization.learn_transforms import initial_transforms
from compressor.quantization.objective import kept_back
from compressor.report.common import FEW_TOKENS, notes
from compressor.transforms.proof import parts_of
from tests import tiny
from tests.architectures import architecture_of
from tests.kills import digest

SMALL = Quantize(scheme="w4a16-channel", samples=4, held_out=4, length=64, learn=False)
NEAREST = replace(SMALL, init="none", rounding="rtn")


def figures(**more: Any) -> dict[str, Any]:
    return {"tokens": 1000, "perplexity": 9.0, "kl": 0.1, "kl_error": 0.02, "top1_agreement": 0.9} | more


def reasons(model_type: str, tmp_path: Path, gains: Tensor) -> BlockwiseModel:
    """Of a model in float64 whose norms have the given gains."""
    model = tiny.model_of(tiny.config_of(model_type))
    for name, p in model.named_parameters():
        if "norm" in name:
            offset = 1.0 if model_type.startswith("gemma") else 0.0
            p.data = gains[: len(p)].clone() - offset if len(p) <= len(gains) else p.data
    return BlockwiseModel(model.config, Weights(tiny.save(model, tmp_path)), torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2"])
def test_where_nothing_rotates_the_weights_keep_their_scale(model_type: str, tmp_path: Path) -> None:
    """Gains of 0, tiny, negative and large ones: readers and norms are as they were, to the last bit."""
    gains = torch.cat([torch.tensor([0.0, 1e-30, -3.0, 123.0]), torch.rand(20) * 4 - 2]).double()
    stream = reasons(model_type, tmp_path, gains)
    assert parts_of(stream).obstacle
    t = initial_transforms(stream, "identity", Scheme.parse("w4a16-channel"), online=False, seed=0)
    for i in range(stream.layers):
        before, after = stream.read_block(i), transformed(stream, i, t)
        for name, value in before.items():
            assert torch.equal(after[name], value), name
        turned = transformed(
            stream, i, initial_transforms(stream, "hadamard", Scheme.parse("w4a16-channel"), online=False, seed=0)
        )
        a = architecture_of(stream.config)
        for name in (a.q, a.k, *a.gates, *a.ups, a.attention_norm, a.mlp_norm):
            if name is not None:
                assert torch.equal(turned[f"{name}.weight"], before[f"{name}.weight"]), name
        assert not torch.equal(turned[f"{a.o}.weight"], before[f"{a.o}.weight"])


def test_a_standard_error_is_that_of_the_mean_of_equal_rows_and_what_leaving_each_out_says() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = torch.rand(50, dtype=torch.float64, generator=generator) * 9
    equal = torch.full((50,), 7.0, dtype=torch.float64)
    assert standard_error(sums, equal) == pytest.approx(float((sums / 7).std() / math.sqrt(50)))
    counts = torch.randint(3, 30, (50,), generator=generator).double()
    sums = sums * counts
    left = torch.stack([(sums.sum() - s) / (counts.sum() - c) for s, c in zip(sums, counts, strict=True)])
    jackknife = math.sqrt(49 / 50 * float((left - left.mean()).square().sum()))
    assert standard_error(sums, counts) == pytest.approx(jackknife, rel=0.05)
    assert standard_error(sums[:1], counts[:1]) is None


def test_the_error_of_a_perplexity_is_of_rows_and_padding_counts_nowhere() -> None:
    ids = torch.randint(5, (6, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 5:] = False
    scores = torch.randn(6, 9, 5, generator=torch.Generator().manual_seed(1))
    found = compare(Corpus(ids, mask, "rows", None), 5, lambda row, positions: scores[row, positions])
    nats = -scores.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].double() * mask[:, 1:]
    tokens = mask[:, 1:].sum(1).double()
    error = standard_error(nats.sum(1), tokens)
    assert error is not None and found.perplexity_error == pytest.approx(found.perplexity * error, rel=1e-5)
    assert found.kl_error is None


@pytest.mark.usefixtures("judged")
def test_what_is_damage() -> None:
    assert rounding_damage(figures(), figures()) is None, "the same is no damage"
    assert rounding_damage(figures(top1_agreement=0.5), None) is None
    assert "fewer than 50%" in str(rounding_damage(figures(top1_agreement=0.499), None))
    # Two standard errors of a difference of figures with .03 and .04 each are .1.
    within, beyond = (figures(kl=0.2 + more, kl_error=0.04) for more in (-0.001, 0.001))
    nearest = figures(kl=0.1, kl_error=0.03)
    assert not beyond_chance(within, nearest) and beyond_chance(beyond, nearest)
    assert not beyond_chance(nearest, beyond), "less is not worse"
    assert rounding_damage(within, nearest) is None and "rounding to nearest" in str(rounding_damage(beyond, nearest))
    assert rounding_damage(figures(kl=0.0109, kl_error=0.0), figures(kl=0.001, kl_error=None)) is None
    assert rounding_damage(figures(kl=math.nan), nearest) is not None
    # A student that begins badly and gets better has done what it should, one that gets worse has not.
    bad, good = figures(kl=5.0, top1_agreement=0.1), figures(kl=3.0, top1_agreement=0.2, perplexity=7.0)
    assert training_damage(bad, good, labels=False) is None
    assert "rose from 3 to 5" in str(training_damage(good, bad, labels=False))
    assert training_damage(bad, figures(kl=6.0, perplexity=8.0), labels=True) is None, (
        "it learns the text, not the teacher"
    )
    assert training_damage(bad, figures(kl=6.0, perplexity=9.1), labels=True) is not None
    fell = figures(top1_agreement=0.4)
    assert "than before" in str(training_damage(figures(top1_agreement=0.6), fell, labels=False))
    assert (
        export_damage(figures(kl=0.11), rounds=True) is None
        and export_damage(figures(kl=0.11), rounds=False) is not None
    )
    assert export_damage(figures(top1_agreement=0.3), rounds=True) is not None


@pytest.mark.usefixtures("judged")
def test_a_model_that_is_broken_is_not_written_but_where_that_is_allowed(tmp_path: Path) -> None:
    options, out = replace(NEAREST, scheme="w2a16-channel"), tmp_path / "out"
    with pytest.raises(Damaged, match=r"w2a16-channel: the most likely .*; rounding to nearest agrees at .* more bits"):
        quantize(embedded.MODEL, out, options)
    assert issubclass(Damaged, Failed) and {p.name for p in tmp_path.iterdir()} == {".out.journal"}
    report = quantize(embedded.MODEL, out, options, resume=True, allow_damage=True)
    assert report["damage"]["allowed"] and "most likely" in report["damage"]["found"]
    assert report["damage"]["found"] in html.unescape((out / "report.html").read_text())
    quantize(embedded.MODEL, tmp_path / "whole", options, allow_damage=True)
    assert digest(out) == digest(tmp_path / "whole")
    fine = quantize(embedded.MODEL, out, replace(NEAREST, scheme="w8a16-channel"))
    assert fine["damage"] == {"found": None, "allowed": False}
    assert fine["quality_by_stage"]["nearest"] == fine["quality"]


@pytest.mark.usefixtures("judged")
def test_a_method_that_costs_more_than_rounding_to_nearest_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose rotation is not orthogonal: the model is another, if not one that says nothing."""
    module = sys.modules["compressor.quantization.learn_transforms"]
    right = module.random_hadamard
    monkeypatch.setattr(module, "random_hadamard", lambda n, g: right(n, g) + 0.004 * torch.randn(n, n, generator=g))
    words = ["parewell", "quantize", embedded.MODEL, tmp_path / "out", "--scheme", "w8a16-channel", "--no-learn"]
    words += ["--tied", "untie", "--samples", 4, "--held-out", 4, "--length", 64]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as status:
        run_cli()
    said = capsys.readouterr().err
    assert status.value.code == 1 and not (tmp_path / "out").exists()
    assert "rounding to nearest without any transform costs" in said
    assert "--init none --no-learn (with --no-resume)" in said and said.endswith("--allow-damage --resume\n")


def test_nearest_is_what_a_job_without_method_does(tmp_path: Path) -> None:
    """Once as a walk of its own, once as a whole job by the walk that calibrates."""
    for scheme in ("w4a8-channel", "w3a16-g64-asym"):
        plain = quantize(embedded.MODEL, tmp_path / "plain", replace(NEAREST, scheme=scheme))["quality"]
        stages = quantize(embedded.MODEL, tmp_path / "out", replace(SMALL, scheme=scheme, online=False))
        nearest = stages["quality_by_stage"]["nearest"]
        assert list(stages["quality_by_stage"]) == ["nearest", "rounded"]
        assert nearest == {name: pytest.approx(value, rel=1e-6) for name, value in plain.items()}
        assert stages["quality"]["kl"] != pytest.approx(nearest["kl"], rel=1e-3)


def test_learning_and_tuning_that_end_worse_are_not_kept(tmp_path: Path) -> None:
    """With rates that none survives OUT has the bytes of a job that does not learn, or does not tune."""
    fixed = replace(SMALL, scheme="w3a16-channel", samples=8, init="hadamard")
    quantize(embedded.MODEL, tmp_path / "fixed", fixed)
    wild = replace(fixed, learn=True, steps=3, batch=2, lr_rotation=3.0, lr_scale=3.0, block_steps=0, tune_steps=0)
    learned = quantize(embedded.MODEL, tmp_path / "learned", wild)
    tuned = quantize(
        embedded.MODEL, tmp_path / "tuned", replace(fixed, block_steps=0, tune_steps=3, batch=2, lr_tune=2.0)
    )
    for report, name, words in ((learned, "learn", "Learning ended worse"), (tuned, "tune", "Tuning ended worse")):
        check = report["checks"][name]
        assert not check["kept"] and check["after"] > check["before"] > 0
        assert check["rows"] == kept_back(8) == 2 and check["tokens"] == 128
        assert any(note.startswith(words) for note in notes(report))
        assert list(report["quality_by_stage"]) == ["nearest", "rounded"]
    for name in ("learned", "tuned"):
        own, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in (name, "fixed"))
        assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own), name
    coarse = replace(fixed, scheme="w2a16-channel", samples=16)  # where tuning has much to win, whatever sums round to
    better = replace(coarse, block_steps=0, tune_steps=20, batch=4, lr_tune=0.002)
    kept = quantize(embedded.MODEL, tmp_path / "kept", better, allow_damage=True)
    check = kept["checks"]["tune"]
    assert check["kept"] and check["after"] < check["before"] and "tuned" in kept["quality_by_stage"]


def test_rows_that_are_kept_back_are_not_descended_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other words in them change what they tell, and no byte of what is learned."""
    batch = sys.modules["compressor.quantization.objective"].CalibrationBatch
    seen = list[tuple[int, ...]]()
    read = batch.read

    def watched(data: Any, rows: Any, device: Any) -> Any:
        seen.append(tuple(rows))
        return read(data, rows, device)

    monkeypatch.setattr(batch, "read", staticmethod(watched))
    quantize(embedded.MODEL, tmp_path / "out", replace(SMALL, samples=8, block_steps=0, tune_steps=6, batch=3))
    assert {row for rows in seen if len(rows) == 3 for row in rows} == set(range(6))  # of a step's three rows
    assert {row for rows in seen if len(rows) == 1 for row in rows} == {6, 7}  # of the two that were kept back
    assert [kept_back(n) for n in (1, 3, 4, 16, 128)] == [0, 0, 1, 4, 8]


@pytest.mark.usefixtures("judged")
def test_a_student_that_got_worse_is_not_written(tmp_path: Path) -> None:
    options = Distill(student=embedded.MODEL, samples=4, held_out=4, length=32, steps=3, warmup=0, lr=0.05)
    with pytest.raises(Damaged, match=r"KL from the teacher rose from .* lower --lr"):
        distill(embedded.MODEL, tmp_path / "out", options)
    assert {p.name for p in tmp_path.iterdir()} == {".out.journal"}
    report = distill(embedded.MODEL, tmp_path / "out", options, resume=True, allow_damage=True)
    assert report["damage"]["found"] == json.loads((tmp_path / "out/report.json").read_text())["damage"]["found"]
    assert report["damage"]["allowed"] and "rose" in report["damage"]["found"]
    # Half of the blocks say nothing yet; a step that helps is no failure.
    cut = replace(options, student=None, layers=4, lr=1e-4, steps=2)
    quality = distill(embedded.MODEL, tmp_path / "cut", cut)
    assert quality["damage"]["found"] is None and quality["quality"]["top1_agreement"] < 0.5


@pytest.mark.usefixtures("judged")
def test_an_export_that_answers_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Export(held_out=1, length=32)
    assert export(embedded.MODEL, tmp_path / "fine", options)["damage"]["found"] is None
    bad = figures(top1_agreement=0.2, reference_perplexity=2.0, bits_per_byte=1.0, reference_bits_per_byte=1.0)
    measured = SimpleNamespace(asdict=lambda: dict(bad))
    monkeypatch.setattr(sys.modules["compressor.exporters.export"], "compare", lambda *_: measured)
    with pytest.raises(Damaged, match=r"to safetensors: the most likely answer is that of what it was made from at"):
        export(embedded.MODEL, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    assert "20.0%" in export(embedded.MODEL, tmp_path / "out", options, allow_damage=True)["damage"]["found"]


def test_figures_say_how_little_they_rest_on(tmp_path: Path) -> None:
    options = replace(SMALL, samples=4, profile_rows=1, target_bits=4.0, candidate_bits="4,8", halves=True)
    report = quantize(embedded.MODEL, tmp_path / "out", options)
    page = (tmp_path / "out/report.html").read_text()
    assert report["quality"]["tokens"] == 4 * 63
    found = notes(report)
    for words in (
        "Figures rest on 252 tokens, fewer than 2,000",
        "Bit widths rest on 64 tokens",
        "The estimate of what more calibration rows would gain rests on the same",
        "standard error of the perplexity",
    ):
        assert any(words in note for note in found) and words in page, words
    enough = {"quality": figures(tokens=FEW_TOKENS, perplexity_error=0.1), "samples": {}}
    assert not any("rest" in note for note in notes(enough))


@pytest.mark.parametrize("kept", [2, 3])
def test_states_of_a_cut_student_are_held_against_those_of_the_teacher_where_its_next_block_begins(
    kept: int, text_file: Path, tmp_path: Path
) -> None:
    """A teacher whose second block adds nothing to the stream: the student without it goes through the same states,
    and so does one that keeps all blocks; no loss of states has anything to say."""
    model = tiny.model_of(tiny.config_of("llama", num_hidden_layers=3), dtype=torch.float32)
    for name, p in model.named_parameters():
        if ".1." in name and ("o_proj" in name or "down_proj" in name):
            p.data.zero_()
    teacher = tiny.save(model, tmp_path / "teacher")
    options = Distill(
        layers=kept, data=text_file, samples=4, held_out=2, length=16, steps=1, batch=2, loss="forward-kl+hidden"
    )
    report = distill(teacher, tmp_path / "out", options)
    assert report["cut"]["layers"] == ([0, 2] if kept == 2 else [0, 1, 2])
    assert report["curves"]["hidden"][0] == pytest.approx(0, abs=1e-6)
    assert report["curves"]["forward-kl"][0] == pytest.approx(0, abs=1e-5)


@pytest.mark.usefixtures("judged")
def test_students_of_numbers_and_of_several_labels_that_end_worse() -> None:
    one = {"teacher_mse": 1.0, "teacher_mse_error": 0.1, "mse": 2.0}
    assert training_damage(one, one | {"teacher_mse": 1.25}, labels=True) is None, "within two standard errors of both"
    assert training_damage(one, one | {"teacher_mse": 9.0, "mse": 1.9}, labels=True) is None, "it predicts better"
    assert "squared error from the teacher rose" in str(training_damage(one, one | {"teacher_mse": 9.0}, labels=True))
    many = {"kl": 1.0, "kl_error": 0.1, "f1_micro": 0.5}
    assert "KL from the teacher rose" in str(training_damage(many, many | {"kl": 9.0}, labels=True))
    assert training_damage(many, many | {"kl": 9.0, "f1_micro": 0.6}, labels=True) is None
    assert training_damage(many, many | {"kl": 0.5}, labels=True) is None


def test_more_bits_are_advised_by_the_option_that_fixes_them() -> None:
    """The scheme's own bits count neither beside target bits nor where bits are searched for."""
    far = {"top1_agreement": 0.1, "kl": 3.0}
    for asked, word in (
        ({}, "take a scheme of more bits than w4a16"),
        ({"target": 2.5}, "take more --target-bits than 2.5"),
        ({"searched": True}, "ask for a lower --tell-apart"),
    ):
        assert word in advice_after("w4a16", "none", "rtn", far, **asked)
        assert advice_after("w4a16", "cat", "gptq", None, **asked) == advice_after("w4a16", "cat", "gptq", None)
