"""Completions, and what two models think of them, beside loops over whole logits and every possible answer."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib.data.records import Row
from calib.losses.chunked_head import Head
from compressor.on_policy.completions import Completions, RewardedPrompts, score_completions, write_completions
from compressor.on_policy.measure import measure_policy, target_divergence
from compressor.on_policy.rewards import Prompt
from compressor.on_policy.sampling import beginning_of, continued, corrected, end_tokens, surprise
from tests import tiny

VOCAB, LENGTH = 5, 4
BETA = 0.5


class Whole:
    """A model as answers see it."""

    def __init__(self, seed: int, vocab: int = VOCAB) -> None:
        config = tiny.config_of("llama", vocab_size=vocab, bos_token_id=None, eos_token_id=None)
        self.model: Any = tiny.model_of(config, seed, torch.float32)
        self.head = Head.of(self.model)

    def hidden(self, ids: Tensor) -> Tensor:
        made: Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return made

    def log_q(self, ids: Tensor) -> Tensor:
        """(n, T) -> (n, T - 1, V)."""
        made: Tensor = self.model(ids).logits[:, :-1].double().log_softmax(-1)
        return made


@pytest.fixture(scope="module")
def models() -> tuple[Whole, Whole]:
    """A student and its teacher."""
    return Whole(0), Whole(1)


class Even:
    """A reward: whether the tokens' numbers add up to an even one."""

    def __call__(self, prompt: Prompt, written: str) -> float:
        return float(sum(map(int, written.split())) % 2 == 0)


def prompts(beginnings: list[list[int]]) -> RewardedPrompts:
    about = tuple(Prompt("", None, Row(f"row {i}", i, {}, 0)) for i in range(len(beginnings)))
    tokenizer: Any = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids.tolist())))
    reward: Any = Even()
    return RewardedPrompts(tuple(map(torch.tensor, beginnings)), about, LENGTH, reward, tokenizer)


def test_scores_are_those_of_whole_logits(models: tuple[Whole, Whole]) -> None:
    student, teacher = models
    g = torch.Generator().manual_seed(0)
    ids, written = torch.randint(VOCAB, (7, 6), generator=g), torch.zeros(7, 6).bool()
    for row, (start, end) in enumerate([(1, 6), (2, 3), (5, 6), (1, 1), (3, 6), (1, 4), (2, 6)]):
        written[row, start:end] = True
    for at_once in (6, 4096):
        found = score_completions(student, teacher, ids, written, at_once)
        q, p, counted = student.log_q(ids), teacher.log_q(ids), written[:, 1:].double()
        of = ids[:, 1:, None]
        for value, each in (
            (found.log_pi, q.gather(-1, of)[..., 0]),
            (found.log_base, p.gather(-1, of)[..., 0]),
            (found.entropy, -(q.exp() * q).sum(-1)),
            (found.reverse_kl, (q.exp() * (q - p)).sum(-1)),
            (found.forward_kl, (p.exp() * (p - q)).sum(-1)),
        ):
            assert torch.allclose(value, (each * counted).sum(-1), atol=1e-5)


def test_figures_against_every_answer_there_is(models: tuple[Whole, Whole]) -> None:
    """Entropy, both KLs and the KL from the target of whole answers, within five standard errors of their sums over
    all 125 answers of three tokens."""
    student, teacher = models
    asked, draws = prompts([[0], [3]]), 3000
    every = torch.tensor(list(product(range(VOCAB), repeat=LENGTH - 1)))
    torch.manual_seed(0)
    own, theirs = (write_completions(m.model, asked, [0, 1], draws, m.head) for m in models)
    found = measure_policy(student, teacher, own, theirs, BETA, 4096)
    expected = torch.zeros(5, dtype=torch.float64)
    for first in (0, 3):
        ids = torch.cat([torch.full((len(every), 1), first), every], 1)
        log_pi, log_t = (m.log_q(ids).gather(-1, ids[:, 1:, None])[..., 0].sum(-1) for m in models)
        reward = (every.sum(1) % 2 == 0).double()
        log_p = (log_t + reward / BETA).log_softmax(0)
        expected += torch.stack([
            (log_pi.exp() * reward).sum(), -(log_pi.exp() * log_pi).sum(), (log_pi.exp() * (log_pi - log_t)).sum(),
            (log_t.exp() * (log_t - log_pi)).sum(), (log_pi.exp() * (log_pi - log_p)).sum(),
        ]) / 2  # fmt: skip
    values = [found.reward, found.entropy, found.reverse_kl, found.forward_kl, found.target_kl]
    assert torch.allclose(torch.tensor(values, dtype=torch.float64), expected, atol=0.08), (values, expected)
    assert found.pass_at["1"] == pytest.approx(found.reward) and found.length == LENGTH - 1
    scores, heard = (score_completions(student, teacher, a.ids, a.written) for a in (own, theirs))
    assert target_divergence(scores, heard, own, theirs, BETA).mean() == pytest.approx(found.target_kl)


