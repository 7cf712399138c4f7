from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unlearn.model.examples import IGNORED, Examples, plain_examples


def drawn(seed: int, rows: int = 6, width: int = 5) -> Examples:
    """Rows with none to five decisions each."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(9, (rows, width), generator=g)
    labels[torch.rand(rows, width, generator=g) < 0.4] = IGNORED
    return Examples({"ids": torch.randint(9, (rows, width), generator=g)}, labels)


@given(st.integers(0, 10_000), st.lists(st.integers(0, 5), max_size=8))
def test_decisions_of_some_rows_are_those_rows_decisions(seed: int, some: list[int]) -> None:
    every, rows = drawn(seed), torch.tensor(some, dtype=torch.long)
    assert torch.equal(every.targets[every.target_positions(rows)], every[rows].targets)
    assert torch.equal(every.row_index[every.target_positions(rows)], rows[every[rows].row_index])


@given(st.integers(0, 10_000))
def test_sums_are_by_row_and_skip_prompts_and_padding(seed: int) -> None:
    every = drawn(seed)
    values = torch.randn(len(every.targets), dtype=torch.float64)
    found, at = every.sums(values), 0
    for row, labels in enumerate(every.labels):
        count = int((labels != IGNORED).sum())
        assert torch.isclose(found[row], values[at : at + count].sum()) and every.counts[row] == count
        at += count


def test_a_classifier_decides_once_a_row() -> None:
    x, y = torch.randn(4, 3), torch.tensor([2, 0, 1, 1])
    every, rows = plain_examples(x, y), torch.tensor([3, 0])
    assert torch.equal(every.targets, y) and torch.equal(every.row_index, torch.arange(4))
    assert torch.equal(every.target_positions(rows), rows) and torch.equal(every[rows].inputs[""], x[rows])
    assert torch.equal(every.sums(x[:, 0]), x[:, 0])


def test_a_fingerprint_is_of_all_that_there_is() -> None:
    one = drawn(0)
    assert one.fingerprint == drawn(0).fingerprint

    def changed(x: Tensor) -> Tensor:
        other = x.clone()
        other[2, 3] += 1
        return other

    assert Examples(one.inputs, changed(one.labels)).fingerprint != one.fingerprint
    assert Examples({"ids": changed(one.inputs["ids"])}, one.labels).fingerprint != one.fingerprint
    assert Examples({"other": one.inputs["ids"]}, one.labels).fingerprint != one.fingerprint
