"""What mkdocs does not do by itself: the README as the site's first page, with links that lead somewhere there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links into docs/ are the site's own; those into benchmarks/ name files that it does not have."""
    if page.file.src_uri != "index.md":
        return markdown
    text = README.read_text(encoding="utf-8").replace("](CONTRIBUTING.md)", "](contributing.md)")
    text = re.sub(r"\[([^]]+)\]\((benchmarks/[^)]+)\)", r"`\2`", text)
    return text.replace("](docs/", "](")
