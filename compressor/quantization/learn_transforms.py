"""Learn rotations and scales through fake quantization (OSTQuant, OpenReview rAcgDBdKnP, sections 3 and 4).

Student and teacher are the same weights: the teacher's answers are kept as top-k log-probabilities, the student's
weights are transformed and put on their grids anew in every step, one block in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from calib.blockwise.backward import BlockSequence
from calib.blockwise.linears import Linear, put_together
from calib.blockwise.model import WORKING, BlockwiseModel, Params
from calib.blockwise.walk import RowBatch
from calib.jobs.context import RunContext
from calib.jobs.training_loop import Group
from calib.probe.find import found_parts
from calib.probe.parts import FoundParts, ModelParts, Pair
from calib.quant.grid import fit_weights, on_grid, search_clip
from calib.quant.scheme import Scheme
from calib.runtime.device import allow_tf32, is_accelerator
from compressor.engine.rotations import (
    BlockTurn,
    Rotation,
    hadamard,
    identity,
    nearest_orthogonal,
    principal_hadamard,
    random_hadamard,
    signs_of,
    to_ones,
    with_ones_fixed,
)
from compressor.engine.runtime_transforms import RuntimeTransforms, downs, runtime_transforms
from compressor.quantization.objective import CalibrationData, LearnedFunction, LearningResult, Objective, minimize
from compressor.transforms.fold import (
    BlockFold,
    BlockTransform,
    DenseTurn,
    fold_other,
    identity_transform,
)
from compressor.transforms.proof import parts_of

KEY_ROTATION = "key_rotation"  # stands among a block's parameters while it is learned
ANGLES = "plane_angles"  # of all kinds of transforms the one that is neither a positive factor nor a rotation
ROTATIONS = "pair_rotations"


@dataclass(frozen=True)
class Transforms:
    """All transforms of a model: those that are folded into its weights, and those that run beside it.

    Args:
        parts: of the model, that they are folded into.
        residual: rotation of the residual stream, (d, d); None where there is none.
        blocks: transforms of every block.
        online: what runs beside every block.
        rotation_block: width of the blocks of neighbouring coordinates that the residual rotation is learned in,
            behind the Hadamard that it starts as; None: it is learned whole.
    """

    parts: ModelParts
    residual: Tensor | None
    blocks: list[BlockTransform]
    online: list[RuntimeTransforms]
    rotation_block: int | None = None

    def to(self, device: torch.device) -> Transforms:
        """Move all tensors to a device."""
        return Transforms(
            self.parts,
            None if self.residual is None else self.residual.to(device),
            [t.to(device) for t in self.blocks],
            [o.to(device) for o in self.online],
            self.rotation_block,
        )


def initial_transforms(
    stream: BlockwiseModel,
    init: str,
    scheme: Scheme,
    *,
    online: bool,
    seed: int,
    rotate_residual: bool = True,
    parts: ModelParts | None = None,
    rotation_block: int | None = None,
) -> Transforms:
    """Transforms that learning starts from: scales of one, and rotations that are "identity", "hadamard" (random) or
    "womi".

    `online` adds the Hadamard at the down projection and, where keys are quantized, one on queries and keys. Without
    `rotate_residual`, or where the model does not admit it, the residual stream stays as it is. `parts`: of the model,
    by default as far as transforms of them hold for drawn weights.
    """
    parts = parts or parts_of(stream)
    generator = torch.Generator().manual_seed(seed)

    def readers() -> Iterator[Tensor]:
        for i, found in enumerate(parts.blocks):
            yield from _reading(found, stream.read_block(i), stream.linears(i))

    def outputs(i: int, pair: Pair, group: int) -> Iterator[Tensor]:
        columns = torch.tensor(pair.columns[group])
        for w in _matrices(parts.blocks[i], pair.target, stream.read_block(i), stream.linears(i)):
            yield w[:, columns].flatten(0, 1)

    starts: dict[str, Callable[[int, Callable[[], Iterator[Tensor]]], Tensor]] = {
        "identity": lambda n, _: identity(n),
        "hadamard": lambda n, _: random_hadamard(n, generator),
        "womi": lambda n, rows: principal_hadamard(rows(), n, generator),
    }
    start, residual = starts[init], None
    if rotate_residual and parts.obstacle is None:
        if parts.centred:
            residual = with_ones_fixed(start(stream.hidden - 1, lambda: (to_ones(w)[:, 1:] for w in readers())))
        else:
            residual = start(stream.hidden, readers)
    blocks = [
        replace(
            identity_transform(found),
            pair_rotations={
                pair.name: torch.stack(
                    [start(len(rows), partial(outputs, i, pair, group)) for group, rows in enumerate(pair.rows)]
                )
                for pair in found.pairs
                if pair.rotates
            },
        )
        for i, found in enumerate(parts.blocks)
    ]
    run_time = _run_time(stream, scheme, online=online)
    return Transforms(parts, residual, blocks, run_time, rotation_block).to(stream.device)


def _run_time(stream: BlockwiseModel, scheme: Scheme, *, online: bool) -> list[RuntimeTransforms]:
    """What runs beside every block, of the parts as whoever loads the output finds them."""
    return [
        RuntimeTransforms(
            scheme.activations,
            scheme.kv,
            downs(found, stream.linears(i)) if online else frozenset(),
            _key_rotation(found) if online and scheme.has_own_keys else None,
        )
        for i, found in enumerate(found_parts(stream).blocks)
    ]


def _key_rotation(found: FoundParts) -> Tensor | None:
    """Where keys of a block's one attention layer rotate from."""
    if len(found.attention) != 1:
        return None
    layer = found.attention[0]
    return torch.stack([hadamard(layer.width)] * layer.kv_heads)


