"""Imports point down only: cli -> compressor, unlearn -> calib; the two middle rooms never meet."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "calib": {"calib"},
    "compressor": {"compressor", "calib"},
    "unlearn": {"unlearn", "calib"},
    "cli": {"cli", "compressor", "unlearn", "calib"},
}


def test_arrows_point_down() -> None:
    for room, allowed in MAY_IMPORT.items():
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for name in names:
                    first = name.split(".")[0]
                    assert first not in MAY_IMPORT or first in allowed, f"{file} imports {name}"
