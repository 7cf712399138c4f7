"""Products with matrices that are alike along an axis, without writing them out.

A model is run to see what it calls, with parameters that are one number or one line repeated (`Tensor.expand`). The
library's products would copy them to their whole size; here they are as cheap as they are thin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class ThinProducts(TorchFunctionMode):
    """While this mode is on, products with expanded matrices cost what their lines cost."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = kwargs or {}
        made = _thin(func, args, kwargs)
        return func(*args, **kwargs) if made is None else made


def _thin(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The product, or None where it is none of the kinds that are known, or its matrix is not thin."""
    if func is torch.nn.functional.linear:
        x, weight, bias = (*args, *kwargs.values(), None)[:3]
        return _plus(_product(x, weight.mT), bias)
    if func in (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__) and len(args) == 2:
        return _product(*args)
    if func is torch.addmm and len(args) == 3 and not kwargs:
        return _plus(_product(args[1], args[2]), args[0])
    return None


def _product(x: Any, matrix: Any) -> Tensor | None:
    """x (..., n) @ matrix (..., n, m), where that is one line repeated."""
    if not isinstance(x, Tensor) or not isinstance(matrix, Tensor) or matrix.dim() < 2:
        return None
    if matrix.stride(-2) == 0 and matrix.shape[-2] > 1:
        return x.sum(-1, keepdim=True) * matrix[..., :1, :]
    if matrix.stride(-1) == 0 and matrix.shape[-1] > 1:
        column = torch.matmul(x, matrix[..., :1].contiguous())
        return column.expand(*column.shape[:-1], matrix.shape[-1]).clone()
    return None


def _plus(product: Tensor | None, bias: Tensor | None) -> Tensor | None:
    return product if product is None or bias is None else product + bias


def constants_of(
    model: nn.Module, value: float, dtype: torch.dtype, device: torch.device, names: Iterable[str]
) -> dict[str, Tensor]:
    """Make parameters of one value each, which take no memory."""
    wanted = set(names)
    return {
        name: torch.full((), value, dtype=dtype if p.is_floating_point() else p.dtype, device=device).expand(p.shape)
        for name, p in model.named_parameters(remove_duplicate=False)
        if name in wanted
    }


def drawn_lines(
    model: nn.Module, dtype: torch.dtype, device: torch.device, seed: int, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Draw parameters and stored buffers along one axis, alike along the others: they take no memory."""
    generator, drawn = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    every = dict(model.named_parameters(remove_duplicate=False))
    every |= {name: tensor for name, tensor in model.state_dict().items() if name not in every}
    for name in every if names is None else names:
        p = every[name]
        if not p.is_floating_point():
            drawn[name] = torch.zeros(p.shape, dtype=p.dtype, device=device)
            continue
        if p.dim() < 2 or id(p) in tables:
            line = torch.randn(p.shape[-1:], generator=generator) + ("norm" in name)
        else:
            line = torch.randn(p.shape[-2], 1, generator=generator) / p.shape[-1]
        drawn[name] = line.to(device, dtype).expand(p.shape)
    return drawn
