"""The embedded default: a small LLaMA-type model, trained by `train.py`, and the text that every Python carries.

It lets `parewell demo`, the tests and a first `parewell quantize` run without network or downloads. It is no
substitute for a model and calibration text of one's own.
"""

from __future__ import annotations

import ast
import sysconfig
import zlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

MODEL = Path(__file__).parent / "model"

_NO_PROSE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "__pycache__"}


def is_held_out(topic: str) -> bool:
    """Whether a topic is kept for evaluation.  Decided by its name alone, so that every Python version agrees."""
    return zlib.crc32(topic.encode()) % 10 == 0


def python_topics(part: Literal["train", "held-out"]) -> list[str]:
    """Python's own language reference, one document per topic, as `help('topics')` shows it."""
    return [text for name, text in sorted(topics.items()) if is_held_out(name) == (part == "held-out")]


def stdlib_docstrings() -> list[str]:
    """Docstrings of the standard library, one document per module that has any, in order of path."""
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(library.rglob("*.py")):
        if _NO_PROSE & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # a few modules carry deliberately broken or non-UTF-8 sources
            continue
        found = [
            doc
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and (doc := ast.get_docstring(node))
        ]
        if found:
            documents.append("\n\n".join(found))
    return documents
