"""Relations of attention: how queries are alike one another, and keys, and values (MiniLM v2, arXiv:2012.15828)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from calib import BadInput
from calib.runtime.precision import upcast

# What the library's types call the linears that make queries, keys and values, or all three one after the other.
NAMES_OF_PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"),
               ("query_proj", "key_proj", "value_proj"), ("q", "k", "v"), ("Wqkv",))  # fmt: skip


def relation_divergence(teacher: Tensor, student: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Compare how vectors of one kind (queries, keys or values) relate to each other (arXiv:2012.15828, equations 5-7).

    The vectors are cut into `heads` parts, whatever heads the attention has; of each part softmax(X X^T / sqrt(d_r)),
    d_r its width, is a distribution over the row's tokens for each of them.

    Args:
        teacher: (B, T, D).
        student: (B, T, d).
        mask: bool (B, T), of tokens that are no padding.
        heads: how many parts, which divides D and d.

    Returns:
        (B,): KL(teacher || student) in nats, the mean over heads and the row's tokens; 0 of a row without any.
    """

    def log_relations(x: Tensor) -> Tensor:
        parts = upcast(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = parts @ parts.mT / parts.shape[-1] ** 0.5
        return scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min).log_softmax(-1)

    log_p, log_q = log_relations(teacher), log_relations(student)
    each = (log_p.exp() * (log_p - log_q)).masked_fill(~mask[:, None, None], 0.0).sum(-1).mean(1)
    return (each * mask).sum(1) / mask.sum(1).clamp(min=1)


def attention_relations(teacher: Sequence[Tensor], student: Sequence[Tensor], mask: Tensor, heads: int) -> Tensor:
    """Sum `relation_divergence` over queries, keys and values (arXiv:2012.15828, equation 8 with weights of 1).

    Args:
        teacher: queries, keys and values (B, T, D) of one layer.
        student: the same (B, T, d) of its last.
        mask: bool (B, T), of tokens that are no padding.
        heads: parts that each of them is cut into.

    Returns:
        (B,) nats.
    """
    each = [relation_divergence(t, s, mask, heads) for t, s in zip(teacher, student, strict=True)]
    return torch.stack(each).sum(0)


def projections_in(layer: nn.Module, what: str) -> list[nn.Module]:
    """Find the linears of a layer that make queries, keys and values: three, or one that makes them one after the
    other.  Raises BadInput, naming `what` they were looked for in, where they are not found by name."""
    by_name = dict[str, list[nn.Module]]()
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            by_name.setdefault(name.rpartition(".")[2], []).append(module)
    for names in NAMES_OF_PROJECTIONS:
        if all(len(by_name.get(name, ())) == 1 for name in names):
            return [by_name[name][0] for name in names]
    raise BadInput(
        f"loss attention-relations: the queries, keys and values of {what} are not found by name; leave it out"
    )


def projection_widths(projections: Sequence[nn.Module]) -> list[int]:
    """Widths of queries, keys and values that `projections_in` found."""
    widths = [int(linear.out_features) for linear in projections if isinstance(linear, nn.Linear)]
    return widths if len(widths) == 3 else [widths[0] // 3] * 3


@contextmanager
def watched_projections(projections: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Gather the queries (0), keys (1) and values (2) (B, T, d) that a model computes within a `with` block."""
    found, parts = dict[int, Tensor](), 3 // max(1, len(projections))

    def watching(number: int) -> Callable[..., None]:
        def made(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            found.update(enumerate(output.chunk(parts, -1), number))

        return made

    hooks = [linear.register_forward_hook(watching(number)) for number, linear in enumerate(projections)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
