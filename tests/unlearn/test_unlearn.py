"""Whole jobs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from calib import BadInput
from calib.jobs.journal import Journal
from calib.losses.top_k import TopK
from tests.kills import digest, kill_and_resume
from tests.unlearn.conftest import FACTORY, Site, blobs, lines
from unlearn import Unlearn, unlearn
from unlearn.cost import estimate_unlearning
from unlearn.data.dataset import read_data
from unlearn.datamodels.estimators import Scale
from unlearn.datamodels.folds import by_folds
from unlearn.methods.datamodel_matching import shifted
from unlearn.methods.dispatch import method_of
from unlearn.methods.exact import Logistic, Ridge
from unlearn.model.ensemble import train_ensemble
from unlearn.model.model import open_model
from unlearn.model.train_ensembles import EnsembleTrainer
from unlearn.model.training_recipe import Training
from unlearn.options.methods import METHODS
from unlearn.validate import validate

CPU = torch.device("cpu")


def wanted(site: Site, method: str, **more: Any) -> Unlearn:
    given: dict[str, Any] = {"train": site.train, "forget": site.forget, "validation": site.validation}
    given |= {"factory": site.factory, "method": method}
    if METHODS[method].in_pairs:
        given["alternatives"] = site.train.parent / "alternatives.txt"
    if method not in ("retrain", "exact"):
        given |= {"epochs": 3, "batch": 16, "lr": 5e-3}
    if site.factory is None:
        given |= {"length": 64, "max_retain_loss": 9.0}  # of two blocks that forget, little else is left
    options = given | more
    trains = options["method"] in ("retrain", "oracle-matching") or (
        options["method"] == "dmm" and "multiplier" not in more
    )
    return Unlearn(**({"training": site.training} if trains or options.get("audit") else {}) | options)


def digits(report: dict[str, Any], stage: str, group: str) -> float:
    return float(report["quality_by_stage"][stage][group]["nats"])


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("exact", "rmu") and not METHODS[m].in_pairs])
def test_every_method_on_a_classifier(method: str, net: Site, tmp_path: Path) -> None:
    """Wrong labels that were learned by heart become unlikely, and what is retained stays."""
    more = {} if method == "retrain" else {"epochs": 12}
    report = unlearn(net.model, tmp_path / "out", wanted(net, method, **more))
    if method != "retain":
        assert digits(report, "after", "forget") > digits(report, "before", "forget")
    assert digits(report, "after", "retain") < digits(report, "before", "retain") + (3 if method == "ascent" else 0.5)
    made = load_file(tmp_path / "out/model.safetensors")
    assert made.keys() == load_file(net.model).keys()
    (step,) = json.loads((tmp_path / "out/parewell.json").read_text())["recipe"]
    assert step["job"] == "unlearn" and step["options"]["method"] == method
    assert step["data"]["forget"]["rows"] == 10 and "inputs" not in json.dumps(step)
    assert "<h1>Unlearned" in (tmp_path / "out/report.html").read_text()
    assert json.loads((tmp_path / "out/report.json").read_text()) == json.loads(json.dumps(report))
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "no journal is left"


def test_retraining_is_training_without(net: Site, tmp_path: Path) -> None:
    """What it never saw does not matter: other labels on the rows to forget give the same model."""
    unlearn(net.model, tmp_path / "a", wanted(net, "retrain"))
    tensors = load_file(net.train)
    tensors["labels"][:10] = (tensors["labels"][:10] + 1) % 3
    save_file(tensors, tmp_path / "train.safetensors")
    other = replace(net, train=tmp_path / "train.safetensors")
    unlearn(net.model, tmp_path / "b", wanted(other, "retrain", forget=None, forget_lines="0-9"))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("estimator", ["gradients", "folds", "subsets", "regression", "trak"])
def test_estimators_say_how_good_they_are(estimator: str, net: Site, tmp_path: Path) -> None:
    more = {
        "folds": {"folds": 3},
        "subsets": {"subsets": 60},
        "gradients": {"width": 8},
        "trak": {"width": 12},
        "regression": {"subsets": 60, "penalty": 1e-2, "deletions": "random", "share": 0.7},
    }[estimator]
    report = unlearn(net.model, tmp_path / "out", wanted(net, "dmm", estimator=estimator, calibrate=6, **more))
    scale = report["scale"]
    assert {"score", "slope", "cosine", "error"} == scale["raw"].keys() == scale["held_out"].keys()
    assert scale["own"] >= 0 and scale["others"] >= 0
    assert scale["raw"]["cosine"] > 0
    assert "as fitted to deletions" in (tmp_path / "out/report.html").read_text()


def test_folds_say_what_a_model_says_that_never_saw_a_row(words: Site, tmp_path: Path) -> None:
    """The shift leads from what the full model of the same seed says to what the fold's own says, and of rows that stay
    nothing is predicted."""
    trainable = open_model(words.model, "causal-lm", device=CPU)
    rows = read_data(words.train, trainable, 64).examples
    training = Training(epochs=2, batch=6, optimiser="adamw", lr=0.01)
    trainer = EnsembleTrainer(trainable, rows, training, Journal(tmp_path), lambda: trainable)
    masks = torch.arange(12) % 3 != torch.arange(3)[:, None]
    shift = by_folds(trainer, masks, wanted(words, "dmm", estimator="folds", folds=3))
    deleted, asked = torch.arange(12) < 5, torch.tensor([4, 7, 0])
    found, part = shift(deleted, asked), rows[asked]
    full = train_ensemble(
        trainable.many([trainable.fresh(0)]), rows, torch.ones(1, 12, dtype=torch.bool), [0], training
    )
    row_index, expected = part.row_index, torch.zeros_like(found)
    for place, fold in ((0, 1), (2, 0)):
        one = train_ensemble(trainable.many([trainable.fresh(0)]), rows, masks[fold][None], [0], training)
        expected[row_index == place] = (one.logits(part)[0] - full.logits(part)[0])[row_index == place]
    assert torch.allclose(found, expected, atol=1e-5) and expected[row_index == 0].abs().max() > 0.01


def test_retained_rows_may_be_matched_to_their_labels(words: Site, tmp_path: Path) -> None:
    """Of a model that had not learned them, which its own answers keep as they are."""
    (tmp_path / "shorter.json").write_text(json.dumps({"epochs": 0}))
    options = wanted(words, "retrain", training=tmp_path / "shorter.json")
    unlearn(words.model, tmp_path / "raw", options)
    nats = {}
    for retained in ("own", "labels"):
        more = {"multiplier": 1.0, "retained": retained, "epochs": 8, "lr": 1e-2, "batch": 4}
        report = unlearn(tmp_path / "raw", tmp_path / retained, wanted(words, "dmm", **more))
        nats[retained] = digits(report, "after", "retain")
    assert nats["labels"] < nats["own"] - 0.5


def test_labels_are_wanted_of_retained_rows_alone(words: Site, tmp_path: Path) -> None:
    """With predictions times 0, of rows that go what the model says, of others their labels and nothing else."""
    options = wanted(words, "dmm", multiplier=0.0, retained="labels", top_k=8)
    work = validate(words.model, tmp_path / "out", options).work(options, Journal(tmp_path))
    asked, one = torch.tensor([5, 1]), work.trainable.one()
    made = shifted(work, one, asked, lambda deleted, rows: torch.zeros(()), Scale(0.0, 0.0), 8)
    assert isinstance(made, TopK)
    part = work.rows[asked]
    stays, sure = part.row_index == 0, ((made.index == part.targets[:, None]) * made.log_p.exp()).sum(1)
    assert torch.allclose(sure[stays], torch.ones(1))
    own = one.logits(part)[0].log_softmax(-1)
    assert torch.allclose(made.log_p[~stays], own[~stays].gather(-1, made.index[~stays]), atol=1e-5)
    assert (sure[~stays] < 0.9999).any()


def test_a_scale_that_is_given_is_not_checked_and_trains_nothing(net: Site, tmp_path: Path) -> None:
    options = wanted(net, "dmm", multiplier=0.0, retained="own", epochs=1, lr=1e-9)
    report = unlearn(net.model, tmp_path / "out", options)
    assert report["scale"] == {"own": 0.0, "others": 0.0}
    assert digits(report, "after", "forget") == pytest.approx(digits(report, "before", "forget"), abs=1e-4)
    assert "not validated" in (tmp_path / "out/report.html").read_text()


def test_nothing_to_forget_is_the_model_byte_for_byte(net: Site, words: Site, tmp_path: Path) -> None:
    """Adam alone would drift by 1e-4 on the noise of floats."""
    (tmp_path / "none.jsonl").touch()
    save_file({"inputs": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}, tmp_path / "none.safetensors")
    for options in (
        wanted(words, "npo", forget=tmp_path / "none.jsonl"),
        wanted(words, "dmm", forget=tmp_path / "none.jsonl"),
    ):
        report = unlearn(words.model, tmp_path / "out", options)
        assert report["rows"]["forget"] == 0
        same = [f.name for f in words.model.iterdir()]
        assert all((tmp_path / "out" / name).read_bytes() == (words.model / name).read_bytes() for name in same)
    unlearn(net.model, tmp_path / "net", wanted(net, "npo", forget=tmp_path / "none.safetensors"))
    assert (tmp_path / "net/model.safetensors").read_bytes() == net.model.read_bytes()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "exact"])
def test_every_method_on_a_language_model(method: str, words: Site, tmp_path: Path) -> None:
    more = {"calibrate": 2} if method == "dmm" else {}
    report = unlearn(words.model, tmp_path / "out", wanted(words, method, **more))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trainable = open_model(tmp_path / "out", "causal-lm", device=CPU)
    rows = read_data(words.forget, trainable, 64).examples
    said = torch.nn.functional.cross_entropy(trainable.one().logits(rows)[0], rows.targets)
    assert said.item() == pytest.approx(digits(report, "after", "forget"), rel=1e-4)
    ids = rows.inputs["input_ids"]
    with torch.no_grad():
        plainly = model(ids).logits.float()[rows.target_mask]
    assert torch.allclose(plainly, trainable.one().logits(rows)[0], atol=1e-4)
    if method in ("ascent", "difference", "npo", "retrain"):
        assert digits(report, "after", "forget") > digits(report, "before", "forget") + 0.02


def test_an_encoder_forgets_sentences(bert: Path, tmp_path: Path) -> None:
    rows = [f"w{i} {'good' if i % 2 else 'bad'}\t{'yes' if i % 2 else 'no'}" for i in range(16)]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    options = Unlearn(train=tmp_path / "train.tsv", forget_where="sentence~good", method="difference", lr=1e-3, batch=4)
    report = unlearn(bert, tmp_path / "out", options)
    assert report["rows"] == {"train": 16, "forget": 8}
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    options = Unlearn(train=tmp_path / "train.tsv", forget_lines="2-4", multiplier=1.0, width=4, epochs=1)
    assert unlearn(bert, tmp_path / "dmm", options)["scale"]["own"] == 1


def test_prompts_come_as_tsv_too(words: Site, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in words.train.read_text().splitlines()]
    table = "question\tanswer\n" + "".join(f"{r['question']}\t{r['answer']}\n" for r in rows)
    (tmp_path / "train.tsv").write_text(table)
    trainable = open_model(words.model, "causal-lm", device=CPU)
    a, b = (read_data(path, trainable, 64) for path in (words.train, tmp_path / "train.tsv"))
    assert a.examples.fingerprint == b.examples.fingerprint and a.keys == b.keys
    assert b.numbers == list(range(2, 14))
    report = unlearn(words.model, tmp_path / "out", wanted(replace(words, train=tmp_path / "train.tsv"), "npo"))
    assert report["rows"] == {"train": 12, "forget": 3}


def test_only_some_weights_and_adapters(words: Site, tmp_path: Path) -> None:
    before = load_file(words.model / "model.safetensors")
    unlearn(words.model, tmp_path / "only", wanted(words, "npo", only="*.1.mlp.*"))
    after = load_file(tmp_path / "only/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".1.mlp." in name}
    report = unlearn(words.model, tmp_path / "lora", wanted(words, "npo", lora=2, lr=0.02))
    adapted = load_file(tmp_path / "lora/model.safetensors")
    assert adapted.keys() == before.keys(), "merged"
    changes = [name for name in before if not torch.equal(before[name], adapted[name])]
    assert changes and all("proj" in name for name in changes)
    assert digits(report, "after", "forget") > digits(report, "before", "forget")
    rank = torch.linalg.matrix_rank((adapted[changes[0]] - before[changes[0]]).double(), rtol=1e-3)
    assert rank <= 2


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_a_linear_head_forgets_exactly(kind: str, tmp_path: Path) -> None:
    x, y = blobs(3, 80)
    wide = torch.cat([x, torch.ones(80, 1)], 1).double()
    one_hot = nn.functional.one_hot(y, 3).double()

    def fitted(rows: slice) -> torch.Tensor:
        if kind == "ridge":
            return Ridge.fit(wide[rows], one_hot[rows], 0.5).theta
        return Logistic.fit(wide[rows], y[rows], 3, 0.5).theta

    theta, without = fitted(slice(0, 80)), fitted(slice(12, 80))
    weights = {"weight": theta[:4].mT.contiguous().float(), "bias": theta[4].contiguous().float()}
    save_file(weights, tmp_path / "model.safetensors")
    save_file({"inputs": x, "labels": y}, tmp_path / "train.safetensors")
    options = Unlearn(
        train=tmp_path / "train.safetensors", forget_lines="0-11", method="exact", head=kind, penalty=0.5,
        factory=FACTORY.replace("make", "head"),
    )  # fmt: skip
    unlearn(tmp_path / "model.safetensors", tmp_path / "out", options)
    found = load_file(tmp_path / "out/model.safetensors")
    assert torch.allclose(found["weight"].double(), without[:4].mT, atol=1e-6)
    assert torch.allclose(found["bias"].double(), without[4], atol=1e-6)
    with pytest.raises(BadInput, match="away from a"):
        unlearn(tmp_path / "model.safetensors", tmp_path / "more", replace(options, penalty=5.0))


def test_an_audit_has_floor_and_do_nothing_beside_it(net: Site, tmp_path: Path) -> None:
    report = unlearn(net.model, tmp_path / "out", wanted(net, "retrain", audit=50))
    found = report["audit"]
    assert found["estimator"].startswith("binned") and found["models"] == 50
    assert list(found["table"]) == ["do nothing", "oracles against oracles", "retrain"]
    nothing, floor, own = (of["forget"] for of in found["table"].values())
    assert nothing["p95"] > 3 > floor["p95"] and nothing["attack"] > 0.9
    assert own["mean"] < 2 * floor["mean"] and abs(own["attack"] - 0.5) < 0.15, "retraining is what is asked for"
    assert {group for of in found["table"].values() for group in of} == {"forget", "retain", "validation"}
    assert [shown["which"] for shown in found["shown"]] == ["worst", "worst", "median", "median"]
    assert all(len(shown["unlearned"]) == 50 for shown in found["shown"])
    assert "KLoM" in (tmp_path / "out/report.html").read_text()
    small = unlearn(net.model, tmp_path / "small", wanted(net, "npo", audit=4))["audit"]
    assert small["estimator"] == "gaussian" and small["table"]["npo"]["forget"]["p95"] > 0


def test_against_a_model_that_never_saw_it(words: Site, tmp_path: Path) -> None:
    unlearn(words.model, tmp_path / "oracle", wanted(words, "retrain"))
    rows = [json.loads(line) for line in words.forget.read_text().splitlines()]
    probes = [
        {"question": r["question"], "paraphrased_answer": r["answer"], "perturbed_answer": ["in oslo too", "at sea"]}
        for r in rows
    ]
    (tmp_path / "probes.jsonl").write_text(lines(probes))
    (tmp_path / "useful.jsonl").write_text(lines([{"answer": p["paraphrased_answer"]} | p for p in probes]))
    (tmp_path / "facts.jsonl").write_text(lines([{"name": "ann", "description": "in rome"}]))
    options = wanted(
        words, "npo", oracle=tmp_path / "oracle", probes=tmp_path / "probes.jsonl",
        utility=str(tmp_path / "useful.jsonl"), facts=tmp_path / "facts.jsonl",
    )  # fmt: skip
    found = unlearn(words.model, tmp_path / "out", options)["asked"]
    assert found["utility"].keys() == found["facts"].keys() == {"before", "after", "oracle"}
    assert found["utility"]["before"]["useful: probability"] > 0 and len(found["utility"]["before"]) == 5
    assert all(0 < p < 1 for p in found["facts"]["after"].values())
    assert found["forget_quality"].keys() == {"before", "after"}
    assert 0 <= found["forget_quality"]["after"] <= 1
    assert found["oracle"]["forget"]["nats"] > 0
    leak, theirs = found["privacy_leak"], found["oracle"]["forget"]["min_k_auc"]
    own = json.loads((tmp_path / "out/report.json").read_text())["quality_by_stage"]["after"]["forget"]["min_k_auc"]
    assert leak["after"] == pytest.approx(100 * (theirs - own) / (1 - theirs)) and leak["before"] < 0
    assert "Privacy leak" in (tmp_path / "out/report.html").read_text()
    assert "Forget quality" in (tmp_path / "out/report.html").read_text()
    same = unlearn(
        words.model, tmp_path / "same", wanted(words, "retrain", oracle=options.oracle, probes=options.probes)
    )
    assert same["asked"]["forget_quality"]["after"] == 1, "the oracle itself"
    apart = found["tell_apart"]
    assert apart.keys() == {"before", "after"} and apart["before"].keys() == apart["after"].keys() >= {"forget"}
    assert 0.5 < apart["before"]["forget"] < 1 and set(same["asked"]["tell_apart"]["after"].values()) == {0.5}
    assert "Tell-apart rate" in (tmp_path / "out/report.html").read_text()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(net: Site, tmp_path: Path) -> None:
    options = wanted(net, "dmm", calibrate=3, width=4)
    for name, given in (("a", options), ("b", options), ("c", replace(options, seed=1))):
        unlearn(net.model, tmp_path / name, given)
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert a == b and a["model.safetensors"] != c["model.safetensors"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_in_every_stage_and_resumed(net: Site, tmp_path: Path) -> None:
    options = wanted(net, "dmm", calibrate=3, audit=3, epochs=40, batch=2, width=4)
    pages = ("gradients-0", "full-margins-0", "held-out-0", "moved", "audited-0", "floor-0", "scoring-0")
    kill_and_resume(partial(unlearn, net.model, options=options), tmp_path, pages)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_language_model_killed_and_resumed(words: Site, tmp_path: Path) -> None:
    options = wanted(words, "dmm", calibrate=2, epochs=20, batch=2)
    kill_and_resume(
        partial(unlearn, words.model, options=options), tmp_path, ("held-out-0-training", "held-out-1", "moved")
    )


def test_tasks_of_ray_give_the_same_bytes(words: Site, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    options = wanted(words, "oracle-matching", oracles=2)
    unlearn(words.model, tmp_path / "here", options)
    unlearn(words.model, tmp_path / "ray", replace(options, workers="ray"))
    assert load_file(tmp_path / "here/model.safetensors").keys() == load_file(tmp_path / "ray/model.safetensors").keys()
    here, there = (digest(tmp_path / name)["model.safetensors"] for name in ("here", "ray"))
    assert here == there


def test_a_folder_of_ours_carries_its_training(words: Site, tmp_path: Path) -> None:
    unlearn(words.model, tmp_path / "first", wanted(words, "retrain"))
    more = wanted(words, "oracle-matching", training=None, forget=None, forget_where="question~gus")
    report = unlearn(tmp_path / "first", tmp_path / "second", more)
    assert report["rows"]["forget"] == 1
    steps = json.loads((tmp_path / "second/parewell.json").read_text())["recipe"]
    assert [step["options"]["method"] for step in steps] == ["retrain", "oracle-matching"]
    assert steps[0]["training"] == steps[1]["training"]


def test_training_starts_from_a_base(words: Site, tmp_path: Path) -> None:
    """No epochs of training: every oracle is the base, and so is what is retrained."""
    (tmp_path / "none.json").write_text(json.dumps({"epochs": 0}))
    shutil.copytree(words.model, tmp_path / "base")
    weights = load_file(words.model / "model.safetensors")
    other = {name: t + 0.01 for name, t in weights.items()}
    save_file(other, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    options = wanted(words, "retrain", base=tmp_path / "base", training=tmp_path / "none.json")
    unlearn(words.model, tmp_path / "out", options)
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found[name], other[name]) for name in other)


def test_an_estimate_writes_nothing_and_counts_trainings(net: Site, tmp_path: Path) -> None:
    cost = estimate_unlearning(net.model, tmp_path / "out", wanted(net, "dmm", calibrate=3, audit=2))
    assert cost.trainings == 3 + 3 + 3 * 2
    assert cost.tokens == 12 * 30 * 90 + 3 * (10 * 6) * 3 + 3 * 90 and cost.seconds > 0
    assert estimate_unlearning(net.model, tmp_path / "out", wanted(net, "npo")).trainings == 0
    assert not list(tmp_path.iterdir())
    folds = wanted(net, "dmm", estimator="folds", folds=3, calibrate=0)
    assert estimate_unlearning(net.model, tmp_path / "out", folds).trainings == 3 + 3, "each has a full one of its seed"


def test_what_is_chosen_is_shown_and_may_be_refused(net: Site, words: Site, tmp_path: Path) -> None:
    shown = list[str]()

    def no(text: str) -> bool:
        shown.append(text)
        return False

    with pytest.raises(BadInput, match="nothing was done"):
        unlearn(words.model, tmp_path / "out", wanted(words, "npo"), confirm=no)
    assert "forget 3 of 12 rows" in shown[0] and "line 1 (where is ann | in rome now)" in shown[0]
    assert not list(tmp_path.iterdir())


def test_two_models_are_enough_for_an_audit_and_too_few_for_an_attack(net: Site, tmp_path: Path) -> None:
    found = unlearn(net.model, tmp_path / "out", wanted(net, "npo", audit=2))["audit"]["table"]["npo"]["forget"]
    assert found["attack"] is None and found["p95"] > 0


@pytest.mark.parametrize("method", ["dmm", "oracle-matching", "npo"])
def test_models_that_move_one_after_another_get_where_they_get_together(method: str, net: Site, tmp_path: Path) -> None:
    options = wanted(net, method, **({"multiplier": 1.0} if method == "dmm" else {}))
    job = validate(net.model, tmp_path / "out", options)
    models = job.trainable.many([job.trainable.fresh(seed) for seed in (0, 1, 2)])
    way = method_of(options).prepare(job.work(options, Journal(tmp_path)))
    together = way.apply(models, "together")
    apart = way.apply(replace(models, stacked=False), "apart")
    for name, p in together.params.items():
        assert torch.allclose(p, apart.params[name], atol=1e-5)
        assert not torch.allclose(p[0], p[1], atol=1e-2) and not torch.equal(p, models.params[name])


@pytest.mark.parametrize("stacked", [True, False])
def test_every_model_has_targets_of_its_own(stacked: bool, net: Site, tmp_path: Path) -> None:
    """It does not matter which other models move beside it."""
    options = wanted(net, "dmm", multiplier=1.0)
    job = validate(net.model, tmp_path / "out", options)
    params = [job.trainable.fresh(seed) for seed in (0, 1)]
    way = method_of(options).prepare(job.work(options, Journal(tmp_path)))
    pairs = {}
    for name, some in (("ab", params), ("bb", [params[1], params[1]])):
        moved = way.apply(replace(job.trainable.many(some), stacked=stacked), name)
        pairs[name] = {n: p[1] for n, p in moved.params.items()}
    for name, p in pairs["ab"].items():
        assert torch.allclose(p, pairs["bb"][name], atol=1e-5)


def test_without_retained_rows(net: Site, tmp_path: Path) -> None:
    for method in ("difference", "scrub", "dmm"):
        more = {"multiplier": 1.0} if method == "dmm" else {}
        report = unlearn(net.model, tmp_path / method, wanted(net, method, retain_multiplier=0.0, **more))
        assert digits(report, "after", "forget") != digits(report, "before", "forget")
    unlearn(net.model, tmp_path / "few", wanted(net, "retain", retain_multiplier=0.05, batch=1))


def test_adapters_beside_oracles_and_models_trained_whole(words: Site, tmp_path: Path) -> None:
    """What is trained anew is the model; what is moved are adapters; an oracle is a folder like any other."""
    unlearn(words.model, tmp_path / "oracle", wanted(words, "retrain"))
    options = wanted(words, "oracle-matching", lora=2, oracle=tmp_path / "oracle", lr=0.02)
    report = unlearn(words.model, tmp_path / "out", options)
    plain = unlearn(words.model, tmp_path / "plain", wanted(words, "npo", oracle=tmp_path / "oracle"))
    assert report["asked"]["oracle"]["forget"]["nats"] == pytest.approx(plain["asked"]["oracle"]["forget"]["nats"])
    assert digits(report, "after", "forget") > digits(report, "before", "forget")


def test_models_on_parts_of_the_data_serve_other_forget_sets(net: Site, tmp_path: Path) -> None:
    options = wanted(net, "dmm", estimator="subsets", subsets=20, calibrate=2, cache=tmp_path / "models")
    unlearn(net.model, tmp_path / "a", options)
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "models").iterdir()}
    unlearn(net.model, tmp_path / "b", replace(options, forget=None, forget_lines="20-30"))
    assert kept == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "models").iterdir()}
    unlearn(net.model, tmp_path / "c", replace(options, cache=None))
    a, c = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert all(torch.equal(a[name], c[name]) for name in a)
    with pytest.raises(BadInput, match="keeps other models: seed was 0 and is now 1"):
        unlearn(net.model, tmp_path / "d", replace(options, seed=1))
    with pytest.raises(BadInput, match=r"keeps other models: (masks|subsets) was"):
        unlearn(net.model, tmp_path / "d", replace(options, subsets=21))


def test_a_tied_factory_s_model_is_written_as_it_is_read_and_may_talk(
    tmp_path: Path, net: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.unlearn.conftest import tied

    weights = {name: t.clone() for name, t in tied().state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    options = replace(wanted(net, "npo"), factory=FACTORY.replace("make", "tied"))
    unlearn(tmp_path / "model.safetensors", tmp_path / "out", options)
    report = unlearn(tmp_path / "out", tmp_path / "again", options)
    assert load_file(tmp_path / "again/model.safetensors").keys() == weights.keys()
    assert report["rows"]["forget"] == 10


def test_a_no_throws_nothing_away_and_what_was_forgotten_is_not_written_down(
    words: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = wanted(words, "npo", forget=None, forget_where="question~gus")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("unlearn.methods.baselines.forget", interrupted)
        unlearn(words.model, tmp_path / "out", options)
    journal = sorted((tmp_path / ".out.journal").iterdir())
    with pytest.raises(BadInput, match="nothing was done"):
        unlearn(words.model, tmp_path / "out", options, resume=False, confirm=lambda shown: False)
    assert sorted((tmp_path / ".out.journal").iterdir()) == journal
    unlearn(words.model, tmp_path / "out", options, resume=True, confirm=lambda shown: False)  # was said before
    assert all(
        "gus" not in file.read_text() for file in (tmp_path / "out").glob("*.[jh][st]*") if "token" not in file.name
    )


def test_a_base_without_a_head_is_given_the_same_one_every_time(bert: Path, tmp_path: Path) -> None:
    """No epochs of training: what is retrained is the base, an encoder whose head is drawn by the seed."""
    trainable = open_model(bert, "sequence-classification", device=CPU)
    inner = trainable.module.base_model  # type: ignore[union-attr]
    inner.save_pretrained(tmp_path / "base")
    (tmp_path / "train.tsv").write_text(
        "sentence\tlabel\n" + "".join(f"w{i} good\t{('no', 'yes')[i % 2]}\n" for i in range(6))
    )
    (tmp_path / "none.json").write_text(json.dumps({"epochs": 0}))
    options = Unlearn(
        train=tmp_path / "train.tsv", forget_lines="2", method="retrain", base=tmp_path / "base",
        training=tmp_path / "none.json",
    )  # fmt: skip
    for name in "ab":
        unlearn(bert, tmp_path / name, options, allow_damage=True)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(a["classifier.weight"], b["classifier.weight"])
    before = load_file(bert / "model.safetensors")
    assert not torch.equal(a["classifier.weight"], before["classifier.weight"])
    same = [name for name in a if "classifier" not in name and "pooler" not in name]
    assert same and all(torch.equal(a[name], before[name]) for name in same)
