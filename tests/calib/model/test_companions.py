"""What lies beside a model's weights: which files belong to it, copied byte for byte, and what is left behind."""

import stat
from pathlib import Path

import pytest
import transformers
from huggingface_hub.utils import filter_repo_objects
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from calib import BadInput
from calib.jobs.options import folder_identity
from calib.jobs.output_folder import atomic_folder, check_destination, write_json
from calib.model.companions import (
    BASE_CARD,
    CARD,
    companions,
    copy_companions,
    has_tokenizer,
    hub_patterns,
    is_companion,
)

BELONG = (
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "LICENSE", "LICENSE.llama2.c",
    "LICENSES/MIT.txt", "Llama-LICENSE.md", "NOTICE", "COPYING.txt", "USE_POLICY.md", "Gemma_Terms_of_Use.txt",
    "THIRD_PARTY_NOTICES.txt", "added_tokens.json", "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "chat_template.json",
    "config_sentence_transformers.json", "generation_config.json", "image_processor_config.json", "merges.txt",
    "modules.json", "preprocessor_config.json", "processor_config.json", "qwen.tiktoken",
    "sentence_bert_config.json", "sentencepiece.bpe.model", "source.spm", "special_tokens_map.json", "spiece.model",
    "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "video_preprocessor_config.json",
    "vocab.bpe", "vocab.json", "vocab.txt",
)  # fmt: skip
STAY = (
    "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.pkl", "tokenizer.py", "tokenization_own.py",
    "modeling_own.py", "optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin", "rng_state.pth",
    "quantize_config.json", "quant_config.json", "quantization_config.json", "adapter_config.json",
    "adapter_model.safetensors", "parewell.json", "report.json", "report.html", "parewell.safetensors", "model.gguf",
    "README.md", ".gitattributes", ".git/config", "checkpoint-500/tokenizer.json", "runs/events.out",
    "onnx/tokenizer.json", "1_Pooling/pytorch_model.bin", "1_Pooling/own.py", "additional_chat_templates/own.py",
    "1_Pooling/deeper/config.json",
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in (*BELONG, *STAY):
        file = tmp_path / "model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode() + b"\r\n\0")
    return tmp_path / "model"


def test_what_belongs_to_a_model_is_copied_byte_for_byte_and_nothing_else(model: Path, tmp_path: Path) -> None:
    assert [file.as_posix() for file in companions(model)] == sorted(BELONG)
    (tmp_path / "out").mkdir()
    copy_companions(model, tmp_path / "out")
    copied = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    kept = tmp_path / "out" / BASE_CARD  # OUT gets a card of its own
    assert {file.relative_to(tmp_path / "out").as_posix() for file in copied} == {*BELONG, BASE_CARD}
    assert kept.read_bytes() == (model / CARD).read_bytes()
    copied.remove(kept)
    assert all(file.read_bytes() == (model / file.relative_to(tmp_path / "out")).read_bytes() for file in copied)


def test_vocabulary_files_of_every_tokenizer_of_the_library_belong(tmp_path: Path) -> None:
    names = set[str]()
    for found in TOKENIZER_MAPPING_NAMES.values():
        for name in found if isinstance(found, tuple) else [found]:
            try:
                names |= set(getattr(transformers, str(name)).vocab_files_names.values())
            except (AttributeError, ImportError):  # not installed
                continue
    assert len(names) > 20
    assert [name for name in names if not is_companion(Path(name))] == []


def test_the_hub_is_asked_for_everything_that_belongs() -> None:
    """By the rule of huggingface_hub's own, which minds case."""
    wanted = [*BELONG, "license.txt", "License", "Notice.txt", "notice", "config.json", "model.safetensors", CARD]
    assert list(filter_repo_objects(wanted, allow_patterns=hub_patterns())) == wanted
    unwanted = ["pytorch_model.bin", "modeling_own.py", "model.onnx", "consolidated.00.pth"]
    assert list(filter_repo_objects(unwanted, allow_patterns=hub_patterns())) == []


def test_a_licence_that_is_there_is_kept_where_asked_for(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("LICENSE", "tokenizer.json"):
        (tmp_path / "out" / name).write_text("the student's own")
    copy_companions(model, tmp_path / "out", keep_notices=True)
    assert (tmp_path / "out/LICENSE").read_text() == "the student's own"
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_a_recipe_has_the_hash_of_each(model: Path) -> None:
    files = folder_identity("model", model, "")["files"]
    assert set(files) == {"config.json", *BELONG}
    (model / "additional_chat_templates/rag.jinja").write_text("changed")
    changed = folder_identity("model", model, "")["files"]
    assert [name for name in files if files[name] != changed[name]] == ["additional_chat_templates/rag.jinja"]


def test_no_tokenizer_is_a_config_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").touch()
    (tmp_path / "chat_template.jinja").touch()
    assert not has_tokenizer(tmp_path)
    (tmp_path / "spiece.model").touch()
    assert has_tokenizer(tmp_path)


def test_an_output_with_subfolders_is_replaced_whole_and_what_is_not_ours_is_refused(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for content in ("one", "two"):
        check_destination(out, [model], 0)
        with atomic_folder(out, 0) as scratch:
            copy_companions(model, scratch)
            (scratch / "additional_chat_templates/rag.jinja").write_text(content)
            write_json(scratch / "parewell.json", {"recipe": []})
    assert (out / "additional_chat_templates/rag.jinja").read_text() == "two"
    modes = {stat.S_IMODE(file.stat().st_mode) for file in out.rglob("*") if file.is_file()}
    assert modes == {stat.S_IMODE(out.stat().st_mode) & 0o666}
    for extra in ("additional_chat_templates/mine.txt", "notes.md", "mine/tokenizer.json"):
        (out / extra).parent.mkdir(exist_ok=True)
        (out / extra).touch()
        with pytest.raises(BadInput, match="parewell did not write"):
            check_destination(out, [model], 0)
        (out / extra).unlink()
        if not any((out / extra).parent.iterdir()):
            (out / extra).parent.rmdir()


def test_what_a_killed_run_left_in_subfolders_goes(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial/1_Pooling"
    left.mkdir(parents=True)
    (left / "config.json").touch()
    with atomic_folder(tmp_path / "out", 0) as scratch:
        (scratch / "config.json").touch()
    assert [file.name for file in (tmp_path / "out").rglob("*")] == ["config.json"]
