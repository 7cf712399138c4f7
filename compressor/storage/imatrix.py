"""llama.cpp's importance matrix ("imatrix"): sums of squared inputs of each linear, which its quantizers weight errors
with.  They are the diagonals of the Gram matrices sum x x^T.

A GGUF file of `general.type` imatrix: for each weight NAME the tensors NAME.in_sum2 (matrices, inputs) and NAME.counts
(matrices, 1), where experts that lie in one tensor are so many matrices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calib import BadInput, first_line

KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")


@dataclass(frozen=True)
class Imatrix:
    """Sums over the inputs x of weights, by their names in GGUF.

    Args:
        squares: (m, n) sum of x^2 for each of m matrices with n inputs.
        counts: (m,) how many tokens were summed.
        datasets: names of the texts they come from, one at least.
        chunk_count: rows of text.
        chunk_size: tokens a row.
    """

    squares: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ValueError("an imatrix without the name of a data set, which llama.cpp refuses to read")
        if self.squares.keys() != self.counts.keys():
            raise ValueError(f"squares and counts differ in '{min(self.squares.keys() ^ self.counts.keys())}'")
        for name, squares in self.squares.items():
            counts = self.counts[name]
            if squares.ndim != 2 or counts.shape != squares.shape[:1]:
                raise ValueError(f"'{name}' has squares of shape {list(squares.shape)}, counts of {list(counts.shape)}")
            if not all(bool((x >= 0).all() and x.isfinite().all()) for x in (squares, counts)):
                raise ValueError(f"'{name}' has sums of squares, or counts, that are none")

    def mean(self, name: str) -> Tensor:
        """Mean of x^2 (m, n) of a weight; 1 for matrices that saw no token, as llama.cpp takes them."""
        counts = self.counts[name][:, None]
        return torch.where(counts > 0, self.squares[name] / counts.clamp(min=1), torch.ones(()))


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write an importance matrix for `llama-quantize --imatrix`."""
    from gguf import GGUFWriter

    part = path.with_name(path.name + ".part")
    writer = GGUFWriter(part, arch="")
    writer.add_type("imatrix")
    for key, value in zip(KEYS, (list(imatrix.datasets), imatrix.chunk_count, imatrix.chunk_size), strict=True):
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    for name in sorted(imatrix.squares):
        writer.add_tensor(f"{name}.in_sum2", imatrix.squares[name].float().contiguous().numpy())
        writer.add_tensor(f"{name}.counts", imatrix.counts[name].float()[:, None].contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)


def read_imatrix(path: Path, expected: Mapping[str, tuple[int, int]], optional: Collection[str] = ()) -> Imatrix:
    """Read the importance matrix of a model.

    Args:
        path: a GGUF file, as `llama-imatrix` writes it.
        expected: (matrices, inputs) of the model's weights, by their names in GGUF.
        optional: those of them that it need not have, such as the head, which llama-imatrix leaves out.

    Raises:
        BadInput: it is no such file, of the old format (.dat), damaged, or of another model.
    """
    found = _read(path)
    for name, squares in found.squares.items():
        if name not in expected or tuple(squares.shape) != tuple(expected[name]):
            raise BadInput(f"{path}: has '{name}' of {' x '.join(map(str, squares.shape))} inputs, the model "
                           f"{' x '.join(map(str, expected[name])) if name in expected else 'has no such weight'}; it "
                           "is of another model")  # fmt: skip
    if missing := expected.keys() - found.squares.keys() - set(optional):
        raise BadInput(f"{path}: lacks '{min(missing)}'; it is of another model")
    return found


def _read(path: Path) -> Imatrix:
    from gguf import GGUFReader

    if not path.is_file():
        raise BadInput(f"{path}: is no file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise BadInput(f"{path}: is no GGUF file, perhaps an imatrix of the old format; make it again with "
                       "llama-imatrix --output-format gguf")  # fmt: skip
    try:
        reader = GGUFReader(path)
        kind = reader.get_field("general.type")
        if kind is None or kind.contents() != "imatrix":
            raise BadInput(f"{path}: is a GGUF file, but no imatrix")
        tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
        datasets, chunk_count, chunk_size = (reader.fields[key].contents() for key in KEYS)
        names = {name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")}
        return Imatrix(
            {name: tensors[f"{name}.in_sum2"] for name in names},
            {name: tensors[f"{name}.counts"].flatten() for name in names},
            tuple(datasets), int(chunk_count), int(chunk_size),
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, IndexError, OSError, OverflowError) as error:
        raise BadInput(f"{path}: cannot be read as an imatrix ({first_line(error)})") from error
