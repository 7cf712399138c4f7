"""Bad input to `parewell unlearn`: one line, exit status 2, nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import classifiers
from tests.cli.conftest import Refusal
from tests.unlearn.conftest import FACTORY, Site, lines, net, words
from unlearn import Unlearn, unlearn

__all__ = ["net", "words"]  # fixtures
facts_ = [{"name": "ann", "description": "red"}, {"name": "bob", "description": "so"}]


@pytest.fixture
def refused(tmp_path: Path, refusal: Refusal) -> Refusal:
    """Run `parewell unlearn MODEL OUT --train ...` and return the line it refuses with."""

    def run(site: Site, *arguments: object, model: Path | None = None, train: Path | None = None) -> str:
        given = ["--train", train or site.train, *(["--factory", site.factory] if site.factory else [])]
        given += [] if any(str(a).startswith("--forget") for a in arguments) else ["--forget", site.forget]
        given += [] if "--method" in arguments else ["--method", "npo"]
        return refusal("unlearn", model or site.model, tmp_path / "out", *given, *arguments)

    return run


def test_rows_to_forget_that_are_not_there(net: Site, words: Site, tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "forget.jsonl").write_text(
        words.forget.read_text() + lines([{"question": f"who is {i}", "answer": "x"} for i in range(5)])
    )
    line = refused(words, "--forget", tmp_path / "forget.jsonl")
    assert "5 of 8 rows are not in" in line and "line 4 (who is 0 | x), line 5 (who is 1 | x), line 6" in line
    (tmp_path / "twice.jsonl").write_text(words.forget.read_text() * 2)
    assert "3 of 6 rows are not in" in refused(words, "--forget", tmp_path / "twice.jsonl")
    tensors = load_file(net.forget)
    tensors["inputs"][3] += 1
    save_file(tensors, tmp_path / "forget.safetensors")
    assert "1 of 10 rows are not in" in refused(net, "--forget", tmp_path / "forget.safetensors")


def test_everything_is_to_be_forgotten(net: Site, refused: Refusal) -> None:
    assert "all 90 rows would be forgotten" in refused(net, "--forget", net.train)


def test_copies_that_would_stay(words: Site, net: Site, tmp_path: Path, refused: Refusal) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(words.train.read_text() + words.forget.read_text())
    line = refused(words, train=train)
    assert "3 rows to forget have copies that would stay: line 1 (where is ann | in rome now) stays at 13" in line
    assert "--allow-duplicates" in line
    options = Unlearn(train=train, forget=words.forget, method="npo", epochs=1, allow_duplicates=True)
    assert unlearn(words.model, tmp_path / "out", options)["rows"] == {"train": 15, "forget": 3}
    tensors = load_file(net.train)
    save_file({name: torch.cat([t, t[:2]]) for name, t in tensors.items()}, tmp_path / "train.safetensors")
    assert "2 rows to forget have copies" in refused(net, train=tmp_path / "train.safetensors")


def test_labels_outside_the_classes(net: Site, bert: Path, tmp_path: Path, refused: Refusal) -> None:
    tensors = load_file(net.train)
    tensors["labels"][[4, 7]] = 3
    save_file(tensors, tmp_path / "train.safetensors")
    line = refused(net, train=tmp_path / "train.safetensors")
    assert "row 4: label 3 is none of the model's 3 classes" in line and "2 such rows" in line
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "w1 good\tmaybe\n" * 4)
    encoder = Site(bert, tmp_path / "train.tsv", tmp_path / "train.tsv", net.validation, net.training)
    assert "label 'maybe'" in refused(encoder, "--forget-lines", 2)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--audit", 1], "one model has no spread; ask for at least 2"),
        (["--audit", 49, "--klom", "binned"], "49 models are too few for 20 bins, which want 50; use --klom gaussian"),
        (["--audit", 2], "an audit wants models trained on other rows; give --training FILE"),
        (["--klom", "binned"], "klom: changes nothing without --audit"),
        (["--method", "dmm"], "method dmm wants models trained on other rows; give --training FILE"),
        (["--max-retain-loss", -1], "max-retain-loss is -1.0; it must not be negative"),
        (["--max-retain-loss", 2], "of a classifier it is a share of accuracy"),
        (["--method", "retrain"], "method retrain wants models trained on other rows"),
        (["--method", "exact"], "must be one linear layer"),
        (["--method", "rmu"], "is for language models"),
        (["--forget-lines", "3-"], "must be numbers and ranges"),
        (["--forget-lines", "9-3"], "9 comes after 3"),
        (["--forget-lines", "90"], "has no row at 90"),
        (["--forget-lines", f"0-{10**11}"], "all 90 rows"),
        (["--forget-where", "text=x"], "it has none"),
        (["--epochs", 0], "epochs is 0; it must be at least 1"),
        (["--lr", "nan"], "lr is nan"),
        (["--weight", 0], "weight is 0.0; it must be positive"),
        (["--only", "nosuch*"], "fits none of the model's weights, such as 0.weight"),
        (["--lora", 2], "a factory's model"),
        (["--retain-loss", "kl", "--method", "scrub"], "a loss of its own"),
        (["--estimator", "trak"], "estimator: changes nothing"),
        (["--folds", 3], "folds: changes nothing"),
        (["--method", "dmm", "--multiplier", 1, "--retained", "labels"], "retained labels: squares of logits know no"),
        (["--method", "dmm", "--estimator", "folds", "--folds", 1], "folds is 1; it must be at least 2"),
        (["--method", "dmm", "--multiplier", 1, "--calibrate", 2], "calibrate: changes nothing"),
        (["--utility", "x.jsonl"], "there is no such file or folder"),
        (["--utility", __file__], "has questions to a language model"),
        (["--method", "retain", "--retain-multiplier", 0], "learns from retained rows alone"),
        (["--only", ","], "names no pattern"),
        (["--length", 9], "length: changes nothing"),
        (["--top-k", 9], "top-k: changes nothing"),
        (["--workers", "ray"], "workers: changes nothing"),
        (["--balance", "recap", "--method", "scrub"], "has no two losses"),
        (["--layer", 1], "layer: changes nothing"),
        (["--both-ways"], "both-ways: facts have two directions in language models alone"),
        (["--alternatives", __file__], "alternatives: changes nothing with method npo"),
        (["--method", "dpo", "--alternatives", __file__], "method dpo: is for language models"),
        (["--method", "dpo-ja"], "'dpo-ja'"),
        (["--task", "causal-lm"], "a factory's model takes tensors"),
        (["--seed", 2**40], "must be below 2^31"),
    ],
)
def test_options_that_will_not_do(arguments: list[object], word: str, net: Site, refused: Refusal) -> None:
    assert word in refused(net, *arguments)


def test_more_folds_than_rows(net: Site, refused: Refusal) -> None:
    options = ("--method", "dmm", "--estimator", "folds", "--training", net.training)
    assert "folds: 90 rows do not make 91 folds; ask for fewer" in refused(net, *options, "--folds", 91)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--forget-where", "name=x"], "has no field 'name'; it has answer, question"),
        (["--forget-where", "question"], "must be FIELD=VALUE (exactly) or FIELD~REGEX (searched)"),
        (["--forget-where", "question=nobody"], "no row of"),
        (["--forget-ids", "gone", "--id-field", "question"], "there is no such file"),
        (["--forget-where", "question~("], "is no regular expression"),
        (["--forget-lines", "13"], "has no row at 13"),
        (["--length", 1], "it must be at least 2"),
        (["--length", 4096], "positions (config.json), give at most that"),
        (["--method", "rmu", "--layer", 9], "the model has blocks 0 to 1"),
        (["--method", "dmm", "--multiplier", 1, "--distance", "squares"], "use kl"),
        (["--method", "dmm", "--multiplier", 1, "--estimator", "trak"], "is for classifiers of tensors or images"),
        (["--task", "tensors"], "give --factory"),
        (["--lora", 10**6], "is more than the model is wide"),
        (["--lora", 2, "--only", "x*"], "adapters are trained, not the model's own weights"),
        (
            ["--both-ways"],
            "line 1: is no fact, which --both-ways is about; it has the fields question, answer",
        ),
        (["--both-ways", "--prompt-format", "plain"], "prompt-format: changes nothing with --both-ways"),
        (
            ["--both-ways", "--method", "dpo", "--alternatives", __file__],
            "both-ways: an alternative answers one",
        ),
    ],
)
def test_options_that_will_not_do_for_a_language_model(
    arguments: list[object], word: str, words: Site, refused: Refusal
) -> None:
    assert word in refused(words, *arguments)


def test_factories_that_will_not_do(net: Site, tmp_path: Path, refused: Refusal) -> None:
    def given(factory: str) -> Site:
        return Site(net.model, net.train, net.forget, net.validation, net.training, factory)

    assert "must be package.module:function" in refused(given("nowhere"))
    assert "cannot be imported" in refused(given("nosuch.module:make"))
    assert "cannot be imported" in refused(given(FACTORY + "x"))
    assert "gives a int, not a torch module" in refused(given(FACTORY.replace("make", "not_a_module")))
    assert "tensor 'weight' is missing" in refused(given(FACTORY.replace("make", "head")))
    other = load_file(net.model)
    save_file(other | {"more": torch.zeros(1)}, tmp_path / "more.safetensors")
    assert "'more' has no place" in refused(net, model=tmp_path / "more.safetensors")
    save_file(other | {"2.bias": torch.zeros(4)}, tmp_path / "shape.safetensors")
    assert "has shape [4], the factory's [3]" in refused(net, model=tmp_path / "shape.safetensors")
    assert "holds no model.safetensors" in refused(net, model=tmp_path)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("needs", "fails ("),
        ("leaves", "fails (3)"),
        ("FACTORY", "is no function"),
        ("pairs", "the model answers with tuple"),
        ("one_class", "has one class"),
    ],
)
def test_a_user_s_own_code_that_will_not_do(name: str, word: str, net: Site, tmp_path: Path, refused: Refusal) -> None:
    made = getattr(sys.modules["tests.unlearn.conftest"], name)
    weights = made().state_dict() if name in ("pairs", "one_class") else load_file(net.model)
    save_file(weights, tmp_path / "model.safetensors")
    tensors = load_file(net.train)
    save_file({"inputs": tensors["inputs"], "labels": 0 * tensors["labels"]}, tmp_path / "train.safetensors")
    site = Site(
        tmp_path / "model.safetensors", tmp_path / "train.safetensors", net.forget, net.validation, net.training,
        FACTORY.replace("make", name),
    )  # fmt: skip
    assert word in refused(site, "--forget-lines", 3)


def test_what_a_job_reads_must_not_lie_where_it_writes(net: Site, tmp_path: Path, refused: Refusal) -> None:
    options = Unlearn(train=net.train, forget=net.forget, factory=net.factory, method="npo", epochs=1)
    unlearn(net.model, tmp_path / "out", options)
    place = tmp_path / "out/model.safetensors"
    assert "contains what the job reads" in refused(net, model=place)
    tensors = load_file(net.train)
    save_file(tensors, tmp_path / "out/model-1-of-2.safetensors")
    assert "contains what the job reads" in refused(net, train=tmp_path / "out/model-1-of-2.safetensors")


def test_config_and_recipe_that_are_not_as_they_should_be(
    bert: Path, words: Site, tmp_path: Path, refused: Refusal
) -> None:
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nw1 good\tyes\nbad w2\tno\n")
    encoder = Site(bert, tmp_path / "train.tsv", tmp_path / "train.tsv", bert, bert)
    config = json.loads((bert / "config.json").read_text())
    for i, (changes, word) in enumerate(
        (
            ({"architectures": 5}, "of what the model does; give --task"),
            ({"label2id": {"no": "x"}}, "label2id names no classes by number"),
        )
    ):
        shutil.copytree(bert, tmp_path / f"bert{i}")
        (tmp_path / f"bert{i}/config.json").write_text(json.dumps(config | changes))
        assert word in refused(encoder, "--forget-lines", 2, model=tmp_path / f"bert{i}")
    shutil.copytree(words.model, tmp_path / "model")
    (tmp_path / "model/parewell.json").write_text('{"recipe": [5]}')
    assert "is no recipe of parewell's" in refused(words, model=tmp_path / "model")


def test_caches_that_will_not_do(net: Site, tmp_path: Path, refused: Refusal) -> None:
    subsets = [
        "--method",
        "dmm",
        "--estimator",
        "subsets",
        "--subsets",
        4,
        "--calibrate",
        2,
        "--training",
        net.training,
    ]
    assert "is no folder" in refused(net, *subsets, "--cache", net.training)
    assert "lies below a file" in refused(net, *subsets, "--cache", net.training / "c")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").touch()
    assert "keeps no models" in refused(net, *subsets, "--cache", tmp_path / "other")


def test_models_whose_outputs_are_no_numbers(net: Site, words: Site, tmp_path: Path, refused: Refusal) -> None:
    weights = load_file(net.model)
    weights["0.bias"][0] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    assert "'0.bias' contains NaN or Inf" in refused(net, model=tmp_path / "nan.safetensors")
    save_file({n: t * 1e38 for n, t in load_file(net.model).items()}, tmp_path / "huge.safetensors")
    assert "answers to the first rows are NaN or infinite" in refused(net, model=tmp_path / "huge.safetensors")
    shutil.copytree(words.model, tmp_path / "model")
    broken = load_file(words.model / "model.safetensors")
    broken["model.norm.weight"][:] = torch.inf
    save_file(broken, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    assert "contains NaN or Inf" in refused(words, model=tmp_path / "model")


def test_files_that_are_not_what_they_should_be(net: Site, words: Site, tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "x.safetensors").write_text("not one")
    assert "not a" in refused(net, train=tmp_path / "x.safetensors")
    save_file({"inputs": torch.zeros(3, 4)}, tmp_path / "x.safetensors")
    assert "needs 'inputs' or 'pixel_values' (rows, ...) and whole numbers 'labels'" in refused(
        net, train=tmp_path / "x.safetensors"
    )
    save_file({"inputs": torch.zeros(3, 5), "labels": torch.zeros(3).long()}, tmp_path / "x.safetensors")
    assert "the model cannot take these inputs" in refused(net, train=tmp_path / "x.safetensors")
    save_file({"inputs": torch.full((3, 4), torch.nan), "labels": torch.zeros(3).long()}, tmp_path / "x.safetensors")
    assert "row 0: has NaN or Inf" in refused(net, train=tmp_path / "x.safetensors")
    (tmp_path / "x.txt").write_text("plain text")
    assert "3 of 3 rows are not in" in refused(words, train=tmp_path / "x.txt")  # a line of text is a row
    (tmp_path / "x.tsv").write_text("question\treply\na\tb\n")
    assert "line 2: has none of the fields" in refused(words, train=tmp_path / "x.tsv")
    (tmp_path / "x.jsonl").write_text('{"question": 1}\n')
    assert "line 1: has none of the fields" in refused(words, train=tmp_path / "x.jsonl")
    for content, word in (
        ("[]", "is not a JSON object"),
        ('{"epoch": 3}', "'epoch' is no part of a training"),
        ('{"epochs": -1}', "epochs is -1"),
        ('{"lr": "x"}', "lr is x"),
        ('{"optimiser": "lion"}', "optimiser 'lion' is unknown"),
    ):
        (tmp_path / "training.json").write_text(content)
        assert word in refused(net, "--method", "retrain", "--training", tmp_path / "training.json"), word


def test_oracles_and_probes_that_will_not_do(words: Site, tiny_folder: Path, tmp_path: Path, refused: Refusal) -> None:
    assert "is not as" in refused(words, "--oracle", tiny_folder)
    for content, word in (
        ("x", "line 1: not JSON"),
        ('{"question": "a", "paraphrased_answer": "b"}', "needs a list of texts in 'perturbed_answer'"),
        (
            '{"question": "a", "paraphrased_answer": 3, "perturbed_answer": ["x"]}',
            "needs a text in 'paraphrased_answer'",
        ),
        ('{"question": "a", "paraphrased_answer": "b", "perturbed_answer": ["x"]}', "give at least two"),
    ):
        (tmp_path / "probes.jsonl").write_text(content)
        assert word in refused(words, "--oracle", words.model, "--probes", tmp_path / "probes.jsonl"), word
    (tmp_path / "probes.jsonl").write_text(
        lines([{"question": "a", "paraphrased_answer": "b", "perturbed_answer": ["x"] * n} for n in (1, 2)])
    )
    assert "from 1 to 2 wrong answers" in refused(words, "--oracle", words.model, "--probes", tmp_path / "probes.jsonl")
    (tmp_path / "probes.jsonl").write_text(
        lines([{"question": "a", "paraphrased_answer": "b", "perturbed_answer": ["x"]}] * 2)
    )
    assert "give --oracle DIR" in refused(words, "--probes", tmp_path / "probes.jsonl")


def test_quantized_models_and_places(words: Site, tmp_path: Path, refused: Refusal) -> None:
    shutil.copytree(words.model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "model/config.json").write_text(json.dumps(quantized))
    assert "is quantized; unlearn in the float model" in refused(words, model=tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"architectures": ["Sphinx"]}))
    assert "says Sphinx of what the model does; give --task" in refused(words, model=tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").touch()
    assert "was not written by parewell" in refused(words)


def test_images_by_class_that_will_not_do(
    net: Site, tmp_path: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs the extra images")
    model, images = classifiers.save("vit", tmp_path / "vit"), classifiers.save_folder(tmp_path / "train", 12)
    site = Site(model, images, images / "left", net.validation, net.training)

    def line(*arguments: object, **more: Path) -> str:
        return refused(site, *(arguments or ("--forget-lines", "0-2")), **more)

    assert "is a directory, and a factory's module takes tensors; give .safetensors" in refused(
        net, "--forget-lines", 1, train=images
    )
    assert "has no field 'name'; it has class, file" in line("--forget-where", "name=left")
    assert "no row of" in line("--forget-where", "file=left/none.png")
    assert "has no row at 12" in line("--forget-lines", "12")
    assert "left: holds" in line("--forget", images / "left")
    (images / "up").mkdir()
    (images / "up/a.png").write_bytes(b"no image")
    assert "directory up: label 'up' is none of" in line()
    shutil.move(images / "up/a.png", images / "left/zzz.png")
    assert "left/zzz.png: cannot be read as an image" in line()
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(images / "left/zzz.png")  # Pillow would make it white
    assert "left/zzz.png: cannot be read as an image (it has more than 8 bits a channel, mode I;16)" in line()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(images / "left/zzz.png")
    resizing = (model / "preprocessor_config.json").read_text()
    (model / "preprocessor_config.json").write_text(json.dumps(json.loads(resizing) | {"do_resize": False}))
    assert "does not make images of one size" in line()
    for at_once in (1, 64):
        monkeypatch.setattr("unlearn.data.dataset.FILES_AT_ONCE", at_once)
        assert "have it resize them" in line()
    (model / "preprocessor_config.json").write_text(resizing)
    (images / "left/zzz.png").unlink()
    (images / "up").rmdir()
    classifiers.processor_of(16).save_pretrained(model)
    assert "the model cannot take these inputs (Input image size (16*16) doesn't match model (8*8)" in line()
    (model / "preprocessor_config.json").unlink()
    assert "has no processor that reads images; copy preprocessor_config.json into it" in line()


def test_packages_that_are_not_there(net: Site, words: Site, refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("unlearn.model.train_ensembles", "unlearn.model.model", "unlearn.datamodels.trak"):
        monkeypatch.setattr(sys.modules[module], "find_spec", lambda name: None)
    assert "pip install 'parewell[ray]'" in refused(
        net, "--workers", "ray", "--method", "retrain", "--training", net.training
    )
    assert "pip install 'parewell[lora]'" in refused(words, "--lora", 2)
    assert "pip install 'parewell[trak]'" in refused(net, "--method", "dmm", "--estimator", "trak", "--multiplier", 1)


def test_a_journal_of_other_rows(net: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refusal) -> None:
    """What was learned of one model, of some rows, with one seed, is not taken for another's."""
    options = Unlearn(
        train=net.train,
        forget=net.forget,
        factory=net.factory,
        method="dmm",
        training=net.training,
        calibrate=2,
        width=4,
    )

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys.modules["unlearn.methods.moving"], "match", interrupted)
        unlearn(net.model, tmp_path / "out", options)
    dmm = ["--method", "dmm", "--training", net.training, "--calibrate", 2, "--width", 4]
    assert "continue it with --resume" in refused(net, *dmm)
    assert "options.seed was 0 and is now 1" in refused(net, *dmm, "--resume", "--seed", 1)
    assert "options.forget_lines was None and is now 20-22" in refused(
        net, *dmm, "--resume", "--forget", net.forget, "--forget-lines", "20-22"
    )
    weights = {n: t + 0.01 for n, t in load_file(net.model).items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert "model.sha256 was" in refused(net, *dmm, "--resume", model=tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (None, "method dpo: prefers other answers to the forgotten ones; give --alternatives FILE"),
        ("gone.jsonl", "there is no such file"),
        ("", "is empty; give an alternative answer for each row to forget, or one for all"),
        (
            [{"question": "where is ann", "answer": "x"}],
            "2 of 3 rows to forget have no alternative, such as that of line 2",
        ),
        (
            [{"question": f"where is {n}", "answer": "x"} for n in ("ann", "bob", "cat", "dan", "ann")],
            "line 4: is an alternative to no row to forget, or to one that has another (2 such rows); remove it",
        ),
        ([{"answer": "x"}, {"question": "where is ann", "answer": "x"}], "line 2: is no answer alone, as others are"),
        ([{"answer": " "}], "line 1: is empty; give an answer, or remove it"),
        ([{"answer": "in rome now"}], "gives line 1 of"),
        ([{"answer": "x" * 99}], "takes 3 windows of 64, and a pair is of whole answers; raise --length"),
        ([{"colour": "red"}], "has none of the fields"),
    ],
)
def test_alternatives_that_do_not_match(
    given: list[dict[str, str]] | str | None, word: str, words: Site, tmp_path: Path, refused: Refusal
) -> None:
    file = tmp_path / ("gone.jsonl" if given == "gone.jsonl" else "other.jsonl")
    if given != "gone.jsonl":
        file.write_text(lines(given or []) if not isinstance(given, str) else given)
    named = [] if given is None else ["--alternatives", file]
    assert word in refused(words, "--method", "dpo", *named)


