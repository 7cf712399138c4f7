"""Verdicts of audits and of unlearnings whose predictions were not validated; pages that say so aloud."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn.report.recovery import audited_page
from unlearn.report.unlearning import unlearned_page
from unlearn.report.verdict import audited_verdict, unlearned_verdict


def audited(**shares: float | None) -> dict[str, Any]:
    """Of forms and what is recovered in them."""
    names = {"as_it_is": "as it is"}
    return {"recovery": {names.get(form, form): {"probability": share, "right": share, "extraction": share}
                         for form, share in shares.items()}}  # fmt: skip


def test_the_float_model_is_not_in_fewer_bits() -> None:
    found = audited_verdict(audited(float=0.18, nf4=0.02, w8a16=-0.4))
    assert "18% of the forgotten knowledge is left as the model is" in found.judgment
    assert "at most 2% (nf4) is recovered in fewer bits" in found.judgment
    assert "fewer bits" not in str(audited_verdict(audited(as_it_is=0.18)))
    assert "is left as the model is" not in str(audited_verdict(audited(nf4=0.18)))


@given(st.dictionaries(st.sampled_from(["float", "nf4", "w4a16", "gptq:w3a16"]), st.floats(-1e4, 1e4), min_size=1))
def test_an_audit_is_judged_by_its_worst_form(shares: dict[str, float]) -> None:
    worst, found = max(shares.values()), audited_verdict(audited(**shares))
    assert found.level == ("good" if worst <= 0.1 else "doubtful" if worst <= 0.5 else "bad")
    fewer = [share for form, share in shares.items() if form != "float"]
    told = re.findall(r"at most (-?\d+)%", found.judgment)
    assert told == ([f"{100 * max(0, max(fewer)):.0f}"] if fewer else [])
    assert "-" not in found.judgment.replace("gptq:w3a16", "")


def test_nothing_to_recover_is_not_good() -> None:
    found = audited_verdict(audited(float=None, nf4=None))
    assert found.level == "doubtful" and found.judgment.startswith("Not judged: ")


def unlearned(name: str = "dmm", **more: Any) -> dict[str, Any]:
    def stage(nats: float) -> dict[str, Any]:
        return {"forget": {"nats": nats, "right": 0.5}, "retain": {"nats": 1.0, "right": 0.9}}

    return {"method": name, "task": "causal-lm", "rows": {"train": 12, "forget": 3},
            "quality_by_stage": {"before": stage(1.0), "after": stage(4.0)}, **more}  # fmt: skip


def test_predictions_that_were_not_validated_are_a_warning() -> None:
    """Once in the verdict, and in a callout of its own; notes of the job are callouts too."""
    scale = {"own": 1.0, "others": 1.0, "bounded": 0.25}
    assert unlearned_verdict(unlearned()).level == "good"
    found = unlearned_verdict(unlearned(scale=scale))
    assert found.level == "doubtful" and "predictions were not validated on other deletions" in found.judgment
    page = unlearned_page(unlearned(scale=scale, notes=["earlier rows may be retained"]))
    warnings = re.findall(r'<p class="warning"><strong>Warning.</strong> (.*?)</p>', page)
    assert [text[:20] for text in warnings] == ["Earlier rows may be ", "The predictions were"]
    assert "25.0% of decisions" in page and '<p class="verdict doubtful">' in page
    held_out = {"score": 0.5, "slope": 1.0, "cosine": 0.9, "error": 0.9}
    measured = unlearned(scale=scale | {"raw": held_out, "held_out": held_out})
    assert "relative error 0.90" in unlearned_verdict(measured).judgment and 'warning">' not in unlearned_page(measured)


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x>', "{{ 7 * 7 }}"])
def test_a_name_stays_text(hostile: str) -> None:
    steps = [{"job": "unlearn", "model": {"name": hostile, "sha256": "0"}, "options": {}, "data": {}}]
    page = unlearned_page(unlearned(hostile, asked={"oracle": unlearned()["quality_by_stage"]["after"]}), steps)
    figures = {"nats": 1.0, "right": 0.5, "extraction": 0.1}
    models = {name: {"forget": figures, "retain": figures} for name in ("original", "unlearned", "oracle")}
    looks = {name: {"steps": [0, 8], "trained on": [0.1, 0.9], "asked for": [0.1, 0.2]} for name in models}
    report = audited(float=0.1) | {
        "rows": {"train": 9, "forget": 3}, "table": {hostile: models}, "relearning": looks,
        "flips": {hostile: {"own scales": 0.5, "layers": {hostile: 0.5}}},
    }  # fmt: skip
    audit = audited_page(report, hostile, steps)
    for text in (page, audit):
        assert hostile not in text.partition('<script type="application/json"')[0] or "{{" in hostile
        assert text.count("<script") == 2 and "<img" not in text and "49" not in re.findall(r"<h1>.*?</h1>", text)[0]
    assert "oracle (retrained without the forget set)" in page
    assert json.dumps(hostile)[1:-1] not in audit or "{{" in hostile, "downloads are packed"
