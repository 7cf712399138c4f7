"""Learn rotations and scales through fake quantization (OSTQuant, OpenReview rAcgDBdKnP, sections 3 and 4).

Student and teacher are the same weights: the teacher's answers are kept as top-k log-probabilities, the student's
weights are transformed and put on their grids anew in every step. The model's weights are held in memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from calib.corpus import Corpus
from calib.divergence import Top
from calib.fit import Group
from calib.stream import Stream
from compressor.fold import BlockTransform, absorb_gains, fold_block
from compressor.grid import Grid, fit_weights, on_grid, search_clip
from compressor.match import Objective, match
from compressor.online import Online, running
from compressor.rotate import (
    Rotation,
    hadamard,
    identity,
    nearest_orthogonal,
    principal_hadamard,
    random_hadamard,
)
from compressor.scheme import Scheme

SCALES = ("attention_scale", "mlp_scale", "value_scale", "up_scale", "key_scale")


@dataclass(frozen=True)
class Transforms:
    """Everything that is folded into a model or runs beside it."""

    residual: Tensor  # (d, d)
    blocks: list[BlockTransform]
    online: list[Online]

    def to(self, device: torch.device) -> Transforms:
        return Transforms(
            self.residual.to(device), [t.to(device) for t in self.blocks], [o.to(device) for o in self.online]
        )


def initial(stream: Stream, init: str, scheme: Scheme, *, online: bool, seed: int) -> Transforms:
    """Where learning starts: scales of one, and rotations that are "identity", "hadamard" (random) or "womi".

    `online` adds the Hadamard at the down projection and, where keys are quantized, one on queries and keys.
    """
    a, sizes, generator = stream.anatomy, stream.sizes, torch.Generator().manual_seed(seed)
    g, h = sizes.kv_heads, sizes.head_dim

    def readers() -> Iterator[Tensor]:
        for i in range(sizes.layers):
            params = absorb_gains(stream.read_block(i), a)
            for norm in (a.attention_norm, a.mlp_norm):
                yield from (params[f"{reader}.weight"] for reader in a.readers_of(norm))

    def outputs(i: int) -> list[Callable[[], Iterator[Tensor]]]:
        o = stream.read(f"{a.blocks}.{i}.{a.o}")["weight"].unflatten(1, (g, sizes.group, h))
        return [lambda head=head: iter([o[:, head].flatten(0, 1)]) for head in range(g)]  # type: ignore[misc]

    starts: dict[str, Callable[[int, Callable[[], Iterator[Tensor]]], Tensor]] = {
        "identity": lambda n, _: identity(n),
        "hadamard": lambda n, _: random_hadamard(n, generator),
        "womi": lambda n, rows: principal_hadamard(rows(), n, generator),
    }
    start = starts[init]
    residual = start(sizes.hidden, readers)
    keys = torch.stack([hadamard(h)] * g) if online and scheme.kv else None
    blocks = [
        replace(
            BlockTransform.identity(sizes, a),
            value_rotation=torch.stack([start(h, rows) for rows in outputs(i)]),
        )
        for i in range(sizes.layers)
    ]
    run_time = Online(scheme.activations, scheme.kv, hadamard_down=online, key_rotation=keys)
    return Transforms(residual, blocks, [run_time] * sizes.layers).to(stream.device)


class LearnedBlock:
    """The free parameters of one block: logarithms of scales (which so can never cross zero), angles, rotations."""

    def __init__(self, start: BlockTransform, online: Online) -> None:
        self.logs = {name: getattr(start, name).float().log().requires_grad_() for name in SCALES}
        self.angle = start.key_angle.float().clone().requires_grad_()
        self.value = Rotation(start.value_rotation)
        self.key = None if online.key_rotation is None else Rotation(online.key_rotation)
        self._online = online

    def transform(self) -> BlockTransform:
        scales = {name: log.exp() for name, log in self.logs.items()}
        return BlockTransform(**scales, key_angle=self.angle, value_rotation=self.value.value())

    def online(self) -> Online:
        return self._online if self.key is None else replace(self._online, key_rotation=self.key.value())

    @property
    def rotations(self) -> list[Rotation]:
        return [self.value] if self.key is None else [self.value, self.key]

    @property
    def scales(self) -> list[Tensor]:
        return [*self.logs.values(), self.angle]


def learn(
    stream: Stream,
    corpus: Corpus,
    top: Top,
    start: Transforms,
    grid: Grid,
    how: Objective,
    *,
    lr_rotation: float,
    lr_scale: float,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Transforms, list[float]]:
    """Descend from `start`.  -> transforms whose rotations are orthogonal to float64, and the loss of every step.

    corpus (N, T) and top (N, T, k) are the calibration rows and the float model's answers on them; `grid` is that of
    the weights, activations are rounded as start.online says.
    """
    blocks = [absorb_gains(stream.read_block(i), stream.anatomy) for i in range(stream.sizes.layers)]
    embedding, final_gain = stream.read_embedding(), stream.read_final_gain()
    residual = Rotation(start.residual)
    learned = [LearnedBlock(t, online) for t, online in zip(start.blocks, start.online, strict=True)]
    ratios: list[dict[str, Tensor]] = [{} for _ in blocks]
    hadamard_down = any(online.hadamard_down for online in start.online)

    def run_block(i: int, hidden: Tensor, r: Tensor) -> Tensor:
        params = fold_block(
            blocks[i], learned[i].transform(), r, stream.anatomy, stream.sizes, hadamard_down=hadamard_down
        )
        for name in stream.anatomy.linears:
            weight = params[f"{name}.weight"]
            if name not in ratios[i]:
                ratios[i][name] = search_clip(weight.detach(), grid, COARSE)
            params[f"{name}.weight"] = on_grid(weight, *fit_weights(weight, grid, ratios[i][name]), grid)
        with running(stream.blocks[i], learned[i].online(), stream.anatomy):
            return stream.run(i, params, hidden)

    def forward(ids: Tensor) -> Tensor:
        r = residual.value()
        hidden = embedding[ids] @ r
        for i in range(len(blocks)):
            # Only block inputs are kept; everything inside is computed again on the way back.
            hidden = checkpoint(run_block, i, hidden, r, use_reentrant=False)
        # Back in the old basis: embedding and head stay as they are, tied or not, and cost nothing to rotate.
        return stream.final_norm(hidden, torch.ones_like(final_gain)) @ r.mT

    def before_step(step: int) -> None:
        if step % RESEARCH == 0:
            for block_ratios in ratios:
                block_ratios.clear()

    rotations = [residual, *(r for block in learned for r in block.rotations)]

    def step_done(step: int, loss: float) -> None:
        for rotation in rotations:
            rotation.retract()
        after_step(step, loss)

    groups = [
        Group([r.tangent for r in rotations], lr_rotation),
        Group([s for block in learned for s in block.scales], lr_scale),
    ]
    head = stream.read_head() * final_gain
    curve = match(forward, head, corpus, top, groups, how, before_step, step_done)
    with torch.no_grad():
        return Transforms(
            nearest_orthogonal(residual.point),
            [_exact(block.transform()) for block in learned],
            [_exact_online(block.online()) for block in learned],
        ), curve


# While learning, clip ratios are searched every few steps on a coarser list and held fixed in between.
RESEARCH = 20
COARSE = tuple(1 - 0.05 * i for i in range(13))


def _exact(t: BlockTransform) -> BlockTransform:
    """In float64, with rotations that are orthogonal to that precision: learning in float32 drifts by about 1e-6."""
    t = t.to(torch.float64)
    return replace(t, value_rotation=nearest_orthogonal(t.value_rotation))


def _exact_online(online: Online) -> Online:
    if online.key_rotation is None:
        return online
    return replace(online, key_rotation=nearest_orthogonal(online.key_rotation))
