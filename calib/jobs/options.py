"""What every job's options share, and what decides about the bytes that it ends with."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from calib import BadInput
from calib.model.companions import companions
from calib.quant.scheme import Scheme

if TYPE_CHECKING:  # options are declared before anything heavy is imported
    import torch

    from calib.blockwise.model import BlockwiseModel


PROMPT_FORMAT = (
    "how prompts and answers become text: chat (the tokenizer's template), plain, FILE.jinja; auto: chat where the "
    "tokenizer has a template, but prompt + completion as they are"
)


GROUPS = ("basic", "data", "method", "proof", "advanced")  # in which a command's help shows its options


class Bounds(TypedDict, total=False):
    """Bounds of a number: at least, more than, at most, less than."""

    ge: float
    gt: float
    le: float
    lt: float


def option(
    default: Any, help: str, choices: Sequence[str] = (), *, group: str = "advanced", needs: str | None = None,
    **bounds: Unpack[Bounds],
) -> Any:  # fmt: skip
    """A field of a job's options class.

    Args:
        default: its value where none is given; None passes every check.
        help: what the command line says of it.
        choices: its values, where there are few.
        group: the one of GROUPS in which a command's help shows it.
        needs: another option without which this one changes nothing: its name, where anything but its default will do,
            or NAME=VALUE; several, of which one will do, with | between them.
        bounds: of a number, `ge`, `gt`, `le` and `lt`: at least, more than, at most, less than.
    """
    return field(
        default=default,
        metadata={"help": help, "choices": tuple(choices), "group": group, "bounds": dict(bounds), "needs": needs},
    )


def flag_name(name: str) -> str:
    """An option as the command line spells it, without its dashes."""
    return name.replace("_", "-")


_HOLDS: dict[str, Callable[[float, float], bool]] = {"ge": operator.ge, "gt": operator.gt, "le": operator.le,
                                                     "lt": operator.lt}  # fmt: skip


def check_options(options: Any) -> None:
    """Raises BadInput for a value of an options class that is none of its choices, out of its bounds, or no number that
    can be computed with."""
    for f in fields(options):
        value, bounds, choices = getattr(options, f.name), f.metadata.get("bounds", {}), f.metadata.get("choices")
        if value is None:
            continue
        if choices and value not in choices and f.name != "device":  # which pick_device knows more about
            raise BadInput(f"{flag_name(f.name)} '{value}' is unknown; choose from {', '.join(choices)}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            if bounds:
                raise BadInput(f"{flag_name(f.name)} is {value!r}; it must be a number")
            continue
        if isinstance(value, int) and abs(value) >= 2**31:
            raise BadInput(f"{flag_name(f.name)} is {value}; it must be below 2^31")
        if value != value:
            raise BadInput(f"{flag_name(f.name)} is nan; it must be a number")
        if not all(_HOLDS[name](value, bound) for name, bound in bounds.items()):
            raise BadInput(f"{flag_name(f.name)} is {value}; it must {_bounds_phrase(bounds, value)}")
        if not abs(value) < LARGEST_FLOAT:
            raise BadInput(f"{flag_name(f.name)} is {value}; it must be a number below {LARGEST_FLOAT:g}")
    for name, need in unmet_needs(type(options), vars(options)).items():
        raise BadInput(f"{flag_name(name)}: changes nothing {need}; leave it out")


def unmet_needs(job: Any, values: Mapping[str, Any]) -> dict[str, str]:
    """Options in `values` of the options class `job` that were given although none of those that they need was ->
    "without" or "with" the last of these."""
    found, defaults = dict[str, str](), {f.name: f.default for f in fields(job)}
    whole = {**defaults, **values}
    for f in fields(job):
        if f.metadata.get("needs") is None or whole[f.name] == f.default:
            continue
        unmet = [_unmet(one, whole, defaults) for one in f.metadata["needs"].split("|")]
        if all(unmet):
            found[f.name] = unmet[-1]
    return found


def _unmet(need: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Say what is lacking; empty where the need is met."""
    other, _, value = need.partition("=")
    has, flag = values[other], flag_name(other)
    if value == "None":
        return "" if has is None else f"with --{flag}"
    if value == "True":
        if has or has is None:  # None: as other options have it
            return ""
        return f"without --{flag}" if defaults[other] is False else f"with --no-{flag}"
    if value:
        return "" if str(has) == value else f"without --{flag} {value}"
    return f"without --{flag}" if has == defaults[other] else ""


