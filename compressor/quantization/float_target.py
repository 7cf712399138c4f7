"""Rounding that aims at the float model, one group of linears after the other.

GPTQ has a linear W do on its inputs what W itself does there. With others rounded before it these inputs, X~, are no
longer those of the float model, X, and what is wanted is what W does on X. Without a grid that is least squares,

    W* = argmin |X W^T - X~ V^T|^2 over V = W (X^T X~ + r) (X~^T X~ + r)^-1        (r: GPTQ's ridge)

and a rounded weight Q costs |X~ (W* - Q)^T|^2 beyond it: GPTQ on W*. Linears are rounded in the order in which data
meets them, so that X~ has passed what is rounded within the block, too. GPTAQ (arXiv:2504.02692) and Qronos
(arXiv:2505.11695) come to the same sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calib.blockwise.hooks import observe_inputs
from calib.blockwise.linears import Linear, put_together
from calib.blockwise.model import BlockwiseModel, Params
from calib.blockwise.row_states import RowStates
from calib.blockwise.walk import RowBatch
from calib.probe.find import found_parts
from calib.runtime.distributed import all_reduce_sum_, world_size
from calib.runtime.precision import upcast
from calib.stats.moments import Moments
from compressor.engine.runtime_transforms import RuntimeTransforms, runtime_transforms
from compressor.quantization.gptq import NotPositive, ridge
from compressor.quantization.rounding import RoundedBlock


@dataclass(frozen=True)
class PairedMoments:
    """Sums over the inputs of a linear in the rounded model (X~) and in the float model (X): moments of the former, and
    `cross` = X^T X~, the sum over tokens of x x~^T, float64."""

    rounded: Moments
    cross: Tensor


@torch.no_grad()
def least_squares(weights: Mapping[str, Tensor], inputs: PairedMoments, damping: float) -> dict[str, Tensor]:
    """Weights W* (out, in) that come nearest on rounded inputs to what `weights` do on the float model's.

    `damping`: a ridge towards `weights`, in parts of the mean diagonal of X~^T X~. Overwrites `inputs.cross`. Raises
    NotPositive.
    """
    gram, cross = inputs.rounded.gram.clone(), inputs.cross
    more = ridge(gram.diagonal(), damping)
    gram.diagonal().add_(more)
    cross.diagonal().add_(more)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise NotPositive(f"the Gram matrix is not positive definite with damping {damping}")
    change = torch.cholesky_solve(cross.mT, factor).mT  # (X^T X~ + r) (X~^T X~ + r)^-1
    return {name: w @ change.to(w.dtype) for name, w in weights.items()}


def stages(linears: Sequence[Linear], order: Sequence[str]) -> list[list[Linear]]:
    """Linears in groups, one after the other as data meets them.

    Those that share inputs are in one group, and so are the experts of a layer, at each of their two steps. `order`:
    names of parameters by their first use.
    """
    place = {name: i for i, name in enumerate(order)}
    groups = dict[tuple[str, str | None], list[Linear]]()
    for one in sorted(linears, key=lambda one: place.get(one.parameter, len(place))):
        groups.setdefault((one.site, None) if one.step is None else (one.module, one.step), []).append(one)
    return list(groups.values())


class _AllSeen(Exception):
    """What was looked for has passed; the rest of a block need not run."""


@dataclass(frozen=True)
class Passing:
    """A block's parameters, what runs beside it, and the states (N, T, d) that enter it."""

    params: Params
    online: RuntimeTransforms
    states: RowStates

    def unrounded(self) -> Passing:
        """A copy where nothing is rounded as it runs."""
        return replace(self, online=replace(self.online, activations=None, kv=None))


def one_after_the_other(
    stream: BlockwiseModel, index: int, exact: Passing, calibration: RowStates, mask: Tensor, part: RoundedBlock
) -> Iterator[tuple[list[Linear], dict[str, PairedMoments]]]:
    """Groups of a block's linears as data meets them, and sums over their inputs by site.

    Each is to be rounded into `part` before the next is asked for. `exact`: the block of the float model, whose states
    become those after it; `calibration`: the rounded model's.
    """
    groups = stages(stream.linears(index), list(found_parts(stream).blocks[index].matrices))
    current, floats = dict(exact.params), exact.unrounded()
    for group in groups:
        rounded, last = Passing(current, exact.online, calibration), group is groups[-1]
        yield group, paired_moments(stream, index, group, floats, rounded, mask, advance=last)
        if not last:
            current |= put_together(group, _weights_everywhere(group, part, stream))


