from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from calib import BadInput
from calib.quant.round_to_nearest import round_weight
from cli.gates import audit
from cli.main import parewell
from compressor import Quantize, quantize
from tests.unlearn.conftest import Site
from tests.unlearn.test_unlearn import wanted
from unlearn import unlearn
from unlearn.audit.evaluate import figures
from unlearn.audit.quantized_recovery import recovery
from unlearn.data.dataset import read_data
from unlearn.model.model import open_model
from unlearn.options.audit import Audit


@pytest.fixture(scope="module")
def retrained(words: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("retrained") / "out"
    unlearn(words.model, out, wanted(words, "retrain"))
    return out


def audit_of(words: Site, oracle: Path, **more: Any) -> Audit:
    given = {"original": words.model, "oracle": oracle, "train": words.train, "forget": words.forget, "length": 64}
    return Audit(**given | more)


def test_the_ratio() -> None:
    assert recovery(0.2, 0.9, 0.2) == 0 and recovery(0.9, 0.9, 0.2) == 1 and recovery(0.1, 0.9, 0.2) < 0
    assert recovery(0.5, 0.2, 0.2) is None


def test_the_controls_are_where_the_ratio_begins_and_ends(words: Site, retrained: Path) -> None:
    """A model that never saw the rows has nothing to give back; the model before has all, and all its codes."""
    never, before = (
        audit(retrained, audit_of(words, retrained)),
        audit(words.model, audit_of(words, retrained)),
    )
    for form, of in never["table"].items():
        assert of["unlearned"] == of["oracle"]
        assert before["table"][form]["unlearned"] == of["original"] == before["table"][form]["original"]
    assert never["recovery"]["float"]["probability"] == 0 and before["recovery"]["float"]["probability"] == 1
    assert before["recovery"]["w8a16-channel"]["probability"] == pytest.approx(1, abs=0.05)
    for form in ("w8a16-channel", "w4a16-channel", "nf4"):
        assert before["flips"][form]["same scales"] == before["flips"][form]["own scales"] == 0
        assert never["flips"][form]["same scales"] > 0.1
        layers = never["flips"][form]["layers"]
        name = next(iter(layers))
        a, b = (load_file(folder / "model.safetensors")[name].float() for folder in (words.model, retrained))
        changed = round_weight(b, form, a).codes != round_weight(a, form).codes
        assert layers[name] == pytest.approx(float(changed.double().mean()))
        assert len(layers) == 14 and all("layers." in name for name in layers), "seven linears in each of two blocks"
    assert never["flips"]["w8a16-channel"]["same scales"] > never["flips"]["w4a16-channel"]["same scales"], (
        "a finer grid changes more"
    )


def test_a_model_that_hardly_moved_rounds_to_what_it_was(words: Site, retrained: Path, tmp_path: Path) -> None:
    unlearn(words.model, tmp_path / "out", wanted(words, "npo", epochs=1, lr=1e-5))
    found = audit(tmp_path / "out", audit_of(words, retrained))
    assert found["flips"]["w4a16-channel"]["same scales"] < 0.01
    for group in ("forget", "retain"):
        known = (found["table"]["w4a16-channel"][model][group]["nats"] for model in ("unlearned", "original"))
        assert next(known) == pytest.approx(next(known), abs=0.05)


def test_on_the_command_line(words: Site, retrained: Path) -> None:
    given = audit_of(words, retrained)
    arguments = ["audit", retrained, "--original", given.original, "--oracle", retrained, "--train", given.train]
    arguments += ["--forget", given.forget, "--length", 64, "--forms", "w4a16-channel"]
    result = CliRunner().invoke(parewell, [str(a) for a in arguments], catch_exceptions=False)
    assert "recovery" in result.stdout and "0% is an oracle (retrained without the forget set)" in result.stdout
    result = CliRunner().invoke(parewell, [str(a) for a in [*arguments, "--json"]], catch_exceptions=False)
    assert json.loads(result.stdout) == json.loads(json.dumps(audit(retrained, replace(given, forms="w4a16-channel"))))


def test_what_quantize_makes_is_measured_as_it_is_and_beside_controls_in_the_same_bits(
    words: Site, retrained: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ada likes red , bob likes blue . " * 400)
    found = audit(retrained, audit_of(words, retrained, forms="gptq:w8a16-channel", data=text, samples=4))
    quantize(retrained, tmp_path / "out", Quantize(scheme="w8a16-channel", init="none", learn=False, samples=4, held_out=1, data=text), allow_recovery=True)  # noqa: E501  # fmt: skip
    given = audit(tmp_path / "out", audit_of(words, retrained))
    assert list(given["table"]) == ["as it is"] and given["flips"] == {}
    assert given["table"]["as it is"]["unlearned"] == found["table"]["gptq:w8a16-channel"]["oracle"]
    assert given["recovery"]["as it is"]["probability"] == pytest.approx(0, abs=0.02)
    assert found["table"]["gptq:w8a16-channel"]["unlearned"] == found["table"]["gptq:w8a16-channel"]["oracle"]
    assert (
        found["flips"]["gptq:w8a16-channel"]["own scales"] > 0.5
        and len(found["flips"]["gptq:w8a16-channel"]["layers"]) == 14
    )
    with pytest.raises(BadInput, match="measured as it is; leave out --forms"):
        audit(tmp_path / "out", audit_of(words, retrained, forms="w4a16-channel"))
    with pytest.raises(BadInput, match="controls are quantized here; give the float model"):
        audit(retrained, audit_of(words, tmp_path / "out"))


def test_relearning_brings_back_what_it_trains_on(words: Site, retrained: Path) -> None:
    found = audit(retrained, audit_of(words, retrained, forms="w4a16-channel", relearn=16, relearn_lr=3e-3))[
        "relearning"
    ]
    for of in found.values():
        assert of["steps"] == [0, 2, 4, 6, 8, 10, 12, 14, 16]
        assert of["trained on"][-1] > of["trained on"][0]
    assert found["unlearned"] == found["oracle"]
    trainable = open_model(words.model, "causal-lm", device=torch.device("cpu"))
    rows = read_data(words.forget, trainable, 64).examples
    for half, places in (("trained on", [0, 2]), ("asked for", [1])):
        nats = figures("causal-lm", trainable.one(), {"rows": rows[torch.tensor(places)]})["rows"]["nats"]
        assert found["original"][half][0] == pytest.approx(math.exp(-nats)), "every other row is taught"
    assert found["original"]["asked for"][0] > found["unlearned"]["asked for"][0]


def test_what_does_not_belong_together(words: Site, net: Site, retrained: Path, tmp_path: Path) -> None:
    for change, said in (
        ({"forget": None, "forget_lines": "1"}, "says that 3 others were forgotten"),
        ({"forms": "w4a4-channel"}, "weights alone are rounded"),
        ({"forms": "w4a16-g7"}, "group size 7 does not divide"),
        ({"forms": "best:w4a16-channel"}, "'best' is no way to quantize"),
        ({"forms": "gptq:w4a16-g7"}, "group size 7 does not divide"),
        ({"original": tmp_path}, "config.json: is missing"),
        ({"oracle": tmp_path}, "config.json: is missing"),
    ):
        with pytest.raises(BadInput, match=said):
            audit(retrained, audit_of(words, **{"oracle": retrained} | change))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"no row of .* is like that"):
        audit(retrained, audit_of(words, retrained, forget=None, forget_where="question=nobody"))
    shutil.copytree(words.model, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(
        json.dumps(config | {"architectures": ["BertForSequenceClassification"]})
    )
    with pytest.raises(BadInput, match="is no causal language model"):
        audit(retrained, audit_of(words, retrained, original=tmp_path / "other"))
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    for change in ({"original": tmp_path / "other"}, {"oracle": tmp_path / "other"}):
        with pytest.raises(BadInput, match="is quantized already"):
            audit(retrained, audit_of(words, **{"oracle": retrained} | change))
    shutil.copytree(retrained, tmp_path / "recipe")
    (tmp_path / "recipe/parewell.json").write_text('{"recipe": [{"job": "unlearn", "data": 3}]}')
    with pytest.raises(BadInput, match="is no recipe of parewell's"):
        audit(tmp_path / "recipe", audit_of(words, retrained))
    for missing, said in (("original", "give --original"), ("train", "give --train"), ("forget", "nothing says what")):
        with pytest.raises(BadInput, match=said):
            audit_of(words, retrained, **{missing: None})
    for change, said in (
        ({"data": tmp_path}, "rounding to nearest needs none"),
        ({"relearn_lr": 0.1}, "changes nothing without --relearn"),
        ({"relearn": -1}, "relearn is -1; it must be at least 0"),
    ):
        with pytest.raises(BadInput, match=said):
            audit_of(words, retrained, **change)  # type: ignore[arg-type]
    for forms in ("", ",", "nf4,nf4"):
        with pytest.raises(BadInput, match="must name some, each once"):
            audit_of(words, retrained, forms=forms)
