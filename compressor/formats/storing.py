"""The format that a quantization is stored in, before there is anything to store: whether it can say the scheme, and
what that will weigh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

from calib import BadInput
from calib.blockwise.model import BlockwiseModel
from calib.model.task import WRITERS
from calib.quant.block_types import BLOCK_TYPES
from calib.quant.scheme import Scheme
from compressor.engine.load import QuantizedCheckpoint
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.exporters.export import check_export, check_packages, format_of
from compressor.exporters.format import ExportJob
from compressor.exporters.options import COMPRESSED_TENSORS, EXPORT_FORMATS, Export
from compressor.storage.codecs import codec_name


def native_format(scheme: Scheme) -> str | None:
    """The format that `quantize` stores a scheme in by itself; None where that has no name, as blocks of GGUF's in
    safetensors."""
    named = {"compressed-tensors": COMPRESSED_TENSORS, "bitsandbytes": f"bnb-{scheme.table_name}"}
    return named.get(codec_name(scheme))


@dataclass(frozen=True)
class FutureOutput:
    """A model that is to be quantized: where it lies, the model, the scheme, bits or block types that linears may get
    where they are allocated, and whether it rotates as it runs."""

    folder: Path
    stream: BlockwiseModel
    scheme: Scheme
    widths: Sequence[int | str] = ()
    online: bool = False

    def checked(self, to: str) -> ExportJob:
        """The export of the output, checked as one of a folder is.  Raises BadInput where the format cannot say it."""
        scheme, stream = self.scheme, self.stream
        if stream.task not in WRITERS:
            raise BadInput(f"to {to}: holds models alone that give distributions of words")
        if self.widths:  # any of them may be any linear's
            rows = {one.name: one.shape[1] for i in range(stream.layers) for one in stream.linears(i)}
            each = dict(zip(rows, cycle(self.widths), strict=False))
            kinds = {name: width for name, width in each.items() if isinstance(width, str)}
            scheme = scheme.in_blocks(rows, kinds) if kinds else scheme.with_bits(each)
        some = frozenset({"down"} if self.online else ())
        runs = [RuntimeTransforms(scheme.activations, scheme.kv, some)] * stream.layers
        return check_export(self.folder, QuantizedCheckpoint(stream, runs, scheme), Export(to=to))

    def expected_bytes(self, to: str, *, untied: bool, bits: float | None = None) -> int:
        """Bytes of the output's weights, about.

        Args:
            to: the format.
            untied: whether embedding and head, which are one table, become two for a rotation.
            bits: of a linear's code on average, or of a weight in its block type, where bits are allocated.

        Raises:
            BadInput: the format cannot say it.
        """
        job, form = self.checked(to), format_of(Export(to=to))
        more = sum(self.stream.entry(first).bytes for first in self.stream.tied.values()) if untied else 0
        if bits is None:
            return job.expected_bytes(form) + more
        spent = {BLOCK_TYPES[w].bits_per_weight if isinstance(w, str) else float(w): w for w in self.widths}
        below = max((b for b in spent if b <= bits), default=min(spent))
        above = min((b for b in spent if b >= bits), default=max(spent))
        low, high = (replace(self, widths=(spent[b],)).checked(to).expected_bytes(form) for b in (below, above))
        share = (bits - below) / (above - below) if above > below else 0.0
        return round(low + share * (high - low)) + more


def check_format(future: FutureOutput, to: str) -> None:
    """Raises BadInput, with the formats that can, where one cannot say what a quantization will give."""
    native = native_format(future.scheme)
    if to == native:
        return
    if to in EXPORT_FORMATS:
        check_packages(EXPORT_FORMATS[to])
        if (reason := _unsaid(future, to)) is None:
            return
    else:
        reason = "knows no block types of llama.cpp's and no levels of bitsandbytes'"
    others = [native] if native else []
    others += [name for name in EXPORT_FORMATS if name != native and _says(future, name)]
    raise BadInput(f"format {to}: {reason}; {future.scheme.name} can be stored as {', '.join(others)}")


def _unsaid(future: FutureOutput, to: str) -> str | None:
    """Why a format cannot say it, without what to do; None where it can."""
    try:
        future.checked(to)
    except BadInput as error:
        reason = str(error).partition("; ")[0]
        return reason.removeprefix(f"to {to}: ").removeprefix(f"{future.folder}: ")
    return None


def _says(future: FutureOutput, to: str) -> bool:
    """Whether a format can say it, as far as is known without a package that is not installed."""
    try:
        check_packages(EXPORT_FORMATS[to])
    except BadInput:
        return False
    return _unsaid(future, to) is None
