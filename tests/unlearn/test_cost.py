"""Dry runs of unlearning against the jobs themselves: bytes of OUT within TOLERANCE or SLACK, whichever is more."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from calib.jobs.cost import HOUR
from cli.unlearn import unlearn_command as command
from tests.unlearn.conftest import Site
from unlearn import Unlearn, unlearn
from unlearn.cost import estimate_unlearning, passes_of, shorter_unlearnings
from unlearn.validate import validate

TOLERANCE = 0.02
SLACK = 20_000  # bytes, as reports of small jobs outweigh their models


def wanted(site: Site, **more: Any) -> Unlearn:
    given = {"train": site.train, "forget": site.forget, "validation": site.validation, "factory": site.factory}
    if site.factory is None:
        given |= {"max_retain_loss": 9.0}
    return Unlearn(**{**given, "epochs": 3, "batch": 4, "lr": 1e-4, **more})


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("words", {"method": "npo"}),
        ("words", {"method": "npo", "epochs": 100}),
        ("net", {"method": "difference"}),
        ("net", {"method": "dmm", "audit": 6}),
    ],
)
def test_an_unlearning_weighs_what_was_foretold(
    kind: str, more: dict[str, Any], net: Site, words: Site, tmp_path: Path
) -> None:
    site = {"net": net, "words": words}[kind]
    trained = {"training": net.training} if "audit" in more else {}
    options, out = wanted(site, **more, **trained), tmp_path / "out"
    cost = estimate_unlearning(site.model, out, options)
    assert not list(tmp_path.iterdir())
    report = unlearn(site.model, out, options, allow_damage=True)
    real = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert abs(cost.folder_bytes - real) <= max(TOLERANCE * real, SLACK), (cost.folder_bytes, real)
    assert cost.out_bytes == pytest.approx(report["bytes"]["after"], abs=100 * 30)  # and the header


def test_stages_add_up_and_the_costliest_come_first(net: Site, tmp_path: Path) -> None:
    options = wanted(net, method="dmm", calibrate=3, audit=2, training=net.training, lr=None)
    cost, job = (
        estimate_unlearning(net.model, tmp_path / "out", options),
        validate(net.model, tmp_path / "out", options),
    )
    assert passes_of(job, options) == {
        "train models": 12 * 30 * 90,
        "gradients": 3 * 90,
        "search a rate": 5 * min(20 * 4 * 6, 3 * 60),
        "unlearn": 3 * 3 * 60,
    }
    assert [each.name for each in cost.stages] == list(passes_of(job, options))
    assert cost.seconds == pytest.approx(sum(each.seconds for each in cost.stages))
    assert cost.costliest == ["train models", "search a rate"] and not cost.savings


def test_what_shortens_a_long_job_exists_and_does_as_counted(net: Site, tmp_path: Path) -> None:
    settings = wanted(net, method="dmm", calibrate=8, audit=40, training=net.training, epochs=8)
    job = validate(net.model, tmp_path / "out", settings)
    counts = passes_of(job, settings)
    each = 2 * HOUR / sum(counts.values())
    found = {saving.options: saving.seconds for saving in shorter_unlearnings(job, each)}
    less = 3 * 40 * 30 * 90 + 40 * 8 * 60  # of an audit
    assert found["--audit 0"] == pytest.approx(each * (sum(counts.values()) - less))
    assert found["--audit 10"] == pytest.approx(each * (sum(counts.values()) - less * 30 / 40))
    for options in found:  # as the command line reads them
        command.make_context("unlearn", ["model", "out", *shlex.split(options)])
