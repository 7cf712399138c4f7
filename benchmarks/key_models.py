"""The field's key models, shrunken but true to what was published: what is done with each, and how right that is.

    python -m benchmarks.key_models [NAME ...] [--processes 1]

Each config (benchmarks/key_configs.py) is built by the library with every parameter drawn anew, and saved by it. Then
four jobs on the same rows: w4a16-g32 with fixed transforms, the same learned (8 steps, then 8 of tuning, each kept
where it helps on rows apart), w4a8kv4-g32, and transformed only (`rounding none`). KL is to the float model, on
held-out rows; weights that nothing taught have no structure that could be kept, so these figures say that a job is
sound and little of how good it is on real weights. `transformed` is the difference of logits that transforms alone
make, of the largest; `plain` that between plain transformers and `load`, of the fixed and the learned output; `image`
both with a drawn image. Exports: bnb-nf4 of the transformed model, onnx and gguf of the quantized one, each run by its
own runtime: KL to what it was made of.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING

from benchmarks import architectures, record
from benchmarks.architectures import TooLong, apart
from benchmarks.key_configs import CONFIGS
from calib import BadInput, first_line
from calib.model.task import Task, task_of_checkpoint
from calib.probe.find import walk_of_config
from calib.probe.images import image_inputs
from compressor import Export, Quantize, export, load, quantize
from compressor.engine.support import support_of
from compressor.transforms.proof import left_out, parts_of
from tests.any_type import drawn_anew

SECONDS = 180  # that a model may take
SPOKEN = 140  # ids below are text
SCHEME, ROUNDED_RUNS = "w4a16-g32", "w4a8kv4-g32"
EXPORTS = {"bnb-nf4": "turned", "onnx": "fixed", "gguf": "fixed"}  # of which job's output


def row_of(name: str, cache: Path | None = None) -> dict[str, Any]:
    """All that is measured of a model; what is refused or fails is said, step by step. With `cache` once."""
    kept = cache / f"{name}.json" if cache else None
    if kept is not None and kept.exists():
        return json.loads(kept.read_text())  # type: ignore[no-any-return]
    row: dict[str, Any] = {"model": name, "type": CONFIGS[name]["model_type"], "refused": {}, "failed": {}}
    start = time.monotonic()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            _measure(row, CONFIGS[name], Path(scratch))
    except (Exception, TooLong) as error:
        row["failed"]["all"] = f"{type(error).__name__}: {first_line(error)}"
    finally:
        signal.alarm(0)
    row["seconds"] = time.monotonic() - start
    if kept is not None:
        kept.write_text(json.dumps(row))
    return row


class Refused(Exception):
    """An image cannot be made up, for a reason."""


def _too_long(*_: object) -> None:
    raise TooLong(f"over {SECONDS} s")


def _tried(row: dict[str, Any], step: str, measure: Callable[[], Any]) -> Any:
    """What a step gives; None where it is refused or fails, which the row then says."""
    try:
        return measure()
    except (BadInput, Refused) as error:
        row["refused"][step] = first_line(error)
    except Exception as error:
        row["failed"][step] = f"{type(error).__name__}: {first_line(error)}"
    return None


def _measure(row: dict[str, Any], raw: dict[str, Any], scratch: Path) -> None:
    model = _saved(raw, scratch / "model")
    rows = torch.randint(3, SPOKEN, (24, 32), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": rows}, scratch / "ids.safetensors")
    _tried(row, "support", lambda: _support(row, scratch / "model"))
    asked: dict[str, dict[str, Any]] = {"text": {"input_ids": rows[:2, :24]}}
    if "vision_config" in raw:
        made = _tried(row, "image", lambda: _image(model.config))
        asked |= {"image": made} if made else {}
    given: dict[str, Any] = {"data": scratch / "ids.safetensors", "samples": 16, "held_out": 8, "length": 32}
    jobs = {
        "fixed": Quantize(scheme=SCHEME, **given).without_learning(),
        "learned": Quantize(scheme=SCHEME, steps=8, block_steps=8, tune_steps=8, **given),
        "running": Quantize(scheme=ROUNDED_RUNS, **given).without_learning(),
        "turned": Quantize(scheme=SCHEME, rounding="none", **given).without_learning(),
    }
    for job, options in jobs.items():
        _tried(row, job, partial(_quantize, row, job, options, scratch, asked))
    for to, of in EXPORTS.items():
        if (scratch / of).is_dir():
            options = Export(to=to, data=scratch / "ids.safetensors", held_out=2, length=32)
            row[to] = _tried(row, to, partial(_exported, scratch / of, scratch / to, options))


def _image(config: Any) -> dict[str, Any]:
    try:
        return image_inputs(walk_of_config(config).in_double())
    except ValueError as error:
        raise Refused(str(error)) from error


def _saved(raw: dict[str, Any], folder: Path) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    kind = "AutoModelForImageTextToText" if "vision_config" in raw else "AutoModelForCausalLM"
    model = drawn_anew(getattr(transformers, kind).from_config(config).eval())
    model.save_pretrained(folder)
    return model


def _support(row: dict[str, Any], folder: Path) -> None:
    admitted = list[str]()

    def found(stream: Any) -> dict[str, str]:
        parts = parts_of(stream)
        rotation = [] if parts.obstacle else ["R 1 = 1" if parts.centred else "R"]
        counts = {
            "norms": sum(n.scales for block in parts.blocks for n in block.norms),
            "v/o": sum(p.rotates for block in parts.blocks for p in block.pairs),
            "up/down": sum(not p.rotates for block in parts.blocks for p in block.pairs),
            "planes": sum(len(block.planes) for block in parts.blocks),
        }
        admitted.extend([*rotation, *(f"{name} {count}" for name, count in counts.items() if count)])
        return left_out(parts)

    support = support_of(folder, found)
    row |= {"blocks": support.blocks, "kinds": support.kinds, "share": support.quantized_share,
            "left_out": support.left_out, "admitted": admitted, "kept": support.kept}  # fmt: skip


def _quantize(row: dict[str, Any], job: str, options: Quantize, scratch: Path, asked: dict[str, Any]) -> None:
    report = quantize(scratch / "model", scratch / job, options, allow_damage=True)
    row[job] = {"kl": report["quality"]["kl"], **report["loaders"]}
    if "nearest" in report["quality_by_stage"]:
        row[job]["nearest"] = report["quality_by_stage"]["nearest"]["kl"]
    ours = load(scratch / job)
    if job == "turned":
        model = load(scratch / "model")
        row[job]["apart"] = {what: apart(_logits(ours, x), _logits(model, x)) for what, x in asked.items()}
    if any(loader.startswith("transformers") for loader in report["loaders"]["loaders"]):
        plain = plainly(scratch / job)
        row[job]["plain"] = {what: apart(_logits(plain, x), _logits(ours, x)) for what, x in asked.items()}


def plainly(folder: Path) -> Any:
    """A model as plain transformers opens it, by the class that its config.json names."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = task_of_checkpoint(config.model_type, config.architectures) or Task.CAUSAL_LM
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    floats = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        return model(**floats | {"use_cache": False}).logits  # type: ignore[no-any-return]


