"""A smaller student cut out of its teacher: some of its blocks, of its heads, feed-forward neurons, hidden channels.

Blocks are chosen by what their absence costs: the one without which the teacher's distributions change least is left
out, again and again. Widths are chosen by what passes through them, with x the input of a linear W and means over the
real tokens of the calibration rows:

    neuron j             E[x_j^2] |W_j|^2, W the down projection: what the neuron writes to the stream
    key/value head g     tr(W_g E[x_g x_g^T] W_g^T), W the output projection: what g's query heads write
    hidden channel i     E[x_i^2] / sum_k E[x_k^2], x what attention and feed-forward read, summed over both and blocks

A norm between a writer and the stream counts with its gain.

Heads go by whole groups, a key/value head with the query heads that share it, and keep their width. Every block keeps
as many heads and neurons as any other, its own choice of them, and all the same hidden channels. Nothing is merged or
refitted: that is what distillation is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PretrainedConfig

from calib import BadInput
from calib.blockwise.architectures import (
    Architecture,
    Sizes,
    architecture_of,
    assembled,
    linear_of,
    parts_unknown,
    separated,
    sizes_of,
)
from calib.blockwise.model import BlockwiseModel, Params
from calib.blockwise.row_states import RowStates
from calib.data.corpus import Corpus
from calib.jobs.context import RunContext
from calib.jobs.journal import stop_if_asked
from calib.losses.chunked_head import chunks
from calib.losses.divergences import dense, forward_kl
from calib.probe.find import block_kind, walk_of_config
from calib.runtime.distributed import all_reduce_sum_, local_indices
from calib.runtime.progress import stage
from calib.stats.moments import Moments
from calib.stats.perplexity import LOGIT_COPIES, Logits
from compressor.distillation.options import StudentSize
from compressor.engine.blockwise_runs import embed_rows, logits_of, run_blocks
from compressor.engine.input_statistics import advance, input_moments
from compressor.engine.runtime_transforms import RuntimeTransforms

COUNTED = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")  # how many blocks come before others
NUMBERED = ("attn_layer_indices", "full_attn_idxs", "mlp_only_layers")  # which blocks are of a kind


@dataclass(frozen=True)
class PruningPlan:
    """Parts of the teacher that the student keeps, in order.

    Args:
        layers: its blocks.
        kv_heads: key/value heads of each kept block; None: all of every block's, as of the two that follow.
        ffn: feed-forward neurons of each kept block.
        hidden: channels of the stream.
    """

    layers: list[int]
    kv_heads: list[list[int]] | None = None
    ffn: list[list[int]] | None = None
    hidden: list[int] | None = None


@dataclass(frozen=True)
class Importance:
    """Importance of every part, float64 and never negative: lists by block."""

    kv_heads: list[Tensor]  # (G,)
    ffn: list[Tensor]  # (f,)
    hidden: Tensor  # (d,)


def check_student_size(shape: StudentSize, stream: BlockwiseModel) -> None:
    """Raises BadInput where this teacher has no such student."""
    config, most = stream.config, {"layers": stream.layers}
    if asked := [name for name in ("heads", "ffn", "hidden") if getattr(shape, name) is not None]:
        has = _sizes(config, asked[0])
        most |= {"heads": has.heads, "ffn": has.ffn, "hidden": has.hidden}
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
    if shape.layers is not None and not asked:
        _check_blocks(stream, student, plan.layers)


def _sizes(config: PretrainedConfig, asked: str) -> Sizes:
    """Raises BadInput where the widths of this type cannot be cut."""
    reason = parts_unknown(config)
    if reason is None and architecture_of(config).experts:
        reason = f"{config.model_type} has experts"
    if reason is not None:
        raise BadInput(f"{asked}: of this teacher only depth can be cut, as {reason}; ask for --layers alone")
    return sizes_of(config)


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
    if (shape.heads, shape.ffn, shape.hidden) == (None, None, None):
        return PruningPlan(kept)
    has = sizes_of(config)
    kv_heads, ffn = list(range((shape.heads or has.heads) // has.group)), list(range(shape.ffn or has.ffn))
    return PruningPlan(kept, [kv_heads] * len(kept), [ffn] * len(kept), list(range(shape.hidden or has.hidden)))


def choose(stream: BlockwiseModel, corpus: Corpus, shape: StudentSize, context: RunContext) -> PruningPlan:
    """First blocks, then widths, by what passes through the blocks that are left.  Raises BadInput."""
    check_student_size(shape, stream)
    cut = leading(shape, stream.config, stream.layers)
    layers = choose_decoder_layers(stream, corpus, len(cut.layers), context)
    if cut.kv_heads is None or cut.ffn is None or cut.hidden is None:
        plan = PruningPlan(layers)
        _check_blocks(stream, student_config(stream.config, plan), layers)
        return plan
    found = importance(stream, corpus, layers, context)
    return PruningPlan(
        layers,
        [_most(scores, len(cut.kv_heads[0])) for scores in found.kv_heads],
        [_most(scores, len(cut.ffn[0])) for scores in found.ffn],
        _most(found.hidden, len(cut.hidden)),
    )


def _most(scores: Tensor, count: int) -> list[int]:
    """Where the `count` largest are, in order; of equals the first."""
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


@torch.no_grad()
def choose_decoder_layers(stream: BlockwiseModel, corpus: Corpus, keep: int, context: RunContext) -> list[int]:
    """Leave out the block without which mean KL(teacher || what is left) is least, until `keep` blocks are left.

    Hidden states take what memory `context` allows.
    """
    left = list(range(stream.layers))
    if keep == len(left):
        return left
    outer = stream.read_outer()
    whole = run_blocks(stream, corpus, outer, stream.reading, [RuntimeTransforms()] * len(left), context)
    teacher, context = logits_of(stream, corpus, outer, whole), context.without(whole.bytes_in_ram)
    with stage("choose blocks", sum(range(keep + 1, len(left) + 1)), "candidates") as done:
        while len(left) > keep:
            costs = []
            for without, final in _without_each(stream, corpus, left, outer, context):
                costs.append(_mean_kl(corpus, stream.vocab, teacher, logits_of(stream, corpus, outer, final)))
                done(f"without block {without}: KL {costs[-1]:.3g}")
                stop_if_asked()
            del left[costs.index(min(costs))], final  # whose room the next round needs
    return left


def _without_each(
    stream: BlockwiseModel, corpus: Corpus, left: list[int], outer: Params, context: RunContext
) -> Iterator[tuple[int, RowStates]]:
    """(block, hidden states at the end of the others of `left`) for one after the other; the states are used again."""
    before = embed_rows(stream, corpus, outer, context)
    store = context.without(before.bytes_in_ram).store(before.shape, before.dtype, stream.room)
    for position, without in enumerate(left):
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
    """Measure how important the parts of the blocks `layers` are, run one after another as if there were no others."""
    config, mask = stream.config, corpus.mask[local_indices(len(corpus.ids))]
    a, sizes = architecture_of(config), sizes_of(config)
    states = embed_rows(stream, corpus, stream.read_start(), context)
    kv_heads, ffn, hidden = [], [], torch.zeros(stream.hidden, dtype=torch.float64, device=stream.device)
    with stage("importance", len(layers), "blocks") as done:
        for i, params in stream.reading(layers):
            moments = input_moments(stream, i, params, states, mask, RuntimeTransforms(), advance=True)
            seen = {name: moments[linear_of(config, stream.linears(i), name).site] for name in a.linears}
            parts = separated(params, config)
            for site in (a.q, a.gates[0]):
                energy = seen[site].gram.diagonal()
                hidden += energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
            kv_heads.append(_by_head(_writing(parts, a, a.o), seen[a.o], sizes.kv_heads))
            ffn.append(_by_channel(_writing(parts, a, a.downs[0]), seen[a.downs[0]]))
            del params, parts, moments, seen
            done("")
    return Importance(kv_heads, ffn, hidden)


def _writing(params: Params, a: Architecture, writer: str) -> Tensor:
    """The weight (d, n) of a writer in float64, with the gain of the norm that stands between it and the stream."""
    weight, norm = params[f"{writer}.weight"].double(), dict(zip(a.writers, a.writer_norms, strict=False)).get(writer)
    return weight if norm is None else weight * params[f"{norm}.weight"].double()[:, None]


def _by_channel(weight: Tensor, inputs: Moments) -> Tensor:
    """E[x_j^2] |W_j|^2 for each input channel j.  weight (d, n) -> (n,)."""
    return inputs.gram.diagonal() * weight.square().sum(0) / max(inputs.count, 1)


def _by_head(weight: Tensor, inputs: Moments, heads: int) -> Tensor:
    """tr(W_g E[x_g x_g^T] W_g^T) for the `heads` runs g of input channels.  weight (d, n) -> (heads,)."""
    weight = weight.unflatten(1, (heads, -1)).transpose(0, 1)
    runs = inputs.gram.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))
    own = runs.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (heads, n / heads, n / heads)
    return ((weight @ own) * weight).sum((1, 2)) / max(inputs.count, 1)


def with_layers(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The config of a model that has only these blocks, with what it lists for each of them."""
    student = deepcopy(config)
    text = student.get_text_config()
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count and name not in NUMBERED:
            setattr(text, name, [value[i] for i in layers])
        elif isinstance(value, list) and name in NUMBERED:
            setattr(text, name, [new for new, old in enumerate(layers) if old in value])
        elif name in COUNTED and isinstance(value, int):
            setattr(text, name, sum(i < value for i in layers))
    text.num_hidden_layers = len(layers)
    if getattr(config, "global_attn_every_n_layers", None) is not None:  # what ModernBERT's older readers go by
        whole = [kind == "full_attention" for kind in student.layer_types]
        every = (n for n in range(1, len(whole) + 1) if all(whole[i] == (i % n == 0) for i in range(len(whole))))
        student.global_attn_every_n_layers = next(every, None)  # none: those readers stop, instead of being wrong
    return student


