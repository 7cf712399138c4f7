"""Run a block without its matrices: every product with one of them is answered by whoever looks.

What lies between matrix products (norms, attention, activations, gates, residual sums) is the library's own code and
runs; the matrices themselves are never needed, so that a block is looked into at its real widths without memory and in
milliseconds. Double precision is kept where the library would go back to single.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Use:
    """An operand of a product that is, or is a part of, a parameter.

    Args:
        parameter: its name.
        transposed: whether the parameter is (in, out).
        expert: which of the matrices that the parameter stacks; None: the one that it is, or all of them at once.
        rows: the range of outputs that are asked for, None: all.
        out: how many outputs the whole matrix has.
    """

    parameter: str
    transposed: bool
    expert: int | None
    rows: tuple[int, int] | None
    out: int


@dataclass(frozen=True)
class Asked:
    """A product that is asked for: with which matrix, what is multiplied (..., in), and the parameter that is added."""

    use: Use
    x: Tensor
    bias: str | None


AnswerProduct = Callable[[Asked], Tensor]  # -> (..., out), all outputs of the matrix, without the bias
LookUp = Callable[[str, Tensor], Tensor]  # name of a table, indices -> rows


class AnsweredProducts(TorchFunctionMode):
    """While this mode is on, products with known parameters are answered, and double precision is kept.

    Args:
        parameters: by name, as they are handed to the model; matrices may be on the meta device.
        answer: gives the answer to a product.
        rows: gives rows of a table that is looked up in.
        silent: whether nothing is added to the answer to a product with this parameter.
        experts: numbers of experts; where so many are ranked, every token is sent to others than the ranking says, so
            that all are met.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        answer: AnswerProduct,
        rows: LookUp | None = None,
        silent: Callable[[str], bool] = lambda name: False,
        experts: Collection[int] = (),
    ) -> None:
        super().__init__()
        self._known = {_storage(p): (name, p) for name, p in parameters.items()}
        self._answer, self._rows, self._silent, self._experts = answer, rows, silent, set(experts)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = dict(kwargs or {})
        made = self._made(func, args, kwargs)
        if made is not None:
            return made
        if func in (torch.topk, Tensor.topk) and args[0].shape[-1] in self._experts:
            return torch.return_types.topk(_in_turn(args[0], kwargs.get("k", args[1] if len(args) > 1 else 1)))
        if func in (torch.max, Tensor.max) and args[0].shape[-1:] and args[0].shape[-1] in self._experts:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim in (-1, args[0].dim() - 1):
                values, index = _in_turn(args[0], 1)
                keep = kwargs.get("keepdim", False)
                return torch.return_types.max((values, index) if keep else (values[..., 0], index[..., 0]))
        if func is Tensor.float:
            func = Tensor.double
        if func is torch.tensor and isinstance(args[0], float):
            kwargs.setdefault("dtype", torch.float64)
        args = tuple(map(_wide, args))
        kwargs = {name: _wide(value) for name, value in kwargs.items()}
        if func is Tensor.to and args[0].device.type != "meta":  # where a matrix lies is no place to go to
            args = tuple(a for a in args if not _is_meta(a))
            kwargs = {name: value for name, value in kwargs.items() if not _is_meta(value)}
            if len(args) + len(kwargs) == 1:
                return args[0]
        return func(*args, **kwargs)

    def _made(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The answer, or None where this is no product with a parameter that is known."""
        if not self._known:
            return None
        if func is torch.nn.functional.linear:
            x, weight, bias = (*args, *kwargs.values(), None)[:3]
            return self._product(x, self._use(weight, down=True), bias)
        if func in PRODUCTS and len(args) + len(kwargs) == 2:
            x, weight = (*args, *kwargs.values())
            return self._product(x, self._use(weight, down=False), None)
        if func in (torch.addmm, torch.baddbmm) and len(args) == 3 and not kwargs:
            return self._product(args[1], self._use(args[2], down=False), args[0])
        if func is torch.nn.functional.embedding and self._rows is not None:
            known = self._known.get(_storage(args[1]))
            whole = known is not None and args[1].shape == known[1].shape  # not a slice of a table of tables
            return self._rows(known[0], args[0]) if known is not None and whole else None
        return None

    def _product(self, x: Any, use: Use | None, bias: Any) -> Tensor | None:
        if use is None or not isinstance(x, Tensor) or _storage(x) in self._known:
            return None
        added = self._known.get(_storage(bias)) if isinstance(bias, Tensor) else None
        answer = self._answer(Asked(use, x, added[0] if added else None))
        answer = answer if use.rows is None else answer[..., slice(*use.rows)]
        return answer if bias is None or self._silent(use.parameter) else answer + bias

    def _use(self, operand: Any, *, down: bool) -> Use | None:
        """`down`: outputs lie along the first of its two axes."""
        known = self._known.get(_storage(operand)) if isinstance(operand, Tensor) and operand.dim() >= 2 else None
        if known is None or known[1].dim() < 2:
            return None
        name, whole = known
        height, width = whole.shape[-2:]
        matrix, rest = divmod(operand.storage_offset() - whole.storage_offset(), height * width)
        row, column = divmod(rest, width)
        straight = operand.stride()[-2:] == (width, 1) or (width == 1 and operand.shape[-2:] == (height, 1))
        if not straight and operand.stride()[-2:] != (1, width):
            return None
        # The parameter is (out, in) where outputs lie along its own first axis.
        transposed = straight != down
        outputs, start = (width, column) if transposed else (height, row)
        count, into = operand.shape[-2:] if down else operand.shape[:-3:-1]
        if into != (height if transposed else width):
            return None
        several = whole.dim() > 2 and operand.dim() == 2
        part = None if count == outputs else (start, start + count)
        return Use(name, transposed, matrix if several else None, part, outputs)


def _in_turn(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores (..., E) of k experts for every token, one token's after the other's, and which these are."""
    tokens, experts = scores.shape[:-1].numel(), scores.shape[-1]
    index = torch.arange(tokens * k, device=scores.device).view(*scores.shape[:-1], k) % experts
    return scores.gather(-1, index), index


PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm)


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _is_meta(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "meta") or value == "meta"
