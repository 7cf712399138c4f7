"""A smaller student cut out of its teacher: some of its blocks, of its heads, feed-forward neurons, hidden channels.

Blocks are chosen by what their absence costs: of those that turn the hidden state least (block influence,
arXiv:2403.03853) the one without which the teacher's distributions change least is left out, again and again. Widths
are chosen by what passes through them, with x the input of a linear W and means over the real tokens of the calibration
rows:

    neuron j             E[x_j^2] |W_j|^2, W the down projection: what the neuron writes to the stream
    key/value head g     tr(W_g E[x_g x_g^T] W_g^T), W the output projection: what g's query heads write
    hidden channel i     E[x_i^2] / sum_k E[x_k^2], x what attention and feed-forward read, summed over both and blocks

A norm between a writer and the stream counts with its gain. All experts of a block keep the same neurons, by what they
write together. Where heads, neurons and channels lie is found, and a cut is proved before it is made
(`compressor.pruning`).

Heads go by whole groups, a key/value head with the query heads that share it, and keep their width. Every block keeps
as many heads and neurons as any other, its own choice of them, and all the same hidden channels. Nothing is merged or
refitted: that is what distillation is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PretrainedConfig

from calib import BadInput
from calib.blockwise.linears import Linear
from calib.blockwise.model import BlockwiseModel, Params
from calib.blockwise.row_states import RowStates
from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import stop_if_asked
from calib.losses.chunked_head import chunks
from calib.losses.divergences import dense, forward_kl
from calib.probe.find import block_kind, walk_of_config
from calib.probe.units import FFN, HEADS, HIDDEN, ModelUnits, PieceUnits, Units
from calib.runtime.distributed import all_reduce_sum_, barrier, local_indices
from calib.runtime.progress import stage
from calib.stats.moments import Moments
from calib.stats.perplexity import LOGIT_COPIES, Logits
from compressor.distillation.options import StudentSize
from compressor.engine.blockwise_runs import embed_rows, logits_of, run_blocks
from compressor.engine.input_statistics import advance, input_moments
from compressor.engine.runtime_transforms import RuntimeTransforms, runtime_transforms
from compressor.pruning.narrowing import around, narrowed, narrowed_shapes
from compressor.pruning.widening import first_difference, prove_widths
from compressor.pruning.widths import (
    PruningPlan,
    Widths,
    parameter_shapes,
    shapes_in,
    student_config,
    units_of,
    widths_of,
    with_layers,
)


@dataclass(frozen=True)
class Importance:
    """Importance of every part, float64 and never negative: lists by block."""

    kv_heads: list[Tensor]  # (G,)
    ffn: list[Tensor]  # (f,)
    hidden: Tensor  # (d,)


def check_student_size(shape: StudentSize, stream: BlockwiseModel) -> None:
    """Raises BadInput where this teacher has no such student."""
    config, most = stream.config, {"layers": stream.layers}
    asked = [kind for kind in (HEADS, FFN, HIDDEN) if getattr(shape, kind) is not None]
    if asked:
        has = _widths(config, asked)
        most |= {kind: has.counts[kind] * (has.group if kind == HEADS else 1) for kind in asked}
        if shape.heads is not None and shape.heads % has.group:
            raise BadInput(
                f"heads: {shape.heads} were asked for, but {has.group} of the teacher's share one key/value head; ask "
                f"for a multiple of {has.group}"
            )
    for name, limit in most.items():
        count = getattr(shape, name)
        if count is not None and not 1 <= count <= limit:
            raise BadInput(f"{name}: the teacher has {limit}, {count} were asked for; ask for 1 to {limit}")
    if not stream.walk.static:
        raise BadInput(
            f"config.json: blocks of {config.model_type} are told of more than the hidden state, and cannot be left "
            "out one by one; give --student DIR"
        )
    plan = leading(shape, config, stream.layers)
    try:
        student = student_config(config, plan)
        student.validate()
    except StrictDataclassError as error:
        reason = str(error.__cause__ or error).splitlines()[-1].rstrip(".")
        raise BadInput(f"config.json: the library refuses such a student ({reason}); ask for another width") from error
    if shape.layers is not None:
        _check_blocks(stream, with_layers(config, plan.layers), plan.layers)
    if less := tuple(kind for kind in asked if getattr(shape, kind) < most[kind]):
        _check_widths(stream, student, plan, less)


def _widths(config: PretrainedConfig, asked: Sequence[str]) -> Widths:
    """Raises BadInput where units of these kinds are not known apart in this type."""
    has = widths_of(config)
    for kind in asked:
        if not has.counts:
            raise BadInput(
                f"{kind}: of this teacher only depth can be cut, as {has.missing[kind]}; ask for --layers alone"
            )
        if kind in has.missing:
            raise BadInput(f"{kind}: cannot be cut out of this teacher, as {has.missing[kind]}; leave out --{kind}")
    return has


def _check_widths(stream: BlockwiseModel, student: PretrainedConfig, plan: PruningPlan, less: tuple[str, ...]) -> None:
    """Raises BadInput where the library's model of the student's config is not what the cut leaves, or does not compute
    what it should."""
    config, units = stream.config, units_of(stream.config)
    for i, kind in product(range(stream.layers), (k for k in less if k != HIDDEN)):
        target = units.blocks[i].kinds[kind].target
        if target not in {one.parameter for one in stream.linears(i)}:
            raise BadInput(f"{kind}: cannot be cut out of this teacher, as {target} is no linear; leave out --{kind}")
    names = [stream.block_name(i) for i in range(stream.layers)]
    kept = [plan.kept(i) for i in range(len(plan.layers))]
    left = narrowed_shapes(shapes_in(stream.skeleton), units, names, plan.layers, kept)
    reason = first_difference(config, plan.counts(), left, parameter_shapes(student))
    proof = prove_widths(config, less)
    reason = reason or proof.reason
    if reason is None and proof.grows and len(units.end.gains) != 1:
        reason = "embeddings are multiplied by the root of their width, and no single gain makes up for it"
    if reason is not None:
        raise BadInput(f"{', '.join(less)}: cannot be cut out of this teacher, as {reason}; ask for other widths")


def _check_blocks(stream: BlockwiseModel, student: PretrainedConfig, layers: Sequence[int]) -> None:
    """Raises BadInput where blocks of the student would compute otherwise than those of the teacher's that they are:
    where its config says in a way that is not understood which block is of which kind."""
    try:
        walk = walk_of_config(student)
        same = [block_kind(module) for module in walk.modules] == [block_kind(stream.blocks[i]) for i in layers]
    except BadInput:
        same = False
    if not same:
        raise BadInput(
            f"layers: how the config of {student.model_type} says what each block is like is not understood, so that "
            "blocks of a student would not be the teacher's; give --student DIR"
        )


def leading(shape: StudentSize, config: PretrainedConfig, layers: int) -> PruningPlan:
    """A plan that keeps the first parts of every kind, as many as `shape` says, of a teacher of so many blocks."""
    kept = list(range(shape.layers or layers))
    group = 1 if shape.heads is None else widths_of(config).group
    return PruningPlan(
        kept,
        None if shape.heads is None else [list(range(shape.heads // group))] * len(kept),
        None if shape.ffn is None else [list(range(shape.ffn))] * len(kept),
        None if shape.hidden is None else list(range(shape.hidden)),
    )


def choose(stream: BlockwiseModel, corpus: Corpus, shape: StudentSize, context: RunContext) -> PruningPlan:
    """First blocks, then widths, by what passes through the blocks that are left.  Raises BadInput."""
    check_student_size(shape, stream)
    cut = leading(shape, stream.config, stream.layers)
    layers = choose_decoder_layers(stream, corpus, len(cut.layers), context)
    if shape.layers is not None:
        _check_blocks(stream, with_layers(stream.config, layers), layers)
    counts = cut.counts()
    if not counts:
        return PruningPlan(layers)
    found = importance(stream, corpus, layers, context)
    return PruningPlan(
        layers,
        [_most(scores, counts[HEADS]) for scores in found.kv_heads] if HEADS in counts else None,
        [_most(scores, counts[FFN]) for scores in found.ffn] if FFN in counts else None,
        _most(found.hidden, counts[HIDDEN]) if HIDDEN in counts else None,
    )


def _most(scores: Tensor, count: int) -> list[int]:
    """Where the `count` largest are, in order; of equals the first."""
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


CANDIDATES = 4  # blocks that are tried in each round: influence alone takes others than KL does (docs/LOG.md)


@torch.no_grad()
def choose_decoder_layers(
    stream: BlockwiseModel, corpus: Corpus, keep: int, context: RunContext, candidates: int = CANDIDATES
) -> list[int]:
    """Leave out the block without which mean KL(teacher || what is left) is least, until `keep` blocks are left.

    Tried are as many `candidates` as have the least influence; where there are as many as blocks, the choice is the
    greedy one. Hidden states take what memory `context` allows; its journal keeps every round.
    """
    left = list(range(stream.layers))
    if keep == len(left):
        return left
    influence = block_influence(stream, corpus, context) if candidates < len(left) else [0.0] * len(left)
    outer = stream.read_outer()
    whole = run_blocks(stream, corpus, outer, stream.reading, [RuntimeTransforms()] * len(left), context)
    teacher, context = logits_of(stream, corpus, outer, whole), context.without(whole.bytes_in_ram)
    with stage("choose blocks", sum(min(candidates, n) for n in range(keep + 1, len(left) + 1)), "blocks") as done:
        while len(left) > keep:
            page, tried = f"without-{len(left)}", sorted(sorted(left, key=lambda i: influence[i])[:candidates])
            if page not in context.journal:
                costs = dict[str, float]()
                for without, final in _without_each(stream, corpus, left, tried, outer, context):
                    costs[str(without)] = _mean_kl(
                        corpus, stream.vocab, teacher, logits_of(stream, corpus, outer, final)
                    )
                    done(f"without block {without}: KL {costs[str(without)]:.3g}")
                    stop_if_asked()
                del final  # whose room the next round needs
                context.journal.write(page, {}, costs)
                barrier()
            known = context.journal.notes(page)
            left.remove(min(tried, key=lambda i: known[str(i)]))
    return left


@torch.no_grad()
def block_influence(stream: BlockwiseModel, corpus: Corpus, context: RunContext) -> list[float]:
    """Measure how far each block turns the hidden state: 1 - the mean over real tokens of the cosine between the state
    before it and after it (arXiv:2403.03853, eq. 1), in one pass over the model; kept in the journal."""
    journal, found = context.journal, list[float]()
    if "influence" not in journal:
        states = embed_rows(stream, corpus, stream.read_start(), context)
        mask = corpus.mask[local_indices(len(corpus.ids))]
        with stage("block influence", stream.layers, "blocks") as done:
            for i, params in stream.reading(range(stream.layers)):
                sums = torch.zeros(2, dtype=torch.float64)
                with runtime_transforms(stream, i, RuntimeTransforms()):
                    for rows, batch in states.batches:
                        before = states[rows].to(stream.device)
                        after = stream.run(i, params, before.clone(), batch)
                        real = states.real(mask, sources=False)[rows]
                        turned = 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1).cpu()[real]
                        sums += torch.stack([turned.double().sum(), real.sum()])
                        states[rows] = after
                all_reduce_sum_([sums])
                found.append(float(sums[0] / sums[1].clamp(min=1)))
                done(f"block {i}: {found[-1]:.3g}")
        journal.write("influence", {}, {"by_block": found})
        barrier()
    return list(journal.notes("influence")["by_block"])


def _without_each(
    stream: BlockwiseModel, corpus: Corpus, left: list[int], tried: list[int], outer: Params, context: RunContext
) -> Iterator[tuple[int, RowStates]]:
    """(block, hidden states at the end of the others of `left`) for one of `tried` after the other; the states are used
    again."""
    before = embed_rows(stream, corpus, outer, context)
    store = context.without(before.bytes_in_ram).store(before.shape, before.dtype, stream.room)
    for position, without in enumerate(left[: left.index(tried[-1]) + 1]):
        if without not in tried:
            advance(stream, without, stream.read_block(without), before, RuntimeTransforms())
            continue
        states = RowStates(store, [(rows, batch.copy()) for rows, batch in before.batches])
        for rows, _ in before.batches:
            states[rows] = before[rows]
        for i, params in stream.reading(left[position + 1 :]):
            advance(stream, i, params, states, RuntimeTransforms())
        yield without, states
        advance(stream, without, stream.read_block(without), before, RuntimeTransforms())


def _mean_kl(corpus: Corpus, vocab: int, teacher: Logits, student: Logits) -> float:
    """KL(teacher || student) in nats, over every real token of every process's rows."""
    sums = torch.zeros(2, dtype=torch.float64)
    for row in local_indices(len(corpus.ids)):
        for positions in chunks(corpus.ids.shape[1], LOGIT_COPIES * vocab):
            real = corpus.mask[row, positions]
            apart = dense(forward_kl, teacher(row, positions), student(row, positions)).cpu()[real]
            sums += torch.stack([apart.double().sum(), real.sum()])
    all_reduce_sum_([sums])
    return float(sums[0] / sums[1].clamp(min=1))


