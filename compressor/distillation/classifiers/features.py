"""States inside a classifier: what named modules give, as one vector a row, and answers that are made of it.

The branch is a design of ours and the smallest there is: OFA-KD (arXiv:2310.19444) itself takes convolutions or blocks
of attention to the last resolution before it answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib import BadInput
from compressor.distillation.classifiers.images import ImageClassifier
from compressor.distillation.classifiers.texts import ROWS_AT_ONCE


class ExitBranch(nn.Module):
    """An answer from a state: layer norm, then one linear map to the classes.  (n, width) -> (n, classes)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, state: Tensor) -> Tensor:
        """(n, width) -> (n, classes)."""
        logits: Tensor = self.head(self.norm(state))
        return logits


def pooled_output(output: Any) -> Tensor:
    """One vector a row of what a module gives, in float32: the mean over places of (n, C, H, W), over tokens of
    (n, T, d), or (n, d) as it is; of a tuple or a mapping, its first tensor.  Raises BadInput for anything else."""
    while isinstance(output, Mapping | tuple | list) and len(output):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    if not isinstance(output, Tensor) or output.dim() not in (2, 3, 4) or not output.is_floating_point():
        what = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise BadInput(f"exits: a module gives {what}, and (rows, width), (rows, tokens, width) or (rows, channels, "
                       "height, width) is read; name another")  # fmt: skip
    return output.float() if output.dim() == 2 else output.float().mean((2, 3) if output.dim() == 4 else 1)


def matching_modules(model: nn.Module, patterns: str, option: str) -> list[str]:
    """Names of modules that fit patterns, separated by commas, in the order of the patterns and then of the model.

    A * stands for anything within one level of a name: `stages.*` is stages.0 and stages.1, not stages.0.layers.
    Raises BadInput, naming the `option`, where a pattern fits none.
    """
    names, found = [name for name, _ in model.named_modules() if name], list[str]()
    for pattern in (part.strip() for part in patterns.split(",")):
        fitting = [n for n in names if n.count(".") == pattern.count(".") and fnmatchcase(n, pattern)]
        if not fitting:
            some = ", ".join(names[:: max(1, len(names) // 6)][:6])
            raise BadInput(f"{option} '{pattern}': fits no module of the model, such as {some}; mend the pattern")
        found += [name for name in fitting if name not in found]
    return found


@contextmanager
def watched_states(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Fill a dictionary with the pooled outputs (n, d) of modules, by name, each time the model runs."""
    states: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        states[name] = pooled_output(output)

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name in names
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def states_of(classifier: ImageClassifier, inputs: Sequence[Any], names: Sequence[str]) -> list[Tensor]:
    """Run all rows in evaluation mode.  -> what modules give, pooled, (n, d) each, on the CPU, in the order of `names`.
    Raises BadInput where one does not run."""
    classifier.model.eval()
    parts: list[list[Tensor]] = [[] for _ in names]
    for first in range(0, len(inputs), ROWS_AT_ONCE):
        with watched_states(classifier.model, names) as states:
            classifier.logits(inputs[first : first + ROWS_AT_ONCE])
        for name, part in zip(names, parts, strict=True):
            if name not in states:
                raise BadInput(f"exits: module {name} does not run when the model answers; name another")
            part.append(states[name].cpu())
    return [torch.cat(part) for part in parts]


def exit_widths(
    classifier: ImageClassifier, inputs: Sequence[Any], patterns: str, option: str, path: Path
) -> list[int]:
    """Widths of the states at modules that fit `patterns`, on some rows of the file `path`.  Raises BadInput where
    there are none, or they do not come one a row."""
    states = states_of(classifier, inputs, matching_modules(classifier.model, patterns, option))
    if any(len(state) != len(inputs) for state in states):
        raise BadInput(f"{option} {patterns}: gives no state for each row of {path}; name other modules")
    return [state.shape[1] for state in states]


def drawn_branches(widths: Sequence[int], classes: int, seed: int, device: torch.device) -> list[ExitBranch]:
    """A branch for each exit, with weights drawn by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [ExitBranch(width, classes).to(device) for width in widths]
