"""What a language model still knows: audits of what it says of answers, token by token.

Of an answer come `log_p` (..., T), the log-probability in nats of each of its tokens when all before it are given, and
`mask` (..., T), True where a token counts; what stands where none counts never matters, be it NaN. Which tokens count
is the caller's choice: published code counts the one that ends an answer in probabilities and truth ratios, but not in
memorisation, extraction strength and Min-K. Results are float64, one per row (...,). Raises BadInput for a row in which
nothing counts, for NaN, and for what is no log-probability.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from scipy.stats import ks_2samp, rankdata
from torch import Tensor

from calib import BadInput

LOG_P_TOLERANCE = 1e-3  # nats above 0 that rounding may have put there
WORD = re.compile(r"[^\W_]+")


def per_token(log_p: Tensor, mask: Tensor) -> Tensor:
    """Mean log-probability of the tokens that count, in nats.  (..., T) -> (...,)."""
    counts = _counts(log_p, mask)
    return torch.where(mask, _logs(log_p, mask), 0.0).sum(-1) / counts


def answer_probability(log_p: Tensor, mask: Tensor) -> Tensor:
    """p(answer)^(1 / length): the geometric mean of its tokens' probabilities (TOFU, arXiv:2401.06121).  -> (...,)."""
    return per_token(log_p, mask).exp()


def choice_probability(right: Tensor, wrong: Tensor) -> Tensor:
    """p(right) / (p(right) + sum of p(wrong)): TOFU's probability where answers are to be chosen from.  -> (n,).

    `per_token` of the right answer (n,) and of the wrong ones (n, w). Length-normalised, as in TOFU's code; its paper
    writes probabilities of whole answers, which favour short ones.
    """
    right, wrong = _question(right, wrong)
    return _defined(torch.cat([right[:, None], wrong], -1).softmax(-1)[:, 0])


def truth_ratio(paraphrased: Tensor, perturbed: Tensor) -> Tensor:
    """Ratio of how likely wrong answers are to how likely the paraphrased right one is (TOFU, arXiv:2401.06121).  ->
    (n,), in [0, inf].

    `per_token` of the paraphrased right answer (n,) and of the wrong ones (n, w); where a set has no paraphrases, TOFU
    takes the right answer itself. exp(mean of wrong - right): the mean of wrong probabilities is geometric, as in the
    code of TOFU and open-unlearning for forget quality; TOFU's paper has the arithmetic mean. open-unlearning adds
    1e-10 to p(right), so that a model to which nothing is likely has ratio 0, as if it knew best.
    """
    right, wrong = _question(paraphrased, perturbed)
    return _defined(wrong.mean(-1) - right).exp()


def truth_score(ratios: Tensor) -> Tensor:
    """max(0, 1 - truth ratio): near 1 where the right answer is far likelier, 0 where it is no likelier.  -> (n,)."""
    return _numbers(ratios, "truth ratios").sub(1).neg().clamp(min=0)


