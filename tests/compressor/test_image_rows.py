"""Rows with images: run block by block, measured, calibrated on and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus, pad_to
from calib.data.image_rows import encoder_in, has_images, load_image_rows
from calib.data.load import load_corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.model.checkpoint import read_tokenizer
from calib.model.config import read_config
from calib.model.weights import Weights
from calib.stats.moments import Moments
from compressor import Evaluate, Quantize, evaluate, load, quantize
from compressor.engine.blockwise_runs import embed_rows
from compressor.engine.input_statistics import input_moments
from compressor.engine.runtime_transforms import RuntimeTransforms
from tests import any_type, pictures

pytest.importorskip("PIL", reason="needs the extra images")
CPU = torch.device("cpu")
TYPES = ["llava", "qwen2_5_vl", "qwen3_vl"]


def corpus_in(folder: Path, model: Any) -> Corpus:
    encode = encoder_in(folder) if model.config.model_type == "llava" else pictures.qwen_encoder(model.config)
    return load_image_rows(pictures.rows_file(folder, 6), encode, pictures.IMAGE, length=64)


def row_of(corpus: Corpus, row: int) -> dict[str, Tensor]:
    """What the library's forward takes of a row, without padding."""
    used = int(corpus.mask[row].sum())
    beside = {
        name: value[:, :used] if value.shape[1:] == corpus.ids.shape[1:] else value
        for name, value in corpus.beside[row].items()
    }
    return {"input_ids": corpus.ids[row : row + 1, :used], **beside}


@pytest.mark.parametrize("model_type", TYPES)
def test_block_by_block_is_what_the_library_answers(model_type: str, tmp_path: Path) -> None:
    """Also where features are added behind blocks (Qwen3-VL's) and positions follow the images; and the images are seen
    once, not once for each block."""
    model = pictures.save(model_type, tmp_path)
    corpus = pad_to(corpus_in(tmp_path, model), 60)
    stream = BlockwiseModel(read_config(tmp_path), Weights(tmp_path), CPU)
    seen = list[str]()
    for name, module in stream.skeleton.named_modules():
        if name.endswith(("patch_embed", "patch_embedding")):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    states = embed_rows(stream, corpus, stream.read_outer(), RunContext(Journal(tmp_path / "journal"), 2**30))
    for i, params in stream.reading(range(stream.layers)):
        for rows, batch in states.batches:
            states[rows] = stream.run(i, params, states[rows], batch)
    assert len(seen) == len(corpus.ids)
    end = stream.read_end()
    for row, used in enumerate(corpus.mask.sum(1).tolist()):
        with torch.no_grad():
            expected = model(**row_of(corpus, row)).logits[0]
        found = stream.logits(states[row : row + 1][0, :used], end)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_moments_are_of_image_and_text_together(tmp_path: Path) -> None:
    model = pictures.save("qwen3_vl", tmp_path)
    corpus = corpus_in(tmp_path, model)
    name = "model.language_model.layers.2.mlp.down_proj"
    expected = Moments.zero(model.get_submodule(name).in_features, CPU)

    def see(_: Any, given: tuple[Tensor, ...]) -> None:
        nonlocal expected
        expected = expected.add(given[0].flatten(0, 1))

    with torch.no_grad():
        model.get_submodule(name).register_forward_pre_hook(see)
        for row in range(len(corpus.ids)):
            model(**row_of(corpus, row))
    stream = BlockwiseModel(read_config(tmp_path), Weights(tmp_path), CPU)
    states = embed_rows(stream, corpus, stream.read_outer(), RunContext(Journal(tmp_path / "journal"), 2**30))
    for i, params in stream.reading(range(3)):
        found = input_moments(stream, i, params, states, corpus.mask, RuntimeTransforms(), advance=True)
    assert found[name].count == expected.count == int(corpus.mask.sum())
    torch.testing.assert_close(found[name].gram, expected.gram, rtol=1e-3, atol=1e-3)