@torch.no_grad()
def importance(stream: BlockwiseModel, corpus: Corpus, layers: Sequence[int], context: RunContext) -> Importance:
    """Measure how important the parts of the blocks `layers` are, run one after another as if there were no others.

    Heads and neurons that cannot be told apart have no importance: an empty list.
    """
    mask, units = corpus.mask[local_indices(len(corpus.ids))], units_of(stream.config)
    states = embed_rows(stream, corpus, stream.read_start(), context)
    kv_heads, ffn = list[Tensor](), list[Tensor]()
    hidden = torch.zeros(stream.hidden, dtype=torch.float64, device=stream.device)
    with stage("importance", len(layers), "blocks") as done:
        for i, params in stream.reading(layers):
            moments = input_moments(stream, i, params, states, mask, RuntimeTransforms(), advance=True)
            piece, seen = units.blocks[i], _by_parameter(stream.linears(i), moments)
            for energy, channels in _read(piece, seen):
                share = energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
                hidden.index_add_(0, channels.to(hidden.device), share)
            if (heads := piece.kinds.get(HEADS)) is not None:
                kv_heads.append(_by_head(_writing(params, piece, heads.target), seen[heads.target], heads))
            if (neurons := piece.kinds.get(FFN)) is not None:
                ffn.append(_by_channel(_writing(params, piece, neurons.target), seen[neurons.target]))
            del params, moments, seen
            done("")
    return Importance(kv_heads, ffn, hidden)


