"""A student with fewer layers, made from a classifier of any architecture that the library knows.

The library itself builds the smaller model from a config with fewer layers, and the layers that are kept move into it:
what depends on a layer's place (its index in a cache, whether it attends locally, a norm or a table of positions that
only the first has) is then as it will be when the student is loaded. What is chosen from is what will be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from calib import BadInput, first_line
from calib.data.targets import output_distances
from calib.runtime.memory import is_out_of_memory
from calib.runtime.progress import stage
from compressor.pruning.widths import with_layers

Answers = Callable[[Any], Tensor]  # of a model, on rows that are always the same: logits (n, C)
INSTEAD = "give --student DIR instead of --layers"


@dataclass(frozen=True)
class Stack:
    """Layers that follow each other: where their list is in the model, the config's name for how many there are."""

    path: str
    attribute: str
    size: int

    @property
    def part(self) -> str:
        """ "encoder" or "decoder"."""
        return "decoder" if "decoder" in self.path.split(".") else "encoder"


def stacks_of(model: Any) -> list[Stack]:
    """Find a model's stacks of layers: one, or an encoder's and a decoder's.  Raises BadInput where it has no lists of
    layers."""
    config = model.config
    places_of_counts = [("", "num_hidden_layers")]
    if getattr(config, "is_encoder_decoder", False):
        decoder = next((n for n in ("num_decoder_layers", "decoder_layers") if getattr(config, n, None)), "")
        places_of_counts = [("encoder", "num_hidden_layers"), ("decoder", decoder)]
    lists = {path: len(module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    stacks = list[Stack]()
    for part, attribute in places_of_counts:
        size = getattr(config, attribute, None)
        path = next((p for p, length in lists.items() if length == size and (not part or part in p.split("."))), None)
        if size is None or path is None:
            raise BadInput(
                f"layers: {config.model_type} has no list of {size or 'its'} layers that could be cut (some models "
                f"share one layer's weights among all); {INSTEAD}"
            )
        stacks.append(Stack(path, attribute, int(size)))
    return stacks


def cut_layers(model: Any, stacks: Sequence[Stack], kept: Sequence[Sequence[int]]) -> Any:
    """A model of the same class with the layers `kept` of each stack, sharing its tensors with `model`.

    What only a first layer has is taken from the old first layer. Raises BadInput where the library builds a smaller
    model that needs tensors which `model` does not have.
    """
    config = with_layers(model.config, kept[0])
    for stack, layers in zip(stacks[1:], kept[1:], strict=True):
        setattr(config, stack.attribute, len(layers))
    try:
        with torch.device("meta"):
            student = type(model)(config)
    except Exception as error:  # the library checks configs in many ways
        raise BadInput(
            f"layers: the library cannot build this model smaller ({first_line(error)}); {INSTEAD}"
        ) from error
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    for stack, layers in zip(stacks, kept, strict=True):
        found = dict(student.named_modules()).get(stack.path)
        if not isinstance(found, nn.ModuleList) or len(found) != len(layers):
            raise BadInput(f"layers: {stack.attribute} does not say how many layers there are; {INSTEAD}")
    for name, place in list(_places(student)):
        source = tensors.get(_old_name(name, stacks, kept), tensors.get(name))
        if source is None or source.shape != place[name.rpartition(".")[2]].shape:
            raise BadInput(f"layers: with fewer layers this model would need another '{name}'; {INSTEAD}")
        place[name.rpartition(".")[2]] = source
    if getattr(model, "generation_config", None) is not None:  # which old checkpoints have in config.json alone
        student.generation_config = deepcopy(model.generation_config)
    return student.eval()


def _places(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every parameter and buffer by name, and the dictionary of its module that holds it."""
    for path, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                if tensor is not None:
                    yield f"{path}.{leaf}" if path else leaf, held


def _old_name(name: str, stacks: Sequence[Stack], kept: Sequence[Sequence[int]]) -> str:
    for stack, layers in zip(stacks, kept, strict=True):
        if name.startswith(f"{stack.path}."):
            number, _, rest = name[len(stack.path) + 1 :].partition(".")
            return f"{stack.path}.{layers[int(number)]}.{rest}"
    return name


def check_depth(stacks: Sequence[Stack], keep: Sequence[int]) -> None:
    """Raises BadInput where more layers are asked for than a stack has."""
    for stack, count in zip(stacks, keep, strict=True):
        if count > stack.size:
            raise BadInput(f"layers: the {stack.part} has {stack.size}, {count} were asked for")


def choose_classifier_layers(
    model: Any, keep: int | Sequence[int], answers: Answers, problem: str
) -> tuple[Any, list[list[int]]]:
    """Leave out the layer without which the mean distance from the model's own answers
    (`calib.data.targets.output_distances`) is least, until `keep` are left in each stack.  -> the student, with tensors
    of its own, and the layers left."""
    stacks, reference = stacks_of(model), answers(model)
    left = [list(range(stack.size)) for stack in stacks]
    counts = [keep] * len(stacks) if isinstance(keep, int) else list(keep)
    check_depth(stacks, counts)
    total = sum(sum(range(count + 1, stack.size + 1)) for stack, count in zip(stacks, counts, strict=True))
    with stage("choose layers", total, "candidates") as done:
        for number, stack in enumerate(stacks):
            while len(left[number]) > counts[number]:
                losses = []
                for without in left[number]:
                    others = [i for i in left[number] if i != without]
                    candidate = cut_layers(model, stacks, [*left[:number], others, *left[number + 1 :]])
                    losses.append(float(output_distances(reference, answers(candidate), problem).mean()))
                    done(f"without {stack.part} layer {without}: {losses[-1]:.3g}")
                del left[number][losses.index(min(losses))]
    return deepcopy(cut_layers(model, stacks, left)), left


@torch.no_grad()
def check_loads(student: Any, answers: Answers, near: Path) -> None:
    """Raises BadInput where the student, once saved (in a folder beside `near` that goes) and opened by the library
    alone, does not answer as it does in memory."""
    with TemporaryDirectory(dir=near.resolve().parent, prefix=".parewell-student-") as scratch:
        try:
            student.save_pretrained(scratch)
            loaded = type(student).from_pretrained(scratch, dtype=torch.float32).eval()
            loaded_answers = answers(loaded.to(student.device))
        except Exception as error:  # the library says it in many ways
            if is_out_of_memory(error):
                raise
            raise BadInput(
                f"layers: the library does not load what is left ({first_line(error)}); {INSTEAD}"
            ) from error
    student_answers = answers(student)
    apart = float((student_answers - loaded_answers).abs().max())
    if not apart <= 1e-4 * max(1.0, float(student_answers.abs().max())):
        raise BadInput(
            f"layers: once saved and loaded by the library, what is left answers otherwise (logits differ by "
            f"{apart:.2g}); {INSTEAD}"
        )