def _matrices(found: FoundParts, name: str, params: Params, linears: Sequence[Linear]) -> Iterator[Tensor]:
    """The matrices (out, in) of a parameter, one after the other."""
    own = [one for one in linears if one.parameter == name]
    yield from (one.of(params) for one in own)
    if not own:
        whole, matrix = params[name], found.matrices[name]
        whole = whole.mT if matrix.transposed else whole
        yield from whole if matrix.experts else [whole]


def _reading(found: FoundParts, params: Params, linears: Sequence[Linear]) -> Iterator[Tensor]:
    """Matrices (out, d) that read the residual stream, with the gains of the norms before them."""
    for norm in found.norms:
        gain = 1.0 if norm.gain is None else params[norm.gain] + norm.offset
        for reader in norm.readers:
            yield from (w * gain for w in _matrices(found, reader, params, linears))
    for reader in found.bare:
        yield from _matrices(found, reader, params, linears)


def free_parameters(start: Transforms) -> int:
    """Count the numbers that are learned: angles of rotations, and scales."""
    rotations = [r for block in start.blocks for r in block.pair_rotations.values()]
    rotations += [online.key_rotation for online in start.online if online.key_rotation is not None]
    angles = sum(r.numel() * (r.shape[-1] - 1) // (2 * r.shape[-1]) for r in rotations)
    if start.residual is not None:
        d = len(start.residual) - start.parts.centred
        angles += d * ((start.rotation_block or d) - 1) // 2
    scales = [t for block in start.blocks for kind, of in block.kinds.items() if kind != ROTATIONS for t in of.values()]
    return angles + sum(t.numel() for t in scales)


class LearnedBlock:
    """The free parameters of one block: logarithms of scales (which so can never cross zero), angles, rotations."""

    def __init__(self, start: BlockTransform, online: RuntimeTransforms, dtype: torch.dtype) -> None:
        kinds, self._online = start.to(dtype).kinds, online
        self._logs = {
            kind: {name: t.log().requires_grad_() for name, t in of.items()}
            for kind, of in kinds.items()
            if kind not in (ANGLES, ROTATIONS)
        }
        self._angles = {name: t.clone().requires_grad_() for name, t in kinds[ANGLES].items()}
        self._rotations = {name: Rotation(t, dtype) for name, t in start.pair_rotations.items()}
        self.key = None if online.key_rotation is None else Rotation(online.key_rotation, dtype)

    def transform(self) -> BlockTransform:
        """The block's transforms, differentiable in the parameters."""
        return BlockTransform(
            **{kind: {name: log.exp() for name, log in of.items()} for kind, of in self._logs.items()},
            plane_angles=self._angles,
            pair_rotations={name: rotation.value() for name, rotation in self._rotations.items()},
        )

    def online(self) -> RuntimeTransforms:
        """The block's run-time transforms, differentiable in the parameters."""
        return self._online if self.key is None else replace(self._online, key_rotation=self.key.value())

    @property
    def rotations(self) -> list[Rotation]:
        """Rotations of the block that are learned."""
        return [*self._rotations.values(), *([] if self.key is None else [self.key])]

    @property
    def scales(self) -> list[Tensor]:
        """Parameters of the block other than rotations."""
        return [*(log for of in self._logs.values() for log in of.values()), *self._angles.values()]


class LearnedModel:
    """The learned transforms of a model, and the pass through its blocks that a step takes with them."""

    def __init__(self, stream: BlockwiseModel, start: Transforms, scheme: Scheme, budget: int) -> None:
        """Where `budget` bytes have no room for a block's graph, less of it is kept and more made again."""
        dtype, self._parts = stream.dtype, start.parts
        self._stream, self._scheme = stream, scheme
        free = stream.room.free if is_accelerator(stream.device) else budget
        self._roomy = free >= WORKING * stream.block_bytes
        self._ahead = budget >= 2 * stream.block_bytes
        self._block, self._signs = start.rotation_block, None
        if start.residual is not None and self._block is not None:
            signs = signs_of(start.residual)
            self._signs = None if signs is None else signs.to(dtype)
        self.residual = None if start.residual is None else Rotation(self._framed(start.residual), dtype)
        self.blocks = [LearnedBlock(t, o, dtype) for t, o in zip(start.blocks, start.online, strict=True)]
        self._folds = list(map(BlockFold, start.parts.blocks))
        self._online = start.online
        self._turn: Tensor | None = None  # the residual rotation of this step, a leaf that gathers gradients
        self._clip = [self._no_clip(i) for i in range(len(self.blocks))]
        self._unsearched = set[int]()  # blocks whose clip ratios are to be searched anew

    def _no_clip(self, i: int) -> dict[str, Tensor]:
        stream, groups = self._stream, self._scheme.weights.groups
        return {
            one.name: torch.ones(one.shape[0], groups(one.shape[1]), dtype=stream.dtype, device=stream.device)
            for one in stream.linears(i)
        }

    def _framed(self, rotation: Tensor) -> Tensor:
        """What of a residual rotation is free: blocks behind its start, all of it, or what turns beside the vector of
        ones."""
        if self._block is not None:
            return torch.eye(self._block).to(rotation).repeat(len(rotation) // self._block, 1, 1)
        return to_ones(to_ones(rotation).mT).mT[1:, 1:] if self._parts.centred else rotation

    def _whole(self, free: Tensor) -> Tensor:
        """The inverse of `_framed`."""
        return with_ones_fixed(free) if self._parts.centred else free

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
        if self.residual is not None:
            self._turn = self._whole(self.residual.value()).detach().requires_grad_()

    def end(self) -> None:
        """The gathered gradient of the residual rotation, passed on to its free parameters."""
        if self.residual is not None and self._turn is not None and self._turn.grad is not None:
            self._whole(self.residual.value()).backward(self._turn.grad)

    def prepare(self, i: int, stored: Params) -> Params:
        """Block i transformed and on its grid."""
        transform, linears, turn = self.blocks[i].transform(), self._stream.linears(i), self._turning
        if i in self._unsearched:
            self._unsearched.remove(i)
            with torch.no_grad():
                for one in linears:
                    value = self._folded(i, one, stored, transform)
                    self._clip[i][one.name].copy_(search_clip(value, self._scheme.grid(one.name), COARSE))
        made = put_together(linears, {one.name: self._prepared(i, one, stored, transform) for one in linears})
        params = {
            name: made[name] if name in made else fold_other(name, stored, self._folds[i], transform, turn)
            for name in stored
        }
        key = self.blocks[i].key
        return params if key is None else params | {KEY_ROTATION: key.value()}

    @property
    def _turning(self) -> DenseTurn | BlockTurn | None:
        if self._turn is None:
            return None
        return DenseTurn(self._turn) if self._block is None else BlockTurn(self._turn, self._signs)

    def _prepared(self, i: int, one: Linear, stored: Params, transform: BlockTransform) -> Tensor:
        if self._roomy:
            return self._on_grid(i, one, stored, transform)
        # Made again on the way back, so that what its transform leaves behind exists for one weight at a time.
        return checkpoint(self._on_grid, i, one, stored, transform, use_reentrant=False, preserve_rng_state=False)

    def _on_grid(self, i: int, one: Linear, stored: Params, transform: BlockTransform) -> Tensor:
        value, grid = self._folded(i, one, stored, transform), self._scheme.grid(one.name)
        return on_grid(value, *fit_weights(value, grid, self._clip[i][one.name]), grid)

    def _folded(self, i: int, one: Linear, stored: Params, transform: BlockTransform) -> Tensor:
        return self._folds[i].linear(
            one, one.of(stored), stored, transform, self._turning, hadamard=one.name in self._online[i].hadamard
        )

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
            turn = self._turning
            return hidden if turn is None else turn.columns(hidden)

        def logits(hidden: Tensor) -> Tensor:
            # Turned back before the final norm, whose gain is no diagonal in the rotated basis.
            turn = self._turning
            return stream.logits(hidden if turn is None else turn.back(hidden), end)

        return LearnedFunction(stream, self.walk, embed, logits, self.end)

    @torch.no_grad()
    def transforms(self) -> Transforms:
        """The learned transforms in float64, with rotations that are orthogonal to that precision."""
        residual = None if self.residual is None else self._whole(nearest_orthogonal(self.residual.point))
        if residual is not None and self._block is not None:
            signs = None if self._signs is None else self._signs.to(residual)
            residual = BlockTurn(residual, signs).columns(identity(residual.shape[0] * self._block).to(residual))
        return Transforms(
            self._parts,
            residual,
            [_exact(block.transform()) for block in self.blocks],
            [_exact_online(block.online()) for block in self.blocks],
            self._block,
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
    t = t.to(torch.float64).map(Tensor.detach)
    return replace(t, pair_rotations={name: nearest_orthogonal(r) for name, r in t.pair_rotations.items()})


def _exact_online(online: RuntimeTransforms) -> RuntimeTransforms:
    if online.key_rotation is None:
        return online
    return replace(online, key_rotation=nearest_orthogonal(online.key_rotation))
