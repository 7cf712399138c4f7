"""What a distillation leaves in OUT: the student's checkpoint, its recipe, its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.jobs.output_folder import Shards, write_described, write_json
from calib.jobs.recipe import past_of
from calib.model.architectures import architecture_of
from calib.model.attention_hooks import as_configured
from calib.model.companions import copy_companions
from calib.quant.scheme import Scheme
from compressor.distillation.models import Student
from compressor.distillation.sharded_student import write_sharded
from compressor.engine.load import RUNTIME_TRANSFORMS_FILE, load_runtime_transforms, plainly_loadable, serving_note
from compressor.report.distillation import distilled_page
from compressor.storage.compressed_tensors import CompressedTensors, compressed_tensors_config


def checkpoint_bytes(student: Student) -> int:
    """At most, in single precision."""
    return sum(p.nbytes for p in student.model.parameters())


def save(
    scratch: Path,
    teacher: Path,
    student: Student,
    report: dict[str, Any],
    identity: Mapping[str, Any],
    *,
    shared: bool,
    dtype: torch.dtype,
    scheme: Scheme | None,
    parent: Path | None,
    merge: bool,
) -> dict[str, Any]:
    """Write everything.  -> the report.

    `parent` is the folder that the student came from, if it was not made; `shared`: the student is shared out among
    processes, which give their shares (`write_sharded`) while the first is here.
    """
    model, adapters = student.model, hasattr(student.model, "merge_and_unload")
    if adapters and merge:
        model = model.merge_and_unload()
    hadamard_down = False
    if shared:
        write_sharded(model, scratch, dtype)
    elif scheme is None:
        model.to(dtype).save_pretrained(scratch)
    if scheme is None:
        report["bytes"]["after"] = sum(f.stat().st_size for f in scratch.glob("*.safetensors"))
    else:
        steps = [] if parent is None else past_of(parent)
        hadamard_down = bool(steps and steps[-1].get("hadamard_down"))
        _save_quantized(scratch, student, scheme, dtype, parent, hadamard_down, report)
    (scratch / "README.md").unlink(missing_ok=True)  # peft's, with blanks to be filled in
    if parent is not None:
        copy_companions(parent, scratch)
    copy_companions(teacher, scratch, keep_notices=True)
    step = {"job": "distill", **identity, "quality": report["quality"]}
    if parent is not None and (taught_by := past_of(teacher)):
        step["teacher"] = taught_by
    if scheme is not None:
        step |= {**scheme.recorded, "hadamard_down": hadamard_down}
    write_described(scratch, report, [*past_of(parent or teacher), step], distilled_page)
    return report


def _save_quantized(
    scratch: Path,
    student: Student,
    scheme: Scheme,
    dtype: torch.dtype,
    parent: Path | None,
    hadamard_down: bool,
    report: dict[str, Any],
) -> None:
    model, architecture = student.model, architecture_of(student.model.config)
    shards = Shards(scratch)
    for name, p in model.named_parameters():  # a tied head is listed once, as the embedding
        stored: dict[str, Tensor] = {name: p.detach().to(dtype)}
        if name in student.fakes:
            rounded = student.fakes[name].rounded(p.detach(), dtype)
            stored = CompressedTensors().encode(name.removesuffix(".weight"), rounded, scheme)
        shards.add(stored)
    shards.close()
    run_time = load_runtime_transforms(parent, scheme, hadamard_down, model.config.num_hidden_layers) if parent else []
    turned = any(o.key_rotation is not None for o in run_time)
    if turned and parent:
        (scratch / RUNTIME_TRANSFORMS_FILE).write_bytes((parent / RUNTIME_TRANSFORMS_FILE).read_bytes())
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    plain = plainly_loadable(scheme, architecture, hadamard_down=hadamard_down)
    config["quantization_config"] = compressed_tensors_config(scheme, plain=plain)
    write_json(scratch / "config.json", config)
    report["bytes"]["after"] = shards.bytes
    report["loaders"] = serving_note(
        scheme, online=hadamard_down or turned, experts=False, capped=bool(as_configured(config))
    )
