"""A student whose blocks are sharded over processes, none of which ever holds it whole.

It is built on the meta device and filled tensor by tensor: every process reads each tensor from the checkpoint and
keeps its own share of it, so that nothing is sent, and no process holds more than its shares and one tensor (of a
mixture of experts, one block).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from calib.blockwise.model import BlockwiseModel
from calib.blockwise.skeleton import skeleton
from calib.jobs.output_folder import Shards
from calib.model.config import read_config
from calib.model.weights import Weights
from calib.runtime.distributed import full_tensor, is_main_process, shard_like
from compressor.distillation.models import shard_student


def sharded_student(config: PretrainedConfig, tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> Any:
    """A causal LM in single precision on `device`, all of it trained, with the values of `tensors` by the names of its
    parameters.  To be called by all processes."""
    model: Any = skeleton(config, torch.device("cpu"))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    shard_student(model.requires_grad_(True), device)
    model.to_empty(device=device)
    model.tie_weights()
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for name, value in tensors:
            p = params.pop(name)
            p.copy_(shard_like(value.to(p.device, p.dtype), p))
    assert not params, f"not in the checkpoint: {', '.join(params)}"
    return model


def stored_tensors(folder: Path) -> tuple[PretrainedConfig, Iterator[tuple[str, Tensor]]]:
    """The config and the parameters of a float model, in the dtypes they are stored in, block after block."""
    stream = BlockwiseModel(read_config(folder), Weights(folder), torch.device("cpu"))
    stream.check()

    def read() -> Iterator[tuple[str, Tensor]]:
        for names in ([n for n in stream.outer if n not in stream.tied], *map(stream.parameters, range(stream.layers))):
            yield from stream.read_parameters(names).items()

    return stream.config, read()


def write_sharded(model: Any, scratch: Path | None, dtype: torch.dtype) -> None:
    """Write the weights and configs of a model into `scratch`, one tensor whole at a time, in the first process; the
    others, to which `scratch` is None, give their shares.  To be called by all."""
    if is_main_process():
        assert scratch is not None
        model.config.dtype = dtype
        model.save_pretrained(scratch, state_dict={})  # the configs alone
        for file in scratch.glob("*.safetensors"):
            file.unlink()
        shards = Shards(scratch)
    for name, p in model.named_parameters():  # a tied head is listed once, as the embedding
        whole = full_tensor(p)
        if is_main_process():
            shards.add({name: whole.to(dtype)})
    if is_main_process():
        shards.close()
