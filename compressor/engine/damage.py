"""Whether a job has broken its model: what is measured before anything is written, and when that fails the job.

A model that no longer says what it said is of no use, whatever its size, and a method that costs more than rounding
every weight to nearest is no method for this model. Both are seen on the held-out rows, and both are differences that
rows may make by chance: what is compared is compared within two standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from calib import Damaged
from calib.report.figures import distance

LEAST_COSINE = 0.8  # mean, of embeddings with the float model's: below it a search finds other texts
LEAST_AGREEMENT = 0.5  # share of positions at which the most likely token must still be the float model's
KL_TOLERANCE = 0.01  # nats of KL that are never held against a job: as little as 8 bits cost
EXPORTED = 0.1  # nats that an export may cost which stores the same values in another dtype

Figures = Mapping[str, Any]  # a `Quality` as a dictionary


def beyond_chance(worse: Figures, better: Figures) -> bool:
    """Whether the first is further from its reference than the second, by more than a tolerance and than two standard
    errors of both."""
    name = "cosine_error" if "cosine" in worse else "kl_error"
    errors = [figures.get(name) or 0.0 for figures in (worse, better)]
    margin = max(KL_TOLERANCE, 2 * math.hypot(*errors))
    return not distance(worse) <= distance(better) + margin  # what is no number is worse


def disagreement(figures: Figures, whose: str = "the float model's") -> str | None:
    """Describe a model whose most likely token is seldom the reference's, or whose embeddings lie elsewhere; None for
    one that agrees."""
    if "cosine" in figures:
        if figures["cosine"] >= LEAST_COSINE:
            return None
        return (
            f"embeddings of {figures['rows']:,} held-out texts have a mean cosine of only {figures['cosine']:.3f} with "
            f"{whose}, less than {LEAST_COSINE:g}"
        )
    share = figures["top1_agreement"]
    if share >= LEAST_AGREEMENT:
        return None
    where = f"{figures['tokens']:,} held-out positions" if "tokens" in figures else f"{figures['rows']:,} held-out rows"
    return f"the most likely answer is {whose} at only {share:.1%} of {where}, fewer than {LEAST_AGREEMENT:.0%}"


def rounding_damage(figures: Figures, nearest: Figures | None) -> str | None:
    """Describe what is wrong with a quantized model; None where nothing is.  `nearest`: figures of the same weights
    rounded to nearest as they are, None where nothing is rounded."""
    if (found := disagreement(figures)) is not None:
        return found
    if nearest is not None and beyond_chance(figures, nearest):
        if "cosine" in figures:
            return (
                f"embeddings have a mean cosine of {figures['cosine']:.4f} with the float model's, and rounding to "
                f"nearest without any transform {nearest['cosine']:.4f}"
            )
        return (
            f"the KL from the float model is {figures['kl']:.3g} nats on {figures['tokens']:,} held-out tokens, and "
            f"rounding to nearest without any transform costs {nearest['kl']:.3g}"
        )
    return None


def training_damage(before: Figures, after: Figures, *, labels: bool) -> str | None:
    """Describe a student that ended worse than it began; None for one that did not.

    Where `labels` (the text itself) are learned too, a student that predicts the text better than before is not worse,
    however far from its teacher. One that begins badly and gets better is no failure.
    """
    if labels and _predicts_better(before, after):
        return None
    if "teacher_mse" in after:  # of a regressor
        chance = 2 * math.hypot(before["teacher_mse_error"], after["teacher_mse_error"])
        margin = max(KL_TOLERANCE * before["mse"], chance)  # a share of the squared error to labels that it began with
        if after["teacher_mse"] <= before["teacher_mse"] + margin:
            return None
        return (
            f"the squared error from the teacher rose from {before['teacher_mse']:.3g} to {after['teacher_mse']:.3g} "
            "while the student learned"
        )
    if beyond_chance(after, before):
        return (
            f"the KL from the teacher rose from {before['kl']:.3g} to {after['kl']:.3g} nats while the student learned"
        )
    if "top1_agreement" not in after:  # of a model that gives several labels
        return None
    if after["top1_agreement"] < before["top1_agreement"] and (found := disagreement(after, "the teacher's")):
        return f"{found} and than before it learned ({before['top1_agreement']:.1%})"
    return None


def _predicts_better(before: Figures, after: Figures) -> bool:
    for name, sign in (("perplexity", -1), ("accuracy", 1), ("f1_micro", 1), ("mse", -1)):
        if name in after:
            return bool(sign * (after[name] - before[name]) > 0)
    return False


def export_damage(figures: Figures, *, rounds: bool) -> str | None:
    """Describe what is wrong with a model in another format; None where nothing is.  `rounds`: the format has fewer
    bits, to nearest."""
    if (found := disagreement(figures, "that of what it was made from")) is not None:
        return found
    if not rounds and not figures["kl"] <= EXPORTED:
        return (
            f"the KL from what it was made from is {figures['kl']:.3g} nats, more than the {EXPORTED:g} that another "
            "dtype may cost"
        )
    return None


def soup_damage(figures: Figures, alone: Sequence[Figures]) -> str | None:
    """Describe a mean of models that predicts worse than each of them, by more than two standard errors; None for one
    that does not."""
    worst = max(alone, key=lambda each: float(each["perplexity"]))
    chance = 2 * math.hypot(*(each.get("perplexity_error") or 0.0 for each in (figures, worst)))
    if figures["perplexity"] <= worst["perplexity"] + chance:
        return None
    return (
        f"its perplexity is {figures['perplexity']:.3f}, and that of the worst of its models "
        f"{worst['perplexity']:.3f}: "
        "they do not lie in one valley"
    )


def judge(what: str, found: str | None, *, instead: str, allow: bool) -> dict[str, Any]:
    """-> for the report.  Raises Damaged where something was `found` and is not allowed; says what to do `instead`."""
    if found is not None and not allow:
        raise Damaged(f"{what}: {found}; {instead}, or go on with --allow-damage")
    return {"found": found, "allowed": allow}


def rewarded_damage(before: Figures, after: Figures) -> str | None:
    """Describe a policy whose mean reward on held-out prompts fell by more than two standard errors; None where it did
    not."""
    chance = 2 * math.hypot(*(figures["reward_error"] or 0.0 for figures in (before, after)))
    if after["reward"] >= before["reward"] - chance:
        return None
    return f"the mean reward fell from {before['reward']:.3g} to {after['reward']:.3g} while the student learned"


def judge_training(
    loss: str, before: Figures, after: Figures, *, labels: bool, allow: bool, policies: Mapping[str, Figures] = {}
) -> dict[str, Any]:
    """`judge`, of a student before and after it learned by `loss`; `labels`: whether that knows the right answers.

    `policies`: figures of its own answers "before" and "after", where the loss goes by their rewards: then these
    decide, as such a student is to move away from its teacher.
    """
    if policies:
        found = rewarded_damage(policies["before"], policies["after"])
    else:
        found = training_damage(before, after, labels=labels)
    return judge(f"loss {loss}", found, allow=allow, instead="try a lower --lr or more rows (with --no-resume)")


def advice_after(
    scheme: str,
    init: str,
    rounding: str,
    nearest: Figures | None,
    *,
    target: float | None = None,
    searched: bool = False,
) -> str:
    """Suggest what to try in place of a quantization with these options, which broke the model: `target` mean bits in
    place of the scheme's, or as many as were `searched` for a tell-apart rate."""
    if nearest is not None and (disagreement(nearest) or (init, rounding) == ("none", "rtn")):
        share = nearest.get("top1_agreement", nearest.get("cosine"))
        few = f"rounding to nearest agrees at {share:.1%} too: " if disagreement(nearest) else ""
        more = (
            f"take a scheme of more bits than {scheme}"
            if target is None
            else f"take more --target-bits than {target:g}"
        )
        more = "ask for a lower --tell-apart" if searched else more
        tried = f"{few}{more}"
    elif init != "none":
        tried = "try --init none --no-learn"
    else:
        tried = "try --rounding rtn, or calibration text like that of your own use (--data)"
    return f"{tried} (with --no-resume)"
