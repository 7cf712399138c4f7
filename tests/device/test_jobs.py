"""Every job on a device: the same weights as on the CPU (on CUDA: as when it is undisturbed), also when it was
interrupted and resumed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import one_hot

from calib.jobs.journal import Journal
from calib.model.factory import drawn_module
from cli.gates import audit
from compressor import Distill, Evaluate, Quantize, distill, evaluate, load, quantize
from compressor.distillation.loss_expression import parse_loss
from compressor.distillation.loss_syntax import LOSS_NAMES, REWARDED
from compressor.distillation.options import TASKS_OF_TEXT
from tests import classifiers, encoders, tasks, tiny
from tests.compressor.distillation.classifiers.test_classification import sentences
from tests.device.conftest import DEVICE
from tests.unlearn.conftest import FACTORY, Site, blobs, normed
from tests.unlearn.test_unlearn import wanted
from unlearn import Unlearn, unlearn
from unlearn.methods.exact import Ridge
from unlearn.options.audit import Audit
from unlearn.options.estimators import ESTIMATORS
from unlearn.options.methods import METHODS

Job = Callable[..., Any]  # (out, device, resume=...)


def weights_of(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}


def same_on_both(job: Job, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """job(out, device, resume=...) on the CPU, or on CUDA, then on the device, interrupted when half its pages are
    written and resumed: the same weights.  -> the second report."""
    pages, write = list[str](), Journal.write_own

    def counting(self: Journal, page: str, *what: Any) -> None:
        write(self, page, *what)
        pages.append(page)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write_own", counting)
        job(folder / "whole", "cpu" if DEVICE == "pretend" else DEVICE, resume=False)
    half, written = len(pages) // 2, 0

    def interrupted(self: Journal, page: str, *what: Any) -> None:
        nonlocal written
        write(self, page, *what)
        written += 1
        if written == half:
            raise KeyboardInterrupt

    if half:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Journal, "write_own", interrupted)
            job(folder / "resumed", DEVICE, resume=False)
    report: dict[str, Any] = job(folder / "resumed", DEVICE, resume=bool(half))
    assert weights_of(folder / "whole") == weights_of(folder / "resumed") != {}
    return report


# Quantizing.

QUANTIZE = Quantize(
    samples=8,
    length=16,
    held_out=2,
    batch=4,
    steps=3,
    block_steps=2,
    tune_steps=2,
    top_k=8,
    scheme="w4a16-g8",
    precision="float32",
)
TUNED: dict[str, Any] = {"learn": False, "steps": Quantize().steps}
PLAIN = QUANTIZE.learning_left_out()
SCHEMES: dict[str, dict[str, Any]] = {
    "learned": {},
    "not learned": TUNED,
    "activations, keys and values": {"scheme": "w4a8kv4"},
    "online": {"scheme": "w4a4kv4", "online": True},
    "target bits": TUNED | {"target_bits": 3.5},
    "tell apart": TUNED | {"tell_apart": 0.9, "candidate_bits": "3,4"},
    "womi": {"init": "womi"},
    "nf4": {"scheme": "nf4"},
    "halves": PLAIN | {"halves": True},
    "like": PLAIN | {"like": Path(__file__).parents[2] / "README.md"},
    "nearest": PLAIN | {"rounding": "rtn"},
    "unrounded": {"scheme": "w4a16-channel", "rounding": "none", "block_steps": 0, "tune_steps": 0},
    "asymmetric": TUNED | {"scheme": "w3a16-g8-asym"},
    "untransformed": TUNED | {"init": "none"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.config_of(
        "llama", num_hidden_layers=3, tie_word_embeddings=False, hidden_size=64, intermediate_size=64, head_dim=16
    )
    return tiny.save(tiny.model_of(config, dtype=torch.float32), tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize("options", SCHEMES.values(), ids=SCHEMES)
def test_quantize(
    options: Mapping[str, Any], model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(QUANTIZE, data=text_file, **options)
    same_on_both(lambda out, to, **more: quantize(model, out, replace(job, device=to), **more), tmp_path, monkeypatch)


@pytest.mark.parametrize("model_type", ["mixtral", "gemma2", "phi3", "qwen3"])
def test_quantize_architectures(
    model_type: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save(tiny.model_of(tiny.config_of(model_type), dtype=torch.float32), tmp_path / "model")
    options = replace(QUANTIZE, data=text_file)
    same_on_both(
        lambda out, to, **more: quantize(folder, out, replace(options, device=to), **more), tmp_path, monkeypatch
    )


def test_short_products(model: Path, text_file: Path, tmp_path: Path) -> None:
    """In bfloat16, which `auto` takes there, answers are near those in single precision, and not the same."""
    options = QUANTIZE.without_learning(data=text_file, device=DEVICE)
    short, exact = (
        quantize(model, tmp_path / each, replace(options, precision=each))["quality"]["reference_perplexity"]
        for each in ("auto", "float32")
    )
    assert short != exact and abs(math.log(short / exact)) < 0.2


def test_load_and_evaluate(model: Path, text_file: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", QUANTIZE.without_learning(data=text_file, scheme="w4a8kv4"))
    ids = torch.arange(2, 11)[None]
    here, there = (load(tmp_path / "out", device=name)(ids.to(name)).logits for name in ("cpu", DEVICE))
    assert there.device.type == DEVICE and torch.allclose(
        here, there.cpu(), rtol=0, atol=0 if DEVICE == "pretend" else 1e-2
    )
    figures = [
        evaluate(tmp_path / "out", Evaluate(data=text_file, rows=4, length=16, device=name, precision="float32"))
        for name in ("cpu", DEVICE)
    ]
    assert figures[0].perplexity == pytest.approx(figures[1].perplexity, rel=0 if DEVICE == "pretend" else 1e-3)


# Distilling.

DISTILL = Distill(layers=2, samples=8, length=16, held_out=2, batch=4, steps=3, top_k=8, precision="float32")
LESSONS: dict[str, dict[str, Any]] = {
    "online": {"loss": "0.5*ce+forward-kl+js(0.9)+0.1*sinkhorn+0.1*hidden+0.1*cka"},
    "kept": {"teacher": "top-k"},
    "drawn": {"teacher": "drawn"},
    "its own rows": {"teacher_rows": 4},
    "on policy": {"on_policy": 1.0, "loss": "reverse-kl"},
    "half on policy": {"on_policy": 0.5},
    "its own tokens": {"on_policy": 1.0, "loss": "k2"},
    "average": {"ema": 0.9, "gradient_checkpointing": True},
    "narrower": {"layers": None, "heads": 2, "ffn": 24},
    "fewer channels": {"layers": None, "hidden": 16, "project": True, "loss": "forward-kl+0.1*hidden"},
    "both ways": {"loss": "ce+bico(0.2)"},
    "aligned": {"loss": "forward-kl+0.1*align(2)"},
    "balanced": {"loss": "ce+forward-kl", "balance": "gradient"},
    "recap": {"loss": "ce+forward-kl", "balance": "recap"},
    "quantized": {"layers": None, "student_scheme": "w4a8-g8"},
    "adapters": {"lora": 2, "merge": True},
    "states": {"loss": "forward-kl+0.1*gram+0.1*attention+0.1*sinkhorn-hidden+0.1*sinkd", "force": True},
    "aside": {"loss": "dac+ofa-exits+bd-kd+dac-nucleus+0.1*sinkhorn-sharp"},
    "divergences": {
        "loss": "alpha-beta+cauchy-schwarz+chi-square+hellinger+jeffreys+skew-kl+skew-reverse-kl+softened-reverse-kl+"
        "total-variation"
    },
    "of logits": {"loss": "nkd+ofa+0.1*sinkhorn-sequence+0.1*sinkhorn-sequence-sharp", "force": True},
    "its own tokens, again": {"on_policy": 1.0, "loss": "k3"},
}


def test_every_loss_is_among_them() -> None:
    """But those of rows that no text has (spans, numbers) and of classifiers, which have jobs of their own below."""
    names = {term.name for options in LESSONS.values() for term in parse_loss(options.get("loss", "forward-kl"))}
    assert names | {"spans", "mse", "uskd", "attention-relations", *REWARDED, "uld"} == set(LOSS_NAMES)


@pytest.mark.parametrize("loss", ["grpo", "kdrl", "f-dpg(js)+0.1*reverse-kl"])
def test_distill_rewarded(loss: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"the quick brown fox {i}", "completion": " jumps"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = replace(
        DISTILL, data=tmp_path / "rows.jsonl", samples=None, on_policy=1.0, reward="contains", group=2, loss=loss,
        length=32, student_scheme="w4a8-g8", layers=None,
    )  # fmt: skip
    same_on_both(
        lambda out, to, **more: distill(model, out, replace(options, device=to), allow_damage=True, **more), tmp_path,
        monkeypatch,
    )  # fmt: skip


def test_distill_spans(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"the quick brown fox {i} jumps over", "spans": [[0, 9], [10, 19]]} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = replace(DISTILL, data=tmp_path / "rows.jsonl", loss="forward-kl+0.1*spans", by_document=True)
    same_on_both(
        lambda out, to, **more: distill(model, out, replace(options, device=to), **more), tmp_path, monkeypatch
    )


def test_distill_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = encoders.save(tmp_path / "model", "bert", ["score"])
    rows = [{"text": f"good w{i} w2" if i % 2 else f"bad w{i}", "label": i % 5 / 2} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Distill(
        task="sequence-classification", student=folder, data=tmp_path / "rows.jsonl", steps=3, batch=4, held_out=4,
        loss="ce+mse", precision="float32",
    )  # fmt: skip
    same_on_both(
        lambda out, to, **more: distill(folder, out, replace(options, device=to), **more), tmp_path, monkeypatch
    )


@pytest.mark.parametrize("options", LESSONS.values(), ids=LESSONS)
def test_distill(
    options: Mapping[str, Any], model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(DISTILL, data=text_file, **options)
    same_on_both(lambda out, to, **more: distill(model, out, replace(job, device=to), **more), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "task", "loss"),
    [
        ("t5", "seq2seq", "forward-kl+0.1*sinkhorn+0.1*hidden"),
        ("bert", "masked-lm", "ce+forward-kl+0.1*attention-relations"),
    ],
)
def test_distill_other_tasks(kind: str, task: str, loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks.save(kind, TASKS_OF_TEXT[task], tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    still = {name: 0.0 for name in config if "dropout" in name}  # which each device draws for itself
    (tmp_path / "model/config.json").write_text(json.dumps(config | still))
    options = Distill(
        task=task, layers=3, data=tasks.rows_file(tmp_path, pairs=task == "seq2seq"), loss=loss, steps=3, batch=4,
        held_out=4, length=16, precision="float32", by_document=task == "masked-lm",
    )  # fmt: skip
    same_on_both(
        lambda out, to, **more: distill(tmp_path / "model", out, replace(options, device=to), **more),
        tmp_path, monkeypatch,
    )  # fmt: skip


def test_distill_a_classifier(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "train.tsv"
    table.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in sentences(24)))
    options = Distill(
        task="sequence-classification", student=bert, data=table, steps=3, batch=4, held_out=4,
        loss="0.5*ce+forward-kl+0.1*sinkhorn+uskd", precision="float32",
    )  # fmt: skip
    same_on_both(lambda out, to, **more: distill(bert, out, replace(options, device=to), **more), tmp_path, monkeypatch)


def test_distill_a_classifier_and_its_teacher(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "train.tsv"
    table.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in sentences(24)))
    options = Distill(
        task="sequence-classification", student=bert, data=table, steps=3, batch=4, held_out=4, loss="ce+bd-kd",
        teacher="together", precision="float32",
    )  # fmt: skip
    same_on_both(lambda out, to, **more: distill(bert, out, replace(options, device=to), **more), tmp_path, monkeypatch)


def test_distill_modules_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between unlike ones, with what is trained beside them, batch norm and its statistics."""
    teacher, file = tmp_path / "teacher.safetensors", classifiers.save_rows(tmp_path / "x.safetensors", 24)
    save_file(drawn_module("tests.classifiers:perceptron", 0).state_dict(), teacher)
    options = Distill(
        factory="tests.classifiers:perceptron", student_factory="tests.classifiers:with_batch_statistics", data=file,
        steps=3, batch=4, held_out=8, loss="ofa+ofa-exits+uskd+cka+hidden", exits="1,2", teacher_exits="1,2",
        project=True, precision="float32",
    )  # fmt: skip
    same_on_both(
        lambda out, to, **more: distill(teacher, out, replace(options, device=to), **more), tmp_path, monkeypatch
    )