LARGEST_FLOAT = 1e36  # of options: its square is finite in float64, and itself in float32


def _bounds_phrase(bounds: Mapping[str, float], value: float) -> str:
    """What comes after "it must"."""
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if high is None:
        if "gt" in bounds:
            return "be positive" if low == 0 else f"be more than {low:g}"
        return (
            f"be at least {low:g}"
            if isinstance(value, int)
            else "not be negative"
            if low == 0
            else f"be {low:g} or more"
        )
    if low is None:
        return f"be at most {high:g}" if "le" in bounds else f"be less than {high:g}"
    ends = [f"{end:g} excluded" for name, end in (("gt", low), ("lt", high)) if name in bounds]
    return f"lie between {low:g} and {high:g}" + (f", {' and '.join(ends)}" if ends else "")


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
    """Describe each preset for the help of --preset."""
    return "; ".join(f"{name}: {preset.help}" for name, preset in presets.items())


# Options as they were called before November 2026 -> today. Recipes of that time still have them.
RENAMED = {
    "quantize": {"damp": "damping", "widths": "candidate_bits", "untie": "tied"},
    "distill": {
        "at_once": "micro_batch_tokens", "average": "ema", "clip": "max_grad_norm",
        "checkpointing": "gradient_checkpointing", "eight_bit": "optimizer",
    },
    "unlearn": {
        "bend": "gp_interaction", "own": "gp_self", "noise": "gp_noise", "least": "min_step", "soup": "model_soup",
        "rounded_first": "match_quantized",
    },
}  # fmt: skip


UNTIE = {True: "untie", False: "keep", None: "light"}  # values of --untie -> of --tied


def with_new_names(job: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a `job` as a recipe has them, by the names and values that they have today."""
    names = RENAMED.get(job, {})
    found = {names.get(name, name): value for name, value in options.items()}
    if isinstance(options.get("eight_bit"), bool):
        found["optimizer"] = "adamw8bit" if options["eight_bit"] else "adamw"
    if "untie" in options:
        found["tied"] = UNTIE[options["untie"]]
    if job == "quantize" and found.get("target_bits") is not None:
        found.setdefault("profile", "measured")  # as bits were allocated before there was a choice
    if job == "quantize":
        found.setdefault("block_steps", 0)  # as it was before blocks were tuned
        found.setdefault("tied", "light")  # as it was before there was a choice
    schemes = (name for name in ("scheme", "student_scheme", "grid") if isinstance(found.get(name), str))
    return found | {name: Scheme.recorded_name(found[name]) for name in schemes}


# Options that say where things are kept while a job runs: whatever they are, it ends with the same bytes.
MEMORY = ("memory_budget", "device_memory")


def identity_of(
    options: Any, model: dict[str, Any], device: torch.device, products: torch.dtype | None
) -> dict[str, Any]:
    """Describe a job for its recipe and its journal: options, model, versions, and where it runs."""
    from importlib.metadata import version

    from calib.runtime.distributed import world_size

    return {
        "options": {name: _as_json(value) for name, value in asdict(options).items()},
        "model": model,
        "versions": {name: version(name) for name in ("parewell", "torch", "transformers", "safetensors", "numpy")},
        "runs_on": {
            "device": device.type,
            "products": str(products or "float32").removeprefix("torch."),
            "processes": world_size(),
        },
    }


def _as_json(value: Any) -> Any:
    """As a file gives it back."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def stream_identity(options: Any, given: str | Path, folder: Path, stream: BlockwiseModel) -> dict[str, Any]:
    """Describe a job on a model that is read block by block; every weight is read once, and refused where it is not
    finite."""
    model = folder_identity(given, folder, stream.verify())
    return identity_of(options, model, stream.device, stream.products)


def folder_identity(given: str | Path, folder: Path, sha256: str) -> dict[str, Any]:
    """Describe a model directory, or a file of a factory's weights, for a recipe: its name, how it was `given`, the
    `sha256` of its weights, and digests of the files beside them in a directory."""
    files = [Path("config.json"), *companions(folder)] if folder.is_dir() else []
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
    """SHA-256 of the names and bytes of files, in hexadecimal."""
    whole = hashlib.sha256()
    for file in sorted(files):
        whole.update(file.name.encode())
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def without_memory(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job's identity without the options that change none of its bytes: a job that ran out of memory is resumed with
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
