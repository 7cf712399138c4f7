"""DAC-KL (arXiv:2407.10068): KL where a teacher's distribution is dense, and what goes with it along spans of a text.

As a nucleus, without parameters; or within limits that a net learns. All are divergences of log-probabilities like
those of `calib.losses.divergences`, with the same back-ends: never negative, zero where the two agree, never above the
full KL.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from calib.losses.divergences import forward_kl
from calib.runtime.precision import upcast


def dac_nucleus(log_p: Tensor, log_q: Tensor, mass: float = 0.95) -> Tensor:
    """KL(p || q) on the teacher's most likely classes, as few as hold `mass`, all others being one class more.

    (..., C), (..., C) -> (...).  Stands in, without parameters, for the learnt clip of DAC-KL (arXiv:2407.10068).
    Never above the full KL, and it at mass 1. Classes as likely as the last one taken are taken too: their order in the
    vocabulary must not count. Raises ValueError where `mass` is not in (0, 1].
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass {mass} is not in (0, 1]")
    if mass == 1:  # rounding of the running sum would leave the last ones out
        return forward_kl(log_p, log_q)
    with torch.no_grad():
        falling = log_p.sort(-1, descending=True).values
        before = falling.exp().cumsum(-1) - falling.exp()
        last = falling.where(before < mass, torch.inf).amin(-1, keepdim=True)
        kept = log_p >= last
        whole = kept.all(-1)
    inside = (log_p.exp() * (log_p - log_q)).where(kept, 0).sum(-1)
    # Where nothing is outside, the sum over it would have no gradient: zeros for both sides cancel instead.
    p_tail, q_tail = (z.where(~kept, -torch.inf).where(~whole[..., None], 0).logsumexp(-1) for z in (log_p, log_q))
    return inside + p_tail.exp() * (p_tail - q_tail)