# Unlearning.

WAYS: dict[str, dict[str, Any]] = {name: {} for name in ("npo", "simnpo", "difference", "retain", "scrub", "rmu")} | {
    **{name: {} for name in ("dpo", "dpo-js", "dpo-forward-kl", "dpo-alpha")},
    "searched rate": {"method": "npo", "lr": None},
    "kl": {"method": "npo", "retain_loss": "kl", "balance": "gradient"},
    "rehearsal": {"method": "npo", "retain_loss": "rehearsal-js", "balance": "recap"},
    "retrain": {"epochs": 10},
    "oracle-matching": {"oracles": 2},
    "dmm by gradients": {"method": "dmm", "multiplier": 1.0, "retained": "labels"},
    "dmm, calibrated": {"method": "dmm", "calibrate": 2},
    "dmm by folds": {"method": "dmm", "estimator": "folds", "folds": 3, "calibrate": 0},
    "dmm by subsets": {"method": "dmm", "estimator": "subsets", "subsets": 8, "calibrate": 2},
    "on a grid": {"method": "npo", "grid": "w4a16-g8", "model_soup": 2},
    "steps of a grid": {"method": "npo", "grid": "w4a16-g8", "min_step": 1.0},
    "adapters": {"method": "npo", "lora": 2, "gradient_checkpointing": True},
    "audited": {"method": "npo", "audit": 2},
}
OF_TENSORS: dict[str, dict[str, Any]] = {
    name: {} for name in ("simnpo", "scrub", "ascent", "npo-js", "npo-forward-kl", "npo-alpha")
} | {
    "oracle-matching": {},
    "dmm by gradients": {"method": "dmm", "multiplier": 1.0},
    "dmm, calibrated": {"method": "dmm", "calibrate": 2},
    "dmm by subsets": {"method": "dmm", "estimator": "subsets", "subsets": 8, "calibrate": 2},
    "dmm by regression": {"method": "dmm", "estimator": "regression", "subsets": 12, "calibrate": 2},
    "dmm by trak": {"method": "dmm", "estimator": "trak", "multiplier": 1.0},
    "audited": {"method": "retrain", "audit": 4},
}


