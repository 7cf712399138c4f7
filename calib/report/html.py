"""Self-contained HTML pages from jinja2 templates: nothing is fetched, and no text of a report can become markup.

Page functions compute plain data, and a template beside them, which extends `templates/page.html`, lays it out. Styles
and script lie in `templates/` too; a Content-Security-Policy admits those two by their hashes and nothing else. What
can be downloaded is packed into the page.
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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.report import charts

if TYPE_CHECKING:
    from jinja2 import Environment

Report = Mapping[str, Any]  # what a job measured and did, as report.json has it
Steps = Sequence[Mapping[str, Any]]  # of a recipe, oldest first, as parewell.json has it
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # a head, and rows whose first cell names them
HERE = "OUT"  # what the folder is called in lines to be copied
TEMPLATES = Path(__file__).with_name("templates")
_MEDIA_TYPES = {".json": "application/json", ".csv": "text/csv"}


@dataclass(frozen=True)
class Verdict:
    """A judgment in a sentence or two, and the figures it rests on; `level` is good, doubtful or bad."""

    level: str
    judgment: str
    figures: str

    def __str__(self) -> str:
        return f"{self.judgment} {self.figures}".strip()


def render_page(template: Path, *, title: str, verdict: Verdict, files: Mapping[str, str], **data: Any) -> str:
    """A whole page.

    Args:
        template: a file that extends page.html.
        title: of the page; its heading, unless `heading` is given.
        verdict: what stands at the top.
        files: texts that can be downloaded, by name.
        data: what the template and page.html lay out.

    Returns:
        The page, in one HTML file.
    """
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    packed = [
        {"name": name, "type": _MEDIA_TYPES[Path(name).suffix], "data": _packed(text)} for name, text in files.items()
    ]
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    found = templates_in(template.parent).get_template(template.name)
    return found.render(
        {"title": title, "verdict": verdict, "policy": policy, "style": style, "script": script,
         "files": packed, "HERE": HERE, **data}
    )  # fmt: skip


@cache
def templates_in(folder: Path) -> Environment:
    """Templates of a folder and those here; what a template names and is not given is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # takes a while, and most commands write no page

    found = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters |= {
        "cell": format_cell, "plain": plain_text, "slug": _slug, "headings": _headings, "sentence": _sentence,
    }  # fmt: skip
    found.globals["chart"] = charts
    return found


def format_number(value: float | None) -> str:
    """Four digits; a dash for what was not measured."""
    return "–" if value is None else f"{value:z,.4g}"


def format_cell(value: object) -> str:
    """A table's cell: texts as they are, counts whole, other numbers with four digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return format_number(value) if value is None or isinstance(value, float) else str(value)


def format_change(before: float, after: float) -> str:
    """Relative, in percent."""
    return f"{after / before - 1:+z,.1%}" if before and math.isfinite(after / before) else "–"


def changed_row(text: str, before: float, after: float) -> tuple[str, float, float, str]:
    """A row of a table of before and after."""
    return text, before, after, format_change(before, after)


def done_to(steps: Steps, done: str) -> str:
    """The line over a page's heading: the model and what was done with it."""
    return f"parewell · {steps[-1]['model']['name']}, {done}" if steps else f"parewell · {done}"


def loss_charts(curves: Mapping[str, Sequence[float]], y: charts.Axis) -> list[charts.Chart]:
    """The losses of a job's steps, by name."""
    return [
        charts.chart(
            {charts.Line("loss", "loss"): curve}, f"{name[:1].upper()}{name[1:]}", x=charts.STEP, y=y,
            at=range(1, len(curve) + 1),
        )
        for name, curve in curves.items() if curve
    ]  # fmt: skip


def described_steps(steps: Steps) -> list[dict[str, Any]]:
    """A recipe's steps for page.html. Steps of earlier jobs were never checked, and may lack anything."""
    return [_described(step) for step in steps]


