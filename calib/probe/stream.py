"""What reads from the residual stream, what writes to it, and the norms between.

All answers as wide as the stream are silenced, and so the stream is the block's input throughout. What is then put into
one of them comes out of the block as it is, up to one factor a token, if it is added to the stream; and whatever
multiplies a norm of the input, or the input itself, reads from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from calib.probe.bench import Bench, Change, normal
from calib.probe.parts import FoundParts, Norm
from calib.probe.products import Asked

LOUD = 1e4  # size of the hidden states: what norms add to a mean square, to divide by it, vanishes beside them
SAME = 1e-9
TOKENS = (2, 10)


def find_stream(bench: Bench, width: int) -> FoundParts:
    """Find writers, norms and readers of a block.

    Args:
        bench: the block.
        width: of a token's hidden state.
    """
    x = LOUD * normal("stream", (*TOKENS, width))
    bench.run(x)  # what there is
    wide = {m.name for m in bench.matrices.values() if m.out == width and not m.router}
    quiet: dict[str, Change] = dict.fromkeys(wide, torch.zeros_like)
    found = _readers(bench, x, quiet)
    base = bench.run(x, quiet, silent=wide)
    if base.shape != x.shape or not proportional(base, x):
        return replace(found, norms=(), bare=(), obstacle="what a block gives is no sum of what it is given and more")

    def answered(name: str, delta: Tensor) -> Tensor:
        return bench.run(x, {**quiet, name: lambda y: delta.expand_as(y)}, silent=wide) - base

    def added(name: str, delta: Tensor) -> Tensor:
        return bench.run(x, quiet, silent=wide, params={name: bench.params[name] + delta}) - base

    writers, obstacle = list[str](), None
    for name in bench.matrices:
        along = is_written(partial(answered, name), name, width) if name in wide else False
        if along is None:
            obstacle = obstacle or f"a norm or a gain stands between {name.removesuffix('.weight')} and the stream"
        elif along:
            writers += [name, *filter(None, [bench.matrices[name].bias])]
    multiplied = {m.bias for m in bench.matrices.values()} | bench.matrices.keys()
    for name, p in bench.params.items():
        if name in multiplied or not p.is_floating_point() or p.device.type == "meta" or p.shape[-1:] != (width,):
            continue
        along = is_written(partial(added, name), name, width)
        if along is None:
            obstacle = obstacle or f"{name} multiplies each channel of the stream by another number"
        elif along:
            writers.append(name)
    return replace(found, writers=tuple(writers), obstacle=obstacle)


def find_gains(bench: Bench, width: int) -> dict[str, float]:
    """Find the parameters that norms of a block multiply by, whatever they norm.

    Args:
        bench: the block.
        width: of a token's hidden state.

    Returns:
        Name -> what is added to it first.
    """
    found = dict[str, float]()

    def note(name: str, given: Tensor, out: Tensor) -> None:
        if any(m == name or m.startswith(f"{name}.") for m in bench.matrices):
            return
        if (fit := _fitted(given.flatten(0, -2), out.flatten(0, -2))) is not None:
            norm = _named(bench, _Seen(name, *fit, out), ())
            if norm is not None and norm.gain is not None:
                found.setdefault(norm.gain, norm.offset)

    with bench.watching(note):
        loud = dict.fromkeys(bench.matrices, partial(torch.mul, torch.tensor(LOUD, dtype=torch.float64)))
        bench.run(LOUD * normal("stream", (*TOKENS, width)), loud, silent=bench.matrices.keys())
    return found


def find_end(bench: Bench, width: int) -> FoundParts:
    """Find the norms and readers of what follows the last block."""
    x = LOUD * normal("stream", (*TOKENS, width))
    bench.run(x)
    return _readers(bench, x, {})


def find_start(bench: Bench, width: int) -> FoundParts:
    """Take for writers what stands before the first block and is as wide as the stream; whether it is, is proved."""
    bench.run(torch.zeros(*TOKENS, width, dtype=torch.float64))
    writers = list[str]()
    for name, p in bench.params.items():
        matrix = bench.matrices.get(name)
        if matrix is not None:
            writers += [name, *filter(None, [matrix.bias])] if matrix.out == width else []
        elif p.is_floating_point() and p.shape[-1:] == (width,):
            writers.append(name)
    return FoundParts(dict(bench.matrices), tuple(bench.tables), tuple(dict.fromkeys(writers)))


def is_written(changed: Callable[[Tensor], Tensor], name: str, width: int) -> bool | None:
    """Whether what is put somewhere comes out as it is, up to a factor that does not depend on it; None where it comes
    out as something else.  changed(delta (d,)) -> by what the output (B, T, d) differs then."""
    factors = list[Tensor]()
    for size in (1.0, 30.0):
        delta = size * normal(f"{name} {size}", (width,))
        out = changed(delta).flatten(0, -2)
        factor = out @ delta / delta.square().sum()
        if (out - factor[:, None] * delta).abs().max() > SAME * max(float(out.abs().max()), 1e-3):
            return None
        factors.append(factor)
    small, large = factors
    if not small.abs().max() > SAME:
        return False
    return True if torch.allclose(small, large, rtol=1e-6, atol=1e-9) else None


@dataclass
class _Seen:
    name: str
    gain: Tensor
    bias: Tensor
    centred: bool
    out: Tensor


def _readers(bench: Bench, x: Tensor, quiet: Mapping[str, Change]) -> FoundParts:
    """Norms of the stream x and the matrices that multiply it; `quiet` keeps everything else out of the stream."""
    products, norms = list[Asked](), list[_Seen]()
    flat = x.flatten(0, -2)

    def note(name: str, given: Tensor, out: Tensor) -> None:
        if given.shape[-1] != x.shape[-1] or given.numel() != x.numel() or not proportional(given, x):
            return
        if any(m == name or m.startswith(f"{name}.") for m in bench.matrices) or proportional(out, x):
            return
        if (fit := _fitted(given.flatten(0, -2), out.flatten(0, -2))) is not None:
            norms.append(_Seen(name, *fit, out.flatten(0, -2)))

    with bench.watching(note):
        bench.run(x, quiet, silent=quiet.keys(), seen=products)
    readers, bare, centred = dict[str, list[str]](), list[str](), any(n.centred for n in norms)
    for asked in products:
        name, z = asked.use.parameter, asked.x.flatten(0, -2)
        if z.shape[-1] != flat.shape[-1] or name in bare:
            continue
        source = next((n for n in norms if multiples_of(z, n.out)), None)
        if source is not None:
            own = readers.setdefault(source.name, [])
            own += [] if name in own else [name]
        elif multiples_of(z, flat):
            bare.append(name)
        elif multiples_of(z, flat - flat.mean(-1, keepdim=True)):
            bare.append(name)
            centred = True
    found, obstacle = list[Norm](), None
    for seen in norms:
        if seen.name not in readers:
            continue
        norm = _named(bench, seen, tuple(readers[seen.name]))
        if norm is not None:
            found.append(norm)
        elif not bool((seen.gain - 1).abs().max() < 1e-6 and seen.bias.abs().max() < 1e-6):
            obstacle = f"{seen.name} multiplies by something else than a weight of its own"
        else:
            bare += readers[seen.name]
    return FoundParts(dict(bench.matrices), norms=tuple(found), bare=tuple(bare), centred=centred, obstacle=obstacle)


def _named(bench: Bench, seen: _Seen, readers: tuple[str, ...]) -> Norm | None:
    """A norm by its parameters; None where it has none that its gain is made of."""
    start = f"{seen.name}." if seen.name else ""
    own = {n: p.flatten() for n, p in bench.params.items() if n.startswith(start) and p.numel() == seen.gain.numel()}
    gain = next((n for n, p in own.items() if (seen.gain - p).std() < 1e-6), None)
    if gain is None:
        return None
    offset = round(float((seen.gain - own[gain]).mean()), 6)
    moved = bool(seen.bias.abs().max() > 1e-6)
    bias = next((n for n, p in own.items() if n != gain and (seen.bias - p).abs().max() < 1e-6), None)
    return None if moved and bias is None else Norm(seen.name, gain, bias, offset + 0.0, readers)


def _fitted(given: Tensor, out: Tensor) -> tuple[Tensor, Tensor, bool] | None:
    """gain (d,), bias (d,) and whether the mean is taken away, where out (N, d) is gain * normed(given) + bias."""
    for centred in (False, True):
        z = given - given.mean(-1, keepdim=True) if centred else given
        z = z * torch.rsqrt(z.square().mean(-1, keepdim=True))
        apart = z - z.mean(0)
        gain = (apart * (out - out.mean(0))).sum(0) / apart.square().sum(0)
        bias = out.mean(0) - gain * z.mean(0)
        if (z * gain + bias - out).abs().max() < 1e-6 * max(1.0, float(gain.abs().max())) and gain.abs().max() > 1e-9:
            return gain, bias, centred
    return None


def proportional(z: Tensor, x: Tensor) -> bool:
    """Whether every token of z is x's, up to a factor of its own that is not zero."""
    z, x = z.flatten(0, -2), x.flatten(0, -2)
    if z.shape != x.shape:
        return False
    factor = (z * x).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True)
    return bool((z - factor * x).abs().max() <= SAME * z.abs().max() and factor.abs().min() > 0)


def multiples_of(z: Tensor, x: Tensor) -> bool:
    """Whether every row of z (n, d) is some row of x (N, d) up to a factor, which may be zero for some."""
    size = z.norm(dim=-1)
    z = z[size > 0] / size[size > 0, None]
    if not len(z):
        return False
    y = x / x.norm(dim=-1, keepdim=True)
    near = y[(z @ y.mT).abs().argmax(-1)]
    return bool((z - (z * near).sum(-1, keepdim=True) * near).abs().max() < SAME)
