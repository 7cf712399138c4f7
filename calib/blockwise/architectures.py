"""Where the parts of a transformer are: one entry for each `model_type`, names as the checkpoint stores them.

A reader takes its input from the residual stream, a writer adds its output to it. To teach the toolbox a further
architecture, add an entry to `ARCHITECTURES` (and its sizes to `tests/tiny.py`; the tests that run over every entry
compare it with the library's own class).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from calib import BadInput

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from calib.blockwise.linears import Linear

MAX_DIMENSION = (
    2**24
)  # of a width or a number of heads or blocks: more is a mistake, and would be built before it is seen
MOST_EXPERTS = 2**16


@dataclass(frozen=True)
class Architecture:
    """Module names: the first five from the root of the causal LM, the rest from a block.

    A linear is named for what it computes, also where the checkpoint keeps several in one tensor (`fused`) or the
    library's class stacks one for each expert (`experts`). `gates`, `ups` and `downs` hold one name each, or one for
    every expert; "{}" stands for the expert's number until `architecture_of` has seen the config.
    """

    embed: str = "model.embed_tokens"
    blocks: str = "model.layers"
    rotary: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"  # before the readers; None where they read the stream as it is
    mlp_norm: str | None = "post_attention_layernorm"
    writer_norms: tuple[str, ...] = ()  # between a writer and the stream
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gates: tuple[str, ...] = ("mlp.gate_proj",)
    ups: tuple[str, ...] = ("mlp.up_proj",)
    downs: tuple[str, ...] = ("mlp.down_proj",)
    q_norm: str | None = None  # between the projection and the rotary embedding
    k_norm: str | None = None
    qk_norm_over: Literal["head", "all"] = "head"  # what those two normalise: each head by itself, or all at once
    gain_offset: float = 0.0  # norms multiply by weight + this

    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # stored linear -> the linears it is cut into
    experts: str | None = None  # the library's module that stacks the experts' weights
    router: tuple[str, str] | None = None  # its weight, as stored and in the library's class; it is never quantized

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear of a block, in the order in which data meets them."""
        experts = zip(self.gates, self.ups, self.downs, strict=True)
        return (self.q, self.k, self.v, self.o, *(name for expert in experts for name in expert))

    @property
    def writers(self) -> tuple[str, ...]:
        """Linears whose outputs are added to the residual stream."""
        return (self.o, *self.downs)

    @property
    def norms(self) -> tuple[str, ...]:
        """Every norm of a block."""
        names = (self.attention_norm, self.mlp_norm, *self.writer_norms, self.q_norm, self.k_norm)
        return tuple(name for name in names if name)

    def readers_of(self, norm: str) -> tuple[str, ...]:
        """Linears that read the output of a norm."""
        if norm == self.attention_norm:
            return (self.q, self.k, self.v)
        gates_and_ups = tuple(n for pair in zip(self.gates, self.ups, strict=True) for n in pair)
        return (*gates_and_ups, self.router[0].removesuffix(".weight")) if self.router else gates_and_ups


