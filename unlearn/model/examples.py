"""Rows that a model is trained on, and the target positions that each of them asks for.

A classifier decides once a row, a language model at every token of an answer. All that is learned or measured here is
of target positions, flat, in order of their rows: padding and prompts have none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # the label of a position where nothing is decided


@dataclass(frozen=True)
class Examples:
    """n rows: inputs (n, ...) by the names that the model takes them by; labels int (n,), or (n, T) where a row has
    target positions at some of T positions and IGNORED elsewhere."""

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> Examples:
        return Examples({name: x[rows] for name, x in self.inputs.items()}, self.labels[rows])

    def __or__(self, other: Examples) -> Examples:
        """These rows, then those; of one width."""
        inputs = {name: torch.cat([x, other.inputs[name]]) for name, x in self.inputs.items()}
        return Examples(inputs, torch.cat([self.labels, other.labels]))

    def padded(self, width: int, pad: int = 0) -> Examples:
        """Rows of token ids, each with `pad` and labels that are ignored after it, up to `width` tokens."""
        missing = (0, width - self.inputs["input_ids"].shape[1])
        inputs = {
            name: torch.nn.functional.pad(x, missing, value=pad if name == "input_ids" else 0)
            for name, x in self.inputs.items()
        }
        labels = self.labels if self.labels.dim() == 1 else torch.nn.functional.pad(self.labels, missing, value=IGNORED)
        return Examples(inputs, labels)

    def to(self, device: torch.device) -> Examples:
        """Move all tensors to a device."""
        return Examples({name: x.to(device) for name, x in self.inputs.items()}, self.labels.to(device))

    @property
    def target_mask(self) -> Tensor:
        """bool (n, T): where something is decided."""
        return self.labels != IGNORED

    @property
    def targets(self) -> Tensor:
        """(d,): the label of each target position."""
        return self.labels if self.labels.dim() == 1 else self.labels[self.target_mask]

    @property
    def width(self) -> int:
        """Tokens of each row that pass through a model: of rows with target positions at positions up to the last one;
        1 where rows are not of tokens."""
        if self.labels.dim() == 1:
            return int(self.inputs["input_ids"].shape[1]) if "input_ids" in self.inputs else 1
        target_mask = self.target_mask.any(0).nonzero()
        return int(target_mask.max()) + 1 if len(target_mask) else 1

    @property
    def counts(self) -> Tensor:
        """(n,): target positions in each row."""
        return torch.ones_like(self.labels) if self.labels.dim() == 1 else self.target_mask.sum(1)

    @property
    def row_index(self) -> Tensor:
        """(d,): the row that each target position is of."""
        rows = torch.arange(len(self), device=self.labels.device)
        return rows if self.labels.dim() == 1 else rows.repeat_interleave(self.counts)

    def target_positions(self, rows: Tensor) -> Tensor:
        """Numbers, among all target positions, of those of `rows` (b,), in order of `rows`.  -> int (d',)."""
        if self.labels.dim() == 1:
            return rows.to(self.labels.device)
        ends = self.counts.cumsum(0).tolist()
        found = [torch.arange(ends[r - 1] if r else 0, ends[r]) for r in rows.tolist()]
        return torch.cat(found or [rows]).to(self.labels.device)

    def sums(self, values: Tensor) -> Tensor:
        """Sum values (d,) of target positions by row.  -> (n,)."""
        return values if self.labels.dim() == 1 else values.new_zeros(len(self)).index_add(0, self.row_index, values)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of inputs and labels, in hexadecimal."""
        digest = hashlib.sha256()
        for name, x in sorted({**self.inputs, "labels": self.labels}.items()):
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            digest.update(x.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


def plain_examples(inputs: Tensor, labels: Tensor) -> Examples:
    """Examples for a module that takes one tensor: inputs (n, ...), labels int (n,)."""
    return Examples({"": inputs}, labels)
