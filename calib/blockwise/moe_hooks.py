"""See and change what enters each expert of a mixture, without writing the block again.

`transformers` stacks the experts' weights in one module and lets the function that multiplies by them be registered by
name. Ours takes one expert after the other and shows what enters its two steps: "in" (gate and up) and "down".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "parewell"

Step = Literal["in", "down"]
ExpertPatch = Callable[[Tensor, Tensor], Tensor]  # x (n, width), which tokens of the flattened batch (n,) -> x

_changes: WeakKeyDictionary[nn.Module, list[tuple[Step, int, ExpertPatch]]] = WeakKeyDictionary()


def _experts(module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """hidden (tokens, d); index, weight (tokens, k): which experts a token goes to, and what each counts."""

    def changed(x: Tensor, step: Step, expert: int, token: Tensor) -> Tensor:
        for where, number, change in _changes.get(module, ()):
            if (where, number) == (step, expert):
                x = change(x, token)
        return x

    def product(x: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(module, name)[expert]
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        return nn.functional.linear(x, weight.mT if module.is_transposed else weight, bias)

    first, result = "gate_up_proj" if module.has_gate else "up_proj", torch.zeros_like(hidden)
    for expert in range(module.num_experts):
        token, slot = torch.where(index == expert)
        if len(token):
            x = product(changed(hidden[token], "in", expert, token), first, expert)
            x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
            x = product(changed(x, "down", expert, token), "down_proj", expert)
            if getattr(module, "has_post_expert_norm", False):
                x = module.post_expert_norm(x)
            result = result.index_add(0, token, (x * weight[token, slot, None]).to(result.dtype))
    return result


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)


def patch_expert_input(module: nn.Module, step: Step, expert: int, change: ExpertPatch) -> Callable[[], None]:
    """Change what enters `step` of `expert` from now on.  -> a function that ends this."""
    entry = (step, expert, change)
    _changes.setdefault(module, []).append(entry)
    return lambda: _changes[module].remove(entry)


def has_experts(module: nn.Module) -> bool:
    """Whether a module is a stack of experts that `patch_expert_input` sees into."""
    return all(hasattr(module, name) for name in ("num_experts", "down_proj", "has_bias", "is_transposed"))
