"""Model cards: metadata by the hub's own parser, figures as measured, and no path or earlier card that gets lost."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK, metadata_load

from calib import BadInput
from calib.jobs.output_folder import check_destination
from calib.report.model_card import hub_name, is_own_card, model_card, read_metadata_of, with_repository
from compressor import Distill, Export, Quantize, distill, export, quantize

SMALL = Quantize(scheme="w4a16-channel", samples=2, held_out=2, length=32, learn=False, precision="float32")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language:
- en
- de
datasets:
- some/rows
model-index: [nothing, of, ours]
tags:
- theirs
---

# Tiny

A model of somebody's.
"""


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a card of its own."""
    folder = tmp_path_factory.mktemp("secret-place") / "tiny"
    shutil.copytree(tiny_folder, folder)
    (folder / "README.md").write_text(SOURCE)
    return folder


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    quantize(model, out, SMALL, allow_damage=True)
    return out


def test_the_hub_reads_the_metadata_and_the_sources_card_stays(model: Path, made: Path) -> None:
    text = (made / "README.md").read_text()
    assert REGEX_YAML_BLOCK.search(text) is not None
    assert metadata_load(made / "README.md") == ModelCard.load(made / "README.md").data.to_dict() == {
        "license": "other", "license_name": "tiny-licence", "license_link": "LICENSE", "language": ["en", "de"],
        "datasets": ["some/rows"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["parewell", "quantized", "w4a16-channel"],
    }  # fmt: skip
    assert (made / "README.base.md").read_bytes() == (model / "README.md").read_bytes()


def test_figures_are_those_of_the_report_and_no_path_is_shown(model: Path, made: Path) -> None:
    text, quality = (made / "README.md").read_text(), json.loads((made / "report.json").read_text())["quality"]
    row = re.search(r"^\| perplexity, held-out \| (\S+) \| (\S+) \|$", text, re.M)
    assert row is not None
    for shown, figure in zip(row.groups(), ("reference_perplexity", "perplexity"), strict=True):
        assert float(shown.replace(",", "")) == pytest.approx(quality[figure], rel=1e-3)
    assert f"| {quality['top1_agreement']:.1%} |" in text
    assert "seed 0" in text and "2 calibration rows" in text
    assert "secret-place" not in text and str(made.parent) not in text and "from tiny" in text


def test_the_same_job_writes_the_same_card_wherever_it_lies(model: Path, made: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "another", SMALL, allow_damage=True)
    assert (tmp_path / "another/README.md").read_bytes() == (made / "README.md").read_bytes()


def test_lines_to_copy_are_python_and_name_the_repository(made: Path) -> None:
    text = with_repository((made / "README.md").read_text(), "me/tiny-w4")
    lines = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(lines) == 2 and all(ast.parse(block) and '"me/tiny-w4"' in block for block in lines)
    assert "OUT" not in text


def test_the_first_card_goes_through_a_chain_of_jobs(model: Path, made: Path, tmp_path: Path) -> None:
    export(made, tmp_path / "plain", Export(to="safetensors", held_out=0))
    options = Distill(student=tmp_path / "plain", steps=1, samples=2, held_out=2, length=32)
    distill(model, tmp_path / "student", options, allow_damage=True)
    for name, tags in (("plain", ["quantized"]), ("student", ["quantized", "distillation"])):
        found = metadata_load(tmp_path / name / "README.md")
        assert found is not None and found["license"] == "other" and set(tags) <= set(found["tags"])
        assert (tmp_path / name / "README.base.md").read_text() == SOURCE
        assert "Made from tiny with parewell" in (tmp_path / name / "README.md").read_text()


def test_a_students_card_has_no_licence_of_its_teachers(model: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """The weights are those of another model."""
    options = Distill(student=tiny_folder, steps=1, samples=2, held_out=2, length=32)
    distill(model, tmp_path / "out", options, allow_damage=True)
    assert "license" not in (metadata_load(tmp_path / "out/README.md") or {})
    assert not (tmp_path / "out/README.base.md").exists()


def test_a_card_that_somebody_went_on_writing_is_kept(made: Path, tmp_path: Path) -> None:
    edited = shutil.copytree(made, tmp_path / "edited")
    check_destination(edited, [], 0)
    text = (edited / "README.md").read_text().replace("## Figures", "My own words.\n\n## Figures")
    (edited / "README.md").write_text(text)
    assert is_own_card((made / "README.md").read_text()) and not is_own_card(text)
    with pytest.raises(BadInput, match=r"holds README\.md, which parewell did not write"):
        check_destination(edited, [], 0)
    export(edited, tmp_path / "plain", Export(to="safetensors", held_out=0))
    assert (tmp_path / "plain/README.base.md").read_text() == text


@pytest.mark.parametrize(
    ("given", "name", "expected"),
    [
        ("org/model", COMMIT, "org/model"),
        ("gpt2", COMMIT, "gpt2"),
        ("models/tiny", "tiny", None),  # a folder that is called as a repository could be
        (f"/root/hub/models--org--a-model/snapshots/{COMMIT}", COMMIT, "org/a-model"),
        (f"/root/hub/models--gpt2/snapshots/{COMMIT}", COMMIT, "gpt2"),
        ("/srv/secret/tiny", "tiny", None),
    ],
)
def test_only_a_model_that_came_from_the_hub_has_a_name_there(given: str, name: str, expected: str | None) -> None:
    assert hub_name({"given": given, "name": name}) == expected


def step(job: str, **more: object) -> dict[str, object]:
    return {
        "job": job,
        "model": {"given": "org/model", "name": COMMIT},
        "options": {},
        "data": {},
        "versions": {},
    } | more


UNLEARNED = {
    "job": "unlearn", "task": "sequence-classification", "method": "npo",
    "quality_by_stage": {"before": {"forget": {"nats": 0.5}}, "after": {"forget": {"nats": 2.25}}},
}  # fmt: skip
DISTILLED = {
    "job": "distill", "student": "adapters", "quality": {"tokens": 5, "reference_perplexity": 2.0, "perplexity": 3.0},
    "parameters": {"teacher": 123_456_789, "student": 9},
}  # fmt: skip


def test_relations_to_a_model_on_the_hub() -> None:
    def metadata(report: dict[str, object], *steps: dict[str, object], **config: object) -> dict[str, object]:
        return ModelCard(model_card(report, steps, config, {})).data.to_dict()

    forgot = metadata(UNLEARNED, step("unlearn"))
    assert (forgot["base_model"], forgot["base_model_relation"]) == ("org/model", "finetune")
    assert (forgot["pipeline_tag"], forgot["tags"]) == ("text-classification", ["parewell", "unlearning"])
    adapters = metadata(DISTILLED, step("distill", options={"lora": 4, "merge": False}))
    assert (adapters["base_model_relation"], adapters["library_name"]) == ("adapter", "peft")
    rounded = {"job": "quantize", "scheme": "w4a4", "loaders": {"loaders": ["compressor.load"], "notes": []}} | {
        "quality": DISTILLED["quality"]
    }
    quantized = metadata(rounded, step("unlearn"), step("quantize", scheme="w4a4"), quantization_config={"a": 1})
    assert (quantized["base_model_relation"], quantized["library_name"]) == ("quantized", "parewell")
    assert quantized["tags"] == ["parewell", "unlearning", "quantized", "w4a4"]
    student = step("distill", student={"given": "org/student", "name": COMMIT})
    assert metadata(DISTILLED, student)["base_model"] == "org/student"


def test_a_classifiers_and_an_unlearnings_figures() -> None:
    text = model_card(UNLEARNED, [step("unlearn")], {}, {})
    assert "| forget: cross-entropy, nats | 0.5 | 2.25 |" in text and "AutoModelForSequenceClassification" in text
    assert "| parameters | 123,456,789 | 9 |" in model_card(DISTILLED, [step("distill")], {}, {})


def test_damage_that_was_allowed_is_reported() -> None:
    assert "damaged" not in model_card(UNLEARNED, [step("unlearn")], {}, {})
    assert "damaged" in model_card(UNLEARNED | {"damage": {"lost": ["retain"]}}, [step("unlearn")], {}, {})


@pytest.mark.parametrize(
    "block",
    ["[1, 2]", "license: [a", "license: {a: b}\nlanguage: 3", "license: 'mit\\n# a heading'", "license: mit -->"],
)
def test_metadata_that_is_none_is_left_out(block: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{block}\n---\n")
    found = read_metadata_of(tmp_path / "README.md")
    text = model_card(UNLEARNED, [step("unlearn")], {}, found)
    assert "license" not in ModelCard(text).data.to_dict() and "language" not in ModelCard(text).data.to_dict()


def test_names_cannot_become_markup() -> None:
    model = {"given": "/x", "name": "a|b](http://c)\n# d <script>"}
    text = model_card(UNLEARNED, [step("unlearn", model=model)], {}, {})
    assert "\n# d" not in text and r"a\|b\](http://c) # d \<script\>" in text
