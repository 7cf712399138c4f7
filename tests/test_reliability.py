"""docs/reliability.md speaks of tests that are there, and of all files of bad input."""

from __future__ import annotations

import ast
import re

from benchmarks.reliability import DOCUMENT, GROUPS, HAD, ROOT, inputs
from benchmarks.reliability_inputs import INPUTS


def test_every_case_of_the_document_is_a_test() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for file, (title, _) in GROUPS.items():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        part = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
        lines = [line for line in part.splitlines() if line.startswith("| ")][2:]
        cases = [line.split("|")[1].partition("(")[0].strip() for line in lines]
        assert len(cases) > 10
        assert {f"test_{case.replace(' ', '_')}" for case in cases} <= tests


def test_what_people_have_is_one_row_each() -> None:
    rows = [row for part in INPUTS.values() for row in part]
    assert len({given for given, _, _ in rows}) == len(rows) >= 45
    reports = [report for _, _, seen in rows if seen for report in seen.split(", ")]
    assert len(set(reports)) >= 25 and all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", report) for report in reports)
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"## {HAD}\n" not in text or "\n".join(inputs()) in text
