"""What reaches the inputs of a matrix: which outputs of other matrices, which entries of gains and biases.

It is seen by gradients, which are zero where there is no way. Statistics of norms are held fixed, for these tie all
that a norm divides to all that it sees.

What is asked is always which unit of inputs something reaches, be it a head or a single channel, and the answer is read
bit by bit: what reaches inputs whose unit has a bit, and none whose unit has it not, reaches a unit with that bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from calib.probe.bench import Bench, normal
from calib.probe.products import Asked
from calib.probe.stream import TOKENS

NONE, SEVERAL = -1, -2  # in place of a unit
STREAM = ""  # the name by which codes have the channels of the stream itself


class Reach:
    """A run of a piece with gradients to every output of a matrix and every entry of a vector: what reaches what.

    Args:
        bench: the piece.
        width: of a token's hidden state.
        params: vectors with other values than those drawn.
    """

    def __init__(self, bench: Bench, width: int, params: Mapping[str, Tensor] | None = None) -> None:
        self.bench, self.inputs = bench, dict[str, list[Tensor]]()
        x = normal("units", (*TOKENS, width))
        bench.run(x)  # what there is
        sizes = {name: (m.out,) for name, m in bench.matrices.items()}
        sizes |= {name: (bench.params[name].shape[-1],) for name in bench.tables}
        vectors = {
            name: p if params is None else params.get(name, p)
            for name, p in bench.params.items()
            if name not in sizes and p.is_floating_point() and p.device.type != "meta"
        }
        shapes: dict[str, tuple[int, ...]] = {
            STREAM: (width,),
            **sizes,
            **{n: tuple(p.shape) for n, p in vectors.items()},
        }
        self._factors = {
            name: torch.ones(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()
        }
        seen, f = list[Asked](), self._factors
        with FixedStatistics(), torch.enable_grad():
            self.output = bench.run(
                x * f[STREAM],
                {name: lambda y, name=name: y * f[name] for name in sizes},  # type: ignore[misc]
                params={name: p * f[name] for name, p in vectors.items()},
                seen=seen,
                grad=True,
            )
        for asked in seen:
            self.inputs.setdefault(asked.use.parameter, []).append(asked.x)

    def reaching(self, targets: Sequence[Tensor], units: Tensor, count: int) -> dict[str, Tensor]:
        """Find which unit of `count` everything reaches.

        Args:
            targets: each (..., n).
            units: (n,), the unit of each column, or NONE.
            count: of units.

        Returns:
            Name of a matrix, table or vector -> by output, column or entry the unit, NONE or SEVERAL.
        """
        with torch.enable_grad():  # each column as one number, of which nothing is left out
            columns = sum(
                (t * normal(f"weights {i}", t.shape)).reshape(-1, len(units)).sum(0) for i, t in enumerate(targets)
            )
        codes = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in self._factors.items()}
        single = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in self._factors.items()}
        touched = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in self._factors.items()}
        for bit in range(max(1, (count - 1).bit_length())):
            has = (units >> bit & 1).bool()
            with torch.enable_grad():
                totals = [(columns * (mask & (units >= 0))).sum() for mask in (has, ~has)]
            with_bit, without = map(self._touched, totals)
            for name in codes:
                codes[name] += with_bit[name].long() << bit
                single[name] &= with_bit[name] ^ without[name]
                touched[name] |= with_bit[name] | without[name]
        return {
            name: torch.where(single[name], codes[name], torch.where(touched[name], SEVERAL, NONE)) for name in codes
        }

    def _touched(self, total: Tensor) -> dict[str, Tensor]:
        names = list(self._factors)
        if not total.requires_grad:
            return {name: torch.zeros(self._factors[name].shape, dtype=torch.bool) for name in names}
        grads = torch.autograd.grad(
            total, [self._factors[name] for name in names], retain_graph=True, allow_unused=True
        )
        return {
            name: torch.zeros(self._factors[name].shape, dtype=torch.bool) if g is None else g != 0
            for name, g in zip(names, grads, strict=True)
        }

    def axes(
        self, seen: Iterable[Mapping[str, Tensor]], inputs: Mapping[str, Tensor] | None = None
    ) -> dict[tuple[str, int], Tensor]:
        """Put together where units lie.

        Args:
            seen: what `reaching` found, of one target after the other.
            inputs: matrix -> the unit of each of its inputs.
        """
        found = dict[str, Tensor]()
        for codes in seen:
            for name, code in codes.items():
                old = found.setdefault(name, code)
                agree = (old == code) | (code == NONE)
                found[name] = torch.where(old == NONE, code, torch.where(agree, old, SEVERAL))
        result = dict[tuple[str, int], Tensor]()
        for name, units in (inputs or {}).items():
            result[name, self.sides(name)[1]] = units
        biases = {m.bias: name for name, m in self.bench.matrices.items() if m.bias}
        for name, code in found.items():
            if name == STREAM or (code == NONE).all():
                continue
            if name in self.bench.matrices:
                own, axis = code, self.sides(name)[0]
            elif name in self.bench.tables:
                own, axis = code, self.bench.params[name].dim() - 1
            elif name in biases and found[biases[name]].shape[-1:] == code.shape[-1:]:
                own, axis = found[biases[name]], code.dim() - 1
            else:
                along = _along(code)
                if along is None:
                    continue
                own, axis = along
            own = torch.where(own == SEVERAL, NONE, own)
            if (own != NONE).any():
                result[name, axis] = own
        return result

    def sides(self, name: str) -> tuple[int, int]:
        """Name the axes of a parameter along which its outputs and its inputs lie."""
        last = self.bench.params[name].dim() - 1
        return (last, last - 1) if self.bench.matrices[name].transposed else (last - 1, last)


def _along(code: Tensor) -> tuple[Tensor, int] | None:
    """The units (n,) by index along an axis, and that axis, where all that an index has is of one unit."""
    for axis in range(code.dim()):
        rows = code.movedim(axis, 0).reshape(code.shape[axis], -1)
        if (rows == rows[:, :1]).all():
            return rows[:, 0], axis
    return None


class FixedStatistics(TorchFunctionMode):
    """While this mode is on, gradients take means, variances and norms for constants."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = dict(kwargs or {})
        if func in (F.layer_norm, F.rms_norm):
            return _normalized(func, *args, **kwargs)
        if func is F.normalize:
            return func(args[0].detach(), *args[1:], **kwargs) + args[0] - args[0].detach()
        made = func(*args, **kwargs)
        if func in STATISTICS:
            return tuple(t.detach() for t in made) if isinstance(made, tuple) else made.detach()
        return made


def _normalized(
    func: Callable[..., Tensor],
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
) -> Tensor:
    """What a norm of the library's gives, with a gradient that goes straight through."""
    plain = func(x.detach(), normalized_shape, eps=eps) + x - x.detach()
    plain = plain if weight is None else plain * weight
    return plain if bias is None else plain + bias


STATISTICS = {
    torch.mean, Tensor.mean, torch.var, Tensor.var, torch.std, Tensor.std, torch.var_mean, torch.norm, Tensor.norm,
    torch.linalg.vector_norm, torch.linalg.norm, torch.rsqrt, Tensor.rsqrt,
}  # fmt: skip
