"""A block, or what stands around the blocks, with drawn answers in place of its matrix products."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from calib.blockwise import moe_hooks
from calib.blockwise.arguments import answer_of
from calib.blockwise.walk import RowBatch, Walk
from calib.probe.parts import Matrix
from calib.probe.products import AnsweredProducts, Asked

Change = Callable[[Tensor], Tensor]  # of the answer (..., out) to a product
UNDRAWN = 2**22  # numbers of a parameter that are not drawn, if it can be helped


class Bench:
    """Runs one piece of a model, in double precision, again and again under other answers.

    Args:
        modules: that the piece consists of, by name.
        shapes: the piece's parameters and stored buffers, on whatever device.
        run: the piece: (parameters, hidden states (B, T, d)) -> its output.
        read: embeddings whose tables the piece may read as a whole, so that they have to be drawn.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        shapes: Mapping[str, Tensor],
        run: Callable[[Mapping[str, Tensor], Tensor], Tensor],
        read: Collection[str] = (),
    ) -> None:
        self.modules, self._run = modules, run
        multiplied = {
            f"{name}.{parameter}" if name else parameter
            for name, module in modules.items()
            if isinstance(module, nn.Linear | Conv1D | nn.Embedding) or moe_hooks.has_experts(module)
            for parameter, p in module.named_parameters(recurse=False)
            if p.dim() >= (3 if moe_hooks.has_experts(module) else 2)
        }
        self.params = {
            name: drawn(name, p, none=name in multiplied.difference(read) or p.numel() > UNDRAWN)
            for name, p in shapes.items()
        }
        self._answers = dict[Any, Tensor]()
        self.matrices, self.tables = dict[str, Matrix](), dict[str, None]()
        self.routers = {
            parameter for parameter, p in shapes.items() if p.dim() == 2 and self._chooses(parameter, p)
        }  # fmt: skip

    def _chooses(self, parameter: str, p: Tensor) -> bool:
        """Whether a matrix is a router: what it says is a decision."""
        counts = {m.num_experts for m in self.modules.values() if moe_hooks.has_experts(m)}
        owner = self.modules.get(parameter.rpartition(".")[0])
        return p.shape[0] in counts or "router" in type(owner).__name__.lower()

    def run(
        self,
        hidden: Tensor,
        change: Mapping[str, Change] | None = None,
        *,
        silent: Collection[str] = (),
        params: Mapping[str, Tensor] | None = None,
        seen: list[Asked] | None = None,
        grad: bool = False,
    ) -> Tensor:
        """Run the piece.

        Args:
            hidden: (B, T, d).
            change: by name of a matrix or table, what becomes of the answers to its products or of its rows.
            silent: matrices to whose answers nothing is added.
            params: vectors with other values than those drawn.
            seen: where products are noted as they are asked for.
            grad: whether gradients are wanted.

        Returns:
            The output of the piece.
        """
        change, given = change or {}, {**self.params, **(params or {})}

        def answer(asked: Asked) -> Tensor:
            self._note(asked)
            if seen is not None:
                seen.append(asked)
            name = asked.use.parameter
            made = self._drawn(asked)
            # A copy, as the library's code may write into it.
            return (change[name](made) if name in change else made).clone()

        def rows(name: str, index: Tensor) -> Tensor:
            self.tables[name] = None
            made = normal(name, (int(index.max()) + 1, *given[name].shape[1:]))[index]
            return change[name](made) if name in change else made

        with torch.set_grad_enabled(grad), AnsweredProducts(given, answer, rows, lambda name: name in silent):
            return self._run(given, hidden)

    def _note(self, asked: Asked) -> None:
        use = asked.use
        whole = self.params[use.parameter]
        if use.parameter not in self.matrices:
            self.matrices[use.parameter] = Matrix(
                use.parameter, use.transposed, asked.bias, whole.shape[0] if whole.dim() > 2 else 0, use.out,
                whole.shape[-2] if use.transposed else whole.shape[-1], use.parameter in self.routers,
            )  # fmt: skip

    def _drawn(self, asked: Asked) -> Tensor:
        """The same for the same matrix and shape; for every token where experts are chosen, so that all meet the
        same."""
        use, lead = asked.use, tuple(asked.x.shape[:-1])
        if use.parameter in self.routers:
            lead = (1,) * len(lead)
        key = use.parameter, use.expert, lead
        if key not in self._answers:
            self._answers[key] = normal(f"{use.parameter}{use.expert}", (*lead, use.out))
        return self._answers[key].expand(*asked.x.shape[:-1], use.out)

    @contextmanager
    def watching(self, note: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
        """Within the `with` block, note(name, input, output) is called for modules that map one tensor to another of
        the same shape."""

        def hook_of(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
                given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
                if given and isinstance(out, Tensor) and out.shape == given[0].shape:
                    note(name, given[0], out)

            return hook

        hooks = [m.register_forward_hook(hook_of(name), with_kwargs=True) for name, m in self.modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def bench_of_block(walk: Walk, index: int) -> Bench:
    """Set up a block of a model whose walk is in double precision and static."""
    module = walk.modules[index]

    def run(params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return walk.run(index, params, hidden, text(walk, hidden))

    shapes = {**module.state_dict(), **dict(module.named_parameters(remove_duplicate=False))}
    return Bench(dict(module.named_modules()), shapes, run)


def bench_of_end(walk: Walk) -> Bench:
    """Set up what follows the last block: hidden states -> logits."""

    def run(params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return answer_of(walk.finish(text(walk, hidden), params, hidden))

    return Bench(outer_modules(walk), outer_shapes(walk, walk.leaving), run)


def bench_of_start(walk: Walk, ids: Tensor) -> Bench:
    """Set up what stands before the first block: ids (B, T) -> hidden states; what it is run on does not matter."""

    def run(params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return walk.start(RowBatch(walk.inputs(ids)), params)

    return Bench(outer_modules(walk), outer_shapes(walk, walk.entering), run)


def outer_modules(walk: Walk) -> dict[str, nn.Module]:
    """List the modules of a model that are no blocks', by name."""
    blocks = tuple(f"{name}." for name in walk.names)
    every = walk.model.named_modules()
    return {name: m for name, m in every if name not in walk.names and not f"{name}.".startswith(blocks)}


def outer_shapes(walk: Walk, names: Sequence[str]) -> dict[str, Tensor]:
    """List parameters and stored buffers of a model, by name, as it has them."""
    every = dict(walk.model.named_parameters(remove_duplicate=False)) | walk.model.state_dict()
    return {name: every[name] for name in names}


def text(walk: Walk, hidden: Tensor) -> RowBatch:
    """Rows of ids for hidden states (B, T, ...)."""
    return RowBatch(walk.inputs(torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)))


def normal(name: str, shape: Sequence[int]) -> Tensor:
    """Numbers that are drawn alike for the same name."""
    return torch.randn(*shape, generator=_generator(name), dtype=torch.float64)


def drawn(name: str, like: Tensor, *, none: bool) -> Tensor:
    """A parameter by its name: away from zero, matrices small; with `none` a tensor without numbers."""
    if none:
        return torch.empty(like.shape, dtype=torch.float64, device="meta")
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    values = 0.5 + torch.rand(like.shape, generator=_generator(name), dtype=torch.float64)
    return values if like.dim() < 2 else normal(name, like.shape) / like.shape[-1] ** 0.5


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))
