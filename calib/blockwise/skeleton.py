"""The library's own model of a config, without weights: parameters on the meta device, buffers computed."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from calib import BadInput
from calib.blockwise import attention_hooks, moe_hooks
from calib.model.task import Task, task_of_checkpoint
from calib.runtime.memory import is_out_of_memory

MOST_BUFFERS = 2**31  # bytes of what the library computes from a config: more is a mistake in the config


def skeleton(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype = torch.float32, auto: str | None = None
) -> nn.Module:
    """Build a model whose parameters take no memory.

    Args:
        config: of a model that the library knows; its `architectures` say for which task.
        device: of its buffers (rotary frequencies and the like), which the library computes when weights are
            initialized; those that a checkpoint stores have to be read as parameters are.
        dtype: that it is to run in.
        auto: the library's class that opens it; None: that of its task.

    Returns:
        The model, open to `calib.blockwise.attention_hooks` and `calib.blockwise.moe_hooks`.

    Raises:
        BadInput: the library cannot build it.
    """
    try:
        with torch.device("meta"):
            model: Any = empty_model(config, auto=auto)
    except Exception as error:  # the library checks little, and fails wherever what it was not told of shows
        if is_out_of_memory(error):
            raise
        raise BadInput(f"config.json: the library cannot build this model ({error!r}); mend the config") from error
    _computed_to_buffers(model)
    size = sum(buffer.nbytes for buffer in model.buffers())
    if size > MOST_BUFFERS:
        raise BadInput(f"config.json: the model would compute tables of {size:,} bytes; mend the config")
    for module in model.modules():
        module._is_hf_initialized = False  # what was initialized on the meta device has no values
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()
    if dtype == torch.float64:  # as a model of single precision has them, cast
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.double()
    return model


def sample_of(config: PretrainedConfig, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the forward of a model of this config: two short rows of token ids."""
    ids = torch.arange(10, device=device).view(2, 5) % config.get_text_config().vocab_size
    task = task_of_checkpoint(config.model_type, config.architectures)
    if task in (Task.MASKED_LM, Task.EMBEDDING, Task.TEXT_ENCODING):
        return {"input_ids": ids}
    both = {"decoder_input_ids": ids} if task is Task.SEQ_TO_SEQ_LM else {}
    return {"input_ids": ids, **both, "use_cache": False}


def _computed_to_buffers(model: Any) -> None:
    """Turn parameters that the library computes, and does not store, into buffers: Marian's positions."""
    patterns = getattr(model, "_keys_to_ignore_on_save", None) or []
    for name, parameter in list(model.named_parameters()):
        if name in patterns:
            place, _, own = name.rpartition(".")
            module = model.get_submodule(place)
            del module._parameters[own]
            module.register_buffer(own, parameter.data, persistent=False)


def empty_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32, auto: str | None = None) -> nn.Module:
    """The library's own model, without trained weights, ready to be seen into and edited while it runs."""
    opener = getattr(
        transformers, auto or task_of_checkpoint(config.model_type, config.architectures) or Task.CAUSAL_LM
    )
    library = opener._model_mapping.get(type(config), None)
    open_to_hooks = getattr(library, "_supports_attention_backend", False)
    attention = "eager"
    if open_to_hooks:  # where sdpa would leave out what a model adds to its scores, the model's own function runs
        capped = not getattr(library, "_supports_sdpa", False)
        attention = attention_hooks.EAGER if capped else attention_hooks.name_for(config)
    model = opener.from_config(config, attn_implementation=attention, dtype=dtype)
    for part in model.modules():  # as an argument, not every transformers takes ours
        if hasattr(part, "config"):
            part.config._experts_implementation = moe_hooks.NAME
        moe_hooks.open_repeated(part)
    return model.eval().requires_grad_(False)