def student_config(config: PretrainedConfig, cut: PruningPlan) -> PretrainedConfig:
    """The teacher's config with the student's sizes."""
    student = with_layers(config, cut.layers)
    if cut.kv_heads is None or cut.ffn is None or cut.hidden is None:
        return student
    has = sizes_of(config)
    student.num_key_value_heads = len(cut.kv_heads[0])
    student.num_attention_heads = len(cut.kv_heads[0]) * has.group
    student.head_dim = has.head_dim  # said outright: else the library would divide the new hidden size by the new heads
    if architecture_of(config).experts is None:
        student.intermediate_size = len(cut.ffn[0])
    student.hidden_size = len(cut.hidden)
    return student


def student_tensors(stream: BlockwiseModel, cut: PruningPlan) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the student's parameters, one after the other, on the CPU, in the dtypes of the teacher's.

    The gains of norms stay as they are, which is right where the channels left out are as large as the others.
    """
    for name in stream.outer:
        if name not in stream.tied and (cut.hidden is None or name not in _outer_names(stream)):
            yield name, stream.read_parameters([name])[name]
    if cut.hidden is not None:
        yield from _outer_tensors(stream, torch.tensor(cut.hidden))
    for new, old in enumerate(cut.layers):
        block, moved = stream.block_name(old), stream.block_name(new)
        params = {n.removeprefix(f"{block}."): t for n, t in stream.read_parameters(stream.parameters(old)).items()}
        if cut.kv_heads is not None and cut.ffn is not None and cut.hidden is not None:
            params = _narrowed(stream.config, params, cut.kv_heads[new], cut.ffn[new], cut.hidden)
        for name, tensor in params.items():
            yield f"{moved}.{name}", tensor


def _outer_names(stream: BlockwiseModel) -> set[str]:
    a = architecture_of(stream.config)
    return {f"{name}.weight" for name in (a.embed, a.final_norm, a.head)}


def _outer_tensors(stream: BlockwiseModel, hidden: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Embedding, final norm and head with some channels."""
    a, growth = architecture_of(stream.config), _embedding_growth(stream, len(hidden))

    def read(module: str) -> Tensor:
        name = f"{module}.weight"
        return stream.read_parameters([name])[name]

    yield f"{a.embed}.weight", read(a.embed)[:, hidden] * growth
    gain = read(a.final_norm)[hidden]
    if stream.tied and growth != 1:  # the head has grown with the embedding
        gain = ((gain.double() + a.gain_offset) / growth - a.gain_offset).to(gain.dtype)
    yield f"{a.final_norm}.weight", gain
    if not stream.tied:
        yield f"{a.head}.weight", read(a.head)[:, hidden]


