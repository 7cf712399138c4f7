"""What a model says after a prompt: a few tokens, to look at before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from calib import BadInput
from calib.data.prompts import Document, prompt_format
from calib.data.token_rows import encode_documents
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.config import read_json
from calib.model.task import WRITERS, task_of_checkpoint
from calib.runtime.device import fork_rng, pick_device
from compressor.engine.load import load


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, form: str = "auto") -> Tensor:
    """Token ids (1, t) of a prompt: with `form` "chat" as a user's turn in the tokenizer's chat template, with "plain"
    as it is, with "auto" in the template where there is one.  One BOS where the tokenizer adds one, and no EOS."""
    chosen = prompt_format(form, tokenizer)
    document = (
        Document(prompt, (), complete=True, prompt_only=True) if chosen.plain else chosen.prompt_of(prompt, "prompt")
    )
    (encoded,) = encode_documents([document], tokenizer, "prompt")
    return torch.from_numpy(encoded.ids)[None]


def continue_prompt(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    say: Callable[[str], object] = lambda piece: None,
) -> str:
    """The text that `model` writes after the prompt `ids` (1, t), until it ends or has written `max_new_tokens`.

    The most likely token each time, or with a `temperature` one that is drawn. `say` gets pieces of text as they come.
    """
    pieces = list[str]()

    def hear(text: str, stream_end: bool = False) -> None:
        pieces.append(text)
        say(text)

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = hear
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    ends = model.generation_config.eos_token_id
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=0, **sampled)
    device = next(model.parameters()).device
    with torch.no_grad(), fork_rng(device, seed):
        ids = ids.to(device)
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer)
    return "".join(pieces)


def generate_text(
    folder: str | Path, prompt: str, *, form: str = "auto", max_new_tokens: int = 64, temperature: float = 0.0,
    seed: int = 0, device: str = "auto", say: Callable[[str], object] = lambda piece: None,
) -> str:  # fmt: skip
    """Continue a prompt with a model in a directory, or with a hub name, and pass each piece to `say`.  Raises
    BadInput."""
    place = find_model(folder)
    raw = read_json(place / "config.json")
    task = task_of_checkpoint(str(raw.get("model_type")), raw.get("architectures"))
    if task is not None and task not in WRITERS:
        raise BadInput(
            f"{folder}: is for another task ({task.described}) and does not go on with a prompt; load it "
            f"(parewell.load, or {task.value} of transformers) and call it"
        )
    tokenizer = read_tokenizer(place)
    if tokenizer is None:
        raise BadInput(f"{folder}: has no tokenizer, so a prompt cannot be read; copy tokenizer.json into it")
    ids = prompt_ids(prompt, tokenizer, form)
    if not ids.numel():
        raise BadInput("prompt: is empty; write something to go on from")
    model: Any = load(place, device=pick_device(device))
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and ids.shape[1] >= most:
        raise BadInput(f"prompt: has {ids.shape[1]} tokens, and {folder} takes {most}; give a shorter one")
    if most is not None:
        max_new_tokens = min(max_new_tokens, most - ids.shape[1])
    return continue_prompt(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, say=say
    )
