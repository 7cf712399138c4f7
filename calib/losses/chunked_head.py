"""Losses of hidden states through a large head, some positions at a time.

Logits over a whole vocabulary are by far the largest tensors of a training step. Here they exist for some positions,
and so do their gradients, which are made on the way forward: nothing is kept for a way back, nothing is made twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 2**26  # of float32 logits that exist at a time
FEWEST_POSITIONS = 32  # that pass the head together: with fewer, reading it takes longer than multiplying by it
HEAD_BYTES = 10 * 2**20  # the same where they get gradients: some ten tensors of that size exist then
PART_OF_WIDTH = 20  # and at least so many-th of the head's width in positions: these tensors take half of what it takes


def chunks(tokens: int, vocab: int, size: int | None = None) -> Iterator[slice]:
    """Slices of `tokens` positions: `size` each, or as many as fill CHUNK_BYTES with logits, and a few at least."""
    size = size or max(FEWEST_POSITIONS, CHUNK_BYTES // (4 * vocab))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def positions_at_once(rows: Tensor) -> int:
    """Count the positions whose logits, by a head's rows (V, d), get gradients together.

    As many as fill HEAD_BYTES. Where the vocabulary is so large that these are few, each product takes as long as
    reading the head does; there they are as many as take half of the head's own memory.
    """
    vocab, width = rows.shape
    return max(1, HEAD_BYTES // (4 * vocab), width // PART_OF_WIDTH)


def by_chunks(
    hidden: Tensor, loss: Callable[[slice, Tensor], Tensor], vocab: int, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of loss(positions, hidden[positions]), a scalar for each chunk of hidden (T, d), and its gradient (T, d).

    Gradients of whatever else `loss` depends on are added to their .grad. Logits, and what is made of them, exist for
    one chunk at a time. The sum () is float64 and on the device: nobody has to wait for it.
    """
    gradient, total = torch.empty_like(hidden), torch.zeros((), dtype=torch.float64, device=hidden.device)
    for positions in chunks(len(hidden), vocab, size):
        x = hidden[positions].detach().requires_grad_()
        value = loss(positions, x)
        value.backward()
        total += value.detach()
        assert x.grad is not None
        gradient[positions] = x.grad
    return total, gradient


@dataclass(frozen=True)
class Head:
    """The output head, from hidden states to logits: weight (V, d), a factor, the cap where scores are soft-capped, a
    bias (V,).

    Rows of the weight beyond `vocab` stand for no token and are left out.
    """

    weight: Tensor
    scale: float = 1.0
    cap: float | None = None
    vocab: int | None = None
    bias: Tensor | None = None

    @staticmethod
    def of(model: Any, vocab: int | None = None) -> Head:
        """The head of a language model of transformers, with the scaling and soft-capping that its config names, and
        the bias that BART and its like keep apart."""
        linear = model.get_output_embeddings()
        bias = getattr(linear, "bias", None)
        apart = getattr(model, "final_logits_bias", None)
        if bias is None and apart is not None:
            bias = apart.view(-1)
        return Head.as_configured(model.config, linear.weight, bias, vocab)

    @staticmethod
    def as_configured(config: Any, weight: Tensor, bias: Tensor | None, vocab: int | None = None) -> Head:
        """Scale and soft-cap as a config of transformers says."""
        config = config.get_text_config()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return Head(weight, scale, cap, vocab, bias)

    @property
    def fixed(self) -> Head:
        """A copy whose weight takes no gradient."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    @property
    def rows(self) -> Tensor:
        """The weight's rows that stand for tokens (vocab, d)."""
        return self.weight[: self.vocab]

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., V)."""
        return self.finish(hidden @ self.rows.mT)

    def each(self, hidden: Tensor, values: Callable[[slice, Tensor], Tensor], size: int | None = None) -> Tensor:
        """values(positions, logits (t, V)) -> (t, ...), of hidden (T, d).  -> (T, ...).

        Logits exist for some positions at a time; on the way back they are made again. Where all fit in one chunk they
        are made once, as without this. Gradients reach hidden states and weight, and nothing else `values` depends on.
        """
        size = size or positions_at_once(self.rows)
        if len(hidden) <= size:
            return values(slice(0, len(hidden)), self(hidden))
        made: Tensor = _Each.apply(hidden, self.weight, self.bias, self, values, size)
        return made

    def finish(self, product: Tensor) -> Tensor:
        """Add the bias to the product of states and weight, scale and soft-cap it."""
        if self.bias is not None:
            product = product + self.bias[: self.vocab]
        if self.scale != 1.0:
            product = product * self.scale
        return product if self.cap is None else self.cap * (product / self.cap).tanh()


class _Each(torch.autograd.Function):
    """`Head.each`, in chunks."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head,
        values: Callable[[slice, Tensor], Tensor], size: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, weight)
        ctx.options = (head.fixed, values, size)
        head = ctx.options[0]
        return torch.cat([values(at, head(hidden[at])) for at in chunks(len(hidden), len(head.rows), size)])

    @staticmethod
    def backward(ctx: Any, from_values: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, weight), (head, values, size) = ctx.saved_tensors, ctx.options
        rows = head.rows
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(head.bias) if head.bias is not None and ctx.needs_input_grad[2] else None
        for at in chunks(len(hidden), len(rows), size):
            product = (hidden[at] @ rows.mT).requires_grad_()
            with torch.enable_grad():
                made = values(at, head.finish(product))
            (from_product,) = torch.autograd.grad(made, product, from_values[at])
            if to_hidden is not None:
                torch.mm(from_product, rows, out=to_hidden[at])
            if to_bias is not None:
                to_bias[: len(rows)] += from_product.sum(0)
            if to_weight is not None:
                to_weight[: len(rows)].addmm_(from_product.mT, hidden[at])
            del product, made, from_product  # before the next chunk's come
        return to_hidden, to_weight, to_bias, None, None, None


def through_head(
    hidden: Tensor, head: Head, loss: Callable[[slice, Tensor], Tensor], size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of loss(positions, logits (t, V)) over chunks of hidden (T, d), and its gradient (T, d).  The sum () is
    float64 and on the device.

    The gradient of the head's weight is added to its .grad in place, and so is that of whatever else `loss` depends on.
    Hidden states that a graph hangs on take the gradient with `hidden.backward(gradient)`.
    """
    weight, rows = head.weight, head.rows.detach()
    gradient = torch.empty_like(hidden, requires_grad=False)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    if weight.requires_grad and weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    into = None if weight.grad is None else weight.grad[: len(rows)]
    fitting = positions_at_once(rows)
    even = fitting - fitting % 8 if fitting > 8 else fitting  # matrix products of odd sizes take a tenth longer
    for positions in chunks(len(hidden), len(rows), size or even):
        x = hidden[positions].detach()
        product = (x @ rows.mT).requires_grad_()
        value = loss(positions, head.finish(product))
        value.backward()
        from_loss = product.grad
        assert from_loss is not None
        total += value.detach()
        torch.mm(from_loss, rows, out=gradient[positions])
        if into is not None:
            into.addmm_(from_loss.mT, x)
        del product, value, from_loss  # before the next chunk's come
    return total, gradient
