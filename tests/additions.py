"""A small LLaMA that adds: a teacher whose answers a program can check."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIGNS = ["<s>", "</s>", *"0123456789+="]


def sums(digits: int) -> list[tuple[str, str]]:
    """All additions of two numbers of so many digits, as prompt and answer."""
    numbers = [str(n).zfill(digits) for n in range(10**digits)]
    return [(f"{a}+{b}=", str(int(a) + int(b)).zfill(digits + 1)) for a in numbers for b in numbers]


def write_rows(file: Path, digits: int, rows: slice, seed: int = 0) -> Path:
    """JSON lines with some of these additions, in a random order."""
    every = sums(digits)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    lines = [
        json.dumps({"prompt": every[i][0], "completion": every[i][1], "pattern": every[i][1]}) for i in order[rows]
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def adder(folder: Path, digits: int, *, width: int, steps: int, batch: int, seed: int = 0) -> Path:
    """Train a LLaMA of two blocks on all additions, and save it."""
    tokenizer = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(SIGNS)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SIGNS), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    every = torch.tensor([fast(prompt + answer).input_ids for prompt, answer in sums(digits)])
    start = 2 * digits + 3  # after <s>, both numbers and both signs
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = every[torch.randint(len(every), (batch,))]
        logits = model(rows).logits[:, start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, start:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@torch.no_grad()
def share_right(folder: Path, digits: int) -> float:
    """Share of all additions that a saved model answers right, greedily."""
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    every = torch.tensor([tokenizer(prompt + answer).input_ids for prompt, answer in sums(digits)])
    start = 2 * digits + 3
    logits = torch.cat([model(rows).logits[:, start - 1 : -1].argmax(-1) for rows in every.split(1000)])
    return float((logits == every[:, start:]).all(-1).float().mean())
