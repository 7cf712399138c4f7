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
    result = torch.zeros_like(hidden)
    for expert in range(module.num_experts):
        token, slot = torch.where(index == expert)
        if len(token):
            x = _expert(module, expert, hidden[token], token)
            result = result.index_add(0, token, (x * weight[token, slot, None]).to(result.dtype))
    return result


def _expert(module: Any, expert: int, x: Tensor, token: Tensor) -> Tensor:
    """What an expert makes of x (n, d), the states of tokens (n,)."""

    def changed(x: Tensor, step: Step) -> Tensor:
        for where, number, change in _changes.get(module, ()):
            if (where, number) == (step, expert):
                x = change(x, token)
        return x

    def product(x: Tensor, name: str) -> Tensor:
        weight = getattr(module, name)[expert]
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        return nn.functional.linear(x, weight.mT if module.is_transposed else weight, bias)

    x = product(changed(x, "in"), "gate_up_proj" if module.has_gate else "up_proj")
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = product(changed(x, "down"), "down_proj")
    return module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)


def open_repeated(module: Any) -> None:
    """Open experts that are not the library's usual ones, but Llama 4's: each is given all tokens, weighted by its
    router, so that those which it does not get are zero."""
    if type(module).__name__ != "Llama4TextExperts":
        return
    module.has_bias, module.is_transposed, module.has_gate = False, True, True

    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        result: Tensor = up * module.act_fn(gate)
        return result

    def forward(hidden: Tensor) -> Tensor:
        """hidden (experts * tokens, d)."""
        by_expert = hidden.view(module.num_experts, -1, hidden.shape[-1])
        result = torch.zeros_like(by_expert)
        for expert, x in enumerate(by_expert):
            (token,) = torch.where(x.any(-1))
            if len(token):
                result[expert, token] = _expert(module, expert, x[token], token)
        return result.view_as(hidden)

    module._apply_gate, module.forward = gated, forward


def patch_expert_input(module: nn.Module, step: Step, expert: int, change: ExpertPatch) -> Callable[[], None]:
    """Change what enters `step` of `expert` from now on.  -> a function that ends this."""
    entry = (step, expert, change)
    _changes.setdefault(module, []).append(entry)
    return lambda: _changes[module].remove(entry)


def has_experts(module: nn.Module) -> bool:
    """Whether a module is a stack of experts that `patch_expert_input` sees into."""
    return all(hasattr(module, name) for name in ("num_experts", "down_proj", "has_bias", "is_transposed"))
