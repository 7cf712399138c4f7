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

from calib.jobs.output_folder import Shards
from calib.model.architectures import architecture_of
from calib.model.blockwise import BlockwiseModel, assembled, meta_model
from calib.model.config import read_config
from calib.model.weights import Weights
from calib.runtime.distributed import full_tensor, is_main_process, shard_like
from compressor.distillation.models import shard_student


def sharded_student(config: PretrainedConfig, tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> Any:
    """A causal LM in single precision on `device`, all of it trained, with the values of `tensors` by the names of its
    parameters.  To be called by all processes."""
    model: Any = meta_model(config)
    shard_student(model.requires_grad_(True), device)
    model.to_empty(device=device)
    model.tie_weights()
    _compute_buffers(model, device)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in _as_parameters(model.config, tensors):
            p = params.pop(name)
            p.copy_(shard_like(value.to(p.device, p.dtype), p))
    assert not params, f"not in the checkpoint: {', '.join(params)}"
    return model


def stored_tensors(folder: Path) -> tuple[PretrainedConfig, Iterator[tuple[str, Tensor]]]:
    """The config and the tensors of a float model, as they are stored, read one at a time, block after block."""
    stream = BlockwiseModel(read_config(folder), Weights(folder), torch.device("cpu"))
    stream.weights.check(stream.expected)
    blocks = f"{stream.architecture.blocks}."
    names = [name for name in stream.expected if not name.startswith(blocks)]
    names += [f"{blocks}{i}.{name}" for i in range(stream.sizes.layers) for name in stream.stored_names(i)]
    return stream.config, ((name, stream.read_stored([name])[name]) for name in names)


def _as_parameters(config: PretrainedConfig, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a checkpoint, block after block, as the library's class has them: of experts, which it stacks, those
    of a block together."""
    architecture, held, block = architecture_of(config), dict[str, Tensor](), ""
    if architecture.experts is None:
        yield from tensors
        return
    start = len(architecture.blocks) + 1
    for name, value in tensors:
        inside = name.startswith(f"{architecture.blocks}.")
        own = name[: name.index(".", start) + 1] if inside else ""
        if own != block and held:
            yield from ((block + n, t) for n, t in assembled(held, architecture).items())
            held = {}
        block = own
        if inside:
            held[name.removeprefix(own)] = value
        else:
            yield name, value
    if held:
        yield from ((block + n, t) for n, t in assembled(held, architecture).items())


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Give values to what is computed from the config and not stored, which the meta device has left open."""
    architecture = architecture_of(model.config)
    owner, _, name = architecture.rotary.rpartition(".")
    rotary = type(model.get_submodule(architecture.rotary))(model.config).to(device)
    setattr(model.get_submodule(owner), name, rotary)
    done = {id(buffer) for buffer in rotary.buffers()}
    embed = model.get_submodule(architecture.embed)
    if (scale := getattr(embed, "embed_scale", None)) is not None:
        scale.fill_(embed.scalar_embed_scale)
        done.add(id(scale))
    left = [name for name, buffer in model.named_buffers() if id(buffer) not in done]
    assert not left, f"buffers that nobody computes: {', '.join(left)}"


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
