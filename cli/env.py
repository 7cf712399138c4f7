"""`parewell env`."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from calib import BadInput
from cli.command import GroupedCommand
from cli.versions import check_versions

SHOWN_LIBRARIES = ("parewell", "torch", "transformers", "safetensors", "huggingface-hub", "compressed-tensors", "numpy")
EXTRAS = {  # of pyproject.toml, with what each brings
    "gguf": "export --to gguf; GGUF files as MODEL",
    "onnx": "export --to onnx, run by onnxruntime",
    "lora": "adapters: --lora, folders of adapters as MODEL",
    "eight-bit": "bitsandbytes: AdamW in 8 bits, folders in NF4 and FP4 in transformers",
    "trak": "unlearn --estimator trak",
    "ray": "unlearn --workers ray",
    "lm-eval": "evaluate --tasks, by lm-evaluation-harness",
    "images": "rows with images, for models that see them",
    "data": "rows in Parquet and zst, folders of datasets, data sets on the hub",
}


@click.command(
    cls=GroupedCommand, short_help="Versions, devices and memory, and what each extra brings.",
    examples={"parewell env": "what to put into a bug report", "parewell env --json": "the same for a program"},
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="print it as JSON on stdout")
def env_command(as_json: bool) -> None:
    """Show what parewell finds on this machine: versions, devices, memory, and extras with what they bring."""
    found = environment()
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in found["versions"].items():
        table.add_row(name, value or "not installed")
    table.add_row()
    for name in ("python", "system", "cores", "memory_gib", "available_gib"):
        table.add_row(name.replace("_gib", " (GiB)"), str(found[name]))
    for device in found["devices"] or [{"name": "no GPU; everything runs on the CPU"}]:
        table.add_row("device", ", ".join(str(value) for value in device.values()))
    if found["problem"]:
        table.add_row("problem", found["problem"])
    table.add_row()
    for name, extra in found["extras"].items():
        missing = ", ".join(extra["missing"])
        state = "installed" if not missing else f"pip install 'parewell[{name}]' ({missing})"
        table.add_row(f"[{name}]".replace("[", r"\["), f"{extra['brings']}: {state}".replace("[", r"\["))
    Console(soft_wrap=True).print(table)


def environment() -> dict[str, Any]:
    """Everything that the command shows, as JSON has it: versions, devices, memory, extras."""
    problem: str | None = None
    try:
        check_versions()
    except BadInput as error:
        problem = str(error)
    devices = list[dict[str, Any]]()
    total, available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    if _version("torch") is not None:
        import torch

        from calib.runtime.memory import available_memory

        available = round(available_memory() / 2**30, 1)
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gib = f"{properties.total_memory / 2**30:.1f} GiB"
            devices.append({"name": properties.name, "memory": gib, "cuda": torch.version.cuda})
    return {
        "versions": {name: _version(name) for name in SHOWN_LIBRARIES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": round(total / 2**30, 1),
        "available_gib": available,
        "devices": devices,
        "problem": problem,
        "extras": {name: {"brings": brings, "missing": _missing(name)} for name, brings in EXTRAS.items()},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _missing(extra: str) -> list[str]:
    """Packages of an extra that are not installed."""
    try:
        needed = requires("parewell") or []
    except PackageNotFoundError:
        return []
    of_extra = (match[1] for line in needed if (match := re.match(rf"([\w.-]+).*extra == ['\"]{extra}['\"]", line)))
    return [name for name in of_extra if _version(name) is None]
