"""A soup: the mean of models that one model was trained into (arXiv:2203.05482), and the loss on the way between them.

Models that began alike often lie in one valley, where their mean is at least as good as they are; where the loss rises
between them they do not. As a reference of a KL it is steadier than any of them (SALSA, arXiv:2411.01798).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus, describe, first_rows
from calib.data.load import Sample, embedded_corpus, load_corpus
from calib.data.rows import positions_of, row_length
from calib.jobs.options import folder_identity, hash_of, identity_of
from calib.jobs.output_folder import Shards, atomic_folder, check_destination, write_described
from calib.jobs.recipe import forgettings, past_of
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.companions import copy_card, copy_companions
from calib.model.config import is_quantized, read_config, read_json
from calib.model.weights import Weights
from calib.runtime.device import memory_budget_bytes, pick_device
from calib.runtime.progress import stage
from calib.stats.perplexity import Quality, compare
from compressor.engine.damage import judge, soup_damage
from compressor.engine.evaluate import logits_function, vocabulary
from compressor.engine.forgetting_gate import Gate
from compressor.engine.load import open_checkpoint
from compressor.merging.options import Soup
from compressor.report.soup import soup_page

NAMES_OF_CONFIGS = {
    "dtype",
    "torch_dtype",
    "transformers_version",
    "architectures",
}  # and change nothing of what is run


@dataclass(frozen=True)
class SoupJob:
    """Models that can be averaged, with their shares, and rows to measure them on."""

    folders: list[Path]
    shares: list[float]
    corpus: Corpus
    identity: dict[str, Any]


def soup(
    models: Sequence[str | Path], out: str | Path, options: Soup | None = None, *, gate: Gate | None = None,
    allow_recovery: bool = False, allow_damage: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Average the weights of models that one model was trained into, and measure the loss on the way between them.

    Args:
        models: two directories or more, outputs of `distill` or `unlearn` from one ancestor (or that itself).
        out: the output directory; complete or absent when this returns or raises.
        options: shares and rows; default: `Soup()`.
        gate: as for `quantize`, where one of the models was made to forget.
        allow_recovery: write the mean of such models without a gate.
        allow_damage: write it even if it predicts worse than each of the models; the report says so.

    Returns:
        The report, as in report.json: figures of the soup beside the first model, perplexity of each model and at the
        points of the line between two.

    Raises:
        BadInput: the models have not one ancestor, one shape and float weights, or the rows will not do.
        Damaged: the soup predicts worse than each of the models; nothing is left.
    """
    options, out = options or Soup(), Path(out)
    job = validate_soup(models, out, options)
    if gate is None and not allow_recovery and (forgetful := next((f for f in job.folders if forgettings(f)), None)):
        raise BadInput(
            f"{forgetful}: was made to forget, which a mean with others may undo; give gate=parewell.gate(...), or "
            "allow it (allow_recovery=True, --allow-recovery)"
        )
    size = sum(entry.bytes for entry in Weights(job.folders[0]).entries.values())
    with atomic_folder(out, size) as scratch:
        alone = [_quality(folder, job, options) for folder in job.folders]
        line = _line(job, options, scratch.parent, alone)
        write_mean(scratch, job.folders, job.shares)
        quality = _quality(scratch, job, options, job.folders[0])
        found = soup_damage(quality.asdict(), [each.asdict() for each in alone])
        report: dict[str, Any] = {
            "job": "soup",
            "models": [
                {"name": folder.name, "share": share, "perplexity": each.perplexity}
                for folder, share, each in zip(job.folders, job.shares, alone, strict=True)
            ],
            "line": line,
            "quality": quality.asdict(),
            "damage": judge("soup", found, allow=allow_damage, instead="take one of the models, or other --weights"),
            "bytes": {"before": size, "after": sum(f.stat().st_size for f in scratch.glob("*.safetensors"))},
            "data": job.identity["data"],
        }
        if gate is not None:
            report["recovery"] = gate(scratch)
        step = {"job": "soup", **job.identity, "quality": report["quality"]}
        write_described(scratch, report, [*past_of(job.folders[0]), step], soup_page)
    return report


def validate_soup(models: Sequence[str | Path], out: Path, options: Soup) -> SoupJob:
    """Check models, rows and destination; weights are read once.  Raises BadInput."""
    if len(models) < 2:
        raise BadInput("soup: wants two models or more, and OUT")
    folders, shares = [find_model(model) for model in models], options.shares(len(models))
    if len(set(map(Path.resolve, folders))) < len(folders):
        raise BadInput(f"soup: {folders[0]} is given twice; give --weights instead")
    device = pick_device(options.device)
    hashes = []
    for folder in folders:
        if is_quantized(read_json(folder / "config.json")):
            raise BadInput(f"{folder}: is quantized, and codes have no mean; give float models")
        hashes.append(BlockwiseModel(read_config(folder), Weights(folder), device).verify())
        _check_alike(folders[0], folder)
    ancestors = [_ancestor(folder, own) for folder, own in zip(folders, hashes, strict=True)]
    for folder, ancestor in zip(folders[1:], ancestors[1:], strict=True):
        if not ancestor & ancestors[0]:
            raise BadInput(
                f"{folder}: comes from another model than {folders[0]} by its recipe, or was cut in another way, so "
                "that their mean is none; give outputs of one ancestor"
            )
    corpus = _rows(folders[0], options)
    size = sum(entry.bytes for entry in Weights(folders[0]).entries.values())
    check_destination(out, folders, size * (2 if len(folders) == 2 else 1))  # a point of the line lies beside it
    named = [folder_identity(model, folder, own) for model, folder, own in zip(models, folders, hashes, strict=True)]
    identity = identity_of(options, named[0], device, None)
    others = [name | {"recipe": past_of(folder)} for name, folder in zip(named[1:], folders[1:], strict=True)]
    identity |= {"with": others, "shares": shares, "data": {"held_out": describe(corpus)}}
    return SoupJob(folders, shares, corpus, identity)