def _by_parameter(linears: Sequence[Linear], moments: Mapping[str, Moments]) -> dict[str, list[Moments]]:
    """Moments of the inputs of each matrix, of stacked ones one after the other."""
    seen = dict[str, dict[int | None, Moments]]()
    for one in linears:
        seen.setdefault(one.parameter, {})[one.expert] = moments[one.site]
    return {name: list(by_expert.values()) for name, by_expert in seen.items()}


def _read(piece: PieceUnits, seen: Mapping[str, list[Moments]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Energy of all that reads the stream, once where several read the same, and the channel of each input."""
    met = set[int]()
    for name, channels in piece.readers.items():
        if name in seen and id(seen[name][0]) not in met:
            met.add(id(seen[name][0]))
            yield sum((one.gram.diagonal() for one in seen[name][1:]), seen[name][0].gram.diagonal()), channels


def _writing(params: Params, piece: PieceUnits, writer: str) -> Tensor:
    """The weight (..., d, n) of a writer in float64, with the gain of the norm that stands between it and the
    stream."""
    weight, gain = params[writer].double(), piece.behind.get(writer)
    weight = weight.mT if piece.matrices[writer].transposed else weight
    return weight if gain is None else weight * (params[gain] + piece.gains[gain]).double()[:, None]


def _by_channel(weight: Tensor, inputs: Sequence[Moments]) -> Tensor:
    """E[x_j^2] |W_j|^2 for each input channel j, over all experts' tokens where there are some.  weight (d, n), or
    (experts, d, n) -> (n,)."""
    weights = weight[None] if weight.dim() == 2 else weight
    energy = [one.gram.diagonal() * w.square().sum(0) for one, w in zip(inputs, weights, strict=True)]
    return sum(energy[1:], energy[0]) / max(sum(one.count for one in inputs), 1)


def _by_head(weight: Tensor, inputs: Sequence[Moments], heads: Units) -> Tensor:
    """tr(W_g E[x_g x_g^T] W_g^T) for the input channels of each key/value head g, over all experts' tokens where there
    are some.  weight (d, n), or (experts, d, n) -> (G,)."""
    (units,) = (units for (name, _), units in heads.axes.items() if name == heads.target)
    order = units.argsort(stable=True).to(weight.device)  # of one head after the other

    def energy(w: Tensor, one: Moments) -> Tensor:
        w = w[:, order].unflatten(1, (heads.count, -1)).transpose(0, 1)
        runs = one.gram[order][:, order].unflatten(0, (heads.count, -1)).unflatten(2, (heads.count, -1))
        own = runs.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (G, n / G, n / G)
        return ((w @ own) * w).sum((1, 2))

    weights = weight[None] if weight.dim() == 2 else weight
    found = [energy(w, one) for one, w in zip(inputs, weights, strict=True)]
    return sum(found[1:], found[0]) / max(sum(one.count for one in inputs), 1)


def student_tensors(stream: BlockwiseModel, cut: PruningPlan) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the student's parameters, one after the other, on the CPU, in the dtypes of the teacher's.

    The gains of norms stay as they are, which is right where the channels left out are as large as the others.
    """
    units = units_of(stream.config) if cut.counts() else None
    grown = {} if units is None else _grown(stream, cut, units)
    for name in stream.outer:
        if name not in stream.tied:
            params = stream.read_parameters([name])
            if units is not None:
                params = narrowed(params, around(units), cut.kept())
            yield name, grown[name](params[name]) if name in grown else params[name]
    for new, old in enumerate(cut.layers):
        block, moved = stream.block_name(old), stream.block_name(new)
        params = {n.removeprefix(f"{block}."): t for n, t in stream.read_parameters(stream.parameters(old)).items()}
        if units is not None:
            params = narrowed(params, units.blocks[old], cut.kept(new))
        for name, tensor in params.items():
            yield f"{moved}.{name}", tensor


def _grown(stream: BlockwiseModel, cut: PruningPlan, units: ModelUnits) -> dict[str, Callable[[Tensor], Tensor]]:
    """What makes up for a library that multiplies embeddings by the root of their width, where it does (Gemma)."""
    if cut.hidden is None or len(cut.hidden) == stream.hidden or not prove_widths(stream.config, (HIDDEN,)).grows:
        return {}
    growth, ((gain, offset),) = math.sqrt(stream.hidden / len(cut.hidden)), units.end.gains.items()
    grown: dict[str, Callable[[Tensor], Tensor]] = {units.start.tables[0]: lambda w: w * growth}
    if stream.is_tied:  # the head has grown with the embedding
        grown[gain] = lambda w: ((w.double() + offset) / growth - offset).to(w.dtype)
    return grown
