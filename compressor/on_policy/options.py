"""Options of training on what a student writes itself, and on how that is rewarded."""

from __future__ import annotations

import re
from dataclasses import dataclass

from calib import BadInput
from calib.jobs.options import flag_name, option

KL_MASKS = ("none", "response", "group")
TARGETS = ("tilted", "verified")
REWARD_SCALES = ("group", "none")
F_DIVERGENCES = (  # of f-dpg
    "forward-kl", "reverse-kl", "total-variation", "js", "chi-square", "reverse-chi-square",
)  # fmt: skip
NAMED_REWARDS = ("exact", "contains")
REWARDS = "exact, contains, regex:FIELD or package.module:function"
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class OnPolicyOptions:
    """How a student is trained on answers of its own."""

    on_policy: float = option(
        0.0, "share of rows that the student generates, for the teacher to answer", group="method", ge=0, le=1
    )
    reward: str | None = option(
        None,
        f"reward of what the student writes: {REWARDS}, which is given prompt, answer and row; with --on-policy 1",
        group="method",
    )
    group: int = option(8, "answers that the student writes to each prompt", group="method", ge=1, needs="reward")
    beta: float = option(
        0.1,
        "weight of the KL from the teacher against the reward: of kdrl, and of the target of f-dpg",
        group="method", ge=0, le=1000.0, needs="reward",
    )  # fmt: skip
    beta_end: float | None = option(
        None, "kdrl: anneal beta, step by step, to this value", group="method", ge=0, le=1000.0, needs="reward"
    )
    kl_mask: str = option(
        "none",
        "kdrl: pull only answers that are wrong (response), or of prompts without a right one (group), to the teacher",
        KL_MASKS, group="method", needs="reward",
    )  # fmt: skip
    kl_by_difficulty: bool = option(
        False,
        "kdrl: pull right answers less to the teacher the harder their prompt is, and punish long wrong ones",
        group="method", needs="reward",
    )  # fmt: skip
    scale_rewards: str = option(
        "group",
        "grpo, kdrl: divide advantages by the rewards' standard deviation in the group, or not",
        REWARD_SCALES, group="method", needs="reward",
    )  # fmt: skip
    target: str = option(
        "tilted",
        "f-dpg: the teacher times exp(reward / beta), or the teacher on rewarded answers alone (verified)",
        TARGETS, group="method", needs="reward",
    )  # fmt: skip
    target_reward: float | None = option(
        None, "f-dpg: choose beta such that the tilted target has this mean reward", group="method", needs="reward"
    )
    correct: float | None = option(
        None,
        "replace the student's first token that is this many nats below the teacher's most likely one, and let it "
        "write on from there; with --on-policy 1", group="method", ge=0,
    )  # fmt: skip
    corrections: int = option(
        1, "how often one answer is corrected at most", group="method", ge=1, le=1000, needs="correct"
    )


def check_rewarded(loss: str | None, options: OnPolicyOptions) -> None:
    """Raises BadInput for options that a job with a reward has no use for, `loss` being grpo, kdrl, f-dpg or None, and
    for those that make another job of it."""
    defaults = OnPolicyOptions()
    belongs = {
        "kl_mask": ("kdrl",), "kl_by_difficulty": ("kdrl",), "beta_end": ("kdrl",), "scale_rewards": ("grpo", "kdrl"),
        "target": ("f-dpg",), "target_reward": ("f-dpg",), "beta": ("kdrl", "f-dpg"),
    }  # fmt: skip
    for name, losses in belongs.items():
        if getattr(options, name) != getattr(defaults, name) and loss not in losses:
            raise BadInput(f"{flag_name(name)}: is of loss {' or '.join(losses)}; leave it out")
    if loss is not None and options.group < 2:
        raise BadInput(f"group 1: {loss} compares each answer with others to its prompt; give at least --group 2")
    if options.kl_by_difficulty and options.kl_mask != "none":
        raise BadInput("kl-by-difficulty: pulls no wrong answer to the teacher, so --kl-mask has nothing to mask")
    if loss == "kdrl" and options.beta == 0:
        raise BadInput("beta 0: kdrl becomes grpo, with no teacher; give --loss grpo, or a beta above 0")
    if loss == "f-dpg" and options.target == "verified":
        if options.target_reward is not None or options.beta != defaults.beta:
            raise BadInput("target verified: has no beta; leave out --beta and --target-reward")
    elif loss == "f-dpg" and options.beta == 0:
        raise BadInput(
            "beta 0: the target becomes the teacher on its best answers alone; give --target verified, or more than 0"
        )
    if options.target_reward is not None and options.beta != defaults.beta:
        raise BadInput("target-reward: chooses beta; leave out --beta")


def check_reward(reward: str) -> None:
    """Raises BadInput where a reward is none of the kinds that there are; nothing is imported yet."""
    kind, _, field = reward.partition(":")
    if reward in NAMED_REWARDS or (kind == "regex" and field) or (_FUNCTION.fullmatch(reward) and kind != "regex"):
        return
    if kind == "regex":
        raise BadInput("reward regex: names no field of the rows; give regex:FIELD, whose pattern an answer must match")
    raise BadInput(f"reward '{reward}' is unknown; give {REWARDS}")
