from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.stats.moments import SLAB, Moments


@given(st.integers(0, 10_000), st.integers(1, 19))
def test_batches_and_merging_do_not_matter(seed: int, cut: int) -> None:
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3
    whole = Moments.zero(5).add(x)
    parts = Moments.zero(5).add(x[cut:]) | Moments.zero(5).add(x[:cut])
    assert whole.count == parts.count == 20
    for name in ("total", "gram", "absmax"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name))
    assert torch.allclose(whole.covariance, x.T.cov(correction=0))
    assert torch.equal(whole.absmax, x.abs().amax(0))


def test_a_gram_matrix_made_in_slabs_is_whole() -> None:
    """Wider than two slabs, the last one not full."""
    x = torch.randn(7, 2 * SLAB + 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(Moments.zero(x.shape[1]).add(x).add(x).gram, 2 * x.T @ x)


def test_no_rows_change_nothing_and_leading_axes_are_rows() -> None:
    x = torch.randn(2, 3, 5)
    assert Moments.zero(5).add(x).add(x[:0]).count == 6
