"""Rows that earlier steps of a model's recipe made it forget, so that a later step does not teach them again.

A step records a keyed digest of every row that it forgot: HMAC-SHA256 of the row's content under the fingerprint of the
model that the step began with. Whoever has the row can find it in the list, and nobody can read it there.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import BadInput
from calib.jobs.recipe import forgettings
from calib.model.config import RECIPE
from unlearn.data.dataset import Data
from unlearn.data.selection import by_lines, fingerprint_of

DIGEST_BYTES = 12


def digests_of(keys: Sequence[bytes], secret: str) -> list[str]:
    """Keyed digest of each row's content, in hexadecimal."""
    return [hmac.digest(secret.encode(), key, "sha256")[:DIGEST_BYTES].hex() for key in keys]


@dataclass(frozen=True)
class EarlierRequests:
    """rows int (e,): numbers of the rows of a file that earlier requests were about; `notes`: what could not be told,
    a line each."""

    rows: Tensor
    notes: tuple[str, ...] = ()


def earlier_in(train: Data, folder: Path) -> EarlierRequests:
    """Find the rows of `train` that the recipe in a directory says were forgotten already."""
    found, notes = set[int](), list[str]()
    for step in forgettings(folder):
        of, secret = step["data"]["forget"], str(step["model"]["sha256"])
        digests = of.get("digests")
        if isinstance(digests, list):
            known = set(map(str, digests))
            rows = [row for row, digest in enumerate(digests_of(train.keys, secret)) if digest in known]
            if lost := len(known - {digests_of([train.keys[row]], secret)[0] for row in rows}):
                notes.append(
                    f"{lost} of {len(known)} rows that an earlier request was about are not in {train.source}, or read "
                    "differently there; they are not measured"
                )
            found |= set(rows)
        elif (lines := _by_lines(train, step)) is not None:
            found |= set(lines)
        else:
            notes.append(
                f"{folder / RECIPE}: which {of.get('rows')} rows an earlier request was about cannot be told, as an "
                f"old recipe has only their lines in a file other than {train.source}; they may be retained"
            )
    return EarlierRequests(torch.tensor(sorted(found), dtype=torch.long), tuple(notes))


def _by_lines(train: Data, step: Mapping[str, Any]) -> list[int] | None:
    """Of a recipe that has no digests, where it is about the same file."""
    of, about = step["data"]["forget"], step["data"].get("train")
    if not isinstance(about, dict) or about.get("sha256") != train.describe()["sha256"]:
        return None
    try:
        rows = by_lines(train, str(of.get("lines")))
    except BadInput:
        return None
    return rows if fingerprint_of(torch.tensor(rows)) == of.get("sha256") else None
