"""Where the parts of ten architectures are, written down by hand: what the probe finds is held against it.

One entry for each `model_type`, names as the checkpoint stores them. A reader takes its input from the residual stream,
a writer adds its output to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


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
    """The entry of a config, with a name for every expert."""
    architecture = ARCHITECTURES[config.model_type]
    if architecture.experts is None:
        return architecture
    count = config.num_experts if hasattr(config, "num_experts") else config.num_local_experts

    def each(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names[0].format(i) for i in range(count))

    return replace(
        architecture, gates=each(architecture.gates), ups=each(architecture.ups), downs=each(architecture.downs)
    )


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
    """Read a model's sizes from its config, by the names that every architecture of `ARCHITECTURES` has."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor", 1.0)
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * share),
        ffn=getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        vocab=config.vocab_size,
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