def _described(step: Mapping[str, Any]) -> dict[str, Any]:
    names = ("model", "quality", "options", "data", "versions", "runs_on")
    model, quality, options, data, versions, runs_on = (
        found if isinstance(found := step.get(name), dict) else {} for name in names
    )
    taught = step["teacher"] if isinstance(step.get("teacher"), list) else []
    teacher = [f"{one.get('job')} of {plain_text(one.get('model', {}).get('name'))}" for one in taught]
    return {
        "job": str(step.get("job")),
        "model": str(model.get("name")),
        "teacher": ", ".join(teacher),
        "figures": ", ".join(
            f"{name.replace('_', ' ')} {plain_text(v)}" for name, v in quality.items() if v is not None
        ),
        "details": {
            title: {str(name).replace("_", " "): plain_text(v) for name, v in values.items() if v is not None}
            for title, values in (
                ("Options", options),
                ("Inputs", {"model": model.get("sha256"), **data}),
                ("Versions", {**versions, **runs_on}),
            )
        },
    }


def as_json(report: Any) -> str:
    """Serialize a report as report.json has it, with null for numbers that are not finite, which JSON does not know."""
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
    if isinstance(value, list):
        return ", ".join(map(plain_text, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)  # the start of a sha256 will do


OWN_LOADERS = {"parewell.load", "compressor.load"}  # as reports name it, the second those of before December 2026
OWN_LINES = f'from parewell import load\n\nmodel = load("{HERE}")'
VLLM_LINES = textwrap.dedent(
    f"""\
    vllm serve {HERE}

    # or, in Python
    from vllm import LLM

    print(LLM("{HERE}").generate("Once upon a time")[0].outputs[0].text)"""
)


def load_lines(
    loaders: Sequence[str],
    notes: Sequence[str] = (),
    vllm: str = "a plain checkpoint",
    kind: str = "AutoModelForCausalLM",
) -> dict[str, str]:
    """Lines that load a language model, by what runs them: of those named in `loaders`; `kind` is the library's class
    for it."""
    zero_points = any("CompressedTensorsConfig" in note for note in notes)
    found = {}
    for loader in loaders:
        if loader in OWN_LOADERS:
            found["Python"] = OWN_LINES
        elif loader == "vLLM":
            found[f"vLLM ({vllm}; not tried here)"] = VLLM_LINES
        elif loader.startswith("transformers"):
            found[loader] = transformers_lines(kind, zero_points=zero_points)
    return found


STATE_LINES = f"""\
from safetensors.torch import load_file

# module: what the factory makes
module.load_state_dict(load_file("{HERE}/model.safetensors"))"""


def transformers_lines(kind: str, *, zero_points: bool = False) -> str:
    """Python lines that load a directory with a class of transformers, such as AutoModelForCausalLM."""
    more = ", CompressedTensorsConfig" if zero_points else ""
    options = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if zero_points else ""
    image = "AutoProcessor" if "Text" in kind else "AutoImageProcessor"
    side = image if "Image" in kind else "AutoTokenizer"
    return (
        f'from transformers import {kind}, {side}{more}\n\nmodel = {kind}.from_pretrained("{HERE}"{options})\n'
        f'{"processor" if "Image" in kind else "tokenizer"} = {side}.from_pretrained("{HERE}")'
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(errors="replace"), mtime=0)).decode()


def _slug(title: str) -> str:
    return re.sub(r"[^a-z]+", "-", title.lower()).strip("-")


def _headings(body: str) -> list[tuple[str, str]]:
    """Places and titles, as HTML, of the sections in a rendered page."""
    return re.findall(r'<h2 id="([\w-]+)">(.+?)</h2>', body)


def _sentence(text: str) -> str:
    """Begins with a capital, ends with a full stop; no line breaks at an arrow, or after the sign of an exponent."""
    whole = f"{text[:1].upper()}{text[1:].removesuffix('.')}."
    return whole.replace(" -> ", "\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}").replace("^(-", "^(\N{MINUS SIGN}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