def test_rows_to_forget_that_have_no_alternative_answer(words: Site, tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "red.txt").write_text("red\n")
    (tmp_path / "train.txt").write_text("ann is here\nbob is there\n")
    options = ("--method", "dpo", "--alternatives", tmp_path / "red.txt", "--forget-lines", 1)
    assert "line 1: has no prompt, to which there could be another answer" in refused(
        words, *options, train=tmp_path / "train.txt"
    )
    (tmp_path / "long.jsonl").write_text(
        lines([{"question": "a", "answer": "b" * 99}, {"question": "c", "answer": "d"}])
    )
    assert "takes 3 windows, and a pair is of whole answers; raise --length" in refused(
        words, *options, train=tmp_path / "long.jsonl"
    )


@pytest.mark.parametrize(
    ("rows", "arguments", "word"),
    [
        (None, [], "cannot be read (No such file or directory)"),
        ([], [], "is empty; give some records"),
        ([{"name": "ann"}], [], "line 1: needs a text in 'description'"),
        ([{"name": "ann", "description": "red"}], [], "is about one name or one description"),
        (facts_, ["--train", __file__], "train: changes nothing with --facts, which are audited alone; leave it out"),
        (facts_, ["--forms", "nf4"], "forms: changes nothing with --facts"),
        (facts_, ["--length", 4], "a fact takes 10 tokens, and rows have 4; shorten it"),
        (facts_, ["--original", "gone"], "gone"),
    ],
)
def test_facts_to_audit_that_will_not_do(
    rows: list[dict[str, str]] | None, arguments: list[object], word: str, words: Site, tmp_path: Path,
    refusal: Refusal,
) -> None:  # fmt: skip
    if rows is not None:
        (tmp_path / "facts.jsonl").write_text(lines(rows))
    asked = ("--facts", tmp_path / "facts.jsonl", *arguments, "--html", tmp_path / "p.html")
    line = refusal("audit", words.model, *asked)
    assert word in line