def _ancestor(folder: Path, own: str) -> set[str]:
    """What the weights are known by that all steps of a folder's recipe began with; its own where it has none.  A
    student that was cut out of its teacher begins with the cut, which is the same for the same options and rows."""
    steps = past_of(folder)
    if not steps:  # jobs on any tensors hash the files
        return {own, hash_of(folder.glob("*.safetensors"))}
    first = steps[0]
    if "student" in first:
        return {str(first["student"]["sha256"])}
    cut = {name: first["options"].get(name) for name in ("layers", "heads", "ffn", "hidden")}
    if first["job"] != "distill" or not any(cut.values()):
        return {str(first["model"]["sha256"])}
    rows = first["data"].get("training", {}).get("sha256")
    return {f"{first['model']['sha256']} {sorted(cut.items(), key=str)} {rows}"}


def _check_alike(first: Path, other: Path) -> None:
    """Raises BadInput where two folders have not the same tensors, or compute something else with them."""
    ours, theirs = Weights(first).entries, Weights(other).entries
    if missing := sorted(ours.keys() ^ theirs.keys()):
        raise BadInput(f"{other}: has not the same tensors as {first} ({missing[0]}); give models of one shape")
    for name, entry in ours.items():
        if entry.shape != theirs[name].shape:
            raise BadInput(
                f"{other}: {name} is {list(theirs[name].shape)}, and {list(entry.shape)} in {first}; give models of "
                "one shape"
            )
    configs = [read_config(folder).to_dict() for folder in (first, other)]
    for name in sorted(configs[0].keys() | configs[1].keys()):
        if name.startswith("_") or name in NAMES_OF_CONFIGS:
            continue
        if configs[0].get(name) != configs[1].get(name):
            raise BadInput(
                f"{other / 'config.json'}: {name} is {configs[1].get(name)!r:.60}, and {configs[0].get(name)!r:.60} in "
                f"{first}; models that compute differently have no mean"
            )


def _rows(folder: Path, options: Soup) -> Corpus:
    tokenizer, config, vocab = read_tokenizer(folder), read_config(folder), vocabulary(folder)
    length = row_length(options.length, positions_of(config))
    if options.data is None:
        found = embedded_corpus("held-out", folder, tokenizer, vocab=vocab, length=length)
        return found[: options.held_out]
    sample = Sample(options.held_out, options.seed)
    return first_rows(load_corpus(options.data, tokenizer, vocab=vocab, length=length, rows=sample), options.held_out)


def mean_tensor(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean of tensors of one shape, in double precision, rounded to the first one's dtype; of whole
    numbers, which have none, the first."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        total += share * tensor.double()
    return total.to(tensors[0].dtype)


def write_mean(scratch: Path, folders: Sequence[Path], shares: Sequence[float]) -> None:
    """Write the mean of models into a folder, tensor by tensor, with what lies beside the first one's weights."""
    copy_companions(folders[0], scratch)
    copy_card(folders[0], scratch)
    (scratch / "config.json").write_bytes((folders[0] / "config.json").read_bytes())
    read, shards = [Weights(folder) for folder in folders], Shards(scratch)
    for name in read[0].entries:
        shards.add({name: mean_tensor([weights.read([name])[name] for weights in read], shares)})
    shards.close()


def _line(job: SoupJob, options: Soup, place: Path, ends: Sequence[Quality]) -> list[dict[str, float]]:
    """Perplexity at points of the line between two models, by the share of the second; nothing of more models."""
    if len(job.folders) != 2:
        return []
    shares = [i / (options.points - 1) for i in range(options.points)]
    measured = {0.0: ends[0], 1.0: ends[1]}
    with stage("measure the line", len(shares) - 2, "points") as done:
        for share in shares[1:-1]:
            with tempfile.TemporaryDirectory(dir=place, prefix=".parewell-soup-") as folder:
                write_mean(Path(folder), job.folders, [1 - share, share])
                measured[share] = _quality(Path(folder), job, options)
            done()
    return [
        {"share": share, "perplexity": of.perplexity, "perplexity_error": of.perplexity_error or 0.0}
        for share in shares for of in (measured[share],)
    ]  # fmt: skip


def _quality(folder: Path, job: SoupJob, options: Soup, reference: Path | None = None) -> Quality:
    device = pick_device(options.device)
    budget = memory_budget_bytes(None, device)
    models = [
        logits_function(open_checkpoint(one, device), job.corpus, budget)
        for one in (folder, reference) if one is not None
    ]  # fmt: skip
    return compare(job.corpus, vocabulary(folder), *models)
