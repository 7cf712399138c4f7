"""What is quantized to how many bits, as a value: parsed from a name such as `w4a16-g64` and written back as one.

Names mean what compressed-tensors, llm-compressor and auto-round mean by them: `W4A16` has groups of 128 weights that
share a scale, `W8A8` and `INT8` one scale per output channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from calib import BadInput
from calib.quant.block_types import BLOCK_TYPES, fitting
from calib.quant.codebooks import CODEBOOKS, e4m3
from calib.quant.grid_types import GROUPED, Grid
from calib.quant.mixtures import MIXTURES

_KIND = r"fp8|nvfp4|mxfp4|mxfp8"
_NAME = re.compile(
    rf"w([2-8]|{_KIND})a([2-8]|16|{_KIND})(?:-g([1-9]\d*)|-(channel)|-b(128)|-(tensor))?(?:-(sym|asym))?"
)
_KEYS = re.compile(r"-?kv([2-8]|fp8(?:-head)?)(?=-|$)")  # wherever it stands in a name
_ALIASES = {
    "int8": "w8a8", "fp8": "wfp8afp8-tensor", "fp8-dynamic": "wfp8afp8", "fp8-block": "wfp8afp8-b128",
    "w4afp8": "w4afp8-g128",
    "nvfp4a16": "wnvfp4a16", "nvfp4": "wnvfp4anvfp4", "mxfp4a16": "wmxfp4a16", "mxfp4": "wmxfp4amxfp4",
    "mxfp8a16": "wmxfp8a16", "mxfp8": "wmxfp8amxfp8",
}  # fmt: skip
_TABLE = re.compile(r"w([2-8])(?:-g([1-9]\d*)|-(channel))?")
GROUP = 128  # weights that share a scale where a name does not say
FP8_BLOCK = 128  # rows and columns that share a scale where a name says so

PRESETS = {
    "w4a16": "4-bit weights, a scale per 128 inputs (w4a16-g128)",
    "w4a16-g64": "4-bit weights, a scale per 64 inputs",
    "w4a16-g64-asym": "the same with zero points",
    "w4a16-channel": "4-bit weights, a scale per output channel",
    "w3a16": "3-bit weights, a scale per 128 inputs",
    "nf4": "4-bit weights at quantiles of the normal distribution, a scale per 64: bitsandbytes",
    "fp4": "4-bit weights in floating point, a scale per 64: bitsandbytes",
    "q4_k_m": "llama.cpp's mixture Q4_K_M; q3_k_s to q5_k_m likewise, for parewell export --to gguf",
    "q4_k": "llama.cpp's Q4_K throughout; q2_k to q6_k, iq4_xs and iq4_nl likewise",
    "wfp8afp8": "weights and activations in FP8, a scale per channel and per token (fp8_dynamic)",
    "wfp8afp8-b128": "the same, a scale per 128 x 128 weights and per 128 activations (fp8_block)",
    "wfp8afp8-tensor": "the same, one scale per weight, and one for its inputs found by calibration (fp8)",
    "wfp8a16": "weights alone in FP8, a scale per channel",
    "w4afp8": "4-bit weights, a scale per 128 inputs; activations in FP8",
    "wnvfp4a16": "weights in FP4, an FP8 scale per 16 inputs (nvfp4a16)",
    "wnvfp4anvfp4": "the same for activations, too (nvfp4)",
    "wmxfp4a16": "weights in FP4, a power of two per 32 inputs (mxfp4a16)",
    "wmxfp4amxfp4": "the same for activations, too (mxfp4)",
    "wmxfp8amxfp8": "weights and activations in FP8, a power of two per 32 inputs (mxfp8)",
    "w8a8": "8-bit weights and activations, a scale per channel and per token (int8)",
    "w4a8": "4-bit weights, a scale per 128 inputs; 8-bit activations",
    "w4a16kvfp8": "w4a16 with keys and values in FP8, scales found by calibration; any scheme likewise",
    "w4a16kvfp8-head": "the same, a scale for each head",
    "w4a4": "4-bit weights and activations",
    "w4a4kv4": "the same with 4-bit keys and values, a scale per output channel",
    "w4a4kv4-asym": "as published by OSTQuant: activations with zero points",
}


def _per_channel(weights: str | None, activations: str | None, kv: str | None) -> bool:
    """Whether a name of these bits that says no group size means one scale per output channel."""
    return weights == "fp8" or not (kv or "fp8").startswith("fp8") or (weights, activations) == ("8", "8")


def _without_keys(name: str) -> tuple[str, str | None]:
    """A scheme's name in lower case without what it says of keys and values, and that: bits, fp8 or fp8-head."""
    spelled = name.lower().replace("_", "-")
    found = _KEYS.search(spelled)
    return (spelled, None) if found is None else (spelled[: found.start()] + spelled[found.end() :], found[1])


