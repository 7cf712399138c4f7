"""One self-contained HTML page for a report: nothing is fetched, and nothing that a report says can become markup.

Styles and script are our own and lie beside this file; a Content-Security-Policy admits those two by their hashes and
nothing else. What can be downloaded is packed into the page.
"""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import io
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from calib.report.charts import grid, lines

Report = Mapping[str, Any]  # what a job measured and did, as report.json has it
HERE = "OUT"  # what the folder is called in lines to be copied


def document(title: str, head: str, parts: Sequence[str], files: Mapping[str, str]) -> str:
    """A whole page of HTML fragments, with links to its sections.  `files`: texts to be downloaded, by name."""
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    kinds = {".json": "application/json", ".csv": "text/csv"}
    packed = [{"name": name, "type": kinds[Path(name).suffix], "data": _packed(text)} for name, text in files.items()]
    rules = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = re.findall(r'<h2 id="([\w-]+)">(.+?)</h2>', "".join(parts))
    links = "".join(f'<a href="#{place}">{text}</a>' for place, text in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{rules}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{style}</style></head>\n<body>'
        f'{head}<nav aria-label="Sections">{links}</nav><main>{"".join(parts)}</main>\n'
        f'<script type="application/json" id="files">{_safe(json.dumps(packed))}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def heading(eyebrow: str, title: str, verdict: str) -> str:
    """What it is, and one sentence of it."""
    paragraph = f'<p class="verdict">{escape(verdict)}</p>'
    return f'<header><p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(title)}</h1>{paragraph}</header>'


def section(title: str) -> str:
    """The heading of one; its words are ours."""
    return f'<h2 id="{re.sub(r"[^a-z]+", "-", title.lower())}">{escape(title)}</h2>'


def about(text: str) -> str:
    return f'<p class="about">{escape(text)}</p>'


def format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def format_change(before: float, after: float) -> str:
    """Relative."""
    return f"{after / before - 1:+z.1%}" if before and math.isfinite(after / before) else "–"


def changed_row(text: str, before: float, after: float) -> tuple[str, str, str, str]:
    """A row of a table of what was and what is."""
    return text, format_number(before), format_number(after), format_change(before, after)


def history(steps: Sequence[Mapping[str, Any]], done: str) -> str:
    """What stands over a page's title: the model and what was done with it."""
    return f"parewell · {steps[-1]['model']['name']}, {done}" if steps else f"parewell · {done}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, sortable: bool = False, tall: bool = False) -> str:
    """The first column names rows, the others hold numbers; a tall table scrolls in a box of its own."""
    top = "".join(f'<th scope="col"{_words(i)}>{escape(c)}</th>' for i, c in enumerate(head))
    body = "".join(
        f'<tr><th scope="row"{_words(0)}>{escape(row[0])}</th>{"".join(f"<td>{escape(c)}" for c in row[1:])}</tr>\n'
        for row in rows
    )
    kind, box = ' class="sortable"' if sortable else "", "scroll tall" if tall else "scroll"
    return (
        f'<div class="{box}" tabindex="0" role="region" aria-label="{escape(head[0] or "figures")}">'
        f"<table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def curves(found: Mapping[str, Sequence[float]], unit: str = "step") -> str:
    """The losses of a job's steps, by name."""
    if not any(found.values()):
        return ""
    drawn = grid(lines({name: curve}, name, unit=unit, first=1) for name, curve in found.items() if curve)
    return section("Loss of every step") + drawn


def loading(lines_of: Mapping[str, str], notes: Sequence[str] = ()) -> str:
    """Lines to be copied, by what runs them."""
    parts = [f"<h3>{escape(name)}</h3><pre><code>{escape(text)}</code></pre>" for name, text in lines_of.items()]
    minded = "".join(about(f"Note: {note}.") for note in notes)
    paragraph = about(f"{HERE} is the folder that this page came in.")
    return f"{section('Load it')}{paragraph}{''.join(parts)}{minded}"


def recipe(steps: Sequence[Mapping[str, Any]]) -> str:
    """How an output was made, oldest step first, as parewell.json has it."""
    if not steps:
        return section("Recipe") + about("Not known: this report came without its parewell.json.")
    return f'{section("Recipe")}<ol class="chain">{"".join(map(_step, steps))}</ol>'


def _step(step: Mapping[str, Any]) -> str:
    """Steps of earlier jobs were never checked, and may lack anything."""
    names = ("model", "quality", "options", "data", "versions", "runs_on")
    model, quality, options, data, versions, runs_on = (
        found if isinstance(found := step.get(name), dict) else {} for name in names
    )
    figures = ", ".join(f"{name.replace('_', ' ')} {plain_text(v)}" for name, v in quality.items() if v is not None)
    parts = [
        f"<p><strong>{escape(str(step.get('job')))}</strong> of {escape(str(model.get('name')))}</p>",
        about(f"{figures[:1].upper()}{figures[1:]}." if figures else "No figures."),
    ]
    if isinstance(of := step.get("teacher"), list):
        jobs = [f"{one.get('job')} of {plain_text(one.get('model', {}).get('name'))}" for one in of]
        parts.insert(1, about(f"Its teacher: {', '.join(jobs)}."))
    for title, values in (
        ("Options", options),
        ("Inputs", {"model": model.get("sha256"), **data}),
        ("Versions", {**versions, **runs_on}),
    ):
        shown = "".join(
            f"<dt>{escape(str(name).replace('_', ' '))}</dt><dd>{escape(plain_text(value))}</dd>"
            for name, value in values.items()
            if value is not None
        )
        parts.append(f"<details><summary>{title}</summary><dl>{shown}</dl></details>")
    return f"<li>{''.join(parts)}</li>"


def downloads() -> str:
    """Where the script puts its buttons."""
    paragraph = about("Made in the browser from what this page carries.")
    return f'{section("Downloads")}{paragraph}<div class="downloads"></div>'


def as_json(report: Any) -> str:
    """As report.json has it, with null for what is no finite number, which JSON does not know."""
    return json.dumps(_finite(report))


def as_csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """RFC 4180, with numbers to their last digit."""
    text = io.StringIO()
    csv.writer(text).writerows([head, *rows])
    return text.getvalue()


LISTED = 8  # of a list, that are shown


def plain_text(value: object) -> str:
    """A value of a recipe, short."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {plain_text(v)}" for k, v in value.items()) + ")"
    if isinstance(value, list) and len(value) > LISTED:
        return f"{len(value):,} entries"
    if isinstance(value, float):
        return f"{value:.5g}"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)  # the start of a sha256 will do


def transformers_lines(kind: str, *, zero_points: bool = False) -> str:
    """To load the folder with a class of the library's, such as AutoModelForCausalLM."""
    more = ", CompressedTensorsConfig" if zero_points else ""
    options = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if zero_points else ""
    side = "AutoImageProcessor" if "Image" in kind else "AutoTokenizer"
    return (
        f'from transformers import {kind}, {side}{more}\n\nmodel = {kind}.from_pretrained("{HERE}"{options})\n'
        f'{"processor" if "Image" in kind else "tokenizer"} = {side}.from_pretrained("{HERE}")'
    )


OWN_LINES = f'from parewell import load\n\nmodel = load("{HERE}")'
VLLM_LINES = textwrap.dedent(
    f"""\
    vllm serve {HERE}

    # or, in Python
    from vllm import LLM

    print(LLM("{HERE}").generate("Once upon a time")[0].outputs[0].text)"""
)


def _words(column: int) -> str:
    return "" if column else ' class="words"'


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(errors="replace"), mtime=0)).decode()


def _safe(text: str) -> str:
    """JSON that cannot end the element it stands in."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
