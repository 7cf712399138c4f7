"""What images write into the residual stream, beside the text: a projector's last matrix, mostly.

A model that sees is run with a drawn image on the way to its blocks. What is put into the answer of a matrix that text
does not reach, and arrives at the tokens of the image as it is, has to turn where the stream turns: a rotated model
would pass every check on text without it, and be wrong of every image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calib import first_line
from calib.blockwise.arguments import hidden_of
from calib.blockwise.walk import RowBatch, Walk
from calib.probe.bench import Bench, normal, outer_modules, outer_shapes
from calib.probe.parts import FoundParts
from calib.probe.stream import is_written
from calib.runtime.memory import is_out_of_memory

AROUND = 3  # tokens of text before and after those of the image


def beside_text(walk: Walk) -> list[str]:
    """Name the parameters that text does not go through."""
    known = {*walk.entering, *walk.leaving}
    return [name for name in walk.outer if name not in known]


def find_images(walk: Walk, start: FoundParts) -> FoundParts:
    """Add to what writes before the first block what writes where there is an image.

    Args:
        walk: of the model, in double precision.
        start: what was found of text.

    Returns:
        The parts, with an obstacle where a matrix is reached neither by text nor by an image.
    """
    shapes = {name: p for name, p in outer_shapes(walk, beside_text(walk)).items() if p.dim() >= 2}
    if not shapes:
        return start
    first = next(iter(shapes)).rpartition(".")[0]
    try:
        found = _found(walk, start)
    except Exception as error:  # whatever the library's code does with an image that no processor made
        if is_out_of_memory(error):
            raise
        reason = f"{first} is for more than text, and could not be run with an image ({first_line(error)})"
        return replace(start, obstacle=start.obstacle or reason)
    return found


def _found(walk: Walk, start: FoundParts) -> FoundParts:
    bench = bench_of_images(walk)
    x = torch.zeros(1, 1, 1, dtype=torch.float64)  # what the way to the blocks is run on are ids, not this
    base, width = bench.run(x), walk.state_shape[-1]
    unseen = {n for n, p in bench.params.items() if p.device.type == "meta"} | _tables(walk)
    multiplied = unseen - {*start.tables, *start.matrices}
    met = {*bench.matrices, *bench.tables}
    towers = set(map(_tower, met))
    # Of sounds, for example; what is as wide as the stream might write to it wherever it lies.
    missed = {n for n in multiplied - met if _tower(n) not in towers or width in bench.params[n].shape}
    if missed:
        raise ValueError(f"nothing goes through {min(missed)}")
    writers, silent = list[str](), bench.matrices.keys()

    def answered(name: str, delta: Tensor) -> Tensor:
        return bench.run(x, {name: lambda y: y + delta}) - base

    def added(name: str, delta: Tensor) -> Tensor:
        return bench.run(x, params={name: bench.params[name] + delta}) - base

    biases = {matrix.bias for matrix in bench.matrices.values()}
    for name in beside_text(walk):
        matrix, p = bench.matrices.get(name), bench.params[name]
        if matrix is not None:
            along = is_written(lambda d, n=name: answered(n, d), name, width) if matrix.out == width else False  # type: ignore[misc]
        elif name in biases or name in silent or p.device.type == "meta" or p.shape[-1:] != (width,):
            continue
        else:
            along = is_written(lambda d, n=name: added(n, d), name, width)  # type: ignore[misc]
        if along is None:
            return replace(start, obstacle=f"a norm or a gain stands between {name} and the stream")
        if along:
            writers += [name, *filter(None, [matrix.bias if matrix else None])]
    if not writers:
        raise ValueError("nothing of it reaches the stream")
    matrices = {**start.matrices, **{n: m for n, m in bench.matrices.items() if n not in start.matrices}}
    tables = tuple(dict.fromkeys((*start.tables, *bench.tables)))
    return replace(start, matrices=matrices, tables=tables, writers=(*start.writers, *writers))


def _tower(name: str) -> str:
    """The part of a model that a parameter is in: its vision tower, for example."""
    return ".".join(name.split(".")[:2])


def bench_of_images(walk: Walk) -> Bench:
    """Set up the way of an image, and of text around it, to the last block; blocks give what they are given.

    Raises:
        ValueError: the model takes no image that could be made up for it.
    """
    inputs = image_inputs(walk)

    def run(params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return hidden_of(walk.before(len(walk.calls) - 1, RowBatch(inputs), params))

    return _bench(walk, run)


def _bench(walk: Walk, run: Callable[[Mapping[str, Tensor], Tensor], Tensor]) -> Bench:
    shapes = outer_shapes(walk, [*walk.entering, *beside_text(walk)])
    return Bench(outer_modules(walk), shapes, run, _tables(walk))


def _tables(walk: Walk) -> set[str]:
    """Embeddings beside the text: of positions mostly, whose tables may be stretched to an image's size."""
    every = {f"{name}.weight" for name, m in outer_modules(walk).items() if isinstance(m, nn.Embedding)}
    return every.intersection(beside_text(walk))


