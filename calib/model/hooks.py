"""Watch or change what enters and leaves named modules of a block; always unhook."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from calib.model import moe_hooks
from calib.model.architectures import Architecture
from calib.runtime.precision import in_float32

See = Callable[[Tensor, Tensor | None], object]  # x, and which tokens of the batch it holds (None: all)
Change = Callable[[Tensor], Tensor]
_Enter = Callable[[Tensor, Tensor | None], Tensor]


@contextmanager
def observe_inputs(block: nn.Module, anatomy: Architecture, inputs: Mapping[str, See]) -> Iterator[None]:
    """Call inputs[name](x, tokens) with the input x of the linear `name`, each time it runs.

    x is (B, T, width) and tokens None; at an expert x is (n, width) and tokens (n,) index the B * T flattened.
    """

    def looking(see: See) -> _Enter:
        def look(x: Tensor, tokens: Tensor | None) -> Tensor:
            def wide(x: Tensor) -> None:
                see(x, tokens)

            in_float32(wide)(x)
            return x

        return look

    undo = [_on_input(block, anatomy, name, looking(see)) for name, see in inputs.items()]
    try:
        yield
    finally:
        for one in undo:
            one()


@contextmanager
def patch_inputs(
    block: nn.Module, anatomy: Architecture, inputs: Mapping[str, Change], outputs: Mapping[str, Change]
) -> Iterator[None]:
    """Feed linears inputs[name](x) instead of x, and pass on outputs[name](y) instead of a module's result y.

    Changes are made in single precision at least.
    """
    remove = change(block, anatomy, inputs, outputs)
    try:
        yield
    finally:
        remove()


def change(
    block: nn.Module, anatomy: Architecture, inputs: Mapping[str, Change], outputs: Mapping[str, Change]
) -> Callable[[], None]:
    """The same for good, or until the function it returns is called.

    Where one module computes several linears of the anatomy, their input is named by the first of them.
    """

    def changed(x: Tensor, tokens: Tensor | None, change: Change) -> Tensor:
        return in_float32(change)(x)

    undo = [_on_input(block, anatomy, name, partial(changed, change=f)) for name, f in inputs.items()]
    undo += [
        block.get_submodule(name).register_forward_hook(lambda _, args, y, f=f: in_float32(f)(y)).remove
        for name, f in outputs.items()
    ]

    def remove() -> None:
        for one in undo:
            one()

    return remove


def _on_input(block: nn.Module, anatomy: Architecture, name: str, enter: _Enter) -> Callable[[], None]:
    if anatomy.experts and name in anatomy.gates:
        return moe_hooks.change_input(block.get_submodule(anatomy.experts), "in", anatomy.gates.index(name), enter)
    if anatomy.experts and name in anatomy.downs:
        return moe_hooks.change_input(block.get_submodule(anatomy.experts), "down", anatomy.downs.index(name), enter)
    stored = next((whole for whole, parts in anatomy.fused.items() if name == parts[0]), name)
    hook = block.get_submodule(stored).register_forward_pre_hook(lambda _, args: (enter(args[0], None), *args[1:]))
    return hook.remove
