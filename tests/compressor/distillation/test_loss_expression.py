from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from calib import BadInput
from calib.losses.divergences import cross_entropy, dense, forward_kl, jensen_shannon
from calib.losses.sinkhorn import debiased, l1, sinkd
from calib.losses.top_k import sample_targets, sampled_cross_entropy, top_k, with_tail_bucket
from compressor.distillation.loss_expression import (
    FAITHFUL_LOSSES,
    LABELED_LOSSES,
    SETS_LOSSES,
    of_sets,
    parse_loss,
    pointwise,
)
from compressor.distillation.loss_syntax import LOSS_NAMES, check_terms, read_terms
from compressor.distillation.losses.decoupled import ofa


def logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_sum_of_losses_is_parsed() -> None:
    terms = parse_loss(" 0.5*ce + js(0.9)+1e-2*sinkhorn(0.05) ")
    assert [(t.label, t.weight) for t in terms] == [("ce", 0.5), ("js(0.9)", 1.0), ("sinkhorn(0.05)", 0.01)]
    p, q = logits(0, 4, 9), logits(1, 4, 9)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    assert torch.equal(terms[1].loss(log_p, log_q), jensen_shannon(log_p, log_q, 0.9))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("kl", "'kl' is unknown; is forward-kl meant? there are ce"),
        ("", "'' is unknown"),
        ("ce+", "'' is unknown"),
        ("0*ce", "must be positive"),
        ("js(x)", "should be numbers"),
        ("js(1,2)", "takes beta; 2 were given"),
        ("ce(3)", "takes no numbers"),
        ("ce+0.5*ce", "names one loss twice"),
        ("-1*ce", "is unknown"),
    ],
)
def test_what_is_no_loss_is_refused(text: str, word: str) -> None:
    with pytest.raises(BadInput) as refusal:
        parse_loss(text)
    assert word in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", SETS_LOSSES)
def test_a_loss_that_is_blind_to_permutations_needs_a_partner(name: str) -> None:
    def checked(loss: str, force: bool = False) -> None:
        check_terms(read_terms(loss), teacher="online", temperature=1.0, on_policy=0.0, force=force)

    with pytest.raises(BadInput, match=r"blind to which row got which answer.*forward-kl\+0\.1\*sinkhorn"):
        checked(name)
    checked(name, force=True)
    checked(f"ce+{name}")


@pytest.mark.parametrize(
    ("loss", "teacher", "options", "word"),
    [
        ("nkd", "top-k", {}, "cannot be had from a teacher kept as top-k"),
        ("ce+sinkhorn", "top-k", {}, "cannot be had"),
        ("js", "drawn", {}, "cannot be had from a teacher kept as drawn"),
        ("forward-kl", "top-k", {"temperature": 2.0}, "was said at 1"),
        ("forward-kl", "drawn", {"on_policy": 0.5}, "must answer what the student says"),
        ("k2", "online", {"on_policy": 0.5}, "add --on-policy 1"),
        ("ce+attention", "top-k", {}, "cannot be had"),
        ("ce+spans", "drawn", {}, "cannot be had"),
        ("ce+ofa-exits", "top-k", {}, "cannot be had"),
        ("uskd", "online", {}, "it is for classifiers"),
        ("ce+attention", "online", {"classify": True}, "is for language models; choose from alpha-beta"),
    ],
)
def test_what_a_teacher_did_not_say_is_not_learned_from(
    loss: str, teacher: str, options: dict[str, Any], word: str
) -> None:
    given = {"temperature": 1.0, "on_policy": 0.0} | options
    with pytest.raises(BadInput, match=word):
        check_terms(read_terms(loss), teacher=teacher, force=False, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*FAITHFUL_LOSSES, *LABELED_LOSSES])
def test_each_is_taken_from_logits_and_is_finite_and_moves_the_student(name: str) -> None:
    p, q, target = logits(0, 5, 9), logits(1, 5, 9).requires_grad_(), torch.arange(5)
    value = pointwise(parse_loss(name)[0], p, q, target, 1.0)
    (gradient,) = torch.autograd.grad(value.sum(), q)
    assert value.shape == (5,) and value.isfinite().all() and gradient.isfinite().all() and gradient.any()