class ClipNet(nn.Module):
    """A network that reads off the shapes of both distributions where to clip the teacher's (after DAC-KL,
    arXiv:2407.10068).

    Classes stand in falling order of the teacher's probability, each where the middle of its mass falls in [0, 1]. For
    every row two limits come out, at least `mass` apart whatever the weights are; a region cannot shrink to nothing. At
    first they are the same for all rows and nearly the nucleus that holds 0.95 (`mass` 0.5), or more.

    The paper, by accounts of it, trains its network on the clipped KL itself. That goes down by looking away: the less
    is told apart, the smaller it is. Here the student descends on `dac_clipped` and has no say in the limits, while the
    network descends on `clip_objective`. Sizes, features, region and objective are ours.
    """

    def __init__(self, generator: torch.Generator, *, quantiles: int = 8, width: int = 16, mass: float = 0.5) -> None:
        super().__init__()
        if not 0 < mass < 1:
            raise ValueError(f"mass {mass} is not in (0, 1)")
        self.mass = mass
        self.read = nn.utils.skip_init(nn.Linear, 2 * quantiles, width)
        self.limits = nn.utils.skip_init(nn.Linear, width, 2)
        self.register_buffer("levels", (torch.arange(quantiles) + 0.5) / quantiles, persistent=False)
        with torch.no_grad():
            nn.init.normal_(self.read.weight, std=(2 * quantiles) ** -0.5, generator=generator)
            self.read.bias.zero_()
            self.limits.weight.zero_()
            self.limits.bias.copy_(torch.tensor([-3.0, 2.2]))  # sigmoids of about 0.05 and 0.9

    def forward(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """(..., C), (..., C) -> lower and upper limit (...), 0 <= lower < upper <= 1.  No gradient into the rows."""
        levels: Tensor = self.get_buffer("levels")
        with torch.no_grad():
            features = torch.cat([_surprise(z, levels) for z in (log_p, log_q)], -1).log1p()
        place, size = self.limits(self.read(features.to(levels.dtype)).tanh()).sigmoid().unbind(-1)
        extent = self.mass + (1 - self.mass) * size
        lower = (1 - extent) * place
        return lower, lower + extent


def dac_clipped(log_p: Tensor, log_q: Tensor, lower: Tensor, upper: Tensor, softness: float = 0.02) -> Tensor:
    """KL(p || q) within limits, with a class for all that is more likely and one for all that is less.

    (..., C), (..., C), (...), (...) -> (...).  A class at t stays itself with probability s((t - lower) / softness)
    s((upper - t) / softness), s the logistic function, else it goes to the side. The same chances hold for p and q, so
    this is a divergence and never above the full KL. Limits are constants here; see `clip_objective` for theirs.
    """
    return _clipped(log_p, log_q, lower.detach(), upper.detach(), softness)[0]


def clip_objective(log_p: Tensor, log_q: Tensor, lower: Tensor, upper: Tensor, softness: float = 0.02) -> Tensor:
    """Objective of the limits, to be minimized: the teacher's mass within them, less the share of the full KL that is
    kept.

    (..., C), (..., C), (...), (...) -> (...), in [-1, 1].  Near zero where everything is within, and below zero where a
    region has more of the disagreement than of the mass. No gradient into the rows.
    """
    log_p, log_q = log_p.detach(), log_q.detach()
    value, mass = _clipped(log_p, log_q, lower, upper, softness)
    whole = forward_kl(log_p, log_q)
    return mass - value / whole.clamp(min=1e-6)  # below that a KL in single precision is rounding


def dac_learned(clip: ClipNet, log_p: Tensor, log_q: Tensor) -> Tensor:
    """`dac_clipped` within the limits that `clip` sets, its value; and with it, as a gradient alone, `clip_objective`.

    (..., C), (..., C) -> (...).  The student descends on the one, the network on the other, in one backward pass.
    """
    lower, upper = clip(log_p, log_q)
    objective = clip_objective(log_p, log_q, lower, upper)
    return dac_clipped(log_p, log_q, lower, upper) + (objective - objective.detach())


def span_correlation(p: Tensor, q: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Mean of (cos(p_t, p_t+1) - cos(q_t, q_t+1))^2 over neighbours within spans of one sequence.  -> ().

    p (T, a) and q (T, b) are rows of probabilities, or of hidden states whose widths may differ; a span is (start, end)
    with 0 <= start < end <= T, else ValueError. 0 where no span has two tokens. After DAC-KL's span loss
    (arXiv:2407.10068), which by accounts of it compares products of neighbouring rows entry by entry.
    """
    length = len(p)
    for start, end in spans:
        if not 0 <= start < end <= length:
            raise ValueError(f"span ({start}, {end}) is not within the sequence's {length} tokens")
    first = [t for start, end in spans for t in range(start, end - 1)]
    index = torch.tensor(first, dtype=torch.long, device=p.device)

    def neighbours(rows: Tensor) -> Tensor:
        unit = nn.functional.normalize(upcast(rows), dim=-1)
        return (unit[index] * unit[index + 1]).sum(-1)

    return (neighbours(p) - neighbours(q)).square().sum() / max(len(first), 1)


def _surprise(log_p: Tensor, levels: Tensor) -> Tensor:
    """-log p of the class at which the running sum of falling probabilities reaches each level.  -> (..., levels)."""
    falling = log_p.sort(-1, descending=True).values
    shares = levels.to(log_p.dtype).expand(*log_p.shape[:-1], -1).contiguous()
    at = torch.searchsorted(falling.exp().cumsum(-1), shares).clamp(max=log_p.shape[-1] - 1)
    return -falling.gather(-1, at)


def _position(log_p: Tensor) -> Tensor:
    """The middle of each class's mass among masses in falling order, equal ones sharing a place.  In [0, 1]."""
    falling, order = log_p.sort(-1, descending=True)
    mass = falling.exp()
    upto = mass.cumsum(-1)
    changes = falling[..., 1:] != falling[..., :-1]
    ends = torch.ones_like(changes[..., :1])
    begin = (upto - mass).where(torch.cat([ends, changes], -1), 0).cummax(-1).values
    end = upto.where(torch.cat([changes, ends], -1), torch.inf).flip(-1).cummin(-1).values.flip(-1)
    return torch.empty_like(log_p).scatter(-1, order, (begin + end) / 2)


def _clipped(log_p: Tensor, log_q: Tensor, lower: Tensor, upper: Tensor, softness: float) -> tuple[Tensor, Tensor]:
    """The clipped KL, and the teacher's mass that stayed."""
    with torch.no_grad():
        t = _position(log_p)
    past, short = (t - lower[..., None]) / softness, (upper[..., None] - t) / softness
    log_stay = logsigmoid(past) + logsigmoid(short)
    stay = (log_p + log_stay).exp()
    value = (stay * (log_p - log_q)).sum(-1)
    for log_share in (logsigmoid(-past), logsigmoid(past) + logsigmoid(-short)):
        p_side, q_side = ((z + log_share).logsumexp(-1) for z in (log_p, log_q))
        value = value + p_side.exp() * (p_side - q_side)
    return value, stay.sum(-1)
