"""Cutting layers out of classifiers of twelve architectures: what the library loads is what was in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from calib import BadInput
from compressor import Distill, distill
from compressor.distillation.classifiers import prune_classifier as prune
from compressor.distillation.classifiers.texts import TextClassifier, check_rows, open_classifier
from tests import encoders
from tests.encoders import SIZES

HOW = Distill(
    task="sequence-classification", layers=2, held_out=4, steps=1, batch=4, lr=1e-6, loss="forward-kl",
    precision="float32", device="cpu",
)  # fmt: skip
CUTTABLE = sorted(SIZES.keys() - {"albert"})
TEXTS = [("good w1 w2",), ("bad w3 w4 w5 w6 w7 w8",), ("w9",), ("w1 w1 good bad",)]
COUNTS = {  # the config's own names
    "distilbert": ["n_layers"], "gpt2": ["n_layer"], "t5": ["num_layers", "num_decoder_layers"],
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.tsv"
    file.write_text("text\tlabel\n" + "".join(f"{TEXTS[i % 4][0]} w{i}\t{encoders.NAMES[i % 3]}\n" for i in range(14)))
    return file


@torch.no_grad()
def by_the_library(folder: Path) -> torch.Tensor:
    """Logits of TEXTS, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for (text,) in TEXTS])


