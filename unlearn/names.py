"""Names that options choose among, apart from what they stand for, so that a command can show and check them without
importing it."""

from __future__ import annotations

TASKS = ("auto", "causal-lm", "sequence-classification", "image-classification", "tensors")
BASELINES = (  # keys of `unlearn.baselines.BASELINES`
    "ascent", "retain", "difference", "npo", "npo-js", "npo-forward-kl", "npo-alpha", "simnpo", "scrub", "rmu",
)  # fmt: skip
RETAINS = ("ce", "kl", "rehearsal-forward-kl", "rehearsal-js", "rehearsal-alpha")  # of its RETAINS
BALANCES = ("none", "gradient", "recap")
DISTANCES = ("squares", "kl")  # of `unlearn.match.DISTANCES`
AT_ONCE = 4096  # tokens that pass through one model together
