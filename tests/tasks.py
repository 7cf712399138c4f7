"""Small models of any type for any task, with a tokenizer whose words are w0, w1, ..."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from calib.model.task import Task
from tests import any_type

MARKS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
WORDS = [*MARKS, *(f"w{i}" for i in range(any_type.VOCAB - len(MARKS) - 4))]


def save(model_type: str, task: Task, folder: Path) -> Any:
    """A model with weights drawn anew, in single precision, in `folder` with its tokenizer.  -> the model."""
    config = any_type.config_of(model_type)
    config.architectures = None
    if task is Task.SEQ_TO_SEQ_LM:
        config.decoder_start_token_id = config.pad_token_id = 0
    torch.manual_seed(0)
    model: Any = getattr(transformers, task).from_config(config).eval()
    computed = model._keys_to_ignore_on_save or ()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in computed:
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5 if p.dim() > 1 else torch.rand_like(p) + 0.5)
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.copy_(torch.randn_like(buffer))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    return model.requires_grad_(False)


def text(words: int, seed: int) -> str:
    """Words at random, each likely to be followed by the next number."""
    draw, known, found = random.Random(seed), len(WORDS) - len(MARKS), list[str]()
    at = draw.randrange(known)
    for _ in range(words):
        found.append(f"w{at}")
        at = (at + 1) % known if draw.random() < 0.7 else draw.randrange(known)
    return " ".join(found)


def rows_file(folder: Path, *, pairs: bool = False, rows: int = 24) -> Path:
    """Rows of text of unlike lengths; where `pairs`, of prompts and answers."""
    file = folder / "rows.jsonl"
    lines = [
        {"prompt": text(4 + i % 9, i), "completion": text(3 + i % 5, 99 + i)} if pairs else {"text": text(4 + i % 9, i)}
        for i in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
