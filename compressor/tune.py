"""After rounding: codes stay, what is 16-bit anyway gives way.

Scales of the grids and gains of the norms are factors that a quantized checkpoint stores in 16 bits whatever their
value, so they may be chosen freely. Here they are learned, with every code fixed, on the same objective as the
transforms: the whole model's answers, GPTQ's error included (the idea of PEQA, arXiv:2305.14152, with a teacher).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from calib.corpus import Corpus
from calib.divergence import Top
from calib.fit import Group
from calib.stream import Stream
from compressor.grid import as_stored, decode
from compressor.match import Objective, match
from compressor.online import Online, running
from compressor.rounding import RoundedBlock
from compressor.walks import Ends


class TunedBlock:
    """A rounded block and the logarithms of the factors by which its scales and gains change: signs stay."""

    def __init__(self, block: RoundedBlock, gains: Sequence[str], dtype: torch.dtype) -> None:
        self._block, self._dtype = block, dtype
        self.scales = {n: torch.zeros_like(r.scale, dtype=dtype, requires_grad=True) for n, r in block.linears.items()}
        self.gains = {n: torch.zeros_like(block.rest[n], dtype=dtype, requires_grad=True) for n in gains}

    def params(self) -> dict[str, Tensor]:
        """What the block runs with, as a function of the factors."""
        params = {name: tensor.to(self._dtype) for name, tensor in self._block.rest.items()}
        for name, log in self.gains.items():
            params[name] = params[name] * log.exp()
        for name, log in self.scales.items():
            rounded = self._block.linears[name]
            params[f"{name}.weight"] = decode(
                rounded.codes, rounded.scale.to(self._dtype) * log.exp(), rounded.zero, rounded.grid
            )
        return params

    @torch.no_grad()
    def block(self) -> RoundedBlock:
        """The block with the factors worked in, everything as it will be stored."""
        rest, linears = dict(self._block.rest), dict(self._block.linears)
        for name, log in self.gains.items():
            rest[name] = (rest[name].to(self._dtype) * log.exp()).to(rest[name].dtype)
        for name, log in self.scales.items():
            scale = linears[name].scale
            linears[name] = replace(linears[name], scale=as_stored(scale.to(self._dtype) * log.exp(), scale.dtype))
        return RoundedBlock(linears, rest)


def tune(
    stream: Stream,
    corpus: Corpus,
    top: Top,
    ends: Ends,
    blocks: Sequence[RoundedBlock],
    online: Sequence[Online],
    how: Objective,
    *,
    lr: float,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[list[RoundedBlock], list[float]]:
    """-> the blocks with new scales and gains, and the loss of every step."""
    gains = [
        name
        for name in (
            stream.anatomy.attention_norm,
            stream.anatomy.mlp_norm,
            stream.anatomy.q_norm,
            stream.anatomy.k_norm,
        )
        if name
    ]
    tuned = [TunedBlock(block, [f"{g}.weight" for g in gains], stream.dtype) for block in blocks]
    embedding, head = ends.embedding.to(stream.dtype), ends.logits_head(stream.dtype)
    no_gain = torch.ones_like(head[0])

    def run_block(i: int, hidden: Tensor) -> Tensor:
        with running(stream.blocks[i], online[i], stream.anatomy):
            return stream.run(i, tuned[i].params(), hidden)

    def forward(ids: Tensor) -> Tensor:
        hidden = embedding[ids]
        for i in range(len(tuned)):
            hidden = checkpoint(run_block, i, hidden, use_reentrant=False)
        return stream.final_norm(hidden, no_gain)

    factors = [f for block in tuned for f in (*block.scales.values(), *block.gains.values())]
    curve = match(forward, head, corpus, top, [Group(factors, lr)], how, after_step=after_step)
    return [block.block() for block in tuned], curve
