"""Every causal type that the installed library knows: what is done with it, and how right that is.

    python -m benchmarks.architectures [TYPE ...] [--processes 2]

Each type is built small (tests/any_type.py: width 64, four blocks, every parameter drawn anew), saved by the library.
Then: its logits block by block against the library's own, in double precision; parts found and proved; logits after all
transforms that it admits at once, folded as they ship, again in double precision; a whole job (`quantize`, w4a16-g8,
GPTQ, fixed transforms), loaded by parewell and, where the report names it, by plain transformers.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks import record
from calib import BadInput, first_line
from calib.blockwise.model import BlockwiseModel
from calib.model.config import read_config
from calib.model.weights import Weights
from calib.probe.products import AnsweredProducts
from compressor import Quantize, load, quantize
from compressor.engine.rotations import Reflections
from compressor.transforms.fold import BlockFold, fold_block, folded_outer
from compressor.transforms.proof import left_out, parts_of, random_transform, residual_turn
from tests import any_type

CPU = torch.device("cpu")
SECONDS = 120  # that a type may take


def logits_of(stream: BlockwiseModel, ids: Tensor, *, transformed: bool = False) -> Tensor:
    """Logits (B, T, V) of a model in double precision, block by block, with all transforms that it admits or none."""
    parts, outer = parts_of(stream), stream.read_outer()
    turn: Reflections | None = None
    if transformed and parts.obstacle is None:
        turn = residual_turn(stream.hidden, centred=parts.centred, device=CPU)
        outer = folded_outer(outer, parts, turn, {name: p.dtype for name, p in outer.items()})
    batch = stream.batch(ids, stream.prepared(outer, stream.walk.outer))
    hidden = stream.start(batch, outer)
    for i, found in enumerate(parts.blocks):
        params = stream.read_block(i)
        if transformed:
            params = fold_block(params, BlockFold(found), random_transform(found, i), turn, stream.linears(i))
        hidden = stream.run(i, params, hidden, batch)
    logits: Tensor = stream.walk.finish(batch, outer, hidden).logits
    return logits


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, of the largest number."""
    return float((a - b).abs().max() / b.abs().max())


def row_of(model_type: str) -> dict[str, Any]:
    """All that is measured of a type; what fails is said."""
    row: dict[str, Any] = {"type": model_type}
    start, folder = time.monotonic(), ""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = scratch
            _measure(row, model_type, Path(scratch))
    except BadInput as error:
        row["refused"] = first_line(error).replace(f"{folder}/", "")
    except (Exception, TooLong) as error:
        row["failed"] = f"{type(error).__name__}: {first_line(error)}"
    finally:
        signal.alarm(0)
    return row | {"seconds": time.monotonic() - start}


class TooLong(BaseException):
    """A type took too long; no Exception, which what tries whether a model can be run would take for an answer."""


def _too_long(*_: object) -> None:
    raise TooLong(f"over {SECONDS} s")


def _measure(row: dict[str, Any], model_type: str, scratch: Path) -> None:
    try:
        model: Any = any_type.model_of(model_type)
    except Exception as error:
        row["unbuilt"] = first_line(error)
        return
    model.save_pretrained(scratch / "double")
    model.float().save_pretrained(scratch / "model")
    ids = torch.randint(3, any_type.VOCAB - 4, (2, 12), generator=torch.Generator().manual_seed(1))
    stream = BlockwiseModel(read_config(scratch / "double"), Weights(scratch / "double"), CPU, torch.float64)
    row["blocks"] = stream.layers
    library: Any = AutoModelForCausalLM.from_pretrained(scratch / "double", dtype=torch.float64)
    if library._can_set_experts_implementation():
        library.set_experts_implementation("eager")
    with torch.no_grad(), _keeping_double():
        expected = library(input_ids=ids, use_cache=False).logits
        row["blockwise"] = apart(logits_of(stream, ids), expected)
        clock = time.monotonic()
        parts = parts_of(stream)
        row["probe_seconds"] = time.monotonic() - clock
        row["left_out"] = left_out(parts)
        row["rotation"] = parts.obstacle is None and ("R 1 = 1" if parts.centred else "R")
        row["norms"] = sum(n.scales for found in parts.blocks for n in found.norms)
        row["values"] = sum(p.rotates for found in parts.blocks for p in found.pairs)
        row["scales"] = sum(not p.rotates for found in parts.blocks for p in found.pairs)
        row["planes"] = sum(len(found.planes) for found in parts.blocks)
        row["transformed"] = apart(logits_of(stream, ids, transformed=True), expected)
    del library
    sizes = [p.numel() for i in range(stream.layers) for p in stream.blocks[i].parameters() if p.dim() >= 2]
    linears = sum(torch.Size(one.shape).numel() for i in range(stream.layers) for one in stream.linears(i))
    row["share"] = linears / max(1, sum(sizes))
    _quantize(row, scratch, ids)