def test_beginnings_of_any_length_go_on_as_the_model_says(models: tuple[Whole, Whole]) -> None:
    """Each continuation is drawn from the model given its own beginning: shares beside the model's probabilities."""
    student, _ = models
    beginnings = [torch.tensor([1, 2, 3]), torch.tensor([4])] * 3000
    torch.manual_seed(0)
    ids, written = continued(student.model, beginnings, LENGTH, torch.device("cpu"))
    assert ids.shape == (6000, LENGTH) and written.sum(-1).tolist() == [1, 3] * 3000
    for start, size in ((0, 3), (1, 1)):
        rows = ids[start::2]
        assert (rows[:, :size] == beginnings[start]).all()
        expected = student.log_q(rows[:1])[0, size - 1].exp()
        shares = torch.bincount(rows[:, size], minlength=VOCAB) / 3000
        assert (shares - expected).abs().max() < 5 * 0.5 / 3000**0.5


def test_a_full_row_is_left_as_it_is(models: tuple[Whole, Whole]) -> None:
    ids, written = continued(models[0].model, [torch.arange(4)], LENGTH, torch.device("cpu"))
    assert ids.tolist() == [[0, 1, 2, 3]] and not written.any()


def test_where_a_row_begins() -> None:
    ids, counted = torch.arange(2, 14), torch.zeros(11, dtype=torch.bool)
    counted[4:] = True
    assert beginning_of(ids, counted).tolist() == [2, 3, 4, 5, 6], "the prompt"
    text, all_of_it = torch.tensor([5, 6, 7, 8, 0, 0]), torch.tensor([True, True, True, False, False])
    assert beginning_of(text, all_of_it).tolist() == [5], "a quarter of four words is one"


def test_surprise_is_the_gap_to_the_most_likely_token(models: tuple[Whole, Whole]) -> None:
    _, teacher = models
    ids = torch.tensor([[0, 3, 1, 4], [2, 2, 0, 1]])
    with torch.no_grad():
        apart, likely = surprise(teacher.head, teacher.hidden(ids), ids)
    log_p = teacher.log_q(ids)
    assert torch.equal(likely[:, 1:], log_p.argmax(-1))
    gap = log_p.max(-1).values - log_p.gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(apart[:, 1:].double(), gap, atol=1e-4) and not apart[:, 0].any()


def corrections(
    models: tuple[Whole, Whole], threshold: float, times: int, ends: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Tensor, int]:
    student, teacher = models

    def surprised(ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return surprise(teacher.head, teacher.hidden(ids), ids)

    torch.manual_seed(0)
    ids, written = continued(student.model, [torch.tensor([1])] * 20, 8, torch.device("cpu"))
    made, own, count = corrected(
        ids, written, surprised, lambda some: continued(student.model, some, 8, torch.device("cpu")),
        ends=torch.tensor(ends, dtype=torch.int64), threshold=threshold, times=times,
    )  # fmt: skip
    return ids, made, own, count


def test_nothing_is_corrected_where_nothing_surprises(models: tuple[Whole, Whole]) -> None:
    ids, made, own, count = corrections(models, float("inf"), 5)
    assert torch.equal(ids, made) and count == 0 and own[:, 1:].all()


def test_a_teacher_that_admits_nothing_else_writes_its_own_text(models: tuple[Whole, Whole]) -> None:
    """At a threshold of 0, corrected often enough, each row is what the teacher writes greedily."""
    _, made, own, count = corrections(models, 0.0, 7)
    greedy: Any = models[1].model.generate(torch.tensor([[1]]), do_sample=False, max_length=8, pad_token_id=0)
    assert (made == greedy[0]).all() and own[:, 1:].all() and count > 20


def test_one_correction_keeps_what_came_before_and_writes_anew_after(models: tuple[Whole, Whole]) -> None:
    ids, made, _, count = corrections(models, 1.0, 1)
    teacher = models[1]
    changed = [row for row in range(20) if not torch.equal(ids[row], made[row])]
    assert 0 < len(changed) <= count
    log_p = teacher.log_q(ids)
    gap = log_p.max(-1).values - log_p.gather(-1, ids[:, 1:, None])[..., 0]
    for row in range(20):
        above = (gap[row] > 1.0).nonzero()
        if not len(above):
            assert row not in changed
            continue
        place = int(above[0]) + 1
        assert torch.equal(made[row, :place], ids[row, :place])
        assert made[row, place] == log_p[row, place - 1].argmax()
    likely = log_p.argmax(-1)
    ending = corrections(models, 1.0, 1, ends=tuple(range(VOCAB)))
    for row in changed:
        place = int((gap[row] > 1.0).nonzero()[0]) + 1
        assert ending[2][row].nonzero().max() == place, "an end token of the teacher's ends the row"
        assert ending[1][row, place] == likely[row, place - 1] and not ending[1][row, place + 1 :].any()


def test_end_tokens() -> None:
    for named, expected in ((None, []), (3, [3]), ([3, 4], [3, 4])):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named))
        assert end_tokens(model).tolist() == expected


def test_a_group_is_rewarded_prompt_by_prompt() -> None:
    asked = prompts([[0], [1]])
    ids = torch.tensor([[0, 2, 2, 0], [0, 1, 2, 0], [1, 1, 0, 0], [1, 2, 0, 0]])
    written = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0]]).bool()
    rewards = asked.rewards([0, 1], ids, written)
    assert rewards.tolist() == [[1, 0], [0, 1]]
    assert Completions(ids, written, [0, 1], rewards).lengths.tolist() == [[2, 2], [1, 1]]
    assert isinstance(Whole(0).model, nn.Module)
