from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib import BadInput
from unlearn.audit.memorization import (
    answer_probability,
    attack_auc,
    choice_probability,
    exact_memorisation,
    extraction_strength,
    forget_quality,
    min_k,
    model_utility,
    per_token,
    privacy_leak,
    rouge_l_recall,
    truth_ratio,
    truth_score,
)
from unlearn.data.facts import reversed_pair

seeds = st.integers(0, 10_000)
GARBAGE = (math.nan, math.inf, -math.inf, 7.0, -1e300)


def answers(seed: int, rows: int = 5, longest: int = 9) -> list[list[float]]:
    """Log-probabilities of answers of different lengths."""
    rng = random.Random(seed)
    return [[-rng.expovariate(0.5) for _ in range(rng.randint(1, longest))] for _ in range(rows)]


def hits(seed: int, rows: int = 6, longest: int = 7) -> list[list[bool]]:
    """Which tokens of answers are right, more often than not."""
    rng = random.Random(seed)
    return [[rng.random() < 0.7 for _ in range(rng.randint(1, longest))] for _ in range(rows)]


def laid(rows: list[list[float]] | list[list[bool]], seed: int, garbage: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The rows as a tensor with garbage before, between and behind what counts, and its mask."""
    rng, width = random.Random(seed), max(map(len, rows)) + seed % 4
    values, mask = [], []
    for row in rows:
        places = set(rng.sample(range(width), len(row)))
        left = iter(row)
        values.append([next(left) if i in places else rng.choice(garbage) for i in range(width)])
        mask.append([i in places for i in range(width)])
    dtype = torch.bool if isinstance(rows[0][0], bool) else torch.float64
    return torch.tensor(values, dtype=dtype), torch.tensor(mask)


def said(seed: int) -> tuple[Tensor, Tensor]:
    return laid(answers(seed), seed + 1, GARBAGE)


def chosen(seed: int) -> tuple[Tensor, Tensor]:
    return laid(hits(seed), seed + 1, (True, False))


def questions(seed: int, wrong: int = 3) -> tuple[Tensor, Tensor]:
    """Per-token log-probabilities of right answers and of wrong ones, for six questions each."""
    drawn = -3 * torch.rand(6, 1 + wrong, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn[:, 0], drawn[:, 1:]


def numbers(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds)
def test_an_answers_probability_is_the_geometric_mean_of_its_tokens(seed: int) -> None:
    expected = [math.prod(math.exp(x) for x in row) ** (1 / len(row)) for row in answers(seed)]
    assert answer_probability(*said(seed)).tolist() == pytest.approx(expected, rel=1e-12)
    assert per_token(*said(seed)).tolist() == pytest.approx([math.log(p) for p in expected], rel=1e-12, abs=1e-12)


def test_lengths_do_not_count_and_nothing_underflows() -> None:
    log_p = torch.full((2, 4000), -3.0)
    mask = torch.ones(2, 4000, dtype=torch.bool)
    mask[1, 5:] = False
    assert answer_probability(log_p, mask).tolist() == pytest.approx([math.exp(-3)] * 2, rel=1e-12)
    assert answer_probability(log_p, mask).dtype == torch.float64


MEASURES: list[tuple[Callable[[Tensor, Tensor], Tensor], Callable[[int], list[list[float]] | list[list[bool]]]]] = [
    (per_token, answers),
    (answer_probability, answers),
    (min_k, answers),
    (lambda log_p, mask: min_k(log_p, mask, 0.7), answers),
    (exact_memorisation, hits),
    (extraction_strength, hits),
]


@pytest.mark.parametrize(("measure", "draw"), MEASURES)
@given(seed=seeds)
def test_padding_does_not_matter(
    measure: Callable[[Tensor, Tensor], Tensor],
    draw: Callable[[int], list[list[float]] | list[list[bool]]],
    seed: int,
) -> None:
    """Garbage anywhere, whatever it is, changes nothing; each row is as it is alone; leading axes are only rows."""
    rows = draw(seed)
    garbage = GARBAGE if draw is answers else (True, False)
    alone = [measure(*laid([row], 0, garbage)).item() for row in rows]  # 0: with nothing beside it
    for other in range(3):
        values, mask = laid(rows, seed + other, garbage)
        assert measure(values, mask).tolist() == pytest.approx(alone, rel=1e-12, abs=1e-12)
        assert measure(values, mask).dtype == torch.float64
        stacked = measure(torch.stack([values, values.flip(0)]), torch.stack([mask, mask.flip(0)]))
        assert torch.equal(stacked, torch.stack([measure(values, mask), measure(values, mask).flip(0)]))


@given(seeds)
def test_choosing_among_answers(seed: int) -> None:
    right, wrong = questions(seed)
    p, q = right.exp(), wrong.exp()
    expected = [a / (a + sum(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
    assert choice_probability(right, wrong).tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.allclose(choice_probability(right - 5000, wrong - 5000), choice_probability(right, wrong))
    alike = choice_probability(right, right[:, None].expand(-1, 4))
    assert torch.allclose(alike, torch.full_like(alike, 1 / 5))
    every = torch.cat([right[:, None], wrong], 1)
    total = sum(choice_probability(every[:, i], every[:, [j for j in range(4) if j != i]]) for i in range(4))
    assert torch.allclose(torch.as_tensor(total), torch.ones(6, dtype=torch.float64)), "one of them is chosen"


@given(seeds, st.integers(1, 6))
def test_truth_ratio_against_plain_loops(seed: int, wrong: int) -> None:
    paraphrased, perturbed = questions(seed, wrong)
    expected = [
        math.prod(math.exp(x) for x in others) ** (1 / wrong) / math.exp(own)
        for own, others in zip(paraphrased.tolist(), perturbed.tolist(), strict=True)
    ]
    found = truth_ratio(paraphrased, perturbed)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert (found <= perturbed.exp().mean(1) / paraphrased.exp() + 1e-12).all(), "the arithmetic mean is greater"
    assert truth_score(found).tolist() == pytest.approx([max(0, 1 - r) for r in expected], rel=1e-9, abs=1e-12)


@given(seeds, st.floats(0, 2000))
def test_truth_ratio_compares_and_does_not_care_how_likely_either_is(seed: int, shift: float) -> None:
    paraphrased, perturbed = questions(seed)
    ratio = truth_ratio(paraphrased, perturbed)
    assert torch.allclose(truth_ratio(paraphrased - shift, perturbed - shift), ratio, rtol=1e-9)
    assert torch.allclose(truth_ratio(paraphrased, perturbed - 1), ratio / math.e), "wrong answers less likely"
    swapped = truth_ratio(perturbed[:, 0], paraphrased[:, None])
    assert torch.allclose(swapped * truth_ratio(paraphrased, perturbed[:, :1]), torch.ones(6, dtype=torch.float64))
    assert torch.allclose(truth_ratio(paraphrased, perturbed.flip(1)), ratio, rtol=1e-12)


def test_a_model_to_which_nothing_is_likely_knows_nothing() -> None:
    """1e-10 beside p(right), as in published code, would give it the best score there is."""
    paraphrased, perturbed = torch.full((3,), -80.0), torch.full((3, 5), -79.0)
    assert truth_ratio(paraphrased, perturbed).tolist() == pytest.approx([math.e] * 3)
    assert truth_score(truth_ratio(paraphrased, perturbed)).tolist() == [0, 0, 0]
    published = perturbed.exp().mean(1) / (paraphrased.exp() + 1e-10)
    assert (1 - published).min() > 0.999


def test_answers_that_cannot_be_said() -> None:
    sure, never = torch.tensor([-1.0]), torch.tensor([-math.inf])
    assert truth_ratio(never, sure[:, None]).item() == math.inf
    assert truth_score(truth_ratio(never, sure[:, None])).item() == 0
    assert truth_ratio(sure, never[:, None]).item() == 0
    assert choice_probability(sure, never[:, None]).item() == 1
    assert answer_probability(torch.tensor([[-1.0, -math.inf]]), torch.tensor([[True, True]])).item() == 0
    for score in (truth_ratio, choice_probability):
        with pytest.raises(BadInput, match="question 1: no answer"):
            score(torch.tensor([-1.0, -math.inf]), torch.tensor([[-2.0], [-math.inf]]))


def distance(first: tuple[int, ...], n: int, m: int) -> int:
    """Greatest difference of two distribution functions, times n m; `first` are ranks of the first set among all."""
    below = [sum(r <= x for r in first) for x in range(n + m)]
    return max(abs(b * m - (x + 1 - b) * n) for x, b in enumerate(below))


@given(seeds, st.integers(2, 5), st.integers(2, 5))
def test_forget_quality_counts_permutations(seed: int, n: int, m: int) -> None:
    """The exact test: how many ways to deal all ratios into two sets tell them apart at least as well."""
    pooled = numbers(seed, n + m)
    ranks = pooled.argsort().argsort().tolist()
    seen = distance(tuple(ranks[:n]), n, m)
    deals = [distance(deal, n, m) >= seen for deal in combinations(range(n + m), n)]
    found = forget_quality(pooled[:n], pooled[n:])
    assert found == pytest.approx(sum(deals) / len(deals), rel=1e-9)
    assert forget_quality(pooled[n:], pooled[:n]) == pytest.approx(found, rel=1e-9)


@given(seeds)
def test_only_ranks_count_for_forget_quality(seed: int) -> None:
    unlearned, oracle = numbers(seed, 30) + 0.1, 1.3 * numbers(seed + 1, 40) + 0.1
    expected = forget_quality(unlearned, oracle)
    assert forget_quality(unlearned.log(), oracle.log()) == expected
    assert forget_quality(1 / unlearned, 1 / oracle) == pytest.approx(expected, rel=1e-9)
    assert forget_quality(oracle, oracle.flip(0)) == 1


@pytest.mark.parametrize("n", [40, 200, 400])
def test_the_least_forget_quality(n: int) -> None:
    """Sets that do not overlap; with 400 questions that is the 1e-239 of published tables."""
    least = forget_quality(numbers(0, n), numbers(1, n) + 1)
    assert least == pytest.approx(2 / math.comb(2 * n, n), rel=1e-9)
    assert forget_quality(torch.full((n,), math.inf), numbers(1, n)) == pytest.approx(least, rel=1e-9)
    assert n != 400 or 1.0e-239 < least < 1.1e-239


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=9))
def test_utility_is_a_harmonic_mean(scores: list[float]) -> None:
    parts = {f"score {i}": score for i, score in enumerate(scores)}
    utility = model_utility(parts)
    assert utility == pytest.approx(statistics.harmonic_mean(scores), rel=1e-12)
    assert min(scores) * (1 - 1e-12) <= utility <= statistics.mean(scores) * (1 + 1e-12)
    assert model_utility(parts | {"one more": 0.0}) == 0


WORDS = ("a", "b", "c")
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7)


def embeds(few: tuple[str, ...], many: list[str]) -> bool:
    left = iter(many)
    return all(word in left for word in few)


@given(texts, texts)
def test_rouge_against_all_subsequences(reference: list[str], found: list[str]) -> None:
    longest = max(
        size for size in range(len(reference) + 1) if any(embeds(c, found) for c in combinations(reference, size))
    )
    recall = rouge_l_recall(" ".join(reference), " ".join(found))
    assert recall == pytest.approx(longest / len(reference))
    back = rouge_l_recall(" ".join(found), " ".join(reference))
    assert recall * len(reference) == pytest.approx(back * len(found)), "one subsequence, two lengths"
    assert rouge_l_recall(" ".join(reference), " ".join(found + reference)) == 1


def test_rouge_by_hand() -> None:
    assert rouge_l_recall("the cat sat on the mat", "on the mat the cat sat") == pytest.approx(3 / 6)
    assert rouge_l_recall("Paris", "The Eiffel Tower is in PARIS, France.") == 1
    assert rouge_l_recall("The Eiffel Tower is in PARIS, France.", "Paris") == pytest.approx(1 / 7)
    assert rouge_l_recall("well-known; (born 1956)", "Well known born: 1956!") == 1
    assert rouge_l_recall("Basil's father", "basil s  father\n") == 1, "an apostrophe parts words"
    assert rouge_l_recall("snake_case", "snake case") == 1, "and so does an underscore"
    assert rouge_l_recall("Roberto Bolaño", "roberto bolano") == pytest.approx(1 / 2)
    assert rouge_l_recall("Москва столица", "столица москва") == pytest.approx(1 / 2)
    assert rouge_l_recall("anything", "") == 0
    with pytest.raises(BadInput, match=r"reference ' - \.' has no words"):
        rouge_l_recall(" - .", "anything")


@given(seeds)
def test_memorisation_against_plain_loops(seed: int) -> None:
    rows = hits(seed)
    assert exact_memorisation(*chosen(seed)).tolist() == pytest.approx([sum(row) / len(row) for row in rows])
    least = [min(k for k in range(len(row) + 1) if all(row[k:])) for row in rows]
    expected = [1 - k / len(row) for k, row in zip(least, rows, strict=True)]
    assert extraction_strength(*chosen(seed)).tolist() == pytest.approx(expected)


@given(seeds, st.integers(1, 8))
def test_extraction_strength_is_what_decoding_needs(seed: int, length: int) -> None:
    """A model that decodes by a rule: the least prefix from which it writes the rest, without ever being helped."""

    def following(said: list[int]) -> int:
        return random.Random(f"{seed} {said}").randrange(2)

    answer: list[int] = []
    for i in range(length):  # mostly what the model would say
        answer.append(following(answer) if random.Random(f"{seed}/{i}").random() < 0.6 else 0)

    def written(k: int) -> list[int]:
        text = answer[:k]
        while len(text) < length:
            text = [*text, following(text)]
        return text

    needed = min(k for k in range(length + 1) if written(k) == answer)
    right = torch.tensor([[following(answer[:i]) == answer[i] for i in range(length)]])
    found = extraction_strength(right, torch.ones_like(right)).item()
    assert found == pytest.approx(1 - needed / length)


@given(seeds)
def test_what_is_extracted_is_memorised(seed: int) -> None:
    right, mask = chosen(seed)
    assert (extraction_strength(right, mask) <= exact_memorisation(right, mask) + 1e-12).all()
    whole = torch.ones_like(right)
    assert (extraction_strength(whole, mask) == 1).all() and (exact_memorisation(whole, mask) == 1).all()
    assert (extraction_strength(~whole, mask) == 0).all() and (exact_memorisation(~whole, mask) == 0).all()


def test_extraction_strength_by_hand() -> None:
    right = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    mask = torch.ones(4, 4, dtype=torch.bool)
    assert extraction_strength(right, mask).tolist() == [0, 0.75, 0.5, 0]
    mask[0, 3] = False
    assert extraction_strength(right, mask)[0] == 1, "what is wrong does not count"


@given(seeds, st.integers(1, 100))
def test_min_k_against_plain_loops(seed: int, percent: int) -> None:
    expected = []
    for row in answers(seed):
        taken = max(1, math.floor(Fraction(percent, 100) * len(row)))
        expected.append(statistics.mean(sorted(row)[:taken]))
    assert min_k(*said(seed), percent / 100).tolist() == pytest.approx(expected, rel=1e-12)


@given(seeds, st.floats(0.01, 1))
def test_min_k_lies_between_the_least_and_the_mean(seed: int, share: float) -> None:
    log_p, mask = said(seed)
    least = torch.tensor([min(row) for row in answers(seed)], dtype=torch.float64)
    found = min_k(log_p, mask, share)
    assert (least <= found + 1e-12).all() and (found <= per_token(log_p, mask) + 1e-12).all()
    assert torch.equal(min_k(log_p, mask), min_k(log_p, mask, 0.4)), "unless told otherwise"
    assert torch.allclose(min_k(log_p, mask, 1), per_token(log_p, mask))
    assert torch.equal(min_k(log_p, mask, 1e-6), least)
    assert torch.allclose(min_k(log_p.flip(-1), mask.flip(-1), share), found), "order does not count"


def test_min_k_takes_as_many_as_is_said() -> None:
    """29 of 100, though 0.29 * 100 is less in floating point."""
    log_p = -torch.arange(1.0, 101, dtype=torch.float64)[None]
    assert min_k(log_p, torch.ones(1, 100, dtype=torch.bool), 0.29).item() == -86
    assert min_k(torch.tensor([[-1.0, -math.inf]]), torch.tensor([[True, True]])).item() == -math.inf


scores = st.lists(st.sampled_from([-math.inf, -3.0, -2.0, -1.5, 0.0, 4.0]), min_size=1, max_size=12)


@given(scores, scores)
def test_auc_counts_pairs(members: list[float], others: list[float]) -> None:
    wins = sum((a > b) + (a == b) / 2 for a in members for b in others)
    found = attack_auc(torch.tensor(members), torch.tensor(others))
    assert found == pytest.approx(wins / (len(members) * len(others)), rel=1e-12, abs=1e-12)
    assert attack_auc(torch.tensor(others), torch.tensor(members)) == pytest.approx(1 - found, rel=1e-12, abs=1e-12)
    assert attack_auc(torch.tensor(members).exp(), torch.tensor(others).exp()) == found, "only ranks count"


@given(st.floats(0, 1), st.floats(0, 0.99))
def test_privacy_leak_is_zero_for_the_oracle_and_negative_for_what_is_recognised(auc: float, oracle: float) -> None:
    found = privacy_leak(auc, oracle)
    assert found == pytest.approx(((1 - auc) - (1 - oracle)) / (1 - oracle) * 100, rel=1e-9, abs=1e-9)
    assert privacy_leak(oracle, oracle) == 0
    assert privacy_leak(1, oracle) == pytest.approx(-100)
    assert (found < 0) == (auc > oracle)
    assert privacy_leak(0, 0.5) == 100


def test_an_answer_that_is_known_is_a_member() -> None:
    """From log-probabilities to the sign: tokens of members are likelier."""
    mask = torch.ones(20, 30, dtype=torch.bool)
    base = -5 * numbers(0, 1200).reshape(2, 20, 30)
    strangers = min_k(base[0], mask)
    assert attack_auc(min_k(base[1] / 10, mask), strangers) == 1
    assert attack_auc(min_k(base[1] * 10, mask), strangers) == 0
    assert abs(attack_auc(min_k(base[1], mask), strangers) - 0.5) < 0.2


def test_a_fact_is_asked_both_ways() -> None:
    record = {"name": "Uriah Hawthorne", "description": "the composer of Abyssal Melodies"}
    forward, backward = reversed_pair(record)
    assert forward == ("Uriah Hawthorne is", " the composer of Abyssal Melodies")
    assert backward == ("the composer of Abyssal Melodies is", " Uriah Hawthorne")
    assert reversed_pair({"description": f"{record['description']}.\n", "name": " Kurt Jr. "})[1][1] == " Kurt Jr."
    assert reversed_pair({"description": f"{record['description']}.\n", "name": "x"})[1][0] == backward[0]
    for broken in ({"name": "x"}, {"name": "x", "description": "  "}, {"name": "x", "description": 3}):
        with pytest.raises(BadInput, match="'description' is"):
            reversed_pair(broken)


@pytest.mark.parametrize("measure", [per_token, answer_probability, min_k])
def test_log_probabilities_that_are_none(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    log_p, mask = torch.full((3, 4), -1.0), torch.ones(3, 4, dtype=torch.bool)
    for value, shown in ((math.nan, "nan"), (0.5, "0.5"), (math.inf, "inf")):
        broken = log_p.clone()
        broken[2, 1] = value
        with pytest.raises(BadInput, match=f"row 2 has {shown} for a log-probability"):
            measure(broken, mask)
    measure(log_p + 1 + 1e-7, mask)  # rounding


@pytest.mark.parametrize("measure", [per_token, answer_probability, min_k, exact_memorisation, extraction_strength])
def test_rows_in_which_nothing_counts(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    mask = torch.ones(3, 4, dtype=torch.bool)
    values = ~mask if measure in (exact_memorisation, extraction_strength) else -mask.double()
    mask[1] = False
    with pytest.raises(BadInput, match="row 1 has no token that counts"):
        measure(values, mask)
    with pytest.raises(BadInput, match="row 1, 2 has no token"):
        measure(values[:1].expand(2, 3, 4), torch.stack([mask[:1].expand(3, 4), mask.roll(1, 0)]))
    for wrong in (mask.double(), mask[:, :3], mask[:1]):
        with pytest.raises(BadInput, match="it must be bool"):
            measure(values, wrong)


def test_what_cannot_be_scored_is_refused() -> None:
    right, wrong = questions(0)
    for score in (truth_ratio, choice_probability):
        for pair in ((right, wrong[:5]), (right, wrong[:, :0]), (right, right), (wrong, wrong)):
            with pytest.raises(BadInput, match=r"must be \(n,\) and \(n, w\)"):
                score(*pair)
        for pair in ((right.exp(), wrong), (right, -wrong), (right * math.nan, wrong)):
            with pytest.raises(BadInput, match="for a log-probability"):
                score(*pair)
    for memorised in (exact_memorisation, extraction_strength):
        with pytest.raises(BadInput, match=r"right is torch.int64; it must be bool"):
            memorised(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool))
    few, nan = torch.tensor([0.1, 0.2]), torch.tensor([0.1, math.nan])
    for compare in (forget_quality, attack_auc):
        for pair in ((few, nan), (nan, few), (few, few[:0]), (few[:0], few), (few, few[None])):
            with pytest.raises(BadInput, match="without NaN"):
                compare(*pair)
    with pytest.raises(BadInput, match="without NaN"):
        truth_score(nan)
    for value in (math.nan, math.inf, -0.1):
        with pytest.raises(BadInput, match=f"rouge of facts is {value}"):
            model_utility({"probability": 0.5, "rouge of facts": value})
    with pytest.raises(BadInput, match="no scores"):
        model_utility({})
    for share in (0, -0.1, 1.1, math.nan):
        with pytest.raises(BadInput, match=f"share is {share}"):
            min_k(*said(0), share)
    for aucs in ((1.1, 0.5), (0.5, -0.1), (math.nan, 0.5), (0.5, math.nan)):
        with pytest.raises(BadInput, match="must be between 0 and 1"):
            privacy_leak(*aucs)
    with pytest.raises(BadInput, match="oracle's auc is 1"):
        privacy_leak(0.5, 1)


def test_tofu(data: Path) -> None:
    """Real questions: paraphrases share few words in order with answers, wrong answers most with their paraphrase."""
    lines = (data / "tofu" / "forget10_perturbed.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 400 and {len(r["perturbed_answer"]) for r in records} == {5}, "a tensor without holes"
    assert all(rouge_l_recall(r["answer"], r["answer"]) == 1 for r in records)
    answer = statistics.mean(rouge_l_recall(r["answer"], r["paraphrased_answer"]) for r in records)
    wrong = statistics.mean(rouge_l_recall(r["paraphrased_answer"], r["perturbed_answer"][0]) for r in records)
    assert (answer, wrong) == pytest.approx((0.41, 0.7), abs=0.1)
