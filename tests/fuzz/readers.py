"""Everything that parewell reads, as functions of a file's bytes.

Each may succeed or raise what is documented, with a message of one line; `outcome` says which, and raises the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from safetensors.torch import save
from torch import nn
from transformers import AutoModelForCausalLM

from calib import MAX_MESSAGE, BadInput, Failed
from calib.blockwise.model import BlockwiseModel
from calib.data.labeled import read_labeled
from calib.data.load import load_corpus
from calib.data.targets import numbers_of
from calib.data.teacher_cache import TeacherCache
from calib.jobs.journal import Journal, check_journal, kept_apart
from calib.jobs.options import check_options
from calib.jobs.output_folder import check_destination
from calib.jobs.recipe import read_recipe
from calib.losses.top_k import TopK, top_k
from calib.model.checkpoint import read_tokenizer
from calib.model.config import read_config, read_json
from calib.model.weights import Weights, read_file
from calib.report.model_card import model_card, read_metadata_of
from cli.main import parewell
from compressor import Quantize, quantize
from compressor.engine.load import RUNTIME_TRANSFORMS_FILE, open_checkpoint
from tests import bert, tiny
from unlearn.audit.directions import read_fact_pairs
from unlearn.audit.probes import read_facts, read_probes
from unlearn.data.dataset import read_data
from unlearn.data.selection import by_lines
from unlearn.model.ensemble import of_module
from unlearn.model.model import TrainableModel, open_model, task_of
from unlearn.model.training_recipe import parse_training, training_of

NAMES = (
    "weights", "index", "config", "tokenizer", "documents", "text", "tokens", "labelled-jsonl", "labelled-tsv",
    "rows-jsonl", "rows-tsv", "rows-labelled", "rows-tensors", "forget-lines", "probes", "facts", "recipe", "quantized",
    "codes", "online", "report", "journal", "cache", "teacher", "config-toml", "training",
    "card",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """Sound files to begin with, what kind they are of (see mutate.py), and what reads them."""

    seeds: list[bytes]
    kind: str
    read: Callable[[bytes], object]


def outcome(reader: Reader, data: bytes) -> str:
    """ "read", or the one line that refuses `data`.  Any other exception is a defect, and so is a line that is not one
    or cannot be printed."""
    try:
        reader.read(data)
    except (BadInput, Failed, click.UsageError) as error:
        said = error.format_message() if isinstance(error, click.UsageError) else str(error)
        assert said and said.isprintable() and len(said) <= MAX_MESSAGE, f"no line to be printed: {said!r}"
        return said
    return "read"


def readers(scratch: Path) -> dict[str, Reader]:
    """By name; all that they need lies in `scratch`."""

    def file(name: str, data: bytes) -> Path:
        place = scratch / "in" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        return place

    model = tiny.save(tiny.model_of(tiny.config_of("llama"), dtype=torch.float32), scratch / "model")
    classifier = bert.save(scratch / "bert")
    tokenizer = read_tokenizer(model)
    config = (model / "config.json").read_bytes()
    shards = {name: save({name: torch.arange(6.0).view(2, 3)}, {"format": "pt"}) for name in ("a", "b")}
    both = {"a": (2, 3), "b": (2, 3)}
    quantized, words = scratch / "quantized", file("some.txt", b"a word " * 60)
    options = Quantize(scheme="w4a4kv4-asym", data=words, samples=4, held_out=2, length=16, learn=False)
    quantize(model, quantized, options)

    def command(*words: object) -> None:
        result = CliRunner().invoke(parewell, [str(word) for word in words], standalone_mode=False)
        if result.exception is not None:
            raise result.exception

    def weights(data: bytes) -> None:
        place = file("folder/model.safetensors", data)
        read_file(place)
        found = Weights(place.parent)
        found.read(found.entries)
        found.verify(both)

    def index(data: bytes) -> None:
        place = file("sharded/model.safetensors.index.json", data)
        for name, data in shards.items():
            if not (place.parent / f"{name}.safetensors").exists():
                (place.parent / f"{name}.safetensors").write_bytes(data)
        Weights(place.parent).verify(both)

    def settings(data: bytes) -> None:
        place = linked(model, scratch / "configured", "config.json")
        (place / "config.json").write_bytes(data)
        task_of(place, "auto", None)
        known = read_config(place)
        BlockwiseModel(known, Weights(place), torch.device("cpu"))

    def vocabulary(data: bytes) -> None:
        place = linked(model, scratch / "spoken", "tokenizer.json")
        (place / "tokenizer.json").write_bytes(data)
        found = read_tokenizer(place)
        load_corpus(file("plain.txt", b"some words of a text " * 4), found, vocab=tiny.VOCAB, length=8)

    def documents(data: bytes) -> None:
        for by_document in (False, True):
            load_corpus(file("x.jsonl", data), tokenizer, vocab=tiny.VOCAB, length=8, by_document=by_document)

    def text(data: bytes) -> None:
        load_corpus(file("x.txt", data), tokenizer, vocab=tiny.VOCAB, length=8)

    def tokens(data: bytes) -> None:
        load_corpus(file("x.safetensors", data), None, vocab=tiny.VOCAB, length=4).fingerprint  # noqa: B018

    def labelled(suffix: str) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            found = read_labeled(file(f"labelled.{suffix}", data))
            numbers_of(found, {"no": 0, "yes": 1})
            found.fingerprint  # noqa: B018

        return read

    spoken = _opened("causal-lm", model, AutoModelForCausalLM.from_pretrained(model), tokenizer)
    told = open_model(classifier, "sequence-classification", device=torch.device("cpu"))
    torch.manual_seed(0)
    plain = _opened("tensors", scratch, nn.Linear(3, 2), None)

    def rows(opened: TrainableModel, name: str) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            found = read_data(file(name, data), opened, 32)
            [found.shown(row) for row in range(len(found))], found.describe()

        return read

    some = read_data(file("rows.jsonl", PAIRS), spoken, 64)

    def lines(data: bytes) -> None:
        by_lines(some, data.decode(errors="replace"))

    def probes(data: bytes) -> None:
        place = file("probes.jsonl", data)
        read_probes(place, spoken, 64, paraphrased=True)
        read_probes(place, spoken, 64, paraphrased=False)

    def facts(data: bytes) -> None:
        read_facts(file("facts.jsonl", data), spoken, 64)
        read_fact_pairs(file("facts.jsonl", data))

    def recipe(data: bytes) -> None:
        place = linked(quantized, scratch / "made", "parewell.json")
        (place / "parewell.json").write_bytes(data)
        refusals = []
        for read in (
            lambda: read_recipe(place),
            lambda: command("show", place),
            lambda: command("show", place, "--json"),
            lambda: check_destination(place, [], 0),
            lambda: training_of(_Trains(), place),  # type: ignore[arg-type]
            lambda: opened(place),
        ):
            try:
                read()
            except (BadInput, Failed) as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]

    def opened(place: Path) -> None:
        found = open_checkpoint(place, torch.device("cpu"))
        for i in range(found.stream.layers):
            found.stream.read_block(i)

    def made(name: str) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            place = linked(quantized, scratch / f"without-{name}", name)
            (place / name).write_bytes(data)
            opened(place)

        return read

    def report(data: bytes) -> None:
        place = file("reported/report.json", data).parent
        command("report", place, "--json")
        command("report", place, "--html", place / "page.html")

    def page(data: bytes) -> None:
        out = scratch / "in" / "out"
        file(".out.journal/job.page", data)
        check_journal(out, {"options": {"seed": 0}}, True)
        Journal(scratch / "in" / ".out.journal").read("job")

    def cache(data: bytes) -> None:
        place = file("cache/cache.page", data).parent
        kept_apart(place, {"of": "this"}, "words of a teacher")

    def taught(data: bytes) -> None:
        place = file("taught/teacher-0.page", data).parent
        TeacherCache(Journal(place)).read(0)

    def job(data: bytes) -> None:
        of = parewell.commands["quantize"]
        context = of.make_context("quantize", ["--config", str(file("job.toml", data))])
        wanted = {name: value for name, value in context.params.items() if name in Quantize.__dataclass_fields__}
        check_options(Quantize(**wanted))

    def training(data: bytes) -> None:
        place = file("training.json", data)
        parse_training(read_json(place), str(place))

    def card(data: bytes) -> None:
        report = json.loads((quantized / "report.json").read_text())
        written = model_card(report, read_recipe(quantized), {}, read_metadata_of(file("carded/README.md", data)))
        assert ModelCard(written).data.to_dict()["tags"][0] == "parewell"

    saved = _pages(scratch / "seeds")
    return {
        "weights": Reader(
            [save({name: torch.arange(6.0).view(2, 3) for name in both}, {"format": "pt"})], "safetensors", weights
        ),
        "index": Reader([INDEX], "json", index),
        "config": Reader([config], "json", settings),
        "tokenizer": Reader([(model / "tokenizer.json").read_bytes()], "json", vocabulary),
        "documents": Reader([DOCUMENTS], "lines", documents),
        "text": Reader([b"some text of many words\r\nand lines", "\ufeffé\u2028".encode() * 9], "bytes", text),
        "tokens": Reader([TOKENS], "safetensors", tokens),
        "labelled-jsonl": Reader([LABELLED], "lines", labelled("jsonl")),
        "labelled-tsv": Reader([TABLE], "table", labelled("tsv")),
        "rows-jsonl": Reader([PAIRS], "lines", rows(spoken, "x.jsonl")),
        "rows-tsv": Reader([b"prompt\tresponse\na\tb\nc\td\n"], "table", rows(spoken, "x.tsv")),
        "rows-labelled": Reader([LABELLED], "lines", rows(told, "told.jsonl")),
        "rows-tensors": Reader([INPUTS], "safetensors", rows(plain, "in.safetensors")),
        "forget-lines": Reader([b"1,2-3", b" 1 - 3 "], "bytes", lines),
        "probes": Reader([PROBES], "lines", probes),
        "facts": Reader([FACTS], "lines", facts),
        "recipe": Reader([(quantized / "parewell.json").read_bytes(), RECIPE], "json", recipe),
        "quantized": Reader([(quantized / "config.json").read_bytes()], "json", made("config.json")),
        "codes": Reader([(quantized / "model.safetensors").read_bytes()], "safetensors", made("model.safetensors")),
        "online": Reader(
            [(quantized / RUNTIME_TRANSFORMS_FILE).read_bytes()], "safetensors", made(RUNTIME_TRANSFORMS_FILE)
        ),
        "report": Reader(REPORTS, "json", report),
        "journal": Reader([saved["job"]], "safetensors", page),
        "cache": Reader([saved["cache"]], "safetensors", cache),
        "teacher": Reader([saved["teacher-0"]], "safetensors", taught),
        "config-toml": Reader([TOML], "bytes", job),
        "training": Reader([TRAINING], "json", training),
        "card": Reader([CARD], "bytes", card),
    }


class _Trains:
    """As much of an unlearning's options as says that models are trained and not how."""

    trains, training, audit, method, estimator = True, None, 0, "retrain", "gradients"


