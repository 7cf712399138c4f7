"""How a quantized linear is laid out on disk: what every codec of this folder can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from calib.quant.scheme import Scheme
from compressor.storage.description import FormatDescription
from compressor.storage.quantized_linear import Rounded


class Codec(Protocol):
    """A format of linears in safetensors files.

    descriptions: what it can say and who reads it, for the table of all formats; by what its readers call a layout.
    """

    @property
    def descriptions(self) -> Mapping[str, FormatDescription]:
        """See the class."""

    def encode(self, name: str, rounded: Rounded, scheme: Scheme) -> dict[str, Tensor]:
        """The tensors that are stored of the linear `name`, by their names."""

    def names(self, name: str, scheme: Scheme) -> list[str]:
        """The names under which `encode` stores the linear `name`."""

    def shapes(self, name: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, tuple[tuple[int, ...], bool]]:
        """(shape, whether integers) of each tensor in which `encode` stores a linear of `shape` (out, in)."""

    def decode(self, name: str, stored: Mapping[str, Tensor], scheme: Scheme) -> Rounded:
        """The inverse of `encode`."""

    def config(self, scheme: Scheme, *, plain: bool, dtype: str, ignore: Sequence[str]) -> dict[str, Any]:
        """The value of config.json's `quantization_config`.

        `plain` is false where only parewell can run the model, `dtype` is the type that products are computed in,
        `ignore` are the linears that stay as they are.
        """
