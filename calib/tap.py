"""Watch or change what enters and leaves named modules; always unhook."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

See = Callable[[Tensor], None]
Change = Callable[[Tensor], Tensor]


@contextmanager
def watching(module: nn.Module, inputs: Mapping[str, See]) -> Iterator[None]:
    """Call inputs[name](x) with the input x of the submodule `name`, each time it runs."""
    handles = [
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, see=see: see(args[0]))
        for name, see in inputs.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changing(module: nn.Module, inputs: Mapping[str, Change], outputs: Mapping[str, Change]) -> Iterator[None]:
    """Feed submodules inputs[name](x) instead of x, and pass on outputs[name](y) instead of their result y."""
    remove = change(module, inputs, outputs)
    try:
        yield
    finally:
        remove()


def change(module: nn.Module, inputs: Mapping[str, Change], outputs: Mapping[str, Change]) -> Callable[[], None]:
    """The same for good, or until the function it returns is called."""
    handles = [
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, f=f: (f(args[0]), *args[1:]))
        for name, f in inputs.items()
    ] + [module.get_submodule(name).register_forward_hook(lambda _, args, y, f=f: f(y)) for name, f in outputs.items()]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
