"""Rewards of what a model writes: named ones, a pattern in each row, or a function of the user's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from calib import BadInput, Failed, first_line
from calib.data.records import Row
from calib.runtime.user_code import imported_function
from compressor.on_policy.options import NAMED_REWARDS

LARGEST_REWARD = 1e6  # beyond which single precision has no room for differences
Reward = Callable[[str, str, Mapping[str, Any]], float]


@dataclass(frozen=True)
class Prompt:
    """A prompt as text, the answer that is expected (None: the rows have none), and the row that both come from."""

    text: str
    answer: str | None
    row: Row


class RewardFunction:
    """A reward, by what `--reward` calls it."""

    def __init__(self, name: str, source: str) -> None:
        """Look the reward up; `source` names the file that rows come from.  Raises BadInput where a module or function
        cannot be had."""
        self.name, self._source = name, source
        self._field = name.partition(":")[2] if name.startswith("regex:") else None
        self._own: Reward | None = None
        if name not in NAMED_REWARDS and not self._field:
            self._own = imported_function("reward", name, "takes prompt, written and row")

    def check(self, prompt: Prompt) -> None:
        """Raises BadInput where a row lacks what the reward needs, or the row's own answer cannot be rewarded."""
        where, fields = f"{self._source}, {prompt.row.place}", prompt.row.fields
        if self.name in NAMED_REWARDS and not prompt.answer:
            raise BadInput(
                f"{where}: has no answer, which reward {self.name} compares with; add the field 'answer', or give "
                "another --reward"
            )
        if self._field is not None:
            pattern = fields.get(self._field)
            if not isinstance(pattern, str):
                raise BadInput(
                    f"{where}: has no field '{self._field}' of text, in which reward {self.name} finds its pattern; "
                    f"add it (there are {', '.join(list(fields)[:8])})"
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise BadInput(f"{where}: '{self._field}' is no regular expression ({error}); mend it") from error

    def __call__(self, prompt: Prompt, written: str) -> float:
        """Reward one answer; `exact` and `contains` leave white space at both ends out.

        Raises Failed, naming the row, where a function of the user's fails or returns no finite number.
        """
        if self.name == "exact":
            return float(written.strip() == (prompt.answer or "").strip())
        if self.name == "contains":
            return float((prompt.answer or "").strip() in written)
        if self._field is not None:
            return float(re.search(prompt.row.fields[self._field], written) is not None)
        assert self._own is not None
        where = f"reward {self.name}: {self._source}, {prompt.row.place}"
        try:
            value = self._own(prompt.text, written, dict(prompt.row.fields))
        except (Exception, SystemExit) as error:  # the user's own, and may raise anything
            raise Failed(f"{where}: {type(error).__name__}: {first_line(error)}; mend the function") from error
        if not isinstance(value, Real) or not math.isfinite(value):
            raise Failed(f"{where}: returned {value!r}, which is no finite number; mend the function")
        if abs(value) > LARGEST_REWARD:
            raise Failed(f"{where}: returned {value!r}, and rewards are at most {LARGEST_REWARD:g}; scale the function")
        return float(value)
