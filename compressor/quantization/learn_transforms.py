"""Learn rotations and scales through fake quantization (OSTQuant, OpenReview rAcgDBdKnP, sections 3 and 4).

Student and teacher are the same weights: the teacher's answers are kept as top-k log-probabilities, the student's
weights are transformed and put on their grids anew in every step, one block in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from calib.blockwise.architectures import architecture_of, assembled, downs, linear_of, separated, sizes_of
from calib.blockwise.backward import BlockSequence
from calib.blockwise.model import WORKING, BlockwiseModel, Params
from calib.blockwise.walk import RowBatch
from calib.jobs.context import RunContext
from calib.jobs.training_loop import Group
from calib.quant.grid import fit_weights, on_grid, search_clip
from calib.quant.scheme import Grid, Scheme
from calib.runtime.device import allow_tf32, is_accelerator
from compressor.engine.rotations import (
    Rotation,
    hadamard,
    identity,
    nearest_orthogonal,
    principal_hadamard,
    random_hadamard,
)
from compressor.engine.runtime_transforms import RuntimeTransforms, runtime_transforms
from compressor.quantization.objective import CalibrationData, LearnedFunction, LearningResult, Objective, minimize
from compressor.quantization.transforms import (
    BlockTransform,
    absorb_gains,
    fold_block,
    unsupported_transforms,
    with_gain,
)

SCALES = ("attention_scale", "mlp_scale", "value_scale", "up_scale", "key_scale")
KEY_ROTATION = "key_rotation"  # stands among a block's parameters while it is learned


@dataclass(frozen=True)
class Transforms:
    """All transforms of a model: those that are folded into its weights, and those that run beside it."""

    residual: Tensor | None  # (d, d); None where the architecture does not admit it
    blocks: list[BlockTransform]
    online: list[RuntimeTransforms]

    def to(self, device: torch.device) -> Transforms:
        """Move all tensors to a device."""
        return Transforms(
            None if self.residual is None else self.residual.to(device),
            [t.to(device) for t in self.blocks],
            [o.to(device) for o in self.online],
        )


def initial_transforms(
    stream: BlockwiseModel, init: str, scheme: Scheme, *, online: bool, seed: int, rotate_residual: bool = True
) -> Transforms:
    """Transforms that learning starts from: scales of one, and rotations that are "identity", "hadamard" (random) or
    "womi".

    `online` adds the Hadamard at the down projection and, where keys are quantized, one on queries and keys. Without
    `rotate_residual`, or where the architecture does not admit it, the residual stream stays as it is.
    """
    a, sizes = architecture_of(stream.config), sizes_of(stream.config)
    generator = torch.Generator().manual_seed(seed)
    g, h = sizes.kv_heads, sizes.head_dim

    def readers() -> Iterator[Tensor]:
        for i in range(sizes.layers):
            params = absorb_gains(separated(stream.read_block(i), stream.config), a)
            for norm in (a.attention_norm, a.mlp_norm):
                yield from (params[f"{reader}.weight"] for reader in a.readers_of(norm or ""))

    def outputs(i: int, head: int) -> Iterator[Tensor]:
        o = separated(stream.read_block(i), stream.config)[f"{a.o}.weight"].unflatten(1, (g, sizes.group, h))
        yield o[:, head].flatten(0, 1)

    starts: dict[str, Callable[[int, Callable[[], Iterator[Tensor]]], Tensor]] = {
        "identity": lambda n, _: identity(n),
        "hadamard": lambda n, _: random_hadamard(n, generator),
        "womi": lambda n, rows: principal_hadamard(rows(), n, generator),
    }
    start = starts[init]
    rotate_residual = rotate_residual and "residual_rotation" not in unsupported_transforms(stream.config)
    residual = start(sizes.hidden, readers) if rotate_residual else None
    keys = torch.stack([hadamard(h)] * g) if online and scheme.kv else None
    blocks = [
        replace(
            BlockTransform.identity(sizes, a),
            value_rotation=torch.stack([start(h, partial(outputs, i, head)) for head in range(g)]),
        )
        for i in range(sizes.layers)
    ]
    run_time = [
        RuntimeTransforms(
            scheme.activations, scheme.kv, downs(stream.config, stream.linears(i)) if online else frozenset(), keys
        )
        for i in range(sizes.layers)
    ]
    return Transforms(residual, blocks, run_time).to(stream.device)


def free_parameters(start: Transforms, config: PretrainedConfig) -> int:
    """Count the numbers that are learned: angles of rotations, and scales."""
    rotations = [start.residual, *(block.value_rotation for block in start.blocks)]
    rotations += [online.key_rotation for online in start.online]
    angles = sum(r.numel() * (r.shape[-1] - 1) // (2 * r.shape[-1]) for r in rotations if r is not None)
    scales = {*SCALES, "key_angle"} - unsupported_transforms(config).keys()
    return angles + sum(getattr(block, name).numel() for block in start.blocks for name in scales)


class LearnedBlock:
    """The free parameters of one block: logarithms of scales (which so can never cross zero), angles, rotations."""

    def __init__(
        self, start: BlockTransform, online: RuntimeTransforms, fixed: Collection[str], dtype: torch.dtype
    ) -> None:
        """What is named in `fixed` stays as it is in `start`."""
        # The rotation is kept once, where it is learned.
        self._start, self._online = replace(start, value_rotation=torch.empty(0)).to(dtype), online
        self.logs = {name: getattr(self._start, name).log().requires_grad_() for name in SCALES if name not in fixed}
        self.angle = self._start.key_angle.clone().requires_grad_("key_angle" not in fixed)
        self.value = Rotation(start.value_rotation, dtype)
        self.key = None if online.key_rotation is None else Rotation(online.key_rotation, dtype)

    def transform(self) -> BlockTransform:
        """The block's transforms, differentiable in the parameters."""
        scales = {name: log.exp() for name, log in self.logs.items()}
        return replace(self._start, **scales, key_angle=self.angle, value_rotation=self.value.value())

    def online(self) -> RuntimeTransforms:
        """The block's run-time transforms, differentiable in the parameters."""
        return self._online if self.key is None else replace(self._online, key_rotation=self.key.value())

    @property
    def rotations(self) -> list[Rotation]:
        """Rotations of the block that are learned."""
        return [self.value] if self.key is None else [self.value, self.key]

    @property
    def scales(self) -> list[Tensor]:
        """Parameters of the block other than rotations."""
        return [*self.logs.values(), *([self.angle] if self.angle.requires_grad else [])]


