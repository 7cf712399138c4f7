"""Whether a traced graph answers as its model on rows of other shapes, where what was taken for constant shows."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib import BadInput, first_line
from compressor.exporters import runtimes

LONG, AGREED = 600, 1e-3  # tokens of a row on which a graph is tried; relative difference of logits

Given = tuple[Tensor, Tensor]  # token ids and mask, both (B, T)


def rows_to_try(config: Any) -> list[Given]:
    """Rows on which a graph shows that it depends on none: one of five tokens, one of one, two long ones of which one
    is padded on the left."""
    positions = getattr(config, "max_position_embeddings", None) or LONG
    drawn, tries = torch.Generator().manual_seed(0), list[Given]()
    for shape in ((1, 5), (1, 1), (2, min(LONG, positions))):
        ids = torch.randint(min(3, config.vocab_size - 1), config.vocab_size, shape, generator=drawn)
        tries.append((ids, torch.ones_like(ids)))
    tries[-1][1][0, : tries[-1][1].shape[1] // 3] = 0
    return tries


def logits_on(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits (n, V) of a model for the n tokens that a mask (B, T) lets through."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[mask.bool()]


def check_graph(folder: Path, model_type: str, answers: list[tuple[Given, Tensor]]) -> None:
    """Ask the graph in a directory what the model was asked.

    Args:
        folder: that holds model.onnx.
        model_type: what the message calls the model.
        answers: rows, and what `logits_on` gave for them.

    Raises:
        BadInput: it says something else, or cannot be asked.
    """
    if find_spec("onnxruntime") is None:
        raise BadInput(f"to onnx: a graph of {model_type} is written where onnxruntime can check it; install that, or "
                       "export to safetensors")  # fmt: skip
    try:
        run = runtimes.onnxruntime_logits(folder)
        found = [run(ids, mask)[mask.bool()] for (ids, mask), _ in answers]
    except Exception as error:  # of another's library, which raises what it likes
        raise BadInput(f"to onnx: onnxruntime does not run what torch traces of {model_type} ({first_line(error)}); "
                       "export to safetensors") from error  # fmt: skip
    far = max(float((a - b).abs().max() / b.abs().max()) for a, (_, b) in zip(found, answers, strict=True))
    if not far < AGREED:
        raise BadInput(f"to onnx: what torch traces of {model_type} answers otherwise on rows of other lengths (by "
                       f"{far:.0e}); export to safetensors")  # fmt: skip