def test_each_kind_of_teacher_is_heard() -> None:
    p, q, target = logits(0, 5, 9), logits(1, 5, 9), torch.arange(5)
    (kl,) = parse_loss("forward-kl")
    (ce,) = parse_loss("ce")
    top, drawn = top_k(p, 3), sample_targets(p, 7, torch.Generator().manual_seed(0))
    assert torch.equal(pointwise(kl, top, q, target, 1.0), with_tail_bucket(forward_kl, top, q))
    assert torch.equal(pointwise(kl, drawn, q, target, 1.0), sampled_cross_entropy(drawn, q))
    assert torch.allclose(pointwise(kl, p, q, target, 3.0), 9 * dense(forward_kl, p, q, 3.0))
    for signal in (p, top, drawn, torch.empty(0)):
        assert torch.equal(pointwise(ce, signal, q, target, 1.0), cross_entropy(target, q))


def test_sets_are_compared_softened() -> None:
    p, q = logits(0, 1, 6, 9), logits(1, 1, 6, 9)
    (term,) = parse_loss("sinkhorn(0.3)")
    expected = debiased((q / 2).softmax(-1), (p / 2).softmax(-1), l1, 0.3)[0]
    assert torch.equal(of_sets(term, p, q, 2.0)[0], expected)
    (softer,) = parse_loss("sinkhorn(0.3,2)")
    assert torch.equal(of_sets(softer, p, q, 1.0)[0], expected), "tau is a temperature of its own"
    (published,) = parse_loss("sinkhorn-sharp(0.1,1,20)")
    assert of_sets(published, p, p, 1.0)[0] > 0  # not zero at equality
    assert of_sets(term, p, p, 1.0)[0].abs() < 1e-4
    (faithful,) = parse_loss("sinkd")
    assert torch.equal(of_sets(faithful, p, q, 1.0)[0], sinkd(p[0], q[0])[None])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("ce+sinkhorn(-0.1)", "eps is -0.1; it must be from 0.001"),  # would never end
        ("ce+sinkhorn-sharp(0.1,1,0)", "sweeps is 0"),
        ("dac-nucleus(0)", "mass is 0"),
        ("js(1.5)", "beta is 1.5; it must be 0, 1 or from 0.01 to 0.99"),
        ("js(1e-6)", "beta is 1e-06"),  # below zero in single precision
        ("skew-kl(2)", "alpha is 2"),
        ("nkd(1.5,0)", "lam is 0"),
        ("1.2.3*ce", "is unknown"),
        ("1e999*ce", "must be positive and finite"),
    ],
)
def test_arguments_out_of_range_are_refused(text: str, word: str) -> None:
    with pytest.raises(BadInput) as error:
        parse_loss(text)
    assert word in str(error.value)


@pytest.mark.parametrize("name", ["js(0)", "js(1)", "skew-kl(0)", "alpha-beta(1,0)"])
def test_the_ends_of_a_family_are_allowed(name: str) -> None:
    assert parse_loss(name)


@pytest.mark.parametrize("partner", ["cka", "gram", "spans", "sinkhorn-sequence"])
def test_what_compares_sets_or_relations_is_no_partner(partner: str) -> None:
    with pytest.raises(BadInput, match="blind to which row"):
        check_terms(read_terms(f"sinkhorn+{partner}"), teacher="online", temperature=1.0, on_policy=0.0, force=False)


def test_a_temperature_softens_what_looks_at_targets_too() -> None:
    p, q, target = logits(0, 4, 9), logits(1, 4, 9), torch.tensor([0, 3, 8, 2])
    (term,) = parse_loss("ofa(1)")
    expected = 4 * ofa(p / 2, q / 2, target, e=1.0)
    assert torch.allclose(pointwise(term, p, q, target, 2.0), expected)


def test_names_are_all_there() -> None:
    assert {"ce", "forward-kl", "reverse-kl", "js", "skew-kl", "bd-kd", "alpha-beta", "sinkhorn", "nkd"} <= set(
        LOSS_NAMES
    )
    assert len(set(LOSS_NAMES)) == len(LOSS_NAMES), "none hides another"
