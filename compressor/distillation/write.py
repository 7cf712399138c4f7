"""What a distillation leaves in OUT: the student's checkpoint, its recipe, its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.jobs.output_folder import Shards, write_described, write_json
from calib.jobs.recipe import past_of
from calib.model.companions import copy_card, copy_companions
from calib.model.config import as_configured
from calib.quant.scheme import Scheme
from compressor.distillation.models import Student
from compressor.distillation.sharded_student import write_sharded
from compressor.engine.load import RUNTIME_TRANSFORMS_FILE, plainly_loadable, serving_note
from compressor.report.distillation import distilled_page
from compressor.storage.compressed_tensors import CompressedTensors, compressed_tensors_config


def checkpoint_bytes(student: Student) -> int:
    """Bytes of the student's checkpoint, at most: all weights in float32."""
    return sum(p.nbytes for p in student.model.parameters())


@dataclass(frozen=True)
class Origin:
    """The models that a student comes from, and how it is stored.

    teacher: its teacher's directory; parent: its own, where it was not made of the teacher.
    scheme: that it was trained on, fake-quantized; dtype: in which its weights are stored.
    identity: what its recipe records of the job.
    """

    teacher: Path
    parent: Path | None
    scheme: Scheme | None
    dtype: torch.dtype
    identity: Mapping[str, Any]


def save(
    scratch: Path,
    student: Student,
    report: dict[str, Any],
    origin: Origin,
    *,
    sharded: bool,
    merge: bool,
) -> dict[str, Any]:
    """Write checkpoint, recipe and report.  -> the report, with the bytes that were written.

    sharded: processes have shares of the student, which they give (`write_sharded`) while the main one is here;
    merge: adapters into its weights.
    """
    scheme, parent, dtype = origin.scheme, origin.parent, origin.dtype
    model, adapters = student.model, hasattr(student.model, "merge_and_unload")
    if adapters and merge:
        model = model.merge_and_unload()
    hadamard_down = False
    if sharded:
        write_sharded(model, scratch, dtype)
    elif scheme is None:
        model.to(dtype).save_pretrained(scratch)
    if scheme is None:
        report["bytes"]["after"] = sum(f.stat().st_size for f in scratch.glob("*.safetensors"))
    else:
        steps = [] if parent is None else past_of(parent)
        hadamard_down = bool(steps and steps[-1].get("hadamard_down"))
        _save_quantized(scratch, student, scheme, origin, hadamard_down, report)
    (scratch / "README.md").unlink(missing_ok=True)  # peft's, with blanks to be filled in
    if parent is not None:
        copy_companions(parent, scratch)
    copy_companions(origin.teacher, scratch, keep_notices=True)
    copy_card(parent or origin.teacher, scratch)
    step = {"job": "distill", **origin.identity, "quality": report["quality"]}
    if parent is not None and (taught_by := past_of(origin.teacher)):
        step["teacher"] = taught_by
    if scheme is not None:
        step |= {**scheme.recorded, "hadamard_down": hadamard_down}
    write_described(scratch, report, [*past_of(parent or origin.teacher), step], distilled_page)
    return report


def _save_quantized(
    scratch: Path, student: Student, scheme: Scheme, origin: Origin, hadamard_down: bool, report: dict[str, Any]
) -> None:
    dtype, parent = origin.dtype, origin.parent
    model = student.model
    shards = Shards(scratch)
    for name, p in model.named_parameters():  # a tied head is listed once, as the embedding
        stored: dict[str, Tensor] = {name: p.detach().to(dtype)}
        if name in student.fakes:
            rounded = student.fakes[name].rounded(p.detach(), dtype)
            stored = CompressedTensors().encode(name.removesuffix(".weight"), rounded, scheme)
        shards.add(stored)
    shards.close()
    turned = parent is not None and (parent / RUNTIME_TRANSFORMS_FILE).is_file()
    if turned and parent:
        (scratch / RUNTIME_TRANSFORMS_FILE).write_bytes((parent / RUNTIME_TRANSFORMS_FILE).read_bytes())
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    plain = plainly_loadable(scheme, experts=False, elsewhere=True, hadamard_down=hadamard_down)
    config["quantization_config"] = compressed_tensors_config(scheme, plain=plain)
    write_json(scratch / "config.json", config)
    report["bytes"]["after"] = shards.bytes
    report["loaders"] = serving_note(
        scheme, online=hadamard_down or turned, experts=False, capped=bool(as_configured(config))
    )
