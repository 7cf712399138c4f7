"""Rewards by name, by pattern and by a function of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from calib import BadInput, Failed
from calib.data.records import Row
from compressor.on_policy.options import check_reward
from compressor.on_policy.rewards import Prompt, RewardFunction

ASKED = Prompt("1+1=", "2", Row("line 3", 3, {"prompt": "1+1=", "pattern": r"^0*2$", "weight": 4}, 9))


def test_named_rewards_and_patterns() -> None:
    exact, contains, regex = (RewardFunction(name, "rows.jsonl") for name in ("exact", "contains", "regex:pattern"))
    for written, expected in ((" 2\n", (1, 1, 0)), ("12", (0, 1, 0)), ("002", (0, 1, 1)), ("3", (0, 0, 0))):
        assert (exact(ASKED, written), contains(ASKED, written), regex(ASKED, written)) == expected


def test_a_function_of_the_user_s_is_given_prompt_answer_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_rewards.py").write_text(
        "def weighed(prompt, written, row):\n    return row['weight'] * (len(prompt) + (written == '2'))\n"
        "def fails(prompt, written, row):\n    return row['no such']\n"
        "def says(prompt, written, row):\n    return 'good'\n"
        "def nothing(prompt, written, row):\n    return float('nan')\n"
        "def leaves(prompt, written, row):\n    raise SystemExit(3)\n"
        "def shouts(prompt, written, row):\n    return 1e39\n"
        "LEVEL = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert RewardFunction("own_rewards:weighed", "rows.jsonl")(ASKED, "2") == 20
    for name, said in (
        ("fails", "KeyError: 'no such'"), ("says", "returned 'good'"), ("nothing", "returned nan"),
        ("leaves", "SystemExit"), ("shouts", "returned 1e.39, and rewards are at most 1e.06"),
    ):  # fmt: skip
        with pytest.raises(Failed, match=rf"reward own_rewards:{name}: rows.jsonl, line 3: {said}"):
            RewardFunction(f"own_rewards:{name}", "rows.jsonl")(ASKED, "2")
    for name, said in (("LEVEL", "is no function"), ("missing", "cannot be imported")):
        with pytest.raises(BadInput, match=said):
            RewardFunction(f"own_rewards:{name}", "rows.jsonl")


def test_rows_that_lack_what_a_reward_needs_are_named() -> None:
    bare = Prompt("1+1=", None, Row("line 3", 3, {"prompt": "1+1=", "pattern": "("}, 9))
    for name, said in (("exact", "has no answer"), ("contains", "has no answer"), ("regex:form", "has no field 'form'"),
                       ("regex:pattern", "is no regular expression")):  # fmt: skip
        with pytest.raises(BadInput, match=f"rows.jsonl, line 3: .*{said}"):
            RewardFunction(name, "rows.jsonl").check(bare)


def test_what_is_no_reward_is_refused_before_anything_is_imported() -> None:
    for name in ("exact", "contains", "regex:answer", "package.module:function"):
        check_reward(name)
    for name, said in (("right", "is unknown"), ("regex:", "names no field"), ("a-b:c", "is unknown")):
        with pytest.raises(BadInput, match=said):
            check_reward(name)
