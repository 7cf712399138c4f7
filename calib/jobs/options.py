"""What every job's options share, and what decides about the bytes that it ends with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib import BadInput
from calib.model.companions import companions
from calib.quant.scheme import Scheme

if TYPE_CHECKING:  # options are declared before anything heavy is imported
    import torch

    from calib.model.blockwise import BlockwiseModel


PROMPT_FORMAT = (
    "how prompts and answers become text: chat (the tokenizer's template), plain, FILE.jinja; auto: chat where the "
    "tokenizer has a template, but prompt + completion as they are"
)


GROUPS = ("basic", "data", "method", "proof", "advanced")  # in which a command's help shows its options


def option(default: Any, help: str, choices: Sequence[str] = (), *, group: str = "advanced") -> Any:
    """A field of a job's options class: its default, what the command line says of it, its values where there are few,
    and the one of GROUPS that it is shown in."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices), "group": group})


PRESET_NAMES = ("fast", "default", "best")


@dataclass(frozen=True)
class Preset:
    """Values of options for a purpose, and what they are for."""

    help: str
    values: Mapping[str, Any]


def with_preset(
    presets: Mapping[str, Preset], name: str, given: Mapping[str, Any], idle: Iterable[str] = ()
) -> dict[str, Any]:
    """Options of a job by name: those that are `given`, and the preset's where they are not.

    `idle` are options that mean nothing beside what is given, and are left as they are. Raises BadInput.
    """
    if name not in presets:
        raise BadInput(f"preset '{name}' is unknown; choose from {', '.join(presets)}")
    return {option: value for option, value in presets[name].values.items() if option not in set(idle)} | dict(given)


def described_presets(presets: Mapping[str, Preset]) -> str:
    """What the help of --preset says of each."""
    return "; ".join(f"{name}: {preset.help}" for name, preset in presets.items())


# Options as they were called before November 2026 -> today. Recipes of that time still have them.
RENAMED = {
    "quantize": {"damp": "damping", "widths": "candidate_bits"},
    "distill": {
        "at_once": "micro_batch_tokens", "average": "ema", "clip": "max_grad_norm",
        "checkpointing": "gradient_checkpointing", "eight_bit": "optimizer",
    },
    "unlearn": {
        "bend": "gp_interaction", "own": "gp_self", "noise": "gp_noise", "least": "min_step", "soup": "model_soup",
        "rounded_first": "match_quantized",
    },
}  # fmt: skip


def with_new_names(job: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a `job` as a recipe has them, by the names and values that they have today."""
    names = RENAMED.get(job, {})
    found = {names.get(name, name): value for name, value in options.items()}
    if isinstance(options.get("eight_bit"), bool):
        found["optimizer"] = "adamw8bit" if options["eight_bit"] else "adamw"
    schemes = (name for name in ("scheme", "student_scheme", "grid") if isinstance(found.get(name), str))
    return found | {name: Scheme.recorded_name(found[name]) for name in schemes}


def check_numbers(options: Any) -> None:
    """Raises BadInput for a job's whole numbers that no machine counts to, and for others that are no numbers."""
    for name, value in asdict(options).items():
        words = name.replace("_", "-")
        if isinstance(value, int) and abs(value) >= 2**31:
            raise BadInput(f"{words} is {value}; it must be below 2^31")
        if isinstance(value, float) and not abs(value) < 1e36:
            raise BadInput(f"{words} is {value}; it must be positive and a number that can be worked with")


# Options that say where things are kept while a job runs: whatever they are, it ends with the same bytes.
MEMORY = ("memory_budget", "device_memory")


def check_sizes(options: Any) -> None:
    """Raises BadInput for sizes of memory that are negative, or no size at all; of a job's options."""
    for name in MEMORY:
        value = getattr(options, name, None)
        if value is not None and not 0 <= value < float("inf"):
            raise BadInput(f"{name.replace('_', '-')} is {value}; it must not be negative")


def identity_of(
    options: Any, model: dict[str, Any], device: torch.device, products: torch.dtype | None
) -> dict[str, Any]:
    """What a recipe records of a job, and a journal compares: options, model, versions, where it runs."""
    from importlib.metadata import version

    from calib.runtime.distributed import world_size

    return {
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(options).items()},
        "model": model,
        "versions": {name: version(name) for name in ("parewell", "torch", "transformers", "safetensors", "numpy")},
        "runs_on": {
            "device": device.type,
            "products": str(products or "float32").removeprefix("torch."),
            "processes": world_size(),
        },
    }


def stream_identity(options: Any, given: str | Path, folder: Path, stream: BlockwiseModel) -> dict[str, Any]:
    """The same of a model that is walked; every weight is read once, and refused where it is no number."""
    model = folder_identity(given, folder, stream.weights.verify(stream.expected))
    return identity_of(options, model, stream.device, stream.products)


def folder_identity(given: str | Path, folder: Path, sha256: str) -> dict[str, Any]:
    """What a recipe records of a model folder, found by what was `given`; `sha256` is of its weights."""
    files = [Path("config.json"), *companions(folder)]
    return {
        "name": folder.resolve().name,
        "sha256": sha256,
        "files": {
            file.as_posix(): hashlib.sha256((folder / file).read_bytes()).hexdigest()
            for file in files
            if (folder / file).is_file()
        },
        "given": str(given),
    }


def hash_of(files: Iterable[Path]) -> str:
    """Of the names and the bytes of all."""
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(file.name.encode())
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def without_memory(job: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a job, but for options that change none of its bytes: a job that ran out of memory goes on with
    others."""
    options = {name: value for name, value in job.get("options", {}).items() if name not in MEMORY}
    return {**job, **({"options": options} if "options" in job else {})}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first leaf in which two nested mappings differ, and how.

    In the order of `now`: an option that was changed changes the data drawn too, and is what should be named.
    """
    was, is_now = _flat(before), _flat(now)
    for name in is_now | was:
        if was.get(name) != is_now.get(name):
            return f"{name} was {was.get(name)} and is now {is_now.get(name)}"
    return None


def _flat(job: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings, named by their path."""
    leaves: dict[str, Any] = {}
    for name, value in job.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves
