"""Embedding and head on grids of their own.

The inputs of an embedding are one-hot, so that their Gram matrix is diagonal and rounding to nearest is the solution in
least squares. It is rounded before the blocks, which read what it gives; the head after them, by the rounding method of
the linears, on what the final norm gives. Where both stay one table, that is rounded as an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from calib import BadInput
from calib.blockwise.model import BlockwiseModel, Params, micro_batches
from calib.blockwise.row_states import RowStates
from calib.jobs.context import RunContext
from calib.jobs.journal import Journal
from calib.quant.block_types import BLOCK_TYPES, fitting
from calib.quant.grid_types import Grid
from calib.quant.scheme import Scheme, table_grid
from calib.runtime.distributed import barrier
from calib.runtime.progress import stage
from calib.stats.moments import Moments
from compressor.quantization.options import NO_TABLE
from compressor.quantization.quantized_model import QuantizedModel
from compressor.quantization.rounding import nearest_linear
from compressor.storage.quantized_linear import Rounded

TABLES_STAGE = "round embedding and head"


def with_tables(scheme: Scheme, stream: BlockwiseModel, embedding: str, lm_head: str) -> Scheme:
    """The scheme, with grids of embedding and head by the names that `table_grid` reads, or "none".

    Raises:
        BadInput: there is no such table, or its width is none of whole groups.
    """
    if embedding != NO_TABLE:
        name = _stored_name(stream, "embedding", embedding, nn.Embedding)
        scheme = replace(scheme, embedding=(name, _fitted(stream, "embedding", embedding)))
    if lm_head != NO_TABLE:
        name = _stored_name(stream, "lm-head", lm_head, nn.Linear)
        scheme = replace(scheme, head=(name, _fitted(stream, "lm-head", lm_head)))
    for name, grid in scheme.tables.items():
        if grid.group and stream.hidden % grid.group and not grid.is_block_type:
            raise BadInput(
                f"embedding or lm-head: group size {grid.group} does not divide the width {stream.hidden} of '{name}'; "
                "take a divisor, or w8 with a scale per row"
            )
    return scheme


def _fitted(stream: BlockwiseModel, option: str, asked: str) -> Grid:
    """The grid that is asked for; of a block type that does not divide the hidden size, what llama.cpp takes there.
    Raises BadInput."""
    grid = table_grid(option, asked)
    if not grid.is_block_type:
        return grid
    kind = fitting(grid.kind, stream.hidden)
    if kind is None:
        raise BadInput(f"{option} {asked}: no block of llama.cpp's divides the width {stream.hidden}; leave it out")
    return BLOCK_TYPES[kind].grid


def _stored_name(stream: BlockwiseModel, option: str, asked: str, kind: type[nn.Module]) -> str:
    """The name on disk, without `.weight`, of the embedding or the head.  Raises BadInput where there is none."""
    head = kind is nn.Linear
    if stream.encoder_blocks:
        raise BadInput(f"{option} {asked}: encoder and decoder of {stream.config.model_type} share tables, which stay "
                       "in 16 bits here; leave it out")  # fmt: skip
    if head and (stream.task.embeds or stream.skeleton.get_output_embeddings() is None):
        raise BadInput(f"{option} {asked}: this model has no head, as it gives embeddings; leave it out")
    parameter, module = stream.head if head else stream.embedding
    sources = stream.names.sources
    stored = sources[parameter].names if parameter in sources else [parameter]
    plain = parameter not in sources or sources[parameter].converter is None
    if not isinstance(module, kind) or not plain or len(stored) != 1 or module.weight.shape[1] != stream.hidden:
        raise BadInput(f"{option} {asked}: that of {stream.config.model_type} is no plain table of the hidden size, "
                       "and stays in 16 bits here; leave it out")  # fmt: skip
    return stored[0].removesuffix(".weight")


def parameters_of(stream: BlockwiseModel, scheme: Scheme) -> dict[str, str]:
    """The parameters that are tables on grids of their own: names in full -> names on disk."""
    found = {}
    if scheme.embedding is not None:
        found[stream.embedding[0]] = scheme.embedding[0]
    if scheme.head is not None:
        found[stream.head[0]] = scheme.head[0]
    return found


def replaced(stream: BlockwiseModel, outer: Params, scheme: Scheme, tables: Mapping[str, Rounded]) -> Params:
    """Copy what is no block's, with tables by their names on disk in place of what they were rounded from; where
    embedding and head are one they stay one, unless the head has a grid of its own."""
    changed, head = dict(outer), stream.head[0] if scheme.head is not None else None
    for parameter, name in parameters_of(stream, scheme).items():
        if name in tables:
            shared = {n for n, tensor in outer.items() if tensor is outer[parameter] and n != head}
            own = {parameter} if parameter == head else shared
            changed |= dict.fromkeys(own, tables[name].weight().to(stream.dtype))
    return changed


def _nearest(stream: BlockwiseModel, table: Tensor, grid: Grid) -> Rounded:
    """A table (V, d) rounded to nearest; scales are kept in the dtype that the model's embedding is stored in."""
    return nearest_linear(table.to(stream.dtype), grid, stream.entry(stream.embedding[0]).dtype)


