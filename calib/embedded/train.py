"""Train the embedded model: `python calib/embedded/train.py`.  About 25 minutes on one CPU core.

A LLaMA with 1.84 million parameters and a byte-level BPE of 2,048 tokens, on the language reference (less the
held-out topics) and the docstrings of the standard library. Writes `model/` and the training curve beside it.
Figures depend on the Python whose text is read: the committed model was trained on CPython 3.11.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))
from calib.embedded import MODEL, python_topics, stdlib_docstrings

CONTEXT = 512


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 2,048 tokens on documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )


def stream_of(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """Concatenate all documents, each led by the start token, into ids (tokens,)."""
    return torch.tensor([i for ids in tokenizer(documents)["input_ids"] for i in ids])


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> float:
    """Bits of all tokens but the first of each window of CONTEXT, over the bytes those tokens stand for."""
    nats, tokens, all_tokens, all_bytes = 0.0, 0, 0, sum(len(d.encode()) for d in documents)
    for document in documents:
        ids = torch.tensor(tokenizer(document)["input_ids"])
        all_tokens += len(ids) - 1  # the start token stands for no byte
        for window in ids.split(CONTEXT):
            if len(window) > 1:
                logits = model(window[None]).logits[0, :-1].float()
                nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
                tokens += len(window) - 1
    return nats / tokens / math.log(2) * all_tokens / all_bytes


def batches(stream: Tensor, rows: int, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Windows at random offsets -> (rows, length), without end."""
    while True:
        starts = torch.randint(len(stream) - length, (rows,), generator=generator)
        yield torch.stack([stream[s : s + length] for s in starts])


def _model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stream: Tensor, held_out: list[str],
    args: argparse.Namespace,
) -> list[dict[str, float]]:  # fmt: skip
    """-> bits per byte of the held-out documents, every 500 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(1.0, s / args.steps))) + 0.01),
    )
    curve, began = list[dict[str, float]](), time.monotonic()
    source = batches(stream, rows=8, length=256, generator=torch.Generator().manual_seed(args.seed))
    for step in range(args.steps + 1):
        if step % 500 == 0 or step == args.steps:
            curve.append({"step": step, "held_out_bits_per_byte": round(bits_per_byte(model, tokenizer, held_out), 4)})
            print(curve[-1], f"{time.monotonic() - began:.0f} s", flush=True)
        if step < args.steps:
            ids = next(source)
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return curve


def train_embedded() -> None:
    """Run the script: train, save the model, and record its held-out bits per byte."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=MODEL)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    torch.set_num_threads(args.threads)

    train, held_out = python_topics("train"), python_topics("held-out")
    docstrings = stdlib_docstrings()
    tokenizer = train_tokenizer(train + docstrings)
    # The reference is what held-out topics resemble: read it four times for every time the docstrings are read.
    stream = stream_of(tokenizer, train * 4 + docstrings)
    model = _model()
    weights = sum(p.numel() for p in model.parameters())
    print(f"{len(stream):,} tokens, {weights:,} parameters", flush=True)

    curve = _train(model, tokenizer, stream, held_out, args)
    model = model.to(torch.bfloat16)
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    final = bits_per_byte(model.float(), tokenizer, held_out)
    figures = {
        "held_out_bits_per_byte_bfloat16": round(final, 4),
        "parameters": weights,
        "tokens_in_corpus": len(stream),
        "tokens_seen": args.steps * 8 * 256,
        "steps": args.steps,
        "seed": args.seed,
        "threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "curve": curve,
    }
    (args.out.parent / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({k: v for k, v in figures.items() if k != "curve"}))


if __name__ == "__main__":
    train_embedded()