class LearnedModel:
    """The learned transforms of a model, and the pass through its blocks that a step takes with them."""

    def __init__(self, stream: BlockwiseModel, start: Transforms, scheme: Scheme, budget: int) -> None:
        """Where `budget` bytes have no room for a block's graph, less of it is kept and more made again."""
        dtype, fixed = stream.dtype, unsupported_transforms(stream.config)
        self._stream, self._scheme = stream, scheme
        free = stream.room.free if is_accelerator(stream.device) else budget
        self._roomy = free >= WORKING * stream.block_bytes
        self._ahead = budget >= 2 * stream.block_bytes
        self.residual = None if start.residual is None else Rotation(start.residual, dtype)
        self.blocks = [LearnedBlock(t, o, fixed, dtype) for t, o in zip(start.blocks, start.online, strict=True)]
        self._online = start.online
        self._turn: Tensor | None = None  # the residual rotation of this step, a leaf that gathers gradients
        self._clip = [self._no_clip() for _ in self.blocks]
        self._unsearched = set[int]()  # blocks whose clip ratios are to be searched anew

    def _no_clip(self) -> dict[str, Tensor]:
        config, groups = self._stream.config, self._scheme.weights.groups
        sizes, architecture = sizes_of(config), architecture_of(config)
        outputs = sizes.outputs(architecture)
        return {
            name: torch.ones(outputs[name], groups(width), dtype=self._stream.dtype).to(self._stream.device)
            for name, width in sizes.inputs(architecture)
        }

    @property
    def rotations(self) -> list[Rotation]:
        """All rotations that are learned, the residual stream's first."""
        return [*([self.residual] if self.residual else []), *(r for block in self.blocks for r in block.rotations)]

    def state(self) -> dict[str, Tensor]:
        """Tensors that change in place beside the parameters."""
        points = {f"point.{i}": r.point for i, r in enumerate(self.rotations)}
        clips = {f"clip.{i}.{name}": ratio for i, clip in enumerate(self._clip) for name, ratio in clip.items()}
        return points | clips

    def begin(self, step: int) -> None:
        """Prepare a step: the residual rotation of this step, and clip ratios that are due."""
        if step % RESEARCH == 0:
            self._unsearched = set(range(len(self.blocks)))
        self._turn = None if self.residual is None else self.residual.value().detach().requires_grad_()

    def end(self) -> None:
        """The gathered gradient of the residual rotation, passed on to its free parameters."""
        if self.residual is not None and self._turn is not None and self._turn.grad is not None:
            self.residual.value().backward(self._turn.grad)

    def prepare(self, i: int, stored: Params) -> Params:
        """Block i transformed and on its grid."""
        raw = separated(stored, self._stream.config)
        transform = self.blocks[i].transform()
        if i in self._unsearched:
            self._unsearched.remove(i)
            with torch.no_grad():
                for name, ratio in self._clip[i].items():
                    value = self._folded(i, f"{name}.weight", self._alone(raw, f"{name}.weight"), transform)
                    ratio.copy_(search_clip(value, self._grid(i, name), COARSE))
        made = {name: self._prepared(i, name, self._alone(raw, name), transform) for name in raw}
        params = assembled(made, self._stream.config)
        key = self.blocks[i].key
        return params if key is None else params | {KEY_ROTATION: key.value()}

    def _alone(self, raw: Params, name: str) -> Params:
        return with_gain(raw, name, architecture_of(self._stream.config), rotated=self.residual is not None)

    def _grid(self, i: int, linear: str) -> Grid:
        """Of what the architecture calls `linear`."""
        return self._scheme.grid(linear_of(self._stream.config, self._stream.linears(i), linear).name)

    def _prepared(self, i: int, name: str, part: Params, transform: BlockTransform) -> Tensor:
        if self._roomy:
            return self._on_grid(i, name, part, transform)
        # Made again on the way back, so that what its transform leaves behind exists for one weight at a time.
        return checkpoint(self._on_grid, i, name, part, transform, use_reentrant=False, preserve_rng_state=False)

    def _on_grid(self, i: int, name: str, part: Params, transform: BlockTransform) -> Tensor:
        value = self._folded(i, name, part, transform)
        linear = name.removesuffix(".weight")
        if linear not in self._clip[i]:
            return value
        grid = self._grid(i, linear)
        return on_grid(value, *fit_weights(value, grid, self._clip[i][linear]), grid)

    def _folded(self, i: int, name: str, part: Params, transform: BlockTransform) -> Tensor:
        """One parameter, as `_alone` has it."""
        config, down = self._stream.config, bool(self._online[i].hadamard)
        return fold_block(
            part, transform, self._turn, architecture_of(config), sizes_of(config), hadamard_down=down
        )[name]  # fmt: skip

    def run(self, i: int, params: Params, hidden: Tensor, batch: RowBatch) -> Tensor:
        """Run block i with given parameters on hidden states (B, T, d)."""
        params, online = dict(params), self._online[i]
        if KEY_ROTATION in params:
            online = replace(online, key_rotation=params.pop(KEY_ROTATION))
        with runtime_transforms(self._stream, i, online):
            return self._stream.run(i, params, hidden, batch)

    @property
    def walk(self) -> BlockSequence[dict[str, Tensor]]:
        """The sequence of blocks that the backward pass goes through."""
        stream = self._stream
        reading = partial(stream.reading, ahead=self._ahead)
        return BlockSequence(stream.layers, reading, self.prepare, self.run, stream.room)

    def function(self) -> LearnedFunction[dict[str, Tensor]]:
        """Embedding and head stay as they are, tied or not: what is rotated is what leaves and enters them."""
        stream, start, end = self._stream, self._stream.read_start(), self._stream.read_end()

        def embed(batch: RowBatch) -> Tensor:
            hidden = stream.start(batch, start)
            return hidden if self._turn is None else hidden @ self._turn

        def logits(hidden: Tensor) -> Tensor:
            # Turned back before the final norm, whose gain is no diagonal in the rotated basis.
            return stream.logits(hidden if self._turn is None else hidden @ self._turn.mT, end)

        return LearnedFunction(stream, self.walk, embed, logits, self.end)

    @torch.no_grad()
    def transforms(self) -> Transforms:
        """The learned transforms in float64, with rotations that are orthogonal to that precision."""
        return Transforms(
            None if self.residual is None else nearest_orthogonal(self.residual.point),
            [_exact(block.transform()) for block in self.blocks],
            [_exact_online(block.online()) for block in self.blocks],
        )


