"""The config of a student with some of its teacher's blocks, channels, heads and neurons, and nothing else changed.

How wide a teacher is, is seen where its units lie (`calib.probe.units`), not read from its config. Numbers of that
config that are as large and called like it are made smaller; whether the library's model has the shapes then that a cut
leaves is for the caller to see.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from calib import BadInput
from calib.blockwise.skeleton import skeleton
from calib.probe.find import remembered, walk_of_config
from calib.probe.units import FFN, HEADS, HIDDEN, ModelUnits, PieceUnits, find_units

COUNTED = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")  # how many blocks come before others
NUMBERED = ("attn_layer_indices", "full_attn_idxs", "mlp_only_layers")  # which blocks are of a kind
# What configs call their widths.
CALLED_HIDDEN = re.compile(
    r"hidden_size|n_embe?d|d_model|d_embed|(embed_|model_|emb_)?dim|embedding_size|word_embed_proj_dim"
)
CALLED_HEADS = re.compile(r"num_attention_heads|n_heads?|num_heads|(decoder|encoder)_attention_heads")
CALLED_KV_HEADS = re.compile(r"num_key_value_heads|(num|n)_kv_heads|n_head_kv|multi_query_group_num|num_query_groups")
CALLED_FFN = re.compile(
    r"(moe_)?intermediate_size|n_inner|(decoder_|encoder_)?ffn_dim|ffn_hidden_size|inner_dim|d_ff|d_inner"
)


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

    def kept(self, block: int | None = None) -> dict[str, list[int]]:
        """Kind of units -> those that are kept, of kinds of which some may not be.

        Args:
            block: its number among those that are kept; None: what is no block's.
        """
        found = {} if self.hidden is None else {HIDDEN: self.hidden}
        if block is not None:
            for kind, units in ((HEADS, self.kv_heads), (FFN, self.ffn)):
                if units is not None:
                    found[kind] = units[block]
        return found

    def counts(self) -> dict[str, int]:
        """Kind of units -> how many a block keeps, of those that `kept` gives."""
        found = {} if self.hidden is None else {HIDDEN: len(self.hidden)}
        for kind, units in ((HEADS, self.kv_heads), (FFN, self.ffn)):
            if units is not None:
                found[kind] = max(map(len, units))
        return found


@dataclass(frozen=True)
class Widths:
    """How many units of each kind a model has, and of those of which it has none that can be told apart the reason."""

    counts: Mapping[str, int]
    missing: Mapping[str, str]
    group: int = 1  # query heads that share a key/value head
    head_dim: int = 0


_known = dict[str, ModelUnits]()  # by config


def units_of(config: PretrainedConfig) -> ModelUnits:
    """Find where the units of a model of this config lie, or remember it.  Raises BadInput."""
    return remembered(_known, config, lambda: _units(config))


def _units(config: PretrainedConfig) -> ModelUnits:
    walk = walk_of_config(config)
    if walk.static:
        return find_units(walk)
    reason = "its blocks are told of more than the hidden state"
    nothing = PieceUnits(missing=dict.fromkeys((HIDDEN, FFN, HEADS), reason))
    return ModelUnits((nothing,) * len(walk.calls), nothing, nothing)


def widths_of(config: PretrainedConfig) -> Widths:
    """Read the widths of a model off its units.  Raises BadInput."""
    units = units_of(config)
    counts, missing = dict[str, int](), dict[str, str]()
    pieces = [units.start, *units.blocks, units.end]
    for kind in (HIDDEN, FFN, HEADS):
        lying = pieces if kind == HIDDEN else units.blocks
        reason = next((piece.missing[kind] for piece in lying if kind in piece.missing), None)
        sizes = {p.kinds[kind].count for p in pieces if kind in p.kinds}
        if reason is None and len(sizes) == 1:
            counts[kind] = sizes.pop()
        else:
            missing[kind] = reason or "not every block has as many"
    heads = [block.kinds[HEADS] for block in units.blocks if HEADS in counts]
    shapes = {(one.copies, one.width) for one in heads}
    if len(shapes) > 1:
        missing[HEADS] = "heads of its blocks differ"
        del counts[HEADS]
    group, head_dim = shapes.pop() if len(shapes) == 1 else (1, 0)
    return Widths(counts, missing, group, head_dim)


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
    """The teacher's config with the student's sizes.  Raises BadInput."""
    return resized(config, cut.layers, cut.counts())


def resized(config: PretrainedConfig, layers: Sequence[int], to: Mapping[str, int]) -> PretrainedConfig:
    """The config of a model that has only these blocks, and so many units of these kinds.  Raises BadInput."""
    student = with_layers(config, layers)
    if not to:
        return student
    widths = widths_of(config)
    text, has = student.get_text_config(), widths.counts
    sizes = dict[re.Pattern[str], tuple[int, int]]()
    if HIDDEN in to:
        sizes[CALLED_HIDDEN] = has[HIDDEN], to[HIDDEN]
    if HEADS in to:
        sizes[CALLED_HEADS] = has[HEADS] * widths.group, to[HEADS] * widths.group
        sizes[CALLED_KV_HEADS] = has[HEADS], to[HEADS]
    if FFN in to:
        sizes[CALLED_FFN] = has[FFN], to[FFN]
    for pattern, (old, new) in sizes.items():
        for name, value in list(vars(text).items()):
            if pattern.fullmatch(name) and type(value) is int and value == old:
                setattr(text, name, new)
    for name, value in list(vars(text).items()):
        # What is not said is worked out of the hidden width, which changes.
        if value is None and CALLED_FFN.fullmatch(name) and FFN in has:
            setattr(text, name, to.get(FFN, has[FFN]))
    if says_head_dim(config):
        text.head_dim = _head_dim(
            config
        )  # said outright: else it would be the new hidden size by the new number of heads
    return student


def _head_dim(config: PretrainedConfig) -> int:
    """Width of a head as it is seen, or else as the library works it out."""
    text, widths = config.get_text_config(), widths_of(config)
    return widths.head_dim or getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def in_proportion(config: PretrainedConfig, to: Mapping[str, int]) -> bool:
    """Whether heads stay as wide as they are where they are as wide as the stream divided by their number."""
    widths = widths_of(config)
    has, every = widths.counts, widths.group * widths.head_dim
    if not {HIDDEN, HEADS} <= has.keys() or has[HIDDEN] != has[HEADS] * every or says_head_dim(config):
        return True
    return to.get(HIDDEN, has[HIDDEN]) == to.get(HEADS, has[HEADS]) * every


_says = dict[str, bool]()


def says_head_dim(config: PretrainedConfig) -> bool:
    """Whether models of this type have heads as wide as their config says, seen by building one with others."""
    key = config.to_json_string(use_diff=False)
    if key not in _says:
        other = deepcopy(config)
        try:
            other.get_text_config().head_dim = 2 * _head_dim(config)
            _says[key] = parameter_shapes(other) != parameter_shapes(config)
        except AttributeError:  # worked out by the config itself, or there are no heads
            _says[key] = False
        except BadInput:  # which it could not be without having been read
            _says[key] = True
    return _says[key]


def parameter_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters and stored buffers of a model of this config, by name.  Raises BadInput."""
    return shapes_in(skeleton(config, torch.device("cpu")))


def shapes_in(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters and stored buffers of a model, by name."""
    return {name: tuple(p.shape) for name, p in model.state_dict().items()}
