"""What a sequence classifier and its tokenizer must agree on: which token pads, and on which side.

Models that read from left to right decide at a row's last token, which they find by `pad_token_id`; where config and
tokenizer name different tokens, or a model counts positions from the left, a row's answer depends on what it is padded
with. The library says nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput, first_line
from calib.model.checkpoint import read_tokenizer
from calib.runtime.memory import is_out_of_memory

TRIED_ON = 256  # rows whose shortest and longest are seen padded and alone
Texts = Sequence[tuple[str, ...]]


def agree_on_padding(model: Any, tokenizer: Any, folder: Path) -> None:
    """Give a model's config and its tokenizer the same padding token, where only one of them names one.

    Raises BadInput where neither does, or the model has no such token.
    """
    config, rows = model.config.get_text_config(), model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id is None and isinstance(config.pad_token_id, int) and 0 <= config.pad_token_id < rows:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    if tokenizer.pad_token_id is None:
        raise BadInput(
            f"{folder}: has no tokenizer that pads; name a pad_token in tokenizer_config.json, and its pad_token_id in "
            "config.json"
        )
    if not tokenizer.pad_token_id < rows:
        raise BadInput(
            f"{folder}: the tokenizer pads with token {tokenizer.pad_token_id}, the model has {rows}; choose another"
        )
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def check_padding(model: Any, tokenizer: Any, answers: Callable[[Texts], Tensor], texts: Texts, folder: Path) -> None:
    """Compare what `answers` (n texts -> logits (n, C)) says of a short row and a long one, together and alone.

    Where padding on the tokenizer's side changes the answer and both agree on the token, padding moves to the other
    side. Raises BadInput where that does not help.
    """
    ordered = sorted(texts[:TRIED_ON], key=lambda row: sum(map(len, row)))
    pair, pads = [ordered[0], ordered[-1]], model.config.get_text_config().pad_token_id
    sides = [tokenizer.padding_side]
    if pads == tokenizer.pad_token_id:
        sides.append("left" if sides == ["right"] else "right")
    try:
        alone = torch.cat([answers([row]) for row in pair])
        for side in sides:
            tokenizer.padding_side = side
            if (answers(pair) - alone).abs().max() <= 1e-2 * alone.abs().max().clamp(min=1e-6):
                return
    except Exception as error:  # a model that is handed what it cannot take may raise anything
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{folder}: the model cannot take rows of text ({first_line(error)})") from error
    raise BadInput(
        f"{folder}: what the model says of a row changes with the padding beside it; make pad_token_id in config.json "
        f"({pads}) and the tokenizer's pad token ({tokenizer.pad_token_id}) one, which stands in no text"
    )


def keep_padding(tokenizer: Any, folder: Path) -> None:
    """Write into the tokenizer's files in `folder` how `tokenizer` pads, where they say otherwise."""
    stored = read_tokenizer(folder)
    expected = (tokenizer.pad_token_id, tokenizer.padding_side)
    if stored is not None and (stored.pad_token_id, stored.padding_side) != expected:
        stored.pad_token, stored.padding_side = tokenizer.pad_token, tokenizer.padding_side
        stored.save_pretrained(folder)