def _keys_grid(kv: str | None) -> Grid | None:
    if kv is None or kv.isdecimal():
        return None if kv is None else Grid(int(kv), symmetric=False)
    return Grid(8, table=e4m3(), scales="head" if kv.endswith("head") else "tensor")


def _check_float(
    name: str, weights: str, activations: str, size: str | None, block: str | None, symmetric: bool
) -> None:
    """Raises BadInput where no loader knows such floating point; `block`: what shares a scale, where that is no row
    or part of one."""
    said = next((kind.upper() for kind in (weights, activations) if not kind.isdecimal()), "")
    if not symmetric and said:
        raise BadInput(f"scheme '{name}': {said} has no zero points; leave out -asym")
    own = next((kind for kind in (weights, activations) if kind in GROUPED), None)
    if own and activations not in ("16", weights):
        raise BadInput(f"scheme '{name}': no loader takes w{weights}a{activations}; write w{own}a16 or w{own}a{own}")
    if own and (size or block):
        raise BadInput(f"scheme '{name}': {own} has groups of {GROUPED[own].group}; leave out what comes after it")
    if weights != "fp8":
        if block == "tensor":
            raise BadInput(f"scheme '{name}': one scale per weight is of FP8 weights; write -channel")
        if block:
            raise BadInput(f"scheme '{name}': blocks of 128 x 128 are of FP8 weights; write -g128 for groups")
        return
    if size:
        raise BadInput(f"scheme '{name}': no loader takes FP8 weights in groups; leave out -g{size}, or write -b128")
    if activations not in ("16", "fp8"):
        raise BadInput(f"scheme '{name}': no loader takes FP8 weights with integer activations; write wfp8afp8")
    if block == "tensor" and activations == "16":
        raise BadInput(f"scheme '{name}': one scale per weight goes with activations in FP8; write wfp8a16")
    if block and activations == "16":
        raise BadInput(f"scheme '{name}': blocks go with activations in FP8; write wfp8afp8-b128, or wfp8a16")


def table_grid(option: str, name: str) -> Grid:
    """Read the grid of an embedding or a head: w8 has a scale per row, w4-g64 one per 64 weights, w4-channel one per
    row; q6_k and the like are llama.cpp's block types.  `option`: what asks for it.  Raises BadInput."""
    if (kind := name.lower().replace("-", "_")) in BLOCK_TYPES:
        return BLOCK_TYPES[kind].grid
    match = _TABLE.fullmatch(name.lower().replace("_", "-"))
    if match is None:
        raise BadInput(f"{option} '{name}' is unknown; write none, or w<bits>[-g<group>|-channel] with 2 to 8 bits, "
                       "such as w8 or w4-g64, or q6_k and the like")  # fmt: skip
    bits, size, channel = match.groups()
    if bits != "8" and not (size or channel):
        raise BadInput(f"{option} {name}: does not say how many weights share a scale; write {name}-g64, or "
                       f"{name}-channel for one per row")  # fmt: skip
    return Grid(int(bits), group=int(size) if size else None)


def table_grid_name(grid: Grid) -> str:
    """The name by which `table_grid` reads a grid."""
    if grid.is_block_type:
        return grid.kind
    return f"w{grid.bits}" + (f"-g{grid.group}" if grid.group else "" if grid.bits == 8 else "-channel")


def _recorded_table(step: Mapping[str, Any], role: str) -> tuple[str, Grid] | None:
    """The name and grid of an embedding or a head in a recipe's step; None where it is not quantized.  Raises
    BadInput."""
    found = step.get(role, {})
    if not isinstance(found, dict) or len(found) > 1 or not all(isinstance(one, str) for one in found.values()):
        raise BadInput(f"has an {role} that is none; make the folder again")
    return next(((name, table_grid(role, grid)) for name, grid in found.items()), None)