def _weights_everywhere(group: Sequence[Linear], part: RoundedBlock, stream: BlockwiseModel) -> dict[str, Tensor]:
    """Rounded weights of a group, of which each process has some in its `part`."""

    def weight(one: Linear) -> Tensor:
        own = part.linears.get(one.name)
        nothing = torch.zeros(one.shape, dtype=stream.dtype, device=stream.device)
        return nothing if own is None else own.weight().to(stream.dtype)

    weights = {one.name: weight(one) for one in group}
    all_reduce_sum_(list(weights.values()))
    return weights


@torch.no_grad()
def paired_moments(
    stream: BlockwiseModel, index: int, some: Sequence[Linear], floats: Passing, rounded: Passing, mask: Tensor,
    *, advance: bool,
) -> dict[str, PairedMoments]:  # fmt: skip
    """Sums over the real tokens at the inputs of some linears of a block, by site, over those of all processes.

    Where `advance`, the float model's states become what the block makes of them; else a block runs no further than to
    the last of these inputs. Where experts are chosen otherwise than the float model does, tokens that an expert has no
    float inputs of count as if theirs were the rounded ones.
    """
    sites, device = {one.site for one in some}, stream.device
    leads = [one for one in some if one.name in sites]
    sums = {
        one.name: PairedMoments(
            Moments.zero(one.shape[1], device),
            torch.zeros(one.shape[1], one.shape[1], dtype=torch.float64, device=device),
        )
        for one in leads
    }
    for rows, batch in rounded.states.batches:
        exact, result = _inputs(stream, index, leads, floats, rows, batch, whole=advance)
        seen, _ = _inputs(stream, index, leads, rounded, rows, batch, whole=False)
        if advance and result is not None:
            floats.states[rows] = result
        for one in leads:
            if one.name not in seen:
                continue  # an expert that nothing goes to
            x, tokens = seen[one.name]
            reads = stream.reads_sources(index, one)
            real = rounded.states.real(mask, sources=reads)[rows].to(x.device).flatten()
            kept = real if tokens is None else real[tokens]
            _add(sums[one.name], _matched(x, tokens, exact.get(one.name), len(real))[kept], x[kept])
    for one in leads:
        sums[one.name] = _everywhere(sums[one.name])
    return sums


_Seen = dict[str, tuple[Tensor, Tensor | None]]  # inputs (n, width) by linear, and which tokens they are (None: all)


@torch.no_grad()
def _inputs(
    stream: BlockwiseModel, index: int, leads: Sequence[Linear], passing: Passing, rows: slice, batch: RowBatch,
    *, whole: bool,
) -> tuple[_Seen, Tensor | None]:  # fmt: skip
    """What enters linears of a block, and what it gives, unless it need not run to its end."""
    seen, result = _Seen(), None

    def look(one: Linear) -> Callable[[Tensor, Tensor | None], None]:
        def see(x: Tensor, tokens: Tensor | None) -> None:
            seen[one.name] = x.flatten(0, -2), tokens
            if not whole and len(seen) == len(leads):
                raise _AllSeen

        return see

    hidden = passing.states[rows].to(stream.device)
    with (
        suppress(_AllSeen),
        runtime_transforms(stream, index, passing.online),
        observe_inputs(stream.blocks[index], {one: look(one) for one in leads}),
    ):
        result = stream.run(index, passing.params, hidden, batch)
    return seen, result


def _matched(x: Tensor, tokens: Tensor | None, other: tuple[Tensor, Tensor | None] | None, count: int) -> Tensor:
    """The float model's rows (n, width) for the tokens, of `count`, that the rounded model's rows x are of; x where it
    has none."""
    if other is None or not len(other[0]):
        return x
    values, at = other
    if tokens is None or at is None:
        return values
    place = torch.full((count,), -1, device=x.device)
    place[at] = torch.arange(len(at), device=x.device)
    found = place[tokens]
    return torch.where((found >= 0)[:, None], values[found], x)


def _add(sums: PairedMoments, exact: Tensor, rounded: Tensor) -> None:
    """Count in rows (n, width)."""
    sums.rounded.add(rounded)
    with torch.autocast(rounded.device.type, enabled=False):
        sums.cross.add_(upcast(exact).mT @ upcast(rounded))


def _everywhere(sums: PairedMoments) -> PairedMoments:
    """The sums over all processes."""
    if world_size() > 1:
        all_reduce_sum_([sums.cross])
    return PairedMoments(sums.rounded.everywhere(), sums.cross)
