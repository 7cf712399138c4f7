"""Linears that stay in 16 bits: names of modules, or regular expressions, as llm-compressor's `ignore` has them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from calib import BadInput
from calib.blockwise.model import BlockwiseModel


def ignored_linears(stream: BlockwiseModel, patterns: Sequence[str], *, head: bool) -> list[str]:
    """Names on disk of the linears that are not to be quantized.

    Args:
        stream: the model.
        patterns: names of modules, such as `model.layers.0.mlp.down_proj`, or `re:` and a regular expression that a
            name begins with, such as `re:.*down_proj$`.
        head: whether the head is to be quantized.

    Raises:
        BadInput: a pattern is none, or matches nothing that multiplies, or the head that is to be quantized; a tensor
            would be quantized in part; or nothing would be quantized.
    """
    linears = [(stream.block_name(i), one) for i in range(stream.layers) for one in stream.linears(i)]
    names = {one.name: {one.name, f"{block}.{one.module}"} for block, one in linears}
    others, found = stream.left_alone(), dict[str, str]()
    for pattern in patterns:
        matched = [name for name, of in names.items() if any(matches(pattern, one) for one in of)]
        if not matched and not any(matches(pattern, name) for name in others):
            raise BadInput(f"ignore '{pattern}': no linear of this model has such a name; write one such as "
                           f"{next(iter(names), 'lm_head')}, or re: and a regular expression")  # fmt: skip
        if head and matches(pattern, stream.head[0].removesuffix(".weight")):
            raise BadInput(f"ignore '{pattern}': is the head, which --lm-head rounds; leave one of them out")
        found |= dict.fromkeys(matched, pattern)
    whole = {(block, one.parameter): one.name for block, one in linears if one.name not in found}
    for block, one in linears:
        if one.name in found and (block, one.parameter) in whole:
            raise BadInput(
                f"ignore '{found[one.name]}': '{one.name}' is one tensor with '{whole[block, one.parameter]}' in "
                f"{stream.config.model_type}; ignore both, or neither"
            )
    if linears and len(found) == len(names):
        raise BadInput(f"ignore '{next(reversed(patterns))}': nothing is left to quantize; leave it out")
    return [name for name in names if name in found]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is the name of a module, or a regular expression that it begins with.  Raises BadInput where it
    is no regular expression."""
    if not pattern.startswith("re:"):
        return pattern == name
    try:
        return re.match(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise BadInput(f"ignore '{pattern}': is no regular expression ({error})") from error
