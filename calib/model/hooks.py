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
Patch = Callable[[Tensor], Tensor]
_Enter = Callable[[Tensor, Tensor | None], Tensor]


@contextmanager
def observe_inputs(block: nn.Module, architecture: Architecture, inputs: Mapping[str, See]) -> Iterator[None]:
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

    undo = [_on_input(block, architecture, name, looking(see)) for name, see in inputs.items()]
    try:
        yield
    finally:
        for one in undo:
            one()


@contextmanager
def patch_inputs(
    block: nn.Module, architecture: Architecture, inputs: Mapping[str, Patch], outputs: Mapping[str, Patch]
) -> Iterator[None]:
    """Feed linears inputs[name](x) instead of x, and pass on outputs[name](y) instead of a module's result y.

    Changes are made in single precision at least.
    """
    remove = install_patches(block, architecture, inputs, outputs)
    try:
        yield
    finally:
        remove()


def install_patches(
    block: nn.Module, architecture: Architecture, inputs: Mapping[str, Patch], outputs: Mapping[str, Patch]
) -> Callable[[], None]:
    """Patch inputs and outputs of a block's linears until the function that is returned is called.

    Where one module computes several linears of the architecture, their input is named by the first of them.
    """

    def changed(x: Tensor, tokens: Tensor | None, change: Patch) -> Tensor:
        return in_float32(change)(x)

    undo = [_on_input(block, architecture, name, partial(changed, change=f)) for name, f in inputs.items()]
    undo += [
        block.get_submodule(name).register_forward_hook(lambda _, args, y, f=f: in_float32(f)(y)).remove
        for name, f in outputs.items()
    ]

    def remove() -> None:
        for one in undo:
            one()

    return remove


def _on_input(block: nn.Module, architecture: Architecture, name: str, enter: _Enter) -> Callable[[], None]:
    if architecture.experts and name in architecture.gates:
        return moe_hooks.patch_expert_input(
            block.get_submodule(architecture.experts), "in", architecture.gates.index(name), enter
        )
    if architecture.experts and name in architecture.downs:
        return moe_hooks.patch_expert_input(
            block.get_submodule(architecture.experts), "down", architecture.downs.index(name), enter
        )
    stored = next((whole for whole, parts in architecture.fused.items() if name == parts[0]), name)
    hook = block.get_submodule(stored).register_forward_pre_hook(lambda _, args: (enter(args[0], None), *args[1:]))
    return hook.remove
