"""The table of all formats: a row for each codec's layouts and each export format, as the modules that write them
describe themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compressor.exporters.export import format_of
from compressor.exporters.options import COMPRESSED_TENSORS, EXPORT_FORMATS, STORED_FORMATS, Export
from compressor.storage.codecs import CODECS
from compressor.storage.description import FormatDescription

HEADINGS_OF_FORMATS = (
    "format", "`--format`, `--to`", "what is written", "bits", "groups", "zero points", "mixed bits", "activations",
    "embedding and head", "read by", "hardware", "bits a weight",
)  # fmt: skip


@dataclass(frozen=True)
class FormatRow:
    """A format, the name by which `quantize --format` asks for it, and the one of `export --to`; "" where none does."""

    about: FormatDescription
    format: str
    to: str
    readers: tuple[str, ...]

    def asdict(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return {"format": self.format or None, "to": self.to or None} | asdict(self.about) | {"readers": self.readers}

    @property
    def name(self) -> str:
        """The name by which options ask for it, and where one of them does not."""
        alone = "" if self.format and self.to else f" (`{'--format' if self.format else '--to'}` alone)"
        return f"{self.format or self.to}{alone}" if self.format or self.to else "–"

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of HEADINGS_OF_FORMATS."""
        about = self.about
        yes = {True: "yes", False: "no"}
        bits = about.bits_per_weight + (f" (+ {about.zero_bits} with zero points)" if about.zero_bits else "")
        return (
            about.title, self.name, about.contents, about.bits, about.groups,
            yes[about.zero_points], yes[about.mixed], about.activations, about.tables, ", ".join(self.readers),
            about.hardware, bits,
        )  # fmt: skip


def format_rows() -> list[FormatRow]:
    """All formats: those that `quantize` writes, then those that `export` does.  One that both write, as NF4, stands
    among the latter."""
    exported = {name: format_of(Export(to=name)).about for name in EXPORT_FORMATS}
    titles = {about.title for about in exported.values()}
    rows = [
        FormatRow(about, codec if codec == COMPRESSED_TENSORS else "", "", about.readers)
        for codec, entry in CODECS.items()
        for about in entry.descriptions.values()
        if about.title not in titles
    ]
    return rows + [
        FormatRow(about, name if name in STORED_FORMATS else "", name, (*EXPORT_FORMATS[name].loaders, *about.readers))
        for name, about in exported.items()
    ]


def markdown_table(rows: Sequence[FormatRow]) -> str:
    """The table as docs/formats.md has it."""
    lines = [HEADINGS_OF_FORMATS, ("---",) * len(HEADINGS_OF_FORMATS), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
