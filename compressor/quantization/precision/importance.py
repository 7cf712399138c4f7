"""How much columns of weights count where scales are searched for, as llama.cpp's importance matrices have it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus
from calib.jobs.journal import Journal
from calib.runtime.distributed import world_size
from compressor.quantization.options import Quantize
from compressor.storage.gguf_names import tensors_for
from compressor.storage.imatrix import Imatrix, read_imatrix, write_imatrix


def importance_for(stream: BlockwiseModel, options: Quantize, folders: Sequence[Path]) -> dict[str, Tensor]:
    """Read how much columns count from the imatrix of a job, nothing where it has none.  Raises BadInput, also where an
    imatrix could not be written as it is to be; `folders` are no place for one."""
    if options.imatrix_out is not None:
        tensors_for("imatrix-out", stream, "leave it out")
        place = options.imatrix_out.resolve()
        if not place.parent.is_dir():
            raise BadInput(f"imatrix-out {options.imatrix_out}: {place.parent} is no folder; make it first")
        if place.exists():
            raise BadInput(f"imatrix-out {options.imatrix_out}: exists; remove it, or choose another name")
        if any(place.is_relative_to(folder.resolve()) for folder in folders):
            raise BadInput(f"imatrix-out {options.imatrix_out}: lies in a model's folder; choose a place beside it")
    return {} if options.imatrix is None else read_importance(options.imatrix, stream.without(()))


def read_importance(file: Path, stream: BlockwiseModel) -> dict[str, Tensor]:
    """Read the mean squared inputs (in,) of a model's linears, by name on disk, and those of its head where the file
    has them.  Raises BadInput where the file is no imatrix, or one of another model."""
    linears = {f"{one.name}.weight": one for i in range(stream.layers) for one in stream.linears(i)}
    expected, optional = dict[str, tuple[int, int]](), set[str]()
    tensors = tensors_for("imatrix", stream, "leave it out")
    for tensor in tensors:
        first = tensor.sources[0]
        if first in linears:
            expected[tensor.name] = (len(tensor.sources), linears[first].shape[1])
        elif len(shape := stream.expected[first]) == 2:  # the head, and routers, which llama-imatrix sums up as well
            expected[tensor.name] = (len(tensor.sources), shape[1])
            optional.add(tensor.name)
    found = read_imatrix(file, expected, optional)
    return {
        source.removesuffix(".weight"): mean
        for tensor in tensors if tensor.name in found.squares
        for source, mean in zip(tensor.sources, found.mean(tensor.name), strict=True)
    }  # fmt: skip


def write_importance(file: Path, stream: BlockwiseModel, rows: Corpus, journal: Journal) -> None:
    """Write the sums over the calibration rows that the float model's run left in a journal, as an imatrix."""
    pages = (journal.read(f"float-{i}-{n}")[0] for i in range(stream.layers) for n in range(world_size()))
    sums = {name: tensor for page in pages for name, tensor in page.items()}
    squares, counts = dict[str, Tensor](), dict[str, Tensor]()
    for tensor in tensors_for("imatrix-out", stream, "leave it out"):
        names = [source.removesuffix(".weight") for source in tensor.sources]
        if f"squares.{names[0]}" in sums:
            squares[tensor.name] = torch.stack([sums[f"squares.{name}"] for name in names]).float()
            counts[tensor.name] = torch.cat([sums[f"count.{name}"] for name in names])
    write_imatrix(file, Imatrix(squares, counts, (rows.source,), len(rows.ids), rows.ids.shape[1]))