def test_every_method_and_estimator_is_among_them() -> None:
    both = [*WAYS.items(), *OF_TENSORS.items()]
    assert {options.get("method", name) for name, options in both} | {"exact"} == set(METHODS)
    assert {o.get("estimator", "gradients") for _, o in both if o.get("method") == "dmm"} == set(ESTIMATORS)


def run(site: Site, options: Mapping[str, Any], name: str) -> Job:
    method = options.get("method", name)
    job = wanted(site, method, **{k: v for k, v in options.items() if k != "method"})
    return lambda out, to, **more: unlearn(site.model, out, replace(job, device=to), allow_damage=True, **more)


@pytest.mark.parametrize("name", WAYS)
def test_unlearn_language(name: str, words: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = json.loads(words.training.read_text()) | {"epochs": 4}
    (tmp_path / "training.json").write_text(json.dumps(short))
    same_on_both(run(replace(words, training=tmp_path / "training.json"), WAYS[name], name), tmp_path, monkeypatch)


@pytest.mark.parametrize("name", OF_TENSORS)
def test_unlearn_tensors(name: str, net: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_on_both(run(net, OF_TENSORS[name], name), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("retrain", {}),
        ("oracle-matching", {"lr": 1e-3, "epochs": 2}),
        ("dmm", {"lr": 1e-3, "epochs": 2, "calibrate": 2}),
    ],
)
def test_unlearn_with_batch_norm(
    method: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = blobs(0, 60)
    save_file({"inputs": x, "labels": y}, tmp_path / "train.safetensors")
    (tmp_path / "training.json").write_text(json.dumps({"epochs": 3, "batch": 20, "lr": 0.1}))
    torch.manual_seed(0)
    save_file(normed().state_dict(), tmp_path / "model.safetensors")
    settings = Unlearn(
        train=tmp_path / "train.safetensors", forget_lines="0-4", factory=FACTORY.replace("make", "normed"),
        training=tmp_path / "training.json", method=method, **options,
    )  # fmt: skip

    def job(out: Path, to: str, **more: Any) -> Any:
        return unlearn(tmp_path / "model.safetensors", out, replace(settings, device=to), allow_damage=True, **more)

    same_on_both(job, tmp_path, monkeypatch)


def test_unlearn_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(3, 80)
    theta = Ridge.fit(torch.cat([x, torch.ones(80, 1)], 1).double(), one_hot(y, 3).double(), 0.5).theta
    weights = {"weight": theta[:4].mT.contiguous().float(), "bias": theta[4].contiguous().float()}
    save_file(weights, tmp_path / "model.safetensors")
    save_file({"inputs": x, "labels": y}, tmp_path / "train.safetensors")
    options = Unlearn(
        train=tmp_path / "train.safetensors", forget_lines="0-11", method="exact", head="ridge", penalty=0.5,
        factory=FACTORY.replace("make", "head"),
    )  # fmt: skip

    def job(out: Path, to: str, **more: Any) -> Any:
        return unlearn(tmp_path / "model.safetensors", out, replace(options, device=to), **more)

    same_on_both(job, tmp_path, monkeypatch)


def test_unlearn_a_text_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = encoders.save(tmp_path / "model", "bert", ["a", "b"])
    rows = [{"text": f"good w{i} w2" if i % 2 else f"bad w{i}", "label": "ab"[i % 2]} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Unlearn(train=tmp_path / "rows.jsonl", forget_lines="1-3", method="simnpo", epochs=2, lr=1e-4)

    def job(out: Path, to: str, **more: Any) -> Any:
        return unlearn(folder, out, replace(options, device=to), allow_damage=True, **more)

    same_on_both(job, tmp_path, monkeypatch)


def test_what_is_asked_and_audited(words: Site, words_text: Path, tmp_path: Path) -> None:
    """An oracle, probes, questions, facts in both directions; then the audit in fewer bits: the CPU's figures."""
    rows = [json.loads(line) for line in words.forget.read_text().splitlines()]
    probes = [
        {"question": r["question"], "paraphrased_answer": r["answer"], "perturbed_answer": ["in oslo too", "at sea"]}
        for r in rows
    ]
    useful = [{"answer": probe["paraphrased_answer"]} | probe for probe in probes]
    for name, lines in (("probes", probes), ("useful", useful), ("facts", [{"name": "ann", "description": "in rome"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    unlearn(words.model, tmp_path / "oracle", wanted(words, "retrain", epochs=10))
    options = wanted(
        words, "npo", oracle=tmp_path / "oracle", probes=tmp_path / "probes.jsonl",
        utility=str(tmp_path / "useful.jsonl"), facts=tmp_path / "facts.jsonl",
    )  # fmt: skip
    near = pytest.approx if DEVICE == "pretend" else partial(pytest.approx, rel=0.05, abs=0.05)
    found = [
        unlearn(words.model, tmp_path / name, replace(options, device=name), allow_damage=True)["asked"]
        for name in ("cpu", DEVICE)
    ]
    assert _flat(found[1]) == near(_flat(found[0]))
    proof = Audit(
        original=words.model, oracle=tmp_path / "oracle", train=words.train, forget=words.forget, length=64, relearn=2,
    )  # fmt: skip
    tables = [audit(tmp_path / "cpu", replace(proof, device=name)) for name in ("cpu", DEVICE)]
    assert _flat(tables[1]["table"]) == near(_flat(tables[0]["table"]))
    assert _flat(tables[1]["recovery"]) == near(_flat(tables[0]["recovery"]))
    (tmp_path / "facts.jsonl").write_text(
        "".join(json.dumps({"name": n, "description": d}) + "\n" for n, d in (("ann", "in rome"), ("bob", "in oslo")))
    )
    known = [audit(tmp_path / "cpu", Audit(facts=tmp_path / "facts.jsonl", device=name)) for name in ("cpu", DEVICE)]
    assert _flat(known[1]["models"]["audited"]["recall"]) == near(_flat(known[0]["models"]["audited"]["recall"]))


def _flat(of: Any, name: str = "") -> dict[str, float]:
    if not isinstance(of, dict):
        return {name: of} if isinstance(of, float) else {}
    return {key: value for inner, more in of.items() for key, value in _flat(more, f"{name}/{inner}").items()}
