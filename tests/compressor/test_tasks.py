"""Masked language models, encoder-decoders and embedding models: run, measured, rounded, loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus
from calib.data.load import load_corpus
from calib.data.task_rows import TaskRows
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.model.checkpoint import read_tokenizer
from calib.model.config import read_config
from calib.model.pooling import pooled, pooling_of
from calib.model.task import ALL_TASKS, Task, task_of_checkpoint
from calib.model.weights import Weights
from calib.stats.moments import Moments
from calib.stats.similarity import rank_correlation
from compressor import Evaluate, Quantize, evaluate, load, quantize
from compressor.engine.blockwise_runs import embed_rows
from compressor.engine.input_statistics import input_moments
from compressor.engine.runtime_transforms import RuntimeTransforms
from tests import tasks

CPU = torch.device("cpu")
KINDS = [
    ("bert", Task.MASKED_LM), ("roberta", Task.MASKED_LM), ("modernbert", Task.MASKED_LM),
    ("distilbert", Task.MASKED_LM), ("deberta-v2", Task.MASKED_LM), ("albert", Task.MASKED_LM),
    ("t5", Task.SEQ_TO_SEQ_LM), ("bart", Task.SEQ_TO_SEQ_LM), ("marian", Task.SEQ_TO_SEQ_LM),
    ("switch_transformers", Task.SEQ_TO_SEQ_LM),
    ("bert", Task.EMBEDDING), ("mpnet", Task.EMBEDDING), ("qwen3", Task.EMBEDDING), ("t5", Task.TEXT_ENCODING),
]  # fmt: skip
ONE_OF_EACH = [("bert", Task.MASKED_LM), ("bart", Task.SEQ_TO_SEQ_LM), ("bert", Task.EMBEDDING)]


def named(kind: tuple[str, Task]) -> str:
    return f"{kind[0]}-{kind[1].name.lower()}"


def opened(folder: Path) -> BlockwiseModel:
    return BlockwiseModel(read_config(folder, ALL_TASKS), Weights(folder), CPU)


def corpus_of(folder: Path, task: Task, *, pairs: bool = False, by_document: bool = True) -> Corpus:
    tokenizer, config = read_tokenizer(folder), read_config(folder, ALL_TASKS)
    return load_corpus(
        tasks.rows_file(folder, pairs=pairs), tokenizer, vocab=config.vocab_size, length=16, by_document=by_document,
        task=TaskRows.of(task, config, tokenizer),
    )  # fmt: skip


def answer(model: Any, rows: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        made = model(**{name: value.long() for name, value in rows.items()})
    found: Tensor = made.logits if hasattr(made, "logits") else made.last_hidden_state
    return found.float()


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_block_by_block_with_padding_is_what_the_library_answers(kind: tuple[str, Task], tmp_path: Path) -> None:
    model = tasks.save(*kind, tmp_path)
    stream, corpus = opened(tmp_path), corpus_of(tmp_path, kind[1], pairs=kind[1] is Task.SEQ_TO_SEQ_LM)
    assert stream.task is kind[1]
    assert not corpus.mask.all()  # rows of unlike lengths
    outer = stream.prepared(stream.read_outer(), stream.walk.outer)
    batch = stream.batch(corpus.inputs, outer)
    hidden = stream.start(batch, outer)
    for i, params in stream.reading(range(stream.layers)):
        hidden = stream.run(i, params, hidden, batch)
    found = torch.stack([stream.logits(row, outer) for row in hidden])
    expected = answer(model, corpus.inputs)
    torch.testing.assert_close(found[corpus.mask], expected[corpus.mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=named)
def test_figures_and_answers_are_those_of_plain_transformers(kind: tuple[str, Task], tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    model = tasks.save(*kind, folder)
    file = tasks.rows_file(tmp_path, pairs=kind[1] is Task.SEQ_TO_SEQ_LM)
    options = Quantize(
        scheme="w4a16-g16", data=file, held_out_data=file, samples=12, held_out=12, length=16, by_document=True,
        steps=2, tune_steps=None,
    )  # fmt: skip
    report = quantize(folder, out, options)
    corpus = corpus_of(folder, kind[1], pairs=kind[1] is Task.SEQ_TO_SEQ_LM)[:12]
    plain = getattr(transformers, kind[1]).from_pretrained(out)
    ours, theirs, before = (answer(one, corpus.inputs) for one in (load(out), plain, model))
    torch.testing.assert_close(ours[corpus.mask], theirs[corpus.mask], rtol=1e-4, atol=1e-4)
    quality = report["quality"]
    if kind[1].embeds:
        a, b = (torch.stack([x[m].mean(0) for x, m in zip(s, corpus.mask, strict=True)]) for s in (theirs, before))
        cosines = torch.nn.functional.cosine_similarity(a, b)
        assert quality["cosine"] == pytest.approx(float(cosines.mean()), abs=1e-5)
        assert quality["least_cosine"] == pytest.approx(float(cosines.min()), abs=1e-5)
    else:
        targets, asked = corpus.targets
        q, p = (x.log_softmax(-1)[asked] for x in (theirs, before))
        nats = -q.gather(-1, targets[asked][:, None]).mean()
        assert quality["tokens"] == int(asked.sum())
        assert quality["perplexity"] == pytest.approx(float(nats.exp()), rel=1e-3)
        assert quality["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2, abs=1e-6)
    again = evaluate(out, Evaluate(data=file, length=16, by_document=True, rows=12, reference=str(folder))).asdict()
    numbers = {name: value for name, value in quality.items() if isinstance(value, float)}
    assert numbers == {name: pytest.approx(again[name], rel=1e-3, abs=1e-6) for name in numbers}
    assert report["loaders"]["class"] == kind[1].value
    assert f"{kind[1].value}.from_pretrained" in (out / "README.md").read_text()


def test_a_masked_language_model_learns_and_tunes(tmp_path: Path) -> None:
    """Gradients through blocks that are told of padding, of the loss at the hidden tokens."""
    folder = tmp_path / "model"
    tasks.save("modernbert", Task.MASKED_LM, folder)
    file = tasks.rows_file(tmp_path, rows=40)
    options = Quantize(
        scheme="w3a16-g16",
        data=file,
        samples=24,
        held_out=8,
        length=16,
        by_document=True,
        steps=20,
        block_steps=2,
        tune_steps=20,
    )
    report = quantize(folder, tmp_path / "out", options)
    assert report["curves"].keys() == {"learn", "tune"}
    for curve in report["curves"].values():
        assert sum(curve[-5:]) < sum(curve[:5])


def test_keys_and_values_of_cross_attention_are_measured_on_the_encoders_tokens(tmp_path: Path) -> None:
    """Moments of every linear's input against hooks on the library's model, over the tokens that it really reads."""
    model = tasks.save("bart", Task.SEQ_TO_SEQ_LM, tmp_path)
    stream, corpus = opened(tmp_path), corpus_of(tmp_path, Task.SEQ_TO_SEQ_LM, pairs=True)
    assert corpus.sources is not None and corpus.source_mask is not None
    seen = dict[str, Tensor]()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, given[0]))
    answer(model, corpus.inputs)
    states = embed_rows(stream, corpus, stream.read_outer(), RunContext(Journal(tmp_path / "journal"), 2**30))
    crossing = 0
    for i, params in stream.reading(range(stream.layers)):
        found = input_moments(stream, i, params, states, corpus.mask, RuntimeTransforms(), advance=True)
        for linear in stream.linears(i):
            crosses = "encoder_attn.k" in linear.name or "encoder_attn.v" in linear.name
            crossing += crosses
            mask = corpus.source_mask if ".encoder." in linear.name or crosses else corpus.mask
            expected = Moments.zero(linear.shape[1], CPU).add(seen[linear.name][mask])
            assert found[linear.site].count == expected.count
            torch.testing.assert_close(found[linear.site].gram, expected.gram, rtol=1e-3, atol=1e-3)
    assert crossing == 2 * model.config.decoder_layers


def test_text_without_prompts_is_read_piece_by_piece(tmp_path: Path) -> None:
    """What the encoder reads and what the decoder is asked for are neighbors in the text."""
    tasks.save("t5", Task.SEQ_TO_SEQ_LM, tmp_path)
    (tmp_path / "text.txt").write_text(tasks.text(100, 3))
    tokenizer, config = read_tokenizer(tmp_path), read_config(tmp_path, ALL_TASKS)
    corpus = load_corpus(
        tmp_path / "text.txt", tokenizer, vocab=config.vocab_size, length=12,
        task=TaskRows.of(Task.SEQ_TO_SEQ_LM, config, tokenizer),
    )  # fmt: skip
    words = [tasks.WORDS.index(word) for word in tasks.text(100, 3).split()]
    assert corpus.sources is not None and corpus.source_mask is not None
    read = list[int]()
    for source, mask, ids, told in zip(corpus.sources, corpus.source_mask, corpus.ids, corpus.mask, strict=True):
        assert (source[0], source[mask][-1], ids[0]) == (1, 2, 0)  # [CLS] ... [SEP]; the decoder's start
        read += source[mask][1:-1].tolist() + ids[told][1:].tolist()
    assert read == words[: len(read)]
    assert len(read) == 100


def test_hidden_tokens_are_as_many_as_bert_hides_and_no_marks(tmp_path: Path) -> None:
    tasks.save("bert", Task.MASKED_LM, tmp_path)
    corpus = corpus_of(tmp_path, Task.MASKED_LM)
    again = corpus_of(tmp_path, Task.MASKED_LM)[[3, 5]]
    assert corpus.hidden is not None and again.hidden is not None
    assert torch.equal(again.hidden, corpus.hidden[[3, 5]])  # whichever rows it is read with
    words = corpus.mask & (corpus.ids >= len(tasks.MARKS))
    assert not (corpus.hidden & ~words).any()
    assert torch.equal(corpus.hidden.sum(1), (0.15 * words.sum(1)).round().clamp(min=1).long())
    assert (corpus.inputs["input_ids"] == 3).equal(corpus.hidden)
    last = corpus.mask.sum(1) - 1
    assert corpus.ids.gather(1, last[:, None]).unique().tolist() == [2]  # every row ends with [SEP]


def test_rank_correlation_and_pooling() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    upper = torch.triu_indices(9, 9, 1)
    expected = stats.spearmanr(*((x @ x.T)[upper[0], upper[1]].numpy() for x in (a, b))).statistic
    assert rank_correlation(a, b) == pytest.approx(float(expected), abs=1e-12)
    assert rank_correlation(a, 3 * a) == pytest.approx(1)
    states = torch.arange(6.0).view(3, 2)
    found = [pooled(states, kind).tolist() for kind in ("cls", "lasttoken", "mean", "max")]
    assert found == [[0, 1], [4, 5], [2, 3], [4, 5]]


def test_pooling_is_the_folders_own(tmp_path: Path) -> None:
    assert pooling_of(tmp_path) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "modules.json").write_text(
        json.dumps([{"path": "", "type": "sentence_transformers.models.Transformer"},
                    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}])
    )  # fmt: skip
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(modes))
    assert pooling_of(tmp_path) == "cls"
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(dict.fromkeys(modes, True)))
    with pytest.raises(BadInput, match="asks for a pooling that is not known"):
        pooling_of(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "named_classes", "task"),
    [
        ("bert", ["BertForMaskedLM"], Task.MASKED_LM), ("bert", ["BertModel"], Task.EMBEDDING),
        ("bert", ["BertForPreTraining"], Task.MASKED_LM), ("bert", ["BertForSequenceClassification"], None),
        ("t5", ["T5WithLMHeadModel"], Task.SEQ_TO_SEQ_LM), ("t5", ["T5EncoderModel"], Task.TEXT_ENCODING),
        ("llama", None, Task.CAUSAL_LM), ("llama", ["LlamaForCausalLM"], Task.CAUSAL_LM),
        ("mistral", ["MistralModel"], Task.EMBEDDING), ("llava", None, Task.IMAGE_TEXT_TO_TEXT),
        ("modernbert", None, Task.MASKED_LM), ("vit", ["ViTModel"], Task.EMBEDDING), ("unheard-of", None, None),
    ],
)  # fmt: skip
def test_what_a_checkpoint_is_for(model_type: str, named_classes: list[str] | None, task: Task | None) -> None:
    assert task_of_checkpoint(model_type, named_classes) is task


def test_what_the_second_task_of_pretraining_left_is_not_needed(tmp_path: Path) -> None:
    """A masked language model saved with the head for pairs of sentences, as BERT's own checkpoints are."""
    tasks.save("bert", Task.MASKED_LM, tmp_path)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    both: Any = transformers.BertForPreTraining(config).eval()
    both.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": ["BertForMaskedLM"]}))
    stream = opened(tmp_path)
    assert "cls.seq_relationship.weight" in stream.names.unknown
    ids = torch.randint(5, 90, (2, 7))
    outer = stream.prepared(stream.read_outer(), stream.walk.outer)
    batch = stream.batch(ids, outer)
    hidden = stream.start(batch, outer)
    for i, params in stream.reading(range(stream.layers)):
        hidden = stream.run(i, params, hidden, batch)
    with torch.no_grad():
        expected = both(input_ids=ids).prediction_logits
    torch.testing.assert_close(torch.stack([stream.logits(row, outer) for row in hidden]), expected)
