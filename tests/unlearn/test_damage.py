"""No model is destroyed in silence: bounded predictions, rates that retained rows allow, jobs that fail, verdicts."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib import BadInput, Diverged, Failed
from calib.jobs.journal import Journal
from cli.main import run_cli
from tests.kills import digest
from tests.unlearn.conftest import Site
from tests.unlearn.test_unlearn import wanted
from unlearn import Unlearn, unlearn
from unlearn.datamodels.estimators import Scale, limited, scale_of
from unlearn.methods.datamodel_matching import shifted
from unlearn.methods.learning_rate import RATES, divided, rate_loss_bound, search_rate
from unlearn.model.ensemble import Ensemble
from unlearn.model.examples import plain_examples
from unlearn.report.verdict import losses, unlearned_verdict
from unlearn.validate import validate

# Predictions.


@given(st.integers(0, 99), st.floats(1e-3, 1e3))
def test_a_change_is_at_most_as_large_as_the_range_of_its_own_logits(seed: int, size: float) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, change = torch.randn(6, 5, generator=g), size * torch.randn(6, 5, generator=g)
    made, large = limited(change, logits)
    for i in range(6):
        own, most = (float(z[i].max() - z[i].min()) for z in (change, logits))
        assert float(made[i].max() - made[i].min()) == pytest.approx(min(own, most), rel=1e-4)
        assert torch.allclose(made[i], change[i] * min(1.0, most / own), rtol=1e-4)
        assert bool(large[i]) == (own > most)
    assert not limited(torch.zeros(2, 3), logits[:2, :3])[0].any()


def test_rows_that_go_are_shifted_by_their_own_scale_and_bounded_unless_that_was_fitted(
    net: Site, tmp_path: Path
) -> None:
    """Rows 2 and 5 of six go; a shift that differs by class and row."""
    options = wanted(net, "dmm", multiplier=1.0, forget=None, forget_lines="2,5")
    work = validate(net.model, tmp_path / "out", options).work(options, Journal(tmp_path))
    asked, one = torch.arange(6), work.trainable.one()
    logits = one.logits(work.rows[asked])[0]
    shift = 100.0 * torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    made = shifted(work, one, asked, lambda deleted, rows: shift[rows], Scale(2.0, 0.5), None)
    assert isinstance(made, Tensor)
    times = torch.tensor([0.5, 0.5, 2.0, 0.5, 0.5, 2.0])[:, None]
    assert torch.allclose(made - logits, times * shift, atol=1e-3)
    large = list[Tensor]()
    held = shifted(work, one, asked, lambda deleted, rows: shift[rows], Scale(2.0, 0.5, fitted=False), None, large)
    assert isinstance(held, Tensor)
    ranges = [(z.amax(-1) - z.amin(-1)) for z in (held - logits, logits)]
    assert torch.allclose(*ranges, atol=1e-3), "each as large as it may be"
    assert torch.cat(large).all() and len(torch.cat(large)) == 6


def test_a_scale_is_fitted_apart_to_rows_that_go_and_others() -> None:
    predicted = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    own = torch.rand(4, 30, generator=torch.Generator().manual_seed(1)) < 0.3
    found = scale_of(predicted, torch.where(own, 3.0, 0.25) * predicted, own)
    assert (found.own, found.others) == (pytest.approx(3.0), pytest.approx(0.25))


def test_a_scale_that_was_given_destroys_nothing_and_the_page_says_what_was_bounded(net: Site, tmp_path: Path) -> None:
    options = wanted(net, "dmm", multiplier=500.0, epochs=12)
    report = unlearn(net.model, tmp_path / "out", options)
    assert report["scale"]["bounded"] > 0.9
    before, after = (report["quality_by_stage"][stage]["retain"]["right"] for stage in ("before", "after"))
    assert after > 0.9 * before
    assert "had to be scaled down" in (tmp_path / "out/report.html").read_text()


# Rates.


def linear(weight: float) -> Ensemble:
    def forward(params: Any, rows: Any) -> Tensor:
        made: Tensor = rows.inputs[""] @ params["w"]
        return made

    return Ensemble(forward, {"w": torch.tensor([[[weight, 0.0]]])})


def test_the_largest_rate_is_taken_that_the_loss_allows(tmp_path: Path) -> None:
    """Logits x w and 0, labels 0: nats are log(1 + exp(-w)) at x = 1, in closed form. At the first rate there is no
    model any more."""
    rows, tried = plain_examples(torch.ones(3, 1), torch.zeros(3, dtype=torch.long)), list[tuple[float, int]]()

    def moved(lr: float, steps: int) -> Ensemble:
        tried.append((lr, steps))
        if lr == RATES[0]:
            raise Diverged("no number")
        return linear(2.0 - lr * 1e4)  # -1, 1, 1.7, 1.9

    def nats(w: float) -> float:
        return math.log1p(math.exp(-w))

    found = search_rate(moved, linear(2.0), rows, nats(1.0) - nats(2.0) + 1e-3, Journal(tmp_path))
    assert found["lr"] == RATES[2] and [t["lr"] for t in found["tried"]] == list(RATES[:3])
    assert [t["nats"] for t in found["tried"]] == [None, pytest.approx(nats(-1.0)), pytest.approx(nats(1.0))]
    assert found["before"] == pytest.approx(nats(2.0)) and len({steps for _, steps in tried}) == 1
    again = search_rate(moved, linear(2.0), rows, 1e-9, Journal(tmp_path))
    assert again == found and len(tried) == 3, "a job that goes on has it on a page"
    (tmp_path / "other").mkdir()
    worst = search_rate(moved, linear(2.0), rows, 1e-9, Journal(tmp_path / "other"))
    assert worst["lr"] == RATES[-1] and len(worst["tried"]) == len(RATES)


@given(st.integers(1, 300), st.integers(1, 200), st.integers(0, 9))
def test_rates_are_judged_by_other_rows_than_those_reported(count: int, most: int, seed: int) -> None:
    retained = torch.arange(count) * 3 + 1
    measured, judging = divided(retained, seed, most, True)
    assert not set(measured.tolist()) & set(judging.tolist())
    assert {*measured.tolist(), *judging.tolist()} <= set(retained.tolist())
    assert len(judging) == min(64, max(count // 5, int(count > 1))) and len(measured) == min(most, count - len(judging))
    whole, none = divided(retained, seed, most, False)
    assert len(whole) == min(most, count) and not len(none)


def test_a_job_without_a_rate_finds_one_and_says_so(net: Site, words: Site, tmp_path: Path) -> None:
    """Again the same; and what judges a rate is neither learned from nor reported on."""
    options = wanted(words, "npo", lr=None)
    report = unlearn(words.model, tmp_path / "a", options)
    unlearn(words.model, tmp_path / "b", options)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    rate = report["rate"]
    assert rate["lr"] == rate["tried"][-1]["lr"] and rate["lr"] in RATES and rate["bound"] == 9.0
    assert "Learning rate" in (tmp_path / "a/report.html").read_text()
    assert "rate" not in unlearn(words.model, tmp_path / "c", replace(options, lr=1e-3))
    same = unlearn(net.model, tmp_path / "d", wanted(net, "npo", lr=None, max_retain_loss=0.3))["rate"]
    assert same["bound"] == pytest.approx(-math.log(0.7)) and same["rows"] == 16
    work = validate(words.model, tmp_path / "x", options).work(options, Journal(tmp_path))
    assert len(work.judging) == 1 and not torch.isin(work.judging, work.measured).any()


def test_rates_of_a_model_that_is_easily_broken_are_low(words: Site, tmp_path: Path) -> None:
    """The bound decides: of no loss at all hardly any rate is left."""
    strict = wanted(words, "ascent", lr=None, epochs=20, batch=1, max_retain_loss=1e-3)
    report = unlearn(words.model, tmp_path / "out", strict, allow_damage=True)
    loose = unlearn(words.model, tmp_path / "loose", replace(strict, max_retain_loss=9.0))
    assert report["rate"]["lr"] < loose["rate"]["lr"] and len(report["rate"]["tried"]) > len(loose["rate"]["tried"])
    assert rate_loss_bound("causal-lm", 0.2) == 0.2 and rate_loss_bound("tensors", 0.1) == pytest.approx(-math.log(0.9))


# Jobs that fail.

HARSH: dict[str, Any] = {"lr": 0.1, "epochs": 6, "max_retain_loss": None}


def test_a_job_that_destroys_a_model_fails_and_leaves_nothing(words: Site, net: Site, tmp_path: Path) -> None:
    for site, unit in ((words, r"retained rows by \d+\.\d+ nats a token"), (net, r"by \d+\.\d% of its accuracy")):
        options = wanted(site, "ascent", **HARSH)
        with pytest.raises(Failed, match=rf"{unit}.*nothing was written\. Forget set: .*--allow-damage"):
            unlearn(site.model, tmp_path / "out", options)
        assert not list(tmp_path.iterdir()), "no journal, so that another run may begin"
    report = unlearn(net.model, tmp_path / "out", options, allow_damage=True)
    assert report["damage"]["bound"] == 0.1 and report["damage"]["lost"].keys() <= {"retain", "validation"}
    assert "Bad: the model got worse on retained rows by" in told(report)
    assert "kept as damage was allowed" in (tmp_path / "out/report.html").read_text()
    assert "damage" not in unlearn(net.model, tmp_path / "fine", replace(options, max_retain_loss=1.0))


def test_rows_of_validation_count_as_well(net: Site) -> None:
    def stages(right: float, nats: float) -> dict[str, dict[str, dict[str, float]]]:
        same = {"right": 0.9, "nats": 1.0}
        return {"before": {"forget": same, "retain": same, "validation": same},
                "after": {"forget": {"right": 0.0, "nats": 9.0}, "retain": same,
                          "validation": {"right": right, "nats": nats}}}  # fmt: skip

    assert losses("tensors", stages(0.82, 5.0), 0.1) == {}, "nine tenths of the accuracy, whatever the nats"
    assert losses("tensors", stages(0.80, 1.0), 0.1) == {"validation": pytest.approx(1 / 9)}
    assert losses("causal-lm", stages(0.0, 1.19), 0.2) == {}, "nats, whatever the accuracy"
    assert losses("causal-lm", stages(0.9, 1.3), 0.2) == {"validation": pytest.approx(0.3)}


# The command.


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["parewell", "unlearn", *map(str, arguments)])
    status = 0
    try:
        run_cli()
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    return status, " ".join(said.out.split()), said.err


def test_the_plain_command_works_and_says_which_method_and_why(
    words: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (words.model, tmp_path / "out", "--train", words.train, "--forget", words.forget)
    status, out, err = command(monkeypatch, capsys, *given)
    assert status == 0, err
    assert "as no training recipe is known, which dmm needs (--training FILE)" in err and "Note: method " in out
    assert "Forget set: token accuracy" in out and ("Doubtful: " in out or "Good: " in out)
    report = json.loads((tmp_path / "out/report.json").read_text())
    (step,) = json.loads((tmp_path / "out/parewell.json").read_text())["recipe"]
    assert report["method"] == step["options"]["method"] != "dmm" and report["rate"]["lr"] in RATES
    status, _, err = command(monkeypatch, capsys, *given, "--method", "dmm")
    assert status == 2 and len(err.splitlines()) == 1 and "method dmm wants models trained on other rows" in err
    status, _, err = command(monkeypatch, capsys, *given, "--method", "ascent", "--lr", "0.1")
    assert status == 1 and "the model got worse on" in err.splitlines()[-1]
    assert not (tmp_path / ".out.journal").exists() and json.loads((tmp_path / "out/report.json").read_text()) == report
    status, out, _ = command(monkeypatch, capsys, *given, "--method", "ascent", "--lr", "0.1", "--allow-damage")
    assert status == 0 and "Bad: " in out


def test_a_method_is_chosen_by_what_is_known(net: Site, tmp_path: Path) -> None:
    base: dict[str, Any] = {"train": net.train, "forget": net.forget, "factory": net.factory}
    for more, method in (({}, Unlearn), ({"training": net.training}, "dmm"), ({"multiplier": 1.0}, "dmm")):
        job = validate(net.model, tmp_path / "out", Unlearn(**base, **more))
        assert (
            (job.options.method == method)
            if method != Unlearn
            else (job.options.method != "dmm" and job.training is None)
        )
        assert job.why is not None and f"method {job.options.method}" in job.summary()
    assert validate(net.model, tmp_path / "out", Unlearn(**base, method="npo")).why is None
    with pytest.raises(BadInput, match="weight: changes nothing"):
        validate(net.model, tmp_path / "out", Unlearn(**base, training=net.training, weight=2.0))


def report_of(**after: tuple[float, float]) -> dict[str, Any]:
    """Nats and accuracy after; before, 0.1 and 97.2% of the forget set, else 0.2 and 93.5%."""
    before = {
        name: {"nats": 0.1, "right": 0.972} if name == "forget" else {"nats": 0.2, "right": 0.935} for name in after
    }
    now = {name: {"nats": nats, "right": right} for name, (nats, right) in after.items()}
    return {
        "method": "npo", "task": "causal-lm", "rows": {"train": 12, "forget": 3},
        "quality_by_stage": {"before": before, "after": now},
    }  # fmt: skip


def told(report: dict[str, Any]) -> str:
    return str(unlearned_verdict(report))


def test_verdicts_in_words() -> None:
    said = told(report_of(forget=(1.4, 0.806), retain=(0.3, 0.87)))
    assert "Forget set: token accuracy 97.2% -> 80.6% (0.100 -> 1.400 nats)." in said
    assert "Retain set: token accuracy 93.5% -> 87.0%" in said and said.startswith("Good: ")
    assert "Bad: nothing was forgotten" in told(report_of(forget=(0.11, 0.972), retain=(0.2, 0.935)))
    assert "Good: no row of the forget set" in told(
        report_of(forget=(0.11, 0.972), retain=(0.2, 0.935)) | {"method": "retrain"}
    )
    never = {"asked": {"oracle": {"forget": {"nats": 0.1, "right": 0.97}}}}
    assert "Bad" not in told(report_of(forget=(0.1, 0.972), retain=(0.2, 0.935)) | never), "it knows no more"
    little = told(report_of(forget=(0.3, 0.9), retain=(0.2, 0.935), validation=(3.0, 0.1)))
    assert "less than half of it was forgotten (0.300 nats; validation rows are at 3.000)" in little
    back = report_of(forget=(1.4, 0.8), retain=(0.2, 0.935), earlier=(3.5, 0.1))
    back["quality_by_stage"]["before"]["earlier"]["nats"] = 5.9
    assert "Bad: rows of earlier requests are recovered (5.900 -> 3.500 nats)" in told(back)
    nothing = told(report_of(retain=(0.2, 0.935)) | {"rows": {"train": 12, "forget": 0}})
    assert nothing.startswith("Nothing was forgotten, as no row was chosen.") and "byte for byte" in nothing