def _narrowed(
    config: PretrainedConfig, params: Params, kv_heads: list[int], ffn: list[int], hidden: list[int]
) -> dict[str, Tensor]:
    """Parameters of a block with some of its heads, neurons and channels."""
    kept = _kept(
        architecture_of(config), sizes_of(config), torch.tensor(hidden), torch.tensor(kv_heads), torch.tensor(ffn)
    )
    parts = dict[str, Tensor]()
    for name, tensor in separated(params, config, factors=False).items():
        parts[name] = tensor
        for axis, channels in enumerate(kept.get(name, ())):
            parts[name] = parts[name].index_select(axis, channels)
    return assembled(parts, config, factors=False)


def _embedding_growth(stream: BlockwiseModel, hidden: int) -> float:
    """What makes up for a library that multiplies embeddings by the root of their width, where it does (Gemma)."""
    name = f"{architecture_of(stream.config).embed}.weight"
    ones = torch.ones(1, 1, device=stream.device).expand(stream.vocab, stream.hidden)
    embedded = stream.start(stream.batch(torch.zeros(1, 1, dtype=torch.int64)), {name: ones.to(stream.dtype)})
    return math.sqrt(stream.hidden / hidden) if embedded.flatten()[0] != 1 else 1.0


def _kept(
    a: Architecture, sizes: Sizes, hidden: Tensor, kv_heads: Tensor, ffn: Tensor
) -> dict[str, tuple[Tensor, ...]]:
    """Name in the architecture -> the channels to keep along each axis.  Routers and norms of single heads stay
    whole."""

    def channels(width: int) -> Tensor:
        return (kv_heads[:, None] * width + torch.arange(width)).flatten()

    keys, queries = channels(sizes.head_dim), channels(sizes.group * sizes.head_dim)
    into = dict.fromkeys(a.linears, hidden) | {a.o: queries} | dict.fromkeys(a.downs, ffn)
    out = {a.q: queries, a.k: keys, a.v: keys}
    out |= dict.fromkeys(a.writers, hidden) | dict.fromkeys((*a.gates, *a.ups), ffn)
    kept: dict[str, tuple[Tensor, ...]] = {f"{name}.weight": (out[name], into[name]) for name in out}
    kept |= {f"{name}.bias": (out[name],) for name in out}
    kept |= {f"{norm}.weight": (hidden,) for norm in (a.attention_norm, a.mlp_norm, *a.writer_norms) if norm}
    if a.q_norm and a.k_norm and a.qk_norm_over == "all":
        kept |= {f"{a.q_norm}.weight": (queries,), f"{a.k_norm}.weight": (keys,)}
    return kept