def forget_quality(unlearned_ratios: Tensor, oracle_ratios: Tensor) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test of truth ratios of the forget set (TOFU).  (n,), (m,) -> float.

    The oracle was retrained without the forget set; 1 where nothing tells the two apart. Only ranks matter: logarithms
    or reciprocals give the same. It is no distance: few questions let anything pass, and n against n questions never
    give less than 2 / binomial(2 n, n), which is 1e-239 for 400.
    """
    sides = [_numbers(r, "truth ratios").cpu().numpy() for r in (unlearned_ratios, oracle_ratios)]
    return float(ks_2samp(*sides).pvalue)


def model_utility(parts: Mapping[str, float]) -> float:
    """Harmonic mean of scores, each by its name; 0 where any is 0 (TOFU).

    TOFU's are nine: means of probability, ROUGE-L recall and truth score, of the retain set, of real authors and of
    world facts; for the latter two sets the probability is `choice_probability`.
    """
    if not parts:
        raise BadInput("model utility: no scores; give those of at least one set of questions")
    for name, value in parts.items():
        if not 0 <= value < math.inf:
            raise BadInput(f"model utility: {name} is {value}; a score is a number that is not negative")
    return len(parts) / sum(1 / value for value in parts.values()) if all(parts.values()) else 0.0


def rouge_l_recall(reference: str, generated: str) -> float:
    """ROUGE-L recall: the share of the reference's words that the generated text has in the same order, not always
    adjacent.

    Length of the longest common subsequence over that of the reference (ROUGE-L, Lin 2004). Words are runs of letters
    and digits of any script, in lower case; all else, the apostrophe too, only parts them. TOFU's scores come from
    words that are stemmed besides, which finds a few more, and from ASCII alone.
    """
    expected, found = (WORD.findall(text.lower()) for text in (reference, generated))
    if not expected:
        raise BadInput(f"rouge: the reference {reference!r} has no words; leave it out")
    row = [0] * (len(found) + 1)  # longest so far, by how much of `found` is allowed
    for word in expected:
        corner = 0
        for j, other in enumerate(found, 1):
            corner, row[j] = row[j], (corner + 1 if word == other else max(row[j], row[j - 1]))
    return row[-1] / len(expected)


def exact_memorisation(right: Tensor, mask: Tensor) -> Tensor:
    """Share of an answer's tokens that are likeliest where all before them are given (arXiv:2205.10770).

    bool (..., T) -> (...,): `right` says of each token whether it is.
    """
    wrong, counts = _wrong(right, mask)
    return 1 - wrong.sum(-1) / counts


def extraction_strength(right: Tensor, mask: Tensor) -> Tensor:
    """1 - k / length, k the least of an answer's tokens from which greedy decoding says all others (arXiv:2406.09179).

    `right` as in `exact_memorisation`: if each further token is, when those before it are given, decoding finds them
    all. 1 where nothing need be given; 0 where the last token is wrong, of which published code says 1 / length.
    """
    wrong, counts = _wrong(right, mask)
    place = mask.cumsum(-1)  # among those that count, from 1
    return 1 - torch.where(wrong, place, 0).amax(-1) / counts


def min_k(log_p: Tensor, mask: Tensor, share: float = 0.4) -> Tensor:
    """Mean of the lowest `share` of an answer's log-probabilities (Min-K%, arXiv:2310.16789).  (..., T) -> (...,).

    Higher for what the model has seen. Rounded down, at least one token. Unlearning benchmarks take 0.4, the paper 0.2.
    """
    if not 0 < share <= 1:
        raise BadInput(f"min-k: share is {share}; it must be above 0 and at most 1")
    counts = _counts(log_p, mask)
    lowest = torch.where(mask, _logs(log_p, mask), math.inf).sort(-1).values
    taken = (counts * share + 1e-9).floor().clamp(min=1)  # 0.29 of 100 is 29, whatever the product says
    first = torch.arange(mask.shape[-1], device=mask.device) < taken[..., None]
    return torch.where(first, lowest, 0.0).sum(-1) / taken


def attack_auc(members: Tensor, non_members: Tensor) -> float:
    """Probability that a member scores above a non-member, ties by half.  (n,), (m,) -> float; 0.5 tells nothing."""
    scores = [_numbers(s, "attack") for s in (members, non_members)]
    n, m = (len(s) for s in scores)
    ranks = rankdata(torch.cat(scores).cpu().numpy())
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def privacy_leak(auc: float, auc_oracle: float) -> float:
    """((1 - auc) - (1 - auc_oracle)) / (1 - auc_oracle), in percent (PrivLeak of MUSE, arXiv:2407.06460).

    Of an attack's AUC, the forget set being the members: 0 is what an oracle gives, below 0 it is still
    recognised (-100: always), above 0 it stands out by being avoided.
    """
    if not (0 <= auc <= 1 and 0 <= auc_oracle <= 1):
        raise BadInput(f"privacy leak: auc is {auc}, the oracle's {auc_oracle}; both must be between 0 and 1")
    if auc_oracle == 1:
        raise BadInput("privacy leak: the oracle's auc is 1, no one's is higher; choose non-members like the members")
    return 100 * (auc_oracle - auc) / (1 - auc_oracle)


def _counts(values: Tensor, mask: Tensor) -> Tensor:
    """How many tokens of each row count, at least one.  -> (...,) float64."""
    if mask.dtype != torch.bool or mask.shape != values.shape:
        raise BadInput(f"mask: {mask.dtype} {tuple(mask.shape)}; it must be bool {tuple(values.shape)} as the answers")
    counts = mask.sum(-1)
    if not counts.all():
        raise BadInput(f"row {_first(counts == 0)} has no token that counts; leave it out or mend its mask")
    return counts.double()


def _wrong(right: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens count and are not right, and how many count."""
    if right.dtype != torch.bool:
        raise BadInput(f"right is {right.dtype}; it must be bool: which tokens the model would have chosen")
    counts = _counts(right, mask)
    return mask & ~right, counts


def _logs(values: Tensor, mask: Tensor) -> Tensor:
    """The values, once it is sure that log-probabilities stand where the mask is True.  -> float64."""
    values = values.double()
    bad = mask & ~(values <= LOG_P_TOLERANCE)
    if bad.any():
        row, value = _first(bad.any(-1)), values[bad][0].item()
        raise BadInput(f"row {row} has {value:.4g} for a log-probability; give log p of a sound model, not p or -log p")
    return values


def _question(right: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """A right answer (n,) and some wrong ones (n, w) for each question, checked.  -> both float64."""
    if right.ndim != 1 or wrong.ndim != 2 or len(right) != len(wrong) or not wrong.shape[1]:
        raise BadInput(f"answers: {tuple(right.shape)} right, {tuple(wrong.shape)} wrong; they must be (n,) and (n, w)")
    both = torch.cat([right[:, None], wrong], -1)
    both = _logs(both, torch.ones_like(both, dtype=torch.bool))
    return both[:, 0], both[:, 1:]


def _defined(result: Tensor) -> Tensor:
    if result.isnan().any():
        raise BadInput(f"question {_first(result.isnan())}: no answer has any probability, so none is likelier")
    return result


def _numbers(values: Tensor, name: str) -> Tensor:
    """(n,) float64, n above 0, without NaN."""
    if values.ndim != 1 or not len(values) or values.isnan().any():
        raise BadInput(f"{name}: {tuple(values.shape)}, {int(values.isnan().sum())} NaN; give (n,) without NaN")
    return values.double()


def _first(where: Tensor) -> str:
    return ", ".join(map(str, where.nonzero()[0].tolist()))
