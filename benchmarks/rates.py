"""The learning rate of each row of a table: the best of a ladder that reaches beyond it on both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def best_rate(figure: Callable[[float], float], start: Sequence[float], furthest: int = 6) -> tuple[float, str]:
    """-> the rate with the least figure, and all that were tried, as text.

    Starts with the rates of `start`, in rising order, and goes on by factors of two for as long as the best is the last
    on its side, `furthest` rates at most.
    """
    tried = {rate: figure(rate) for rate in start}
    while len(tried) < furthest:
        best = min(tried, key=tried.__getitem__)
        if best == min(tried):
            tried[best / 2] = figure(best / 2)
        elif best == max(tried):
            tried[best * 2] = figure(best * 2)
        else:
            break
    return min(tried, key=tried.__getitem__), " ".join(f"{rate:g}: {tried[rate]:.3f}" for rate in sorted(tried))
