"""Find the parts of a model's blocks, without a table of architectures and without its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig

from calib import first_line
from calib.blockwise.model import BlockwiseModel
from calib.blockwise.skeleton import sample_of, skeleton
from calib.blockwise.walk import Walk
from calib.probe.bench import Bench, bench_of_block, bench_of_end, bench_of_start
from calib.probe.images import find_images
from calib.probe.pairs import find_pairs
from calib.probe.parts import FoundParts, ModelParts
from calib.probe.planes import find_planes
from calib.probe.stream import TOKENS, find_end, find_gains, find_start, find_stream
from calib.runtime.memory import is_out_of_memory


def find_parts(walk: Walk) -> ModelParts:
    """Find out how the parts of a model hang together.

    Args:
        walk: of the model, in any precision.
    """
    if not walk.static:
        nothing = FoundParts(obstacle="its blocks are told of more than the hidden state")
        return ModelParts((nothing,) * len(walk.calls), nothing, nothing)
    walk, width = walk.in_double(), walk.state_shape[-1]
    ids = torch.arange(TOKENS[0] * TOKENS[1]).view(TOKENS) % 7
    by_kind = dict[Any, FoundParts]()
    for index, module in enumerate(walk.modules):
        kind = block_kind(module)
        if kind not in by_kind:
            by_kind[kind] = _block(walk, index, width)
    start = _tried(lambda: bench_of_start(walk, ids), find_start, width)
    end = _tried(lambda: bench_of_end(walk), find_end, width)
    found = ModelParts(tuple(by_kind[block_kind(module)] for module in walk.modules), start, end)
    # Where nothing turns it does not matter what images write.
    return found if found.obstacle else replace(found, start=find_images(walk, start))


_T = TypeVar("_T")
_known = dict[str, ModelParts]()  # by config: a function of that and of the library's code
MOST_KNOWN = 8


def found_parts(stream: BlockwiseModel) -> ModelParts:
    """Find the parts of a model, or remember what was found."""
    return remembered(_known, stream.config, lambda: find_parts(walk_on_cpu(stream)))


def remembered(known: dict[str, _T], config: PretrainedConfig, find: Callable[[], _T]) -> _T:
    """Look up what is known of a model of the same config, or find and keep it."""
    key = config.to_json_string(use_diff=False)
    if key not in known:
        while len(known) >= MOST_KNOWN:
            del known[next(iter(known))]
        known[key] = find()
    return known[key]


def walk_on_cpu(stream: BlockwiseModel) -> Walk:
    """The walk of a model where looking into it costs least."""
    return stream.walk if stream.device.type == "cpu" else walk_of_config(stream.config)


def walk_of_config(config: PretrainedConfig) -> Walk:
    """The walk of a model of a config, without weights.  Raises BadInput."""
    cpu = torch.device("cpu")
    return Walk(skeleton(config, cpu), sample_of(config, cpu))


def _block(walk: Walk, index: int, width: int) -> FoundParts:
    def find(bench: Bench, width: int) -> FoundParts:
        if len(walk.state_shape) > 1:
            return FoundParts(obstacle="there are several streams a token")
        found, gains = find_stream(bench, width), find_gains(bench, width)
        attention, planes = find_planes(bench, width, walk.calls[index].attention)
        pairs = find_pairs(bench, width)
        return replace(
            found, matrices=dict(bench.matrices), gains=gains, attention=attention, planes=planes, pairs=pairs
        )

    return _tried(lambda: bench_of_block(walk, index), find, width)


def _tried(make: Callable[[], Bench], find: Callable[[Bench, int], FoundParts], width: int) -> FoundParts:
    """Whatever the library's code does where it is looked into, what cannot be found is left out."""
    try:
        return find(make(), width)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return FoundParts(obstacle=f"its code cannot be looked into ({first_line(error)})")


def block_kind(module: nn.Module) -> Any:
    """Equal for modules that compute alike: of one class, with shapes and settings that are equal."""
    settings = tuple(
        (name, key, value)
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, bool | int | float | str) and key not in ("layer_idx", "layer_id", "layer_number")
    )
    return type(module), tuple((name, p.shape) for name, p in module.named_parameters()), settings