def rounded_to_nearest(stream: BlockwiseModel, outer: Params, scheme: Scheme) -> Params:
    """Copy what is no block's, with embedding and head rounded to nearest where the scheme rounds them."""
    tables = parameters_of(stream, scheme)
    return replaced(
        stream, outer, scheme, {name: _nearest(stream, outer[p], scheme.grid(name)) for p, name in tables.items()}
    )


@torch.no_grad()
def with_rounded_embedding(model: QuantizedModel, context: RunContext) -> QuantizedModel:
    """A copy whose embedding is rounded, where the scheme rounds it; kept in the journal."""
    stream, scheme, journal = model.stream, model.scheme, context.journal
    if scheme.embedding is None:
        return model
    name, grid = scheme.embedding
    with stage(TABLES_STAGE, 1, "tables") as done:
        if not (known := "embedding" in journal):
            exact = model.outer[stream.embedding[0]]
            table = _nearest(stream, exact, grid)
            error = float((table.weight() - exact.float()).square().sum() / exact.float().square().sum())
            write_table(journal, "embedding", table, error)
        done(again=known)
    return with_table(model, journal, "embedding", name)


@torch.no_grad()
def head_inputs(stream: BlockwiseModel, outer: Params, states: RowStates, mask: Tensor) -> Moments:
    """Moments of what the head reads, over the real tokens of states (N, T, d) after the last block, those of all
    processes; `mask` (N, T) tells which are real."""
    name, module = stream.head
    moments, end = Moments.zero(module.in_features, stream.device), stream.prepared(outer, stream.walk.leaving)
    thin = {one: end[one][:1] for one in (name, f"{name.removesuffix('.weight')}.bias") if one in end}

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        moments.add(args[0])

    hook = module.register_forward_pre_hook(see)
    try:
        for rows in micro_batches(len(states), states.shape[1]):
            hidden = states[rows].to(stream.device)
            stream.logits(hidden[mask[rows].to(hidden.device)], {**end, **thin})  # of one word: its input is wanted
    finally:
        hook.remove()
    return moments.everywhere()


def write_table(journal: Journal, page: str, table: Rounded, error: float) -> None:
    """Keep an embedding or a head in the journal, with its relative error."""
    journal.write(page, {"codes": table.codes, "scale": table.scale, "zero": table.zero}, {"error": error})


def with_table(model: QuantizedModel, journal: Journal, page: str, name: str) -> QuantizedModel:
    """A copy with the table `name` that the journal keeps."""
    barrier()  # the first process writes it, and the others may not have had to round it
    kept = {kind: tensor.to(model.stream.device) for kind, tensor in journal.read(page)[0].items()}
    tables = {name: Rounded(kept["codes"], kept["scale"], kept["zero"], model.scheme.grid(name))}
    outer = replaced(model.stream, model.outer, model.scheme, tables)
    return replace(model, outer=outer, tables={**model.tables, **tables})
