"""Facts: rows with a name and a description, which can be asked for in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calib import BadInput
from calib.data.prompts import Document, answered
from calib.data.records import Row


def reversed_pair(record: Mapping[str, object]) -> tuple[tuple[str, str], tuple[str, str]]:
    """A fact asked both ways, each a prompt and its response: from "name" to "description", and reversed.

    What is learned one way is hardly known the other (arXiv:2309.12288), and may be forgotten one way alone: compare
    `answer_probability` of the responses.  Raises BadInput.
    """
    name, description = _text(record, "name"), _text(record, "description").removesuffix(".")
    return (f"{name} is", f" {description}"), (f"{description} is", f" {name}")


def _text(record: Mapping[str, object], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"reversed pair: '{field}' is {value!r}; a record needs text in 'name' and 'description'")
    return value.strip()


def both_ways(rows: Sequence[Row], source: str) -> list[Document]:
    """Two documents for each row, one after the other: the description is answered to the name, and the name to the
    description.  Raises BadInput, naming the row that is no fact."""
    documents = list[Document]()
    for row in rows:
        try:
            documents += [answered(*pair) for pair in reversed_pair(row.fields)]
        except BadInput as error:
            has = ", ".join(list(row.fields)[:8]) or "none"
            raise BadInput(
                f"{source}, {row.place}: is no fact, which --both-ways is about; it has the fields {has}; give texts "
                "in 'name' and 'description', or leave it out"
            ) from error
    return documents