def _opened(task: str, folder: Path, module: Any, tokenizer: Any) -> TrainableModel:
    params = {name: p.detach() for name, p in module.named_parameters()}
    return TrainableModel(task, folder, module, of_module(module), params, lambda _: {}, lambda *_: None, tokenizer)


def linked(folder: Path, into: Path, without: str) -> Path:
    """A folder of links to the files of another, but for one."""
    into.mkdir(exist_ok=True)
    for source in folder.iterdir():
        if source.name != without and not (into / source.name).exists():
            os.link(source, into / source.name)
    return into


def _pages(folder: Path) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    journal = Journal(folder)
    journal.write("job", {"step": torch.zeros(2)}, {"options": {"seed": 0}})
    journal.write("cache", {}, {"of": "this"})
    said: TopK = top_k(torch.arange(15.0).view(3, 5), 2)
    TeacherCache(journal).write(0, said)
    return {name: (folder / f"{name}.page").read_bytes() for name in ("job", "cache", "teacher-0")}


INDEX = b'{"metadata": {"total_size": 32}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}'
DOCUMENTS = b"\n".join(
    (
        b'{"text": "some words of a text", "spans": [[0, 4], [5, 10]]}',
        b'{"prompt": "what is it", "response": " a text of words"}',
        b'{"question": "what", "answer": "nothing"}',
    )
)
TOKENS = save(
    {
        "input_ids": torch.arange(12).view(2, 6),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
        "spans": torch.tensor([[-1, 0, 0, 1, 1, -1]] * 2),
    }
)
LABELLED = b'{"sentence": "good w1", "label": "yes"}\n{"sentence": "bad w2", "label": 0}\n'
TABLE = b"label\tsentence1\tsentence2\nyes\tgood\tw1\nno\tbad\tw2\n"
PAIRS = b'{"prompt": "ab", "response": "cd"}\n{"question": "e", "answer": "f"}\n{"text": "ghij"}\n'
INPUTS = save({"inputs": torch.arange(12.0).view(4, 3), "labels": torch.tensor([0, 1, 1, 0])})
PROBES = b"\n".join(
    b'{"question": "who", "answer": "she", "paraphrased_answer": "her", "perturbed_answer": ["he", "it"]}'
    for _ in range(2)
)
FACTS = b'{"name": "Ada", "description": "a writer of engines"}\n{"name": "Bo", "description": "a reader"}\n'
TOML = b'scheme = "w4a16-channel"\nmodel = "m"\nout = "o"\nseed = 3\nlr-scale = 0.02\nlearn = true\ndata = "text.txt"\n'
TRAINING = (
    b'{"optimiser": "adamw", "epochs": 3, "batch": 8, "lr": 0.1, "momentum": 0.9, "decay": 0.0, "warmup": 0.25, '
    b'"schedule": "linear"}'
)
_STEP = {
    "job": "quantize",
    "options": {"scheme": "w4a16-channel", "seed": 0, "data": None},
    "data": {"calibration": {"rows": 4}},
    "model": {"name": "m", "sha256": "0" * 64, "files": {}},
    "versions": {"torch": "2"},
    "quality": {"kl": 0.5},
    "runs_on": {"device": "cpu"},
    "training": {"epochs": 3},
    "scheme": "w4a16-channel",
    "hadamard_down": False,
}
RECIPE = json.dumps({"recipe": [_STEP]}).encode()
_QUALITY = {
    "perplexity": 9.0, "reference_perplexity": 8.0, "bits_per_byte": 2.0, "reference_bits_per_byte": 1.9, "kl": 0.1,
    "top1_agreement": 0.9, "tokens": 60,
}  # fmt: skip
_SEEN = {
    "activations": {"ratio": 0.5, "channel_range": [0.1, 1.0, 2.0]},
    "weights": {"ratio": 0.5, "channel_range": [0.1, 1.0, 2.0]},
}
_SKILL = {"rows": 9, "accuracy": 0.9, "mcc": 0.8, "f1": 0.9, "ece": 0.1, "kl": 0.1, "top1_agreement": 1.0}
_GROUPS = {name: {"nats": 1.0, "right": 0.5, "extraction": 0.1} for name in ("forget", "retain")}
_KLOM = {"p95": 1.0, "mean": 0.5, "gaussian_p95": 1.0, "gaussian_mean": 0.5, "attack": 0.6}
CARD = b"---\nlicense: other\nlicense_link: LICENSE\nlanguage: [en, de]\ndatasets: a/b\n---\n# A model\n"
REPORTS = [
    json.dumps(report).encode()
    for report in (
        {
            "job": "quantize", "scheme": "w4a16-channel", "quality": _QUALITY,
            "quality_by_stage": {"rounded": _QUALITY, "tuned": _QUALITY},
            "layers": [{"name": "0.q_proj", "output_error": 0.01, "before": _SEEN, "after": _SEEN}],
            "bytes": {"before": 100, "after": 30}, "loaders": {"loaders": ["compressor.load"], "notes": ["a note"]},
            "parts": {"linears": 10, "embedding": 9, "head": 9, "other": 2}, "choices": {"--tied keep": 21},
            "tables": {"head": {"name": "lm_head", "scheme": "w8", "error": 0.01}},
            "untied": True, "left_out": {"residual_rotation": "a norm is there"}, "curves": {"learn": [1.0, 0.5]},
            "data": {},
        },
        {
            "job": "distill", "student": "cut", "cut": {}, "quality": _QUALITY, "data": {},
            "quality_by_stage": {"before": _QUALITY, "after": _QUALITY}, "bytes": {"before": 100, "after": 30},
            "parameters": {"teacher": 100, "student": 30}, "curves": {"ce": [1.0, 0.5]},
            "loaders": {"loaders": ["compressor.load"], "notes": ["a note"]},
        },
        {
            "job": "classify", "student": "cut", "cut": {}, "quality": _SKILL, "data": {},
            "quality_by_stage": {"teacher": _SKILL, "before": _SKILL, "after": _SKILL},
            "parameters": {"teacher": 100, "student": 30}, "curves": {"ce": [1.0, 0.5]},
        },
        {
            "job": "unlearn", "method": "dmm", "task": "causal-lm", "rows": {"train": 9, "forget": 2}, "data": {},
            "quality": {}, "quality_by_stage": {"before": _GROUPS, "after": _GROUPS},
            "asked": {
                "oracle": _GROUPS, "forget_quality": {"after": 0.5}, "privacy_leak": {"after": -3.0},
                "utility": {"after": {"utility": 0.5}}, "facts": {"after": {"forward": 0.5, "reversed": 0.1}},
            },
            "scale": {
                "own": 1.0, "others": 0.5,
                "raw": {"score": 0.5, "slope": 1.0, "cosine": 0.5, "error": 0.9},
                "held_out": {"score": 0.5, "slope": 1.0, "cosine": 0.5, "error": 0.9},
            },
            "audit": {
                "models": 4, "estimator": "gaussian",
                "table": {
                    name: {"forget": _KLOM, "retain": _KLOM}
                    for name in ("do nothing", "oracles against oracles", "dmm")
                },
                "shown": [
                    {"which": "worst", "row": 1, "distance": 2.0, "unlearned": [1.0, 2.0], "oracles": [1.0, 2.0]}
                ],
            },
        },
    )
]  # fmt: skip
