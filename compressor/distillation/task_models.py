"""Encoder-decoders (T5, BART) and masked language models (BERT, RoBERTa) as teachers and students, whole in memory.

They are run by the library's own forward up to the head, so that what stands before it (T5's scaling where embeddings
are tied, BERT's transform) is the library's, and are held against its logits before anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig

from calib import BadInput, first_line
from calib.blockwise.in_memory import BlockParts
from calib.data.corpus import Corpus
from calib.data.targets import SINGLE
from calib.model.task import Task
from compressor.distillation.batches import Relations
from compressor.distillation.classifiers.prune_classifier import (
    check_depth,
    check_loads,
    choose_classifier_layers,
    cut_layers,
    stacks_of,
)
from compressor.distillation.losses.relations import projection_widths, projections_in
from compressor.distillation.models import (
    SAME_HEAD,
    Student,
    Teacher,
    at_targets,
    given_of,
    inputs_on,
    states_before_head,
)

COMPARED_ROWS = 2  # on which states and head are held against the library's logits
SELECTION_LOGITS = 2**25  # at most, by which layers are chosen
STUDENT_INSTEAD = "give another model"


def with_own_beginnings(corpus: Corpus, config: PretrainedConfig) -> Corpus:
    """Rows of an encoder-decoder whose decoder's begin as the library has them begin before labels are learned
    (`prepare_decoder_input_ids_from_labels`), which of some types depends on the row.

    Args:
        corpus: whose ids (N, T) are the start token and the labels.
        config: of the model.

    Returns:
        The corpus, with other first tokens of rows where the library has others; of types without that method, as it
        is.

    Raises:
        BadInput: the library's decoder reads something else than each label after the one before.
    """
    with torch.device("meta"):
        model: Any = getattr(transformers, Task.SEQ_TO_SEQ_LM).from_config(config)
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return corpus
    real = corpus.mask[:, 1:]
    labels = corpus.ids[:, 1:].where(real, -100)
    try:
        made = model.prepare_decoder_input_ids_from_labels(labels=labels)
    except Exception as error:  # the library checks configs in many ways
        raise BadInput(f"config.json: the library makes no decoder rows of labels ({first_line(error)})") from error
    if not torch.equal(made[:, 1:][real[:, 1:]], corpus.ids[:, 1:-1][real[:, 1:]]):
        raise BadInput(
            f"config.json: decoders of {config.model_type} read something else than each label after the one before; "
            f"{STUDENT_INSTEAD}"
        )
    return replace(corpus, ids=torch.cat([made[:, :1], corpus.ids[:, 1:]], 1))


def layers_compared(model: Any) -> list[BlockParts] | None:
    """Layers whose states losses compare: of a decoder, or of the one stack there is; None where none are found."""
    try:
        stack = stacks_of(model)[-1]
    except BadInput:
        return None
    return [BlockParts(f"{stack.path}.{number}", (), ()) for number in range(stack.size)]


def compared_relations(teacher: Any, student: Any, arguments: Mapping[str, float | str]) -> Relations:
    """Find the queries, keys and values that `attention-relations` compares.

    Args:
        teacher: of the library's.
        student: of the library's.
        arguments: of the loss: `heads`, by default the greatest number that divides the teacher's heads and all widths,
            and the teacher's `layer`, counted from 1, by default its last.

    Returns:
        Linears of the teacher's layer and of the student's last one.

    Raises:
        BadInput: they are not found, the teacher has no such layer, or widths cannot be cut into so many heads.
    """
    layers = [layers_compared(model) for model in (teacher, student)]
    if layers[0] is None or layers[1] is None:
        raise BadInput(
            f"loss attention-relations: the layers of {teacher.config.model_type} are not found; leave it out"
        )
    number = int(arguments.get("layer", len(layers[0])))
    if number > len(layers[0]):
        raise BadInput(f"loss attention-relations: layer {number} of {len(layers[0])} was asked for; give one there is")
    places = layers[0][number - 1].name, layers[1][-1].name
    found = [
        projections_in(model.get_submodule(place), place)
        for model, place in zip((teacher, student), places, strict=True)
    ]
    widths = [width for projections in found for width in projection_widths(projections)]
    heads = int(arguments.get("heads", math.gcd(teacher.config.num_attention_heads, *widths)))
    if odd := next((width for width in widths if width % heads), None):
        raise BadInput(f"loss attention-relations: {heads} heads do not divide a width of {odd}; give another number")
    return Relations(found[0], found[1], heads)


@torch.no_grad()
def check_states(model: Student | Teacher, corpus: Corpus, folder: Path, *, ahead: bool) -> int:
    """Hold states and head against the library's own logits, at the real positions of the first rows.

    Args:
        model: the teacher or the student.
        corpus: rows for it.
        folder: of the model, for messages.
        ahead: whether a token is told at the position before it.

    Returns:
        Numbers in the state that the head reads.

    Raises:
        BadInput: the model cannot be run, has no head of its own, its logits are no numbers, or they differ.
    """
    given, reason = inputs_on(given_of(corpus[:COMPARED_ROWS]), model.head.weight.device), "its logits are no numbers"
    counted = corpus.mask[:COMPARED_ROWS, 1:].to(model.head.weight.device)
    assert not isinstance(given, Tensor)
    library: Any = model.model
    training = library.training
    library.eval()
    try:
        states = at_targets(states_before_head(library, given), counted, ahead=ahead)
        logits = at_targets(library(**given).logits, counted, ahead=ahead)[:, : model.head.vocab]
        apart = float((model.head(states) - logits).abs().max() / logits.abs().max())
        if apart < SAME_HEAD:
            return states.shape[-1]
        if apart == apart:
            reason = (
                f"what stands between its last hidden state and its logits is not known (they differ by {apart:.0e})"
            )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = f"it has no head of its own ({first_line(error)})"
    finally:
        library.train(training)
    raise BadInput(
        f"{folder / 'config.json'}: {library.config.model_type} is no teacher or student here, as {reason}; "
        f"{STUDENT_INSTEAD}"
    )


def answers_on(corpus: Corpus, device: torch.device, vocab: int) -> Callable[[Any], Tensor]:
    """Make the function from a model of the library's to its logits (n, V), on the CPU, at the first positions of some
    rows that count: as many as are not too large."""
    most = max(1, SELECTION_LOGITS // vocab)
    at_once = max(1, most // corpus.ids.shape[1])  # rows
    counted = corpus.targets[1]

    @torch.no_grad()
    def answers(model: Any) -> Tensor:
        found, left = list[Tensor](), most
        for start in range(0, len(corpus.ids), at_once):
            some = slice(start, start + at_once)
            given = inputs_on(given_of(corpus[some]), device)
            assert not isinstance(given, Tensor)
            found.append(model(**given).logits.cpu()[counted[some]][:left].float())
            left -= len(found[-1])
            if not left:
                break
        return torch.cat(found)

    return answers


def check_cut(model: Any, keep: Sequence[int], answers: Callable[[Any], Tensor], near: Path) -> None:
    """Cut the first layers of each stack out of a model and load it: whatever is chosen, so many can be had.

    Args:
        model: of the library's.
        keep: how many layers of each stack.
        answers: logits of a model, to compare.
        near: the place beside which the trial is saved for a moment.

    Raises:
        BadInput: there are no such stacks, fewer layers, or the library does not load what is left.
    """
    stacks = stacks_of(model)
    check_depth(stacks, keep)
    some = cut_layers(model, stacks, [range(count) for count in keep])
    check_loads(some, answers, near)


def cut_model(
    model: Any, keep: Sequence[int], answers: Callable[[Any], Tensor], kept: Sequence[Sequence[int]] | None = None
) -> tuple[Any, list[list[int]]]:
    """Make a student of a model's layers, with tensors of its own.

    Args:
        model: of the library's.
        keep: how many layers of each stack.
        answers: logits of a model (n, V), by which layers are chosen: the one without which the mean KL from the whole
            model is least goes first.
        kept: the layers themselves, where they have been chosen before.

    Returns:
        The student, and its layers in each stack.
    """
    if kept is None:
        return choose_classifier_layers(model, keep, answers, SINGLE)
    return deepcopy(cut_layers(model, stacks_of(model), kept)), [list(layers) for layers in kept]
