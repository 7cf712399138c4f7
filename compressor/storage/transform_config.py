"""compressed-tensors' `transform_config`: a Hadamard matrix that a runtime multiplies the inputs of linears by.

vLLM does so (its PR 22486): x becomes x H / sqrt(n) with Sylvester's H, whose width n is a power of two. transformers
drops the whole entry without a word, and so would answer wrongly; a key of its own in each group makes the library's
strict class refuse the folder there, while vLLM looks at those keys alone that it knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

REFUSED_BY_TRANSFORMERS = "rotates_as_it_runs"  # a key of each group
WIDEST_HADAMARD = 2**15  # that vLLM's kernel knows
NAME_OF_TRANSFORM = "R4"  # SpinQuant's (arXiv:2405.16406), as vLLM's own test models have it


def with_hadamard(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """A copy of a `quantization_config` in which inputs of `modules`, named as within a block, are multiplied by a
    Hadamard matrix of their width, which the stored weights are multiplied by already."""
    targets = [f"re:.*\\.{re.escape(module)}$" for module in sorted(set(modules))]
    groups = {name: {**group, REFUSED_BY_TRANSFORMERS: True} for name, group in config["config_groups"].items()}
    apply = [
        {"targets": targets, "location": location, "inverse": inverse, "ignore": []}
        for location, inverse in (("input", False), ("weight_input", True))
    ]
    transform = {"type": "hadamard", "apply": apply, "randomize": False, "requires_grad": False}
    return {
        **config,
        "config_groups": groups,
        "transform_config": {"config_groups": {NAME_OF_TRANSFORM: transform}},
    }


def can_be_served(width: int) -> bool:
    """Whether vLLM has a Hadamard matrix of this width."""
    return width & (width - 1) == 0 and 1 < width <= WIDEST_HADAMARD