def learn_transforms(
    stream: BlockwiseModel,
    data: CalibrationData,
    start: Transforms,
    scheme: Scheme,
    config: Objective,
    context: RunContext,
    *,
    lr_rotation: float,
    lr_scale: float,
) -> tuple[Transforms, LearningResult]:
    """Descend from `start`.  -> transforms whose rotations are orthogonal to float64, and how it went: where that says
    so, `start` is better.

    Weights are rounded as `scheme` says, activations as start.online does. lr_rotation is in about radians per step,
    lr_scale in logarithms of scales.
    """
    model = LearnedModel(stream, start, scheme, context.memory_budget)
    del start  # in double precision, and of no more use

    def step_done(step: int, loss: float) -> None:
        for rotation in model.rotations:
            rotation.retract()
        context.after_step(step, loss)

    groups = [
        Group([r.tangent for r in model.rotations], lr_rotation),
        Group([s for block in model.blocks for s in block.scales], lr_scale),
    ]
    with allow_tf32(stream.device):
        matched = minimize(
            model.function(), data, groups, config, replace(context, after_step=step_done), keep=model.state(),
            before_step=model.begin,
        )  # fmt: skip
    return model.transforms(), matched


# While learning, clip ratios are searched every few steps on a coarser list and held fixed in between.
RESEARCH = 20
COARSE = tuple(1 - 0.05 * i for i in range(13))


def _exact(t: BlockTransform) -> BlockTransform:
    """In float64, with rotations that are orthogonal to that precision: learning in float32 drifts by about 1e-6."""
    t = t.to(torch.float64)
    return replace(t, value_rotation=nearest_orthogonal(t.value_rotation))


def _exact_online(online: RuntimeTransforms) -> RuntimeTransforms:
    if online.key_rotation is None:
        return online
    return replace(online, key_rotation=nearest_orthogonal(online.key_rotation))