def _exported(folder: Path, out: Path, options: Export) -> dict[str, Any]:
    report = export(folder, out, options, allow_damage=True)
    return {"kl": report["quality"]["kl"]} if "quality" in report else {"not_run": report["not_run"]}


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table; "-" where the notes say why there is nothing."""

    def kl(job: str) -> str:
        found = row.get(job)
        return f"{found['kl']:.2g} / {found['nearest']:.2g}" if found else "-"

    def furthest(what: str) -> str:
        plain = [row.get(job, {}).get("plain", {}) for job in ("fixed", "learned")]
        found = [one[what] for one in plain if what in one]
        return f"{max(found):.0e}" if found else "-"

    def ran(to: str) -> str:
        found = row.get(to) or {}
        return f"{found['kl']:.1e}" if "kl" in found else "-"

    turned = (row.get("turned") or {}).get("apart", {})
    seeing = "vision_config" in CONFIGS[row["model"]]
    return {
        "model": row["model"],
        "type": row["type"],
        "blocks (kinds)": f"{row['blocks']} ({row['kinds']})" if "blocks" in row else "-",
        "transforms": ", ".join(row.get("admitted", [])),
        "quantized": f"{row['share']:.1%}" if "share" in row else "-",
        "KL / nearest": kl("fixed"),
        "learned": kl("learned"),
        ROUNDED_RUNS: kl("running"),
        "transformed": f"{turned['text']:.0e}" if turned else "-",
        "plain": furthest("text"),
        "image, transformed": f"{turned['image']:.0e}" if "image" in turned else "-" * seeing,
        "image, plain": furthest("image") if seeing else "",
        **{to: ran(to) for to in EXPORTS},
        "seconds": round(row["seconds"], 1),
    }


def reasons(rows: list[dict[str, Any]]) -> str:
    """What is left out, kept in 16 bits, refused or failed, by reason, with the models that it is said of."""
    found = dict[tuple[str, str], list[str]]()
    for row in rows:
        said = [("left out", f"{what.replace('_', ' ')}: {why}") for what, why in row.get("left_out", {}).items()]
        said += [("refused", f"{step}: {why}") for step, why in row["refused"].items()]
        said += [("failed", f"{step}: {why}") for step, why in row["failed"].items()]
        for job in ("fixed", "running"):
            done = row.get(job)
            if done and not any(loader.startswith("transformers") for loader in done["loaders"]):
                said += [("not for plain transformers", why) for why in done["notes"]]
        said += [("not run", f"{to}: {row[to]['not_run']}") for to in EXPORTS if "not_run" in (row.get(to) or {})]
        types = f"{row['type']}|{CONFIGS[row['model']].get('text_config', {}).get('model_type', row['type'])}"
        for kind, why in dict.fromkeys(said):
            short = re.sub(r"(?<!\S)/\S+/", "", re.sub(rf"\b({types})\b", "its type", why))[:240]
            found.setdefault((kind, short), []).append(row["model"])
    lines = ["| what | reason | models |", "|---|---|---|"]
    for (kind, why), names in sorted(found.items()):
        which = "all" if len(names) == len(rows) else ", ".join(names)
        lines.append(f"| {kind} | {why.replace('|', '/')} | {which} |")
    return "\n".join(lines)


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CONFIGS), metavar="NAME")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="directory of rows that are there already")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CONFIGS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(CONFIGS)}")
    with get_context("spawn").Pool(options.processes, architectures.quiet, maxtasksperchild=8) as pool:
        rows = list[dict[str, Any]]()
        for row in pool.imap(partial(row_of, cache=options.cache), options.names):
            rows.append(row)
            print(f"{row['model']}: {row['seconds']:.0f} s {row['failed'] or ''}", flush=True)
    seconds = sum(row["seconds"] for row in rows)
    processes = f"{options.processes} process{'es' * (options.processes > 1)}"
    notes = f"{__doc__ or ''}\n{seconds:.0f} s in {processes} of one thread.\n\n{reasons(rows)}"
    record.write("key-models", list(map(shown, rows)), notes)


if __name__ == "__main__":
    main()