def image_inputs(walk: Walk) -> dict[str, Any]:
    """Make up an image and the ids around it, as the model's forward takes them.

    Args:
        walk: of the model, in double precision.

    Raises:
        ValueError: it takes none, or none that is known here.
    """
    model: Any = walk.model
    config = model.config
    names, vision = inspect.signature(model.forward).parameters, getattr(config, "vision_config", None)
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if vision is None or token is None or "pixel_values" not in names:
        raise ValueError("it takes no image")
    for image in _images(vision, names):
        try:
            count = _tokens(walk, image)
            break
        except Exception as error:  # of another size than its tables of positions, or of other axes
            if is_out_of_memory(error):
                raise
    else:
        raise ValueError("its images have sizes that are not known")
    other = next(i for i in range(config.get_text_config().vocab_size) if i != token)
    ids = torch.tensor([[other] * AROUND + [token] * count + [other] * AROUND])
    more = {"mm_token_type_ids": (ids == token).long()} if "mm_token_type_ids" in names else {}
    return {"input_ids": ids, "use_cache": False, **image, **more}


def _images(vision: Any, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Images of a few patches, and of the size that the config names; a forward takes arguments of these `names`."""
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    if "image_grid_thw" in names:
        side = 2 * getattr(vision, "spatial_merge_size", 2)
        pixels = normal("image", (side * side, channels * getattr(vision, "temporal_patch_size", 1) * patch**2))
        grid = {"image_grid_thw": torch.tensor([[1, side, side]])}
        yield {"pixel_values": pixels, **grid}
        yield {"pixel_values": pixels.view(side * side, -1, patch, patch), **grid}
        return
    side = 2 * getattr(vision, "pooling_kernel_size", 2)
    patches = normal("image", (1, side * side, channels * patch**2))
    if "spatial_shapes" in names:
        mask = torch.ones(1, side * side, dtype=torch.int64)
        yield {"pixel_values": patches, "spatial_shapes": torch.tensor([[side, side]]), "pixel_attention_mask": mask}
        return
    if "image_position_ids" in names:
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)  # x changes first
        yield {"pixel_values": patches, "image_position_ids": places[None]}
        return
    named = getattr(vision, "image_size", None) or 4 * patch
    for size in (4 * patch, named if isinstance(named, int) else named[0]):
        for lead in ((1,), (1, 1)):  # images, or images of rows
            image = {"pixel_values": normal("image", (*lead, channels, size, size))}
            yield image
            if "image_sizes" in names:
                yield image | {"image_sizes": torch.tensor([[size, size]])}


class _Enough(Exception):  # no error: it ends a forward whose rest is not needed
    pass


def _tokens(walk: Walk, image: Mapping[str, Tensor]) -> int:
    """How many tokens the features of an image take, seen as the library makes them."""
    model: Any = walk.model
    owners = [module for module in model.modules() if hasattr(module, "get_image_features")]
    if not owners:
        raise ValueError("its images are not seen on their way")
    owner: Any = owners[-1]  # the innermost: those around it ask it
    real, counts = owner.get_image_features, list[int]()

    def seen(*args: Any, **options: Any) -> Any:
        made = real(*args, **options)
        found = getattr(made, "pooler_output", made)
        found = made.last_hidden_state if found is None else found
        parts = found if isinstance(found, list | tuple) else [found]
        counts.append(sum(part.shape[:-1].numel() for part in parts))
        raise _Enough

    def run(params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64), "use_cache": False, **image}
        return hidden_of(walk.before(0, RowBatch(inputs), params))

    owner.get_image_features = seen
    try:
        _bench(walk, run).run(torch.zeros(1, 1, 1, dtype=torch.float64))
    except _Enough:
        return counts[0]
    finally:
        del owner.get_image_features
    raise ValueError("its images are not seen on their way")