def test_a_model_is_calibrated_and_measured_on_images(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    model = pictures.save("llava", folder)
    file = pictures.rows_file(tmp_path, 14)
    report = quantize(folder, out, Quantize(scheme="w4a16-g16", data=file, samples=8, held_out=6, length=64))
    assert report["data"]["calibration"]["images"]
    assert "of the images in rows" in report["left_out"]["learning_and_tuning"]
    assert report["quality_by_stage"]["rounded"]["kl"] < report["quality_by_stage"]["nearest"]["kl"]
    plain, own = AutoModelForImageTextToText.from_pretrained(out), load(out)
    corpus = load_image_rows(file, encoder_in(out), pictures.IMAGE, length=64)  # the processor went along
    found = evaluate(out, Evaluate(data=file, length=64, reference=str(folder))).asdict()
    nats, kl, tokens = 0.0, 0.0, 0
    for row in range(len(corpus.ids)):
        given = row_of(corpus, row)
        with torch.no_grad():
            q, other, p = (one(**given).logits[0].log_softmax(-1) for one in (plain, own, model))
        torch.testing.assert_close(q, other, rtol=1e-4, atol=1e-4)
        target = given["input_ids"][0, 1:]
        asked = target != pictures.IMAGE  # pieces of images are nothing to predict
        nats -= float(q[:-1].gather(-1, target[:, None])[asked].sum())
        kl += float((p.exp() * (p - q)).sum(-1)[:-1][asked].sum())
        tokens += int(asked.sum())
    assert found["tokens"] == tokens
    assert found["perplexity"] == pytest.approx(torch.tensor(nats / tokens).exp().item(), rel=1e-3)
    assert found["kl"] == pytest.approx(kl / tokens, rel=1e-2)


def test_rows_with_images_that_will_not_do(tmp_path: Path) -> None:
    model = tmp_path / "model"
    pictures.save("llava", model)
    file = pictures.rows_file(tmp_path, 4)
    small = {"scheme": "w4a16-g16", "samples": 2, "held_out": 2, "length": 64}

    def refused(rows: list[dict[str, Any]], message: str, **more: Any) -> None:
        other = tmp_path / "other.jsonl"
        other.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(BadInput, match=message):
            quantize(model, tmp_path / "out", Quantize(**{**small, "data": other, **more}))  # type: ignore[arg-type]

    good = json.loads(file.read_text().splitlines()[0])
    refused([good | {"images": ["gone.png"]}] * 4, "line [1-4]: there is no image .*gone.png")
    refused(
        [good | {"images": ["https://example.org/a.png"]}] * 4,
        "line [1-4]: images are named by the path of a file here",
    )
    refused([{"images": good["images"]}] * 4, "line [1-4]: in a file with images, has neither")
    turns = [{"role": "user", "content": [{"type": "image"}]}]
    refused([{"messages": turns}] * 4, "line [1-4]: names no file for an image")
    refused([{"messages": [{"role": "user", "content": "w1"}], "images": good["images"]}] * 4, "no message has a place")
    refused([{"messages": [{"role": "user", "content": [{"type": "audio"}]}], "images": good["images"]}] * 4, "'audio'")
    (tmp_path / "0-0.png").write_text("no image")
    refused([good] * 4, "line [1-4]: the model's processor fails on it")
    pictures.rows_file(tmp_path, 4)
    refused([good] * 4, "none of its 4 rows is of at most 8 tokens", length=8)
    refused([good] * 4, "leave out --prompt-format", prompt_format="plain")
    refused([good] * 4, "tune-steps: of llava there is no tuning", tune_steps=2)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (model / name).unlink(missing_ok=True)
    refused([good] * 4, "has no processor, so rows with images cannot be read")
    assert not (tmp_path / "out").exists()


def test_images_are_seen_wherever_they_stand_in_a_file(tmp_path: Path) -> None:
    """Also behind rows without any; and where a model reads text alone they are refused, not passed over."""
    model = pictures.save("llava", tmp_path)
    lines = pictures.rows_file(tmp_path, 4).read_text().splitlines()
    text = json.dumps({"prompt": "w1 w2", "completion": "w3 w4"})
    (tmp_path / "mixed.jsonl").write_text("\n".join([text, *lines]))
    corpus = load_image_rows(tmp_path / "mixed.jsonl", encoder_in(tmp_path), pictures.IMAGE, length=64)
    assert has_images(tmp_path / "mixed.jsonl") and corpus.pictured is not None
    assert corpus.pictured.any(1).tolist() == [False, True, True, True, True]
    stream = BlockwiseModel(read_config(tmp_path), Weights(tmp_path), CPU)
    states = embed_rows(stream, corpus, stream.read_outer(), RunContext(Journal(tmp_path / "journal"), 2**30))
    for i, params in stream.reading(range(stream.layers)):
        for rows, batch in states.batches:
            states[rows] = stream.run(i, params, states[rows], batch)
    for row, used in enumerate(corpus.mask.sum(1).tolist()):
        with torch.no_grad():
            expected = model(**row_of(corpus, row)).logits[0]
        found = stream.logits(states[row : row + 1][0, :used], stream.read_end())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(BadInput, match="line 2: has 'images', and text alone is read here"):
        load_corpus(tmp_path / "mixed.jsonl", read_tokenizer(tmp_path), vocab=any_type.VOCAB, length=16)


def test_rows_without_images_are_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2"}\n')
    (tmp_path / "text.txt").write_text("w1 w2")
    assert not has_images(tmp_path / "rows.jsonl") and not has_images(tmp_path / "text.txt")
    assert any_type.VOCAB > pictures.VIDEO