def _quantize(row: dict[str, Any], scratch: Path, ids: Tensor) -> None:
    rows = torch.randint(3, any_type.VOCAB - 4, (12, 16), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": rows}, scratch / "ids.safetensors")
    options = Quantize(scheme="w4a16-g8", samples=6, held_out=4, length=16, data=scratch / "ids.safetensors")
    report = quantize(scratch / "model", scratch / "out", options.without_learning(), allow_damage=True)
    row["kl"] = report["quality"]["kl"]
    with torch.no_grad():
        ours = load(scratch / "out")(input_ids=ids, use_cache=False).logits
        if any("compressed-tensors" in loader for loader in report["loaders"]["loaders"]):
            plain: Any = AutoModelForCausalLM.from_pretrained(scratch / "out", dtype=torch.float32)
            row["plain"] = apart(plain(input_ids=ids, use_cache=False).logits, ours)


def _keeping_double() -> AnsweredProducts:
    def never(_: object) -> Tensor:
        raise AssertionError("no product is answered here")

    return AnsweredProducts({}, never)


def quiet() -> None:
    """Make a process one of one thread that prints nothing but results."""
    os.environ["PAREWELL_QUIET"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table; empty where there is nothing to measure."""

    def number(name: str, form: str) -> str:
        return format(row[name], form) if row.get(name) is not None else ""

    why = row.get("unbuilt") or row.get("refused") or row.get("failed")
    return {
        "type": row["type"],
        "block by block": number("blockwise", ".0e"),
        "rotation": row.get("rotation") or "",
        **{name: row.get(name) or "" for name in ("norms", "values", "scales", "planes")},
        "transformed": number("transformed", ".0e"),
        "quantized": number("share", ".1%"),
        "KL": number("kl", ".3f"),
        "plain": number("plain", ".0e"),
        "seconds": round(row["seconds"], 1),
        "why not": (why or row.get("left_out", {}).get("residual_rotation", ""))[:120].replace("|", "/"),
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """Count the types of which things hold, as a table."""
    built = [row for row in rows if "unbuilt" not in row]
    counts = {
        "types": len(rows),
        "built small": len(built),
        "logits block by block equal to the library's, to 1e-9": sum(row.get("blockwise", 1) < 1e-9 for row in built),
        "quantized by a whole job": sum("kl" in row for row in built),
        "residual stream rotates": sum(bool(row.get("rotation")) for row in built),
        "of these leaving the vector of ones alone": sum(row.get("rotation") == "R 1 = 1" for row in built),
        "values rotate": sum(bool(row.get("values")) for row in built),
        "logits after all transforms equal to 1e-9": sum(row.get("transformed", 1) < 1e-9 for row in built),
        "at least 99% of the blocks' matrix weights quantized": sum(row.get("share", 0) >= 0.99 for row in built),
        "loaded by plain transformers, to 1e-4": sum(row.get("plain", 1) < 1e-4 for row in built),
        "refused": sum("refused" in row for row in built),
        "failed": sum("failed" in row for row in built),
    }
    return "\n".join(["| what | types |", "|---|---|", *(f"| {name} | {count} |" for name, count in counts.items())])


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=any_type.TYPES)
    parser.add_argument("--processes", type=int, default=2)
    options, start = parser.parse_args(), time.monotonic()
    with get_context("spawn").Pool(options.processes, quiet, maxtasksperchild=25) as pool:
        rows = pool.map(row_of, options.types, chunksize=1)
    seconds = time.monotonic() - start
    notes = f"{__doc__ or ''}\n{summary(rows)}\n\n{seconds:.0f} s in {options.processes} processes."
    record.write("architectures", list(map(shown, rows)), notes)


if __name__ == "__main__":
    main()
