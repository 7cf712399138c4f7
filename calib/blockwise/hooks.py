"""Watch or change what enters the linears of a block; always unhook."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from calib.blockwise import moe_hooks
from calib.blockwise.linears import Linear
from calib.runtime.precision import in_float32

See = Callable[[Tensor, Tensor | None], object]  # x, and which tokens of the batch it holds (None: all)
Patch = Callable[[Tensor], Tensor]
_Enter = Callable[[Tensor, Tensor | None], Tensor]


@contextmanager
def observe_inputs(block: nn.Module, inputs: Mapping[Linear, See]) -> Iterator[None]:
    """Call inputs[linear](x, tokens) with the input x of a linear, each time it runs.

    x is (B, T, width) and tokens None; at an expert x is (n, width) and tokens (n,) index the B * T flattened.
    """

    def looking(see: See) -> _Enter:
        def look(x: Tensor, tokens: Tensor | None) -> Tensor:
            def wide(x: Tensor) -> None:
                see(x, tokens)

            in_float32(wide)(x)
            return x

        return look

    undo = [_on_input(block, linear, looking(see)) for linear, see in inputs.items()]
    try:
        yield
    finally:
        for one in undo:
            one()


@contextmanager
def patch_inputs(block: nn.Module, inputs: Mapping[Linear, Patch]) -> Iterator[None]:
    """Feed linears inputs[linear](x) instead of x.  Changes are made in single precision at least."""
    remove = install_patches(block, inputs)
    try:
        yield
    finally:
        remove()


def install_patches(block: nn.Module, inputs: Mapping[Linear, Patch]) -> Callable[[], None]:
    """Patch inputs of a block's linears until the function that is returned is called.

    Linears that are parts of one module, or of one step of an expert, share what enters: one of them is to be patched.
    """

    def changed(x: Tensor, tokens: Tensor | None, change: Patch) -> Tensor:
        return in_float32(change)(x)

    undo = [_on_input(block, linear, partial(changed, change=f)) for linear, f in inputs.items()]

    def remove() -> None:
        for one in undo:
            one()

    return remove


def _on_input(block: nn.Module, linear: Linear, enter: _Enter) -> Callable[[], None]:
    module = block.get_submodule(linear.module)
    if linear.step is not None:
        assert linear.expert is not None
        return moe_hooks.patch_expert_input(module, linear.step, linear.expert, enter)
    hook = module.register_forward_pre_hook(lambda _, args: (enter(args[0], None), *args[1:]))
    return hook.remove
