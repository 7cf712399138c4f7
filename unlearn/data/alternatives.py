"""Alternative answers to the rows that are to be forgotten, for methods that prefer one answer to another.

Rows with prompts belong to the rows to forget that have the same prompts. Answers without prompts, such as "I don't
know.", are for any of them: each row gets one, drawn by the seed, as TOFU (arXiv:2401.06121) draws its refusals.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.data.conversations import as_messages, turns_of
from calib.data.prompts import PAIRS, Document, PromptFormat, prompt_format
from calib.data.records import Row, is_prose, lines_of_text, read_rows
from calib.data.rows import positions_of, row_length
from unlearn.data.dataset import Data, answer_windows, check_vocabulary, stacked_windows
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel
from unlearn.options.unlearning import Unlearn

ALONE = tuple(dict.fromkeys(answer for _, answer in PAIRS))  # fields that hold an answer, with or without a prompt
_PROMPTS = (*dict.fromkeys(prompt for prompt, _ in PAIRS), "messages", "conversations", "conversation")  # or prompts


def read_alternatives(data: Data, forgotten: Tensor, trainable: TrainableModel, options: Unlearn) -> Examples:
    """Read the alternative answers of `options.alternatives`.

    Args:
        data: the training rows.
        forgotten: numbers of those to forget, int (f,).
        trainable: the language model.
        options: the file of alternatives, and how rows become text.

    Returns:
        f rows on the model's device: the prompts of the rows to forget, in their order, with the other answers.

    Raises:
        BadInput: the model is no language model, a row to forget has no prompt or does not fit in one window, or the
            alternatives are not of these rows; names the row.
    """
    assert options.alternatives is not None
    path, tokenizer = Path(options.alternatives), trainable.tokenizer
    if trainable.task != "causal-lm" or tokenizer is None:
        raise BadInput(f"method {options.method}: is for language models, whose rows have prompts; choose another")
    form, rows = prompt_format(options.prompt_format, tokenizer), [data.rows[row] for row in forgotten.tolist()]
    windows_of = Counter(data.numbers[row] for row in forgotten.tolist())
    for row, number in zip(rows, (data.numbers[row] for row in forgotten.tolist()), strict=True):
        if windows_of[number] > 1:
            raise BadInput(f"{data.source}, {row.place}: takes {windows_of[number]} windows, and a pair is of whole "
                           "answers; raise --length")  # fmt: skip
    asked = [_pair(form, row, f"{data.source}, {row.place}") for row in rows]
    found = _found(path, rows, [document for document, _ in asked], form, options.seed)
    for row, (_, own), (_, other) in zip(rows, asked, found, strict=True):
        if own.strip() == other.strip():
            raise BadInput(
                f"{path}: gives {row.place} of {data.source} the answer that is to be forgotten; give another"
            )
    config: Any = trainable.module.config
    length = row_length(options.length, positions_of(config))
    windows = answer_windows([document for document, _ in found], tokenizer, str(path), length)
    for row, some in zip(rows, windows, strict=True):
        if len(some) != 1:
            raise BadInput(
                f"{path}: the alternative to {row.place} of {data.source} takes {len(some)} windows of {length}, "
                "and a pair is of whole answers; raise --length"
            )
    examples = stacked_windows([window for (window,) in windows])
    check_vocabulary(examples, config, path)
    return examples.to(trainable.device)


_Answered = tuple[Document, str]  # a row as text, and its answer


def _found(
    path: Path, rows: Sequence[Row], asked: Sequence[Document], form: PromptFormat, seed: int
) -> list[_Answered]:
    """The alternatives of a file to `rows`, whose texts are `asked`.  Raises BadInput."""
    given = list(lines_of_text(path) if is_prose(path) else read_rows(path))
    if not given:
        raise BadInput(f"{path}: is empty; give an alternative answer for each row to forget, or one for all")
    alone = [_answer_alone(row) for row in given]
    if all(answer is None for answer in alone):
        return _by_prompt(path, [_pair(form, row, f"{path}, {row.place}") for row in given], given, asked, rows)
    if None in alone:
        raise BadInput(f"{path}, {given[alone.index(None)].place}: is no answer alone, as others are; give all rows a "
                       "prompt, or none")  # fmt: skip
    if empty := next((row for row, answer in zip(given, alone, strict=True) if not str(answer).strip()), None):
        raise BadInput(f"{path}, {empty.place}: is empty; give an answer, or remove it")
    drawn = torch.randint(len(given), (len(rows),), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        _pair(form, replace(row, fields=_answered_instead(row.fields, str(alone[i]))), f"{path}, {given[i].place}")
        for i, row in zip(drawn, rows, strict=True)
    ]


def _pair(form: PromptFormat, row: Row, where: str) -> _Answered:
    """A row as text, and its answer.  Raises BadInput where it has no prompt, or several answers."""
    document = form.document(row, where)
    if not document.answers:
        raise BadInput(f"{where}: has no prompt, to which there could be another answer; give prompts and answers")
    if len(document.answers) > 1:
        raise BadInput(f"{where}: has {len(document.answers)} answers, and pairs are of one; give one turn a row")
    start, end = document.answers[0]
    return document, document.text[start:end]


def _answer_alone(row: Row) -> str | None:
    """The answer of a row that has no prompt; None for one that has."""
    named = [name for name in ("text", *ALONE) if isinstance(row.fields.get(name), str)]
    return None if not named or any(row.fields.get(name) for name in _PROMPTS) else str(row.fields[named[0]])


def _answered_instead(fields: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """Fields of a row that has one answer, with another."""
    turn = {"role": "assistant", "content": answer}
    if (turns := turns_of(fields, "")) is not None:
        others = {name: value for name, value in fields.items() if name not in ("conversations", "conversation")}
        messages = [m | turn if m["role"] == "assistant" else m for m in as_messages(turns, fields, "")]
        return others | {"messages": messages}
    _, name = next(pair for pair in PAIRS if all(fields.get(field) for field in pair))
    return {**fields, name: [turn] if isinstance(fields[name], list) else answer}


def _by_prompt(
    path: Path, given: Sequence[_Answered], places: Sequence[Row], asked: Sequence[Document], rows: Sequence[Row]
) -> list[_Answered]:
    """The one of `given`, which stand at `places` of a file, of the prompt of each of `asked`, which are `rows`."""

    def prompt(document: Document) -> str:
        assert document.answers
        return document.text[: document.answers[0][0]]

    left, missing = defaultdict[str, list[int]](list), list[Row]()
    for i, (document, _) in enumerate(given):
        left[prompt(document)].append(i)
    found = list[_Answered]()
    for document, row in zip(asked, rows, strict=True):
        if same := left[prompt(document)]:
            found.append(given[same.pop(0)])
        else:
            missing.append(row)
    if missing:
        raise BadInput(
            f"{path}: {len(missing)} of {len(rows)} rows to forget have no alternative, such as that of "
            f"{missing[0].place}; give one with the same prompt for each, or answers without prompts for all"
        )
    if spare := sorted(i for same in left.values() for i in same):
        raise BadInput(
            f"{path}, {places[spare[0]].place}: is an alternative to no row to forget, or to one that has another "
            f"({len(spare)} such rows); remove it"
        )
    return found