_SANDWICH = Architecture(
    mlp_norm="pre_feedforward_layernorm",
    writer_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    gain_offset=1.0,
)
_NORMED_HEADS = Architecture(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
ARCHITECTURES = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": _NORMED_HEADS,
    "gemma2": _SANDWICH,
    "gemma3_text": replace(_SANDWICH, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    "phi3": Architecture(
        fused={
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        }
    ),
    "olmo2": replace(
        _NORMED_HEADS,
        qk_norm_over="all",
        attention_norm=None,
        mlp_norm=None,
        writer_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "mixtral": Architecture(
        gates=("block_sparse_moe.experts.{}.w1",),
        ups=("block_sparse_moe.experts.{}.w3",),
        downs=("block_sparse_moe.experts.{}.w2",),
        experts="mlp.experts",
        router=("block_sparse_moe.gate.weight", "mlp.gate.weight"),
    ),
    "qwen3_moe": replace(
        _NORMED_HEADS,
        gates=("mlp.experts.{}.gate_proj",),
        ups=("mlp.experts.{}.up_proj",),
        downs=("mlp.experts.{}.down_proj",),
        experts="mlp.experts",
        router=("mlp.gate.weight", "mlp.gate.weight"),
    ),
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Raises BadInput, naming the architectures that are known, for any other."""
    architecture = known_architecture(config.model_type)
    if architecture.experts is None:
        return architecture
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise BadInput(
            f"config.json: {config.model_type} with some blocks dense and some of experts is not supported; "
            "give a model whose mlp_only_layers is empty and whose decoder_sparse_step is 1"
        )
    count = config.num_experts if hasattr(config, "num_experts") else config.num_local_experts
    if type(count) is not int or not 1 <= count <= MOST_EXPERTS:
        raise BadInput(f"config.json: {count} is no number of experts; mend the config")

    def each(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names[0].format(i) for i in range(count))

    return replace(
        architecture, gates=each(architecture.gates), ups=each(architecture.ups), downs=each(architecture.downs)
    )


def known_architecture(model_type: object) -> Architecture:
    """The entry as it stands, before the config is read.  Raises BadInput."""
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise BadInput(
            f"config.json: model_type '{model_type}' is not supported; give one of {', '.join(ARCHITECTURES)}, or add "
            "it (CONTRIBUTING.md, 'Adding things')"
        )
    return ARCHITECTURES[model_type]


@dataclass(frozen=True)
class Sizes:
    """The widths that folds and grids need, read from a config."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int  # leading channels of a head that the rotary embedding turns
    ffn: int  # of one expert, where there are experts
    vocab: int

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    def inputs(self, architecture: Architecture) -> Iterator[tuple[str, int]]:
        """(name, input width) of every linear of a block."""
        widths = {architecture.o: self.heads * self.head_dim} | dict.fromkeys(architecture.downs, self.ffn)
        for name in architecture.linears:
            yield name, widths.get(name, self.hidden)

    def outputs(self, architecture: Architecture) -> dict[str, int]:
        """Output width of every linear of a block."""
        attention = {architecture.q: self.heads * self.head_dim} | dict.fromkeys(
            (architecture.k, architecture.v), self.kv_heads * self.head_dim
        )
        return (
            attention
            | dict.fromkeys(architecture.writers, self.hidden)
            | dict.fromkeys((*architecture.gates, *architecture.ups), self.ffn)
        )


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Read a model's sizes from its config, by the names that every architecture of `ARCHITECTURES` has.  Raises
    BadInput."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads, vocab = config.num_attention_heads, config.vocab_size
    ffn = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    found = {
        "number of blocks": layers, "width": hidden, "number of heads": heads, "inner width": ffn, "vocabulary": vocab,
        "number of key/value heads": config.num_key_value_heads, "width of a head": getattr(config, "head_dim", 1) or 1,
    }  # fmt: skip
    for what, number in found.items():
        if type(number) is not int or not 1 <= number <= MAX_DIMENSION:
            raise BadInput(
                f"config.json: the {what} is {number!r}; it must be a whole number from 1 to {MAX_DIMENSION}"
            )
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor", 1.0) if isinstance(rope, dict) else None
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise BadInput(f"config.json: rope_parameters are {rope!r}; mend the config")
    return Sizes(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * share),
        ffn=ffn,
        vocab=vocab,
    )


def separated(params: Mapping[str, Tensor], config: PretrainedConfig, *, factors: bool = True) -> dict[str, Tensor]:
    """Cut the parameters of the library's block into one tensor for each linear, by the names of its architecture;
    with `factors` norm weights become what they multiply by."""
    a, sizes, params = architecture_of(config), sizes_of(config), dict(params)
    outputs = sizes.outputs(a)
    for whole, parts in a.fused.items():
        for suffix in ("weight", "bias"):
            if f"{whole}.{suffix}" in params:
                cut = params.pop(f"{whole}.{suffix}").split([outputs[part] for part in parts])
                params |= {f"{part}.{suffix}": piece for part, piece in zip(parts, cut, strict=True)}
    if a.router:
        params[a.router[0]] = params.pop(a.router[1])
    if a.experts:
        pairs, downs = params.pop(f"{a.experts}.gate_up_proj"), params.pop(f"{a.experts}.down_proj")
        for gate, up, down, pair, of in zip(a.gates, a.ups, a.downs, pairs, downs, strict=True):
            params[f"{gate}.weight"], params[f"{up}.weight"] = pair.chunk(2)
            params[f"{down}.weight"] = of
    if a.gain_offset and factors:
        params |= {f"{norm}.weight": params[f"{norm}.weight"] + a.gain_offset for norm in a.norms}
    return params


def assembled(params: Mapping[str, Tensor], config: PretrainedConfig, *, factors: bool = True) -> dict[str, Tensor]:
    """The inverse of `separated`."""
    import torch

    architecture, params = architecture_of(config), dict(params)
    if architecture.gain_offset and factors:
        params |= {f"{norm}.weight": params[f"{norm}.weight"] - architecture.gain_offset for norm in architecture.norms}
    for whole, parts in architecture.fused.items():
        for suffix in ("weight", "bias"):
            if f"{parts[0]}.{suffix}" in params:
                params[f"{whole}.{suffix}"] = torch.cat([params.pop(f"{part}.{suffix}") for part in parts])
    if architecture.router:
        params[architecture.router[1]] = params.pop(architecture.router[0])
    if architecture.experts:

        def take(names: Iterable[str]) -> list[Tensor]:
            return [params.pop(f"{name}.weight") for name in names]

        gates_and_ups = zip(take(architecture.gates), take(architecture.ups), strict=True)
        params[f"{architecture.experts}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in gates_and_ups])
        params[f"{architecture.experts}.down_proj"] = torch.stack(take(architecture.downs))
    return params


def linear_of(config: PretrainedConfig, linears: Iterable[Linear], name: str) -> Linear:
    """The linear of a block that holds what its architecture calls `name`."""
    a = architecture_of(config)
    whole = next((w for w, parts in a.fused.items() if name in parts), name)
    if not a.experts or name in (a.q, a.k, a.v, a.o):
        return next(linear for linear in linears if linear.module == whole)
    kinds: dict[str, tuple[tuple[str, ...], str, int]] = {
        "gate": (a.gates, "in", 0), "up": (a.ups, "in", 1), "down": (a.downs, "down", 0),
    }  # fmt: skip
    names, step, place = next(kind for kind in kinds.values() if name in kind[0])
    return [one for one in linears if one.step == step and one.expert == names.index(name)][place]


def parts_unknown(config: PretrainedConfig) -> str | None:
    """Why nothing is known of how a model's parts hang together, so that it has no transforms; None where it is."""
    try:
        architecture_of(config)
    except BadInput:
        return f"how the parts of a model of type {config.model_type} hang together is not known"
    return None
