"""docs/reliability.md speaks of tests that are there, and of all files of bad input."""

from __future__ import annotations

import ast

from benchmarks.reliability import DOCUMENT, GROUPS, ROOT


def test_every_case_of_the_document_is_a_test() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for file, (title, _) in GROUPS.items():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        part = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
        lines = [line for line in part.splitlines() if line.startswith("| ")][2:]
        cases = [line.split("|")[1].partition("(")[0].strip() for line in lines]
        assert len(cases) > 20
        assert {f"test_{case.replace(' ', '_')}" for case in cases} <= tests
