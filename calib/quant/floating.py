"""Values and scales in few bits of floating point: FP8 (E4M3), FP4 (E2M1), and scales that are powers of two (E8M0)."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MOST, E2M1_MOST = 448.0, 6.0  # the largest numbers
E4M3_LEAST = 2.0**-9  # the smallest above zero


def as_float8(x: Tensor) -> Tensor:
    """Rounded to FP8 (E4M3), ties to even; what is larger than 448 becomes that, also where torch would make it NaN."""
    return x.clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn)


def codes_of_float8(x: Tensor) -> Tensor:
    """Codes (..., n) int8 of FP8 values, which are not NaN: places in the table of levels, counted from zero."""
    byte = x.view(torch.uint8)
    magnitude = (byte & 127).to(torch.int8)
    return torch.where(byte > 127, -magnitude, magnitude)


def float8_of_codes(codes: Tensor) -> Tensor:
    """The inverse of `codes_of_float8`; there is one zero."""
    return (codes.abs().to(torch.uint8) | (codes < 0).to(torch.uint8) << 7).view(torch.float8_e4m3fn)


def codes_of_float4(x: Tensor) -> Tensor:
    """Codes (..., n), in the dtype of x, of the FP4 (E2M1) values nearest to x, ties to even: places among 0, .5, 1,
    1.5, 2, 3, 4, 6 and their negatives, counted from zero."""
    # Levels are .5 apart below 2, 1 below 4, and 2 from there on: a round number of steps on each stretch.
    most = x.abs().clamp_(max=E2M1_MOST)
    place = torch.where(most < 2, (most * 2).round_(), torch.where(most < 4, most.round() + 2, (most / 2).round_() + 4))
    return place.copysign_(x)


def power_of_two(largest: Tensor, most: float) -> Tensor:
    """The scale 2^e, as OCP's MX formats have it, of values whose largest magnitude is `largest`, on levels up to
    `most`: the exponent of the one less that of the other, and one more from seven quarters of a power of two on, as
    compressed-tensors computes it; e from -127 to 127."""
    mantissa, exponent = torch.frexp(largest.float())  # mantissas from 1/2 to 1
    of_most = torch.frexp(torch.tensor(most)).exponent.item()
    exponent = (exponent + (mantissa >= 0.875) - of_most).clamp(-127, 127)
    return torch.ldexp(torch.ones_like(mantissa), torch.where(largest > 0, exponent, -127)).to(largest.dtype)


def power_above(x: Tensor) -> Tensor:
    """The least power of two that is not below x > 0, from 2^-127 to 2^127."""
    mantissa, exponent = torch.frexp(x.float())  # mantissas from 1/2 to 1
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
    return torch.ldexp(torch.ones_like(mantissa), exponent).to(x.dtype)


def nibbles_of_float4(codes: Tensor) -> Tensor:
    """Codes (..., n) int8 of FP4 values -> their four bits, uint8: the place of a magnitude, and 8 where it is
    negative."""
    return codes.abs().to(torch.uint8) | (codes < 0).to(torch.uint8) << 3


def pack_float4(codes: Tensor) -> Tensor:
    """Codes (rows, n) int8 of FP4 values, n even -> bytes (rows, n/2), the first of two in the low half."""
    nibbles = nibbles_of_float4(codes)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack_float4(packed: Tensor) -> Tensor:
    """The inverse of `pack_float4`."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    magnitude = (nibbles & 7).to(torch.int8)
    return torch.where(nibbles > 7, -magnitude, magnitude)


def exponents(scale: Tensor) -> Tensor:
    """Powers of two as bytes: e + 127."""
    return (torch.frexp(scale.float()).exponent + 126).to(torch.uint8)


def of_exponents(stored: Tensor) -> Tensor:
    """The inverse of `exponents`, float32."""
    return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.to(torch.int32) - 127)