@pytest.mark.parametrize("model_type", CUTTABLE)
def test_the_library_loads_a_cut_student_as_it_is_in_memory(model_type: str, data: Path, tmp_path: Path) -> None:
    teacher = encoders.save(tmp_path / "teacher", model_type)
    report = distill(teacher, tmp_path / "out", replace(HOW, data=data), allow_damage=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    for name in COUNTS.get(model_type, ["num_hidden_layers"]):
        assert config[name] == 2, name
    left = report["cut"]
    assert left.keys() == {"encoder", "decoder"} if model_type == "t5" else len(left) == 2
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    # In memory: the teacher's own blocks, as the student was chosen and before it learned (its rate is tiny).
    whole = open_classifier(teacher, HOW)
    stacks = prune.stacks_of(whole.model)
    cut = prune.cut_layers(whole.model, stacks, list(left.values()) if model_type == "t5" else [left])
    assert torch.allclose(replace(whole, model=cut).answers(TEXTS), by_the_library(tmp_path / "out"), atol=2e-3)


@pytest.mark.parametrize("kept", [[0, 1], [0, 2]])
@pytest.mark.parametrize("model_type", CUTTABLE)
def test_a_cut_student_is_the_teacher_without_these_blocks(model_type: str, kept: list[int], tmp_path: Path) -> None:
    """Surgery on the teacher's own lists, where a block's place says nothing about what it does."""
    more = {"scale_attn_by_inverse_layer_idx": False} if model_type == "gpt2" else {}
    folder = encoders.save(tmp_path / "teacher", model_type, **more)
    whole = open_classifier(folder, HOW)
    stacks = prune.stacks_of(whole.model)
    student = prune.cut_layers(whole.model, stacks, [kept for _ in stacks])
    answers = replace(whole, model=student).answers(TEXTS)
    config = whole.model.config
    for stack in stacks:
        blocks = whole.model.get_submodule(stack.path)
        whole.model.get_submodule(stack.path.rpartition(".")[0]).add_module(
            stack.path.rpartition(".")[2], nn.ModuleList(blocks[i] for i in kept)
        )
    config.num_hidden_layers, config.use_cache = 2, False  # layers' own indices are still the old ones
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    assert torch.allclose(answers, whole.answers(TEXTS), atol=1e-5)
    assert not torch.allclose(answers, open_classifier(folder, HOW).answers(TEXTS), atol=1e-3), (
        "the block left out did nothing"
    )


def test_what_is_listed_per_layer_goes_with_its_layer(tmp_path: Path) -> None:
    whole = open_classifier(encoders.save(tmp_path / "qwen3", "qwen3"), HOW).model
    student = prune.cut_layers(whole, prune.stacks_of(whole), [[1, 2]])
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    assert [block.self_attn.layer_idx for block in student.model.layers] == [0, 1]
    assert student.model.layers[0].self_attn.sliding_window == 3
    assert student.model.layers[1].self_attn.q_proj.weight is whole.model.layers[2].self_attn.q_proj.weight


@pytest.mark.parametrize(("kept", "every"), [([0, 1], 2), ([0, 2], 1), ([1, 2], None)])
def test_what_older_readers_of_modernbert_go_by(kept: list[int], every: int | None, tmp_path: Path) -> None:
    folder = encoders.save(tmp_path / "modernbert", "modernbert", global_attn_every_n_layers=2)
    whole = open_classifier(folder, HOW).model
    config = prune.cut_layers(whole, prune.stacks_of(whole), [kept]).config
    assert config.layer_types == [whole.config.layer_types[i] for i in kept]
    assert config.global_attn_every_n_layers == every


def test_t5_keeps_its_table_of_positions(tmp_path: Path) -> None:
    whole = open_classifier(encoders.save(tmp_path / "t5", "t5"), HOW).model
    student = prune.cut_layers(whole, prune.stacks_of(whole), [[1, 2], [0, 3]])
    table, encoder = "layer.0.SelfAttention.relative_attention_bias.weight", student.transformer.encoder.block[0]
    assert encoder.get_parameter(table) is whole.transformer.encoder.block[0].get_parameter(table)
    assert encoder.layer[1] is not None and student.config.num_decoder_layers == 2
    assert student.transformer.shared.weight is student.transformer.encoder.embed_tokens.weight


def test_layers_that_are_shared_are_not_cut(data: Path, tmp_path: Path) -> None:
    teacher = encoders.save(tmp_path / "teacher", "albert")
    with pytest.raises(BadInput, match=r"albert has no list of 3 layers .* share one layer's weights.*--student DIR"):
        distill(teacher, tmp_path / "out", replace(HOW, data=data))
    assert {p.name for p in tmp_path.iterdir()} == {"teacher", "data.tsv"}


def test_a_student_that_loads_otherwise_is_found_before_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that does not say what the blocks do: nothing is written, nothing learned."""
    teacher = encoders.save(tmp_path / "teacher", "qwen3")
    true = prune.cut_layers

    def careless(model: nn.Module, stacks: list[prune.Stack], kept: list[list[int]]) -> nn.Module:
        student = true(model, stacks, kept)
        student.config.rms_norm_eps = 1.0
        return student

    monkeypatch.setattr("compressor.distillation.classifiers.classification.cut_layers", careless)
    with pytest.raises(BadInput, match=r"layers: once saved and loaded by the library, what is left answers otherwise"):
        distill(teacher, tmp_path / "out", replace(HOW, data=data))
    assert {p.name for p in tmp_path.iterdir()} == {"teacher", "data.tsv"}


# Padding.


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_decoders_answer_in_a_batch_as_alone(model_type: str, side: str, tmp_path: Path) -> None:
    """The config without a pad token, as such models come; GPT-2 counts positions from the left, padding included."""
    folder = encoders.save(tmp_path / "teacher", model_type, pad_token_id=None)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": side}))
    assert AutoConfig.from_pretrained(folder).pad_token_id is None
    whole = open_classifier(folder, HOW)
    check_rows(whole, TEXTS, folder)
    assert whole.model.config.pad_token_id == 0
    assert torch.allclose(whole.answers(TEXTS), by_the_library(folder), atol=1e-5)
    assert whole.tokenizer.padding_side == ("right" if model_type == "gpt2" else side)


def test_a_student_of_a_decoder_says_what_pads(data: Path, tmp_path: Path) -> None:
    teacher = encoders.save(tmp_path / "teacher", "gpt2", pad_token_id=None)
    file = teacher / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    distill(teacher, tmp_path / "out", replace(HOW, data=data), allow_damage=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer([text for (text,) in TEXTS], padding=True, return_tensors="pt")
    assert tokenizer.padding_side == "right"
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, by_the_library(tmp_path / "out"), atol=1e-5)


def test_config_and_tokenizer_that_pad_with_different_tokens(data: Path, tmp_path: Path) -> None:
    teacher = encoders.save(tmp_path / "teacher", "llama", pad_token_id=5)
    with pytest.raises(BadInput, match=r"changes with the padding beside it.*\(5\).*\(0\)"):
        distill(teacher, tmp_path / "out", replace(HOW, data=data))
    assert {p.name for p in tmp_path.iterdir()} == {"teacher", "data.tsv"}


def _without_pad(folder: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            kept = {k: v for k, v in json.loads((folder / name).read_text()).items() if k != "pad_token"}
            (folder / name).write_text(json.dumps(kept))


def test_a_tokenizer_without_a_pad_token(data: Path, tmp_path: Path) -> None:
    """The config may name it; else it is asked for."""
    named = encoders.save(tmp_path / "named", "gpt2", pad_token_id=0)
    none = encoders.save(tmp_path / "none", "gpt2", pad_token_id=None)
    for folder in (named, none):
        _without_pad(folder)
    whole = open_classifier(named, HOW)
    assert isinstance(whole, TextClassifier) and whole.tokenizer.pad_token == "[PAD]"
    assert torch.allclose(whole.answers(TEXTS), by_the_library(named), atol=1e-5)
    with pytest.raises(BadInput, match="has no tokenizer that pads; name a pad_token"):
        distill(none, tmp_path / "out", replace(HOW, data=data))
