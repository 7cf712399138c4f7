"""What takes both rooms: audits of unlearned models in fewer bits, and the gate that quantizing one has to pass."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from calib import BadInput
from calib.quant.scheme import Scheme
from cli.from_dataclass import THRESHOLD, RecoveryOptions
from compressor import Quantize, load, quantize
from compressor.engine.forgetting_gate import Gate
from compressor.engine.load import codes_in
from unlearn.audit.directions import audit_facts
from unlearn.audit.gate import gate_of
from unlearn.audit.quantized_recovery import Quantizer, audit_recovery
from unlearn.options.audit import Audit

QUANTIZATION_FORMS: dict[str, dict[str, Any]] = {"gptq": {"init": "none", "learn": False}, "learned": {}}


def audit(model: str | Path, options: Audit) -> dict[str, Any]:
    """Measure what an unlearned language model recovers once its weights are quantized (arXiv:2410.16454).

    Args:
        model: the unlearned model, a directory or a name on the hub.
        options: the original and the oracle to compare with, the rows, and the forms that models are quantized to.

    Returns:
        With `options.facts` what the models know of facts in both directions, block by block (`audit_facts`). Else the
            report: figures of the original, the unlearned model and the oracle in every form; the share recovered (0:
            no more than the oracle knows, 1: as much as the original); codes that differ from the original's.

    Raises:
        BadInput: models or rows will not do.
    """
    if options.facts is not None:
        return audit_facts(model, options)
    return audit_recovery(model, options, Quantizer(_check, partial(_quantize, options=options), _load, codes_in))


def gate(
    model: str | Path, *, train: Path | None = None, threshold: float | None = THRESHOLD, device: str = "auto"
) -> Gate | None:
    """A gate for `quantize`, `distill` and `export`, which lets no model pass that recovers what it was made to forget.

    Args:
        model: the unlearned model: a directory or a name on the hub, whose recipe names the forget set.
        train: its training data, if no longer where the recipe says.
        threshold: the share of the forgotten knowledge that may be recovered, from 0 to 1; None measures only.
        device: where the quantized model is measured: auto, cpu or cuda.

    Returns:
        A function of a finished directory that returns what it measured and raises Recovered above the threshold; None
        for a model that was not made to forget.

    Raises:
        BadInput: the rows are not to be had, or are not those of the recipe.
    """
    return gate_of(model, _load, train=train, threshold=threshold, device=device)


def requested_gate(model: str | Path, options: RecoveryOptions, device: str = "auto") -> Gate | None:
    """The gate that a command asks for, by its options; where anything may be recovered it only measures, if it can."""
    try:
        threshold = None if options.allow else options.threshold
        found = gate(model, train=options.train, threshold=threshold, device=device)
    except BadInput as error:
        if not options.allow:
            raise
        click.echo(f"parewell: not measured whether forgotten knowledge is recovered: {error}", err=True)
        return None
    if options.train is not None and found is None:
        raise BadInput(f"train: {model} was not made to forget anything; leave it out")
    return found


def combine_gates(gates: Iterable[Gate | None]) -> Gate | None:
    """Combine gates into one that refuses what any of them refuses; None where there is none."""
    found = [gate for gate in gates if gate is not None]

    def gate(folder: Path) -> dict[str, Any]:
        all_of = [each(folder) for each in found]
        return {
            "worst": max(one["worst"] for one in all_of), "threshold": all_of[0]["threshold"],
            "unlearnings": [unlearning for one in all_of for unlearning in one["unlearnings"]],
        }  # fmt: skip

    return gate if found else None


def _load(folder: Path, device: torch.device) -> nn.Module:
    return load(folder, device=device)


def _check(form: str, widths: Iterable[tuple[str, int]]) -> None:
    kind, _, scheme = form.partition(":")
    if kind not in QUANTIZATION_FORMS:
        raise BadInput(f"form {form}: '{kind}' is no way to quantize; choose from {', '.join(QUANTIZATION_FORMS)}")
    Scheme.parse(scheme).check_widths(widths)


def _quantize(form: str, model: Path, out: Path, options: Audit) -> None:
    kind, _, scheme = form.partition(":")
    job_options = Quantize(
        scheme=scheme,
        data=options.data,
        samples=options.samples,
        held_out=1,
        seed=options.seed,
        device=options.device,
        **QUANTIZATION_FORMS[kind],
    )
    quantize(model, out, job_options, allow_recovery=True, allow_damage=True)
