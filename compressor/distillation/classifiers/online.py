"""A teacher that is trained at the same time as its student: online BD-KD (arXiv:2212.12965)."""

from __future__ import annotations

from torch import Tensor

from calib.data.targets import REGRESSION
from calib.losses.divergences import cross_entropy, forward_kl
from compressor.distillation.loss_expression import LossTerm, of_problem

TEACHER_LOSSES = ("teacher: ce", "teacher: kl")


def teacher_losses(
    p_logits: Tensor, q_logits: Tensor, target: Tensor, problem: str, temperature: float
) -> dict[str, Tensor]:
    """CE(y, p) and KL(q || p), the objective of a teacher p beside its student q, by row.

    Args:
        p_logits: the teacher's (n, C), with a graph.
        q_logits: the student's (n, C); constant here.
        target: labels, as `calib.data.targets` has them.
        problem: the problem type. Of several labels, both are sums over labels; of a number, squared errors.
        temperature: divides both sides' logits in the second term, which is then times its square.

    Returns:
        (n,) each, in nats, by the names of TEACHER_LOSSES. That the student regularizes its teacher by this reverse KL
        is the paper's abstract; the weight of 1 and the teacher's evaluation mode are ours.
    """
    ce = LossTerm("ce", "ce", 1.0, lambda _, logits, y: cross_entropy(y, logits))
    kl = LossTerm("forward-kl", "forward-kl", 1.0, forward_kl)
    if problem == REGRESSION:
        kl = LossTerm("mse", "mse", 1.0, lambda q, p, _: (q - p).square().sum(-1))
    q_logits = q_logits.detach()
    values = (
        of_problem(ce, problem, q_logits, p_logits, target, temperature),
        of_problem(kl, problem, q_logits, p_logits, target, temperature),
    )
    return dict(zip(TEACHER_LOSSES, values, strict=True))