@dataclass(frozen=True)
class Scheme:
    """Grids of weights, of the inputs of every linear (per token), and of keys and values (per token and head).

    None means 16 bits. Keys and values in whole numbers always have zero points: no file format serves them, so there
    is nothing to be gained by the coarser grid. In FP8 each layer has one scale for its keys and one for its values.
    Where bits are `mixed`, it has those of every linear by its name on disk, and `weights` says all else of their
    grids; or every linear's block type. `mixture` is the one of llama.cpp's that these are of. `embedding` and `head`
    are (name on disk, grid) of those, where they are quantized; `ignored` are names of linears that are not.
    """

    weights: Grid
    activations: Grid | None = None
    kv: Grid | None = None
    mixed: tuple[tuple[str, int | str], ...] = ()
    mixture: str | None = None
    embedding: tuple[str, Grid] | None = None
    head: tuple[str, Grid] | None = None
    ignored: tuple[str, ...] = ()

    @staticmethod
    def parse(name: str) -> Scheme:
        """w{2..8|fp8|nvfp4|mxfp4|mxfp8}a{2..8|16|fp8|nvfp4|mxfp4|mxfp8}[kv{2..8|fp8|fp8-head}][-g{group}|-channel|-b128|
        -tensor][-sym|-asym], nf4, fp4, a block type or a mixture of llama.cpp's such as q4_k or q4_k_m, or a name of
        llm-compressor's such as int8, fp8, fp8_dynamic, fp8_block, w4afp8, nvfp4a16 or mxfp4, in upper or lower case.
        The part on keys and values may also stand elsewhere behind a hyphen, and after such a name: w4a16-kvfp8,
        fp8_dynamic-kvfp8.

        Without a group or `-channel`, 128 weights share a scale; one per output channel do for w8a8, for FP8 weights,
        and where keys and values are in whole numbers, as published. With `-b128` FP8 weights have one per 128 x 128,
        and FP8 activations one per 128 of a token's; with `-tensor` a whole weight has one, and so have its inputs,
        which calibration finds. NVFP4 has one per 16, MXFP4 and MXFP8 one per 32. The last part speaks of the
        activations, or of the weights where activations stay 16-bit; symmetric if absent. Raises BadInput.
        """
        return Scheme._parsed(name, GROUP)

    @staticmethod
    def _parsed(name: str, default_group: int | None) -> Scheme:
        spelled, kv = _without_keys(name)
        spelled = _ALIASES.get(spelled, spelled)
        kind = spelled.replace("-", "_")
        if kv and (kind in BLOCK_TYPES or kind in MIXTURES or spelled in CODEBOOKS):
            raise BadInput(f"scheme '{name}': {kind} is of weights alone; leave out kv{kv}")
        if kind in BLOCK_TYPES:
            return Scheme(BLOCK_TYPES[kind].grid)
        if kind in MIXTURES:
            return Scheme(BLOCK_TYPES[MIXTURES[kind].base].grid, mixture=kind)
        if spelled in CODEBOOKS:
            return Scheme(Grid(4, group=64, table=CODEBOOKS[spelled]()))
        match = _NAME.fullmatch(spelled)
        if not match:
            raise BadInput(
                f"scheme '{name}' is unknown; write w<bits>a<bits>[kv<bits>][-g<group>|-channel][-sym|-asym] with 2 to "
                f"8 bits, fp8, nvfp4, mxfp4 or mxfp8 (16 for activations left alone), for example {', '.join(PRESETS)}"
            )
        w, a, size, channel, block, tensor, symmetry = match.groups()
        symmetric, keys = symmetry != "asym", _keys_grid(kv)
        if not (w + a).isdecimal() or block or tensor:
            _check_float(name, w, a, size or channel, block or tensor, symmetric)
        if w in GROUPED:
            return Scheme(GROUPED[w], GROUPED.get(a), keys)
        if tensor:
            whole = Grid(8, table=e4m3(), scales="tensor")
            return Scheme(whole, whole, keys)
        group = int(size) if size else None if channel or _per_channel(w, a, kv) else default_group
        if w == "fp8":
            weights = Grid(8, table=e4m3(), group=FP8_BLOCK if block else None, rows=FP8_BLOCK if block else 1)
        else:
            weights = Grid(int(w), symmetric if a == "16" else True, group)
        if a == "16":
            return Scheme(weights, None, keys)
        if a == "fp8":
            return Scheme(weights, Grid(8, table=e4m3(), group=FP8_BLOCK if block else None), keys)
        return Scheme(weights, Grid(int(a), symmetric), keys)

    def weights_only(self) -> Scheme:
        """A copy that leaves activations, keys and values alone; FP8 in blocks goes with such activations alone, and
        becomes that with a scale per output channel; so does FP8 with one for all."""
        whole = self.weights.rows > 1 or self.weights.scales == "tensor"
        weights = replace(self.weights, group=None, rows=1, scales="any") if whole else self.weights
        return replace(self, weights=weights, activations=None, kv=None)

    def with_bits(self, bits: Mapping[str, int | str]) -> Scheme:
        """A copy with bits, or a block type, for each linear, by name on disk; an empty mapping: the same for all."""
        return replace(self, mixed=tuple(bits.items()))

    @property
    def has_fixed_inputs(self) -> bool:
        """Whether inputs are rounded by numbers that are found once, by calibration."""
        return self.activations is not None and self.activations.is_fixed

    @property
    def has_fixed_keys(self) -> bool:
        """Whether keys and values are rounded by numbers that are found once, by calibration."""
        return self.kv is not None and self.kv.is_fixed

    @property
    def has_own_keys(self) -> bool:
        """Whether keys and values are rounded in a way that no file format knows: per token and head."""
        return self.kv is not None and not self.kv.is_fixed

    @cached_property
    def bits(self) -> dict[str, int | str]:
        """Bits of each linear, or its block type, by name on disk, where they differ."""
        return dict(self.mixed)

    @property
    def tables(self) -> dict[str, Grid]:
        """Grids of embedding and head, where they are quantized, by name on disk."""
        return dict(one for one in (self.embedding, self.head) if one is not None)

    def of(self, name: str) -> Scheme:
        """The scheme of one matrix, by its name on disk: that of embedding or head rounds weights alone."""
        grid = self.tables.get(name)
        return self if grid is None else Scheme(grid)

    def grid(self, linear: str) -> Grid:
        """The grid of a linear's weights, by its name on disk; also of an embedding's and a head's."""
        if (table := self.tables.get(linear)) is not None:
            return table
        own = self.bits[linear] if self.mixed else self.weights.bits
        if isinstance(own, str):
            return BLOCK_TYPES[own].grid
        return replace(self.weights, bits=own)

    @property
    def recorded(self) -> dict[str, Any]:
        """The scheme as a recipe has it."""
        tables = {"embedding": self.embedding, "lm_head": self.head}
        named = {role: {one[0]: table_grid_name(one[1])} for role, one in tables.items() if one is not None}
        ignored = {"ignored": list(self.ignored)} if self.ignored else {}
        return {"scheme": self.name} | ({"bits": self.bits} if self.mixed else {}) | named | ignored

    @staticmethod
    def read(step: Mapping[str, Any]) -> Scheme:
        """Read the scheme of a recipe's step.  Raises BadInput where the step names none."""
        name, bits = step.get("scheme"), step.get("bits", {})
        if not isinstance(name, str):
            raise BadInput("does not say how the folder was quantized; make it again")
        known = isinstance(bits, dict) and all(
            b in BLOCK_TYPES or (type(b) is int and 2 <= b <= 8) for b in bits.values()
        )
        if not known:
            raise BadInput("has bits that are not from 2 to 8 for each linear; make the folder again")
        found = Scheme.parse(Scheme.recorded_name(name)).with_bits(bits)
        ignored = step.get("ignored", [])
        if not isinstance(ignored, list) or not all(isinstance(one, str) for one in ignored):
            raise BadInput("has names of ignored linears that are none; make the folder again")
        embedding, head = (_recorded_table(step, role) for role in ("embedding", "lm_head"))
        return replace(found, embedding=embedding, head=head, ignored=tuple(ignored))

    @staticmethod
    def recorded_name(name: str) -> str:
        """The name, today, of a scheme that a recipe calls `name`.

        Recipes say a group size wherever there is one. In those of before November 2026 `w4a16` and the like had one
        scale per output channel.
        """
        return Scheme._parsed(name, None).name

    @staticmethod
    def says_group(name: str) -> bool:
        """Whether a name that `parse` takes says how many weights share a scale."""
        match = _NAME.fullmatch(_without_keys(name)[0])
        return match is None or match[3] is not None or match[4] is not None

    def with_group(self, group: int | None) -> Scheme:
        """A copy with so many weights that share a scale; None: one scale per output channel."""
        return replace(self, weights=replace(self.weights, group=group))

    @property
    def table_name(self) -> str | None:
        """The name of the codebook, where levels are not evenly spaced."""
        return next((name for name, levels in CODEBOOKS.items() if self.weights.table == levels()), None)

    @property
    def name(self) -> str:
        """The scheme's full name, such as w4a16-g128."""
        if self.mixture or self.table_name or self.weights.is_block_type:
            return self.mixture or self.table_name or self.weights.kind
        w, a = self.weights, self.activations
        kinds = [None if grid is None else grid.kind for grid in (w, a, self.kv)]
        name = f"w{kinds[0]}a{kinds[1] or 16}" + (f"kv{kinds[2]}" if self.kv else "")
        if w.rows > 1:
            name += f"-b{w.rows}"
        elif w.scales == "tensor":
            name += "-tensor"
        elif w.kind in GROUPED:
            return name
        elif w.group:
            name += f"-g{w.group}"
        elif not _per_channel(*kinds):
            name += "-channel"
        return name + ("" if (a or w).symmetric else "-asym")

    def check_widths(self, widths: Iterable[tuple[str, int]]) -> None:
        """Raises BadInput, naming the first layer whose input width the group size does not divide."""
        group = None if self.weights.is_block_type else self.weights.group  # these are fitted one by one
        widths = list(widths)
        for name, width in widths:
            if group and width % group:
                nearest = self.fitted(width for _, width in widths)
                instead = f"the nearest that fits every layer is {nearest.name} (quantize --group-size auto takes it)"
                raise BadInput(
                    f"scheme {self.name}: group size {group} does not divide the input width {width} of '{name}'; "
                    + (instead if nearest != self else "take wfp8a16, or whole numbers such as w4a16")
                )

    def fitted(self, widths: Iterable[int]) -> Scheme:
        """A copy with the largest group size up to the scheme's, 8 or more, that divides all `widths`; else with one
        scale per output channel."""
        group, widths = self.weights.group, list(widths)
        if group is None or not self.weights.is_even:
            return self
        return self.with_group(next((g for g in range(group, 7, -1) if all(w % g == 0 for w in widths)), None))

    def in_blocks(self, widths: Mapping[str, int], kinds: Mapping[str, str] | None = None) -> Scheme:
        """A copy for linears of such input widths, by name, where weights are in a block type: each in the one of
        `kinds`, or all in the scheme's; or in what llama.cpp takes for rows that it does not divide.  Raises BadInput
        where nothing does."""
        if not self.weights.is_block_type or self.mixed:
            return self
        found = dict[str, int | str]()
        for name, width in widths.items():
            kind = fitting((kinds or {}).get(name, self.weights.kind), width)
            if kind is None:
                raise BadInput(f"scheme {self.name}: no block of llama.cpp's divides the input width {width} of "
                               f"'{name}'; take whole numbers such as w4a16-channel")  # fmt: skip
            found[name] = kind
        return self.with_bits(found if {*found.values()} != {self.weights.kind} else {})

    def bits_per_weight(self, linear: str, width: int, scale_bits: int = 16) -> float:
        """Including scales and zero points, for a linear with `width` inputs."""
        grid = self.grid(linear)
        if grid.is_block_type:
            return BLOCK_TYPES[grid.scales].bits_per_weight
        if self.table_name:
            scale_bits = 32  # whatever else is kept in
        if grid.scales == "tensor":
            return grid.bits  # one scale for all of them counts for nothing
        if grid.scales != "any":
            scale_bits = 8
        zero_bits = 0 if grid.symmetric else grid.bits
        return grid.bits + (scale_bits + zero_bits) / ((grid.group or width) * grid.rows)
