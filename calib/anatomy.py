"""Where the parts of a transformer are: one entry for each `model_type`, names as `transformers` gives them.

A reader takes its input from the residual stream, a writer adds its output to it. To teach the toolbox a further
architecture, add an entry to `ANATOMIES` (and a line to `tests/calib/test_anatomy.py`, which checks every entry
against the library's own class).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from calib import BadInput


@dataclass(frozen=True)
class Anatomy:
    """Module names: the first five from the root of the causal LM, the rest from a block."""

    embed: str = "model.embed_tokens"
    blocks: str = "model.layers"
    rotary: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    q_norm: str | None = None  # RMS norms over the head dimension, between the projection and the rotary embedding
    k_norm: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear of a block, in the order in which data meets them."""
        return (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)

    def readers_of(self, norm: str) -> tuple[str, ...]:
        return (self.q, self.k, self.v) if norm == self.attention_norm else (self.gate, self.up)


ANATOMIES = {
    "llama": Anatomy(),
    "mistral": Anatomy(),
    "qwen2": Anatomy(),
    "qwen3": Anatomy(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
}


def anatomy_of(model_type: str | None) -> Anatomy:
    """Raises BadInput, naming the architectures that are known, for any other."""
    if not isinstance(model_type, str) or model_type not in ANATOMIES:
        known = ", ".join(ANATOMIES)
        raise BadInput(f"config.json: model_type '{model_type}' is not supported; give one of {known}")
    return ANATOMIES[model_type]


@dataclass(frozen=True)
class Sizes:
    """The widths that folds and grids need, read from a config."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    def inputs(self, anatomy: Anatomy) -> Iterator[tuple[str, int]]:
        """(name, input width) of every linear of a block."""
        for name in anatomy.linears:
            yield name, {anatomy.o: self.heads * self.head_dim, anatomy.down: self.ffn}.get(name, self.hidden)


def sizes_of(config: PretrainedConfig) -> Sizes:
    heads = config.num_attention_heads
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
    )
