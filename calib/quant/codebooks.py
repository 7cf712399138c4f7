"""Levels of grids that are not evenly spaced, ascending: of 4 bits from -1 to 1, of floating point as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from statistics import NormalDist
from struct import Struct

_OUTERMOST = 0.9677083  # the largest quantile, which is to become 1
_FP4 = (0.0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)
_SINGLE = Struct("f")


@cache
def nf4() -> tuple[float, ...]:
    """Sixteen quantiles of the normal distribution (arXiv:2305.14314, appendix E): eight above 0 and seven below."""
    above, below = _quantiles(8), [-x for x in _quantiles(7)]
    return _single(x / above[0] for x in (*below, 0.0, *above[::-1]))


@cache
def fp4() -> tuple[float, ...]:
    """A sign, two bits of exponent and one of mantissa, as bitsandbytes has them.  There are two zeros."""
    return _single((*(-x for x in _FP4[::-1]), *_FP4))


@cache
def e4m3() -> tuple[float, ...]:
    """FP8 with four bits of exponent (bias 7) and three of mantissa, without infinities (E4M3 of OCP's 8-bit floating
    point): from -448 to 448, with one zero."""
    subnormal = [m / 8 * 2.0**-6 for m in range(1, 8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]  # the last is no number
    above = [*subnormal, *normal]
    return (*(-x for x in reversed(above)), 0.0, *above)


@cache
def e2m1() -> tuple[float, ...]:
    """FP4 with two bits of exponent (bias 1) and one of mantissa (E2M1 of OCP's MX formats): from -6 to 6, with one
    zero."""
    above = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    return (*(-x for x in reversed(above)), 0.0, *above)


@cache
def iq4() -> tuple[float, ...]:
    """The sixteen levels of llama.cpp's IQ4_NL and IQ4_XS."""
    return (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _quantiles(count: int) -> list[float]:
    """At even steps from the outermost down to the median, which is left out."""
    step = (0.5 - _OUTERMOST) / count
    return [NormalDist().inv_cdf(_OUTERMOST + i * step) for i in range(count)]


def _single(values: Iterable[float]) -> tuple[float, ...]:
    """Rounded to single precision."""
    return tuple(_SINGLE.unpack(_SINGLE.pack(x))[0] for x in values)


CODEBOOKS: dict[str, Callable[[], tuple[float, ...]]] = {"nf4": nf4, "fp4": fp4}
