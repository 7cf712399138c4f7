"""A model while it is quantized: its blocks on disk, and everything that is done to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from calib.blockwise.model import BlockwiseModel, Params
from calib.data.corpus import Corpus
from calib.probe.parts import ModelParts
from calib.quant.scheme import Scheme
from compressor.engine.runtime_transforms import RuntimeTransforms
from compressor.quantization.learn_transforms import Transforms
from compressor.quantization.objective import LearningResult
from compressor.quantization.rounding import RoundedBlock
from compressor.storage.quantized_linear import Rounded

Profile = dict[str, dict[str, Any]]  # linear -> QSUR and channel ranges of its weights and inputs


@dataclass(frozen=True)
class Splits:
    """The rows of a job: calibration (N, T) and held-out (M, T), of which each process runs its own share; `like` those
    of deployment, with which the calibration rows are compared, where there are any."""

    calibration: Corpus
    held_out: Corpus
    like: Corpus | None = None


@dataclass(frozen=True)
class QuantizedModel:
    """The float model `stream` with what it becomes: what is no block's as it will be stored, transforms to fold into
    each block (None: none), what runs beside each block, and the grids of its linears; `tables` are embedding and head
    as they are stored, by name on disk, as far as they are rounded."""

    stream: BlockwiseModel
    scheme: Scheme
    outer: Params
    transforms: Transforms | None
    online: Sequence[RuntimeTransforms]
    tables: Mapping[str, Rounded] = field(default_factory=dict)

    @property
    def is_exact_outside(self) -> bool:
        """Whether what is no block's is the float model's own: neither turned nor rounded."""
        return (self.transforms is None or self.transforms.residual is None) and not self.scheme.tables

    def with_scheme(self, scheme: Scheme) -> QuantizedModel:
        """A copy with another scheme."""
        return replace(self, scheme=scheme)


@dataclass(frozen=True)
class QuantizationResult:
    """The results of a job's stages, from which the output is written.

    `parts` are the model's, as far as its weights admit transforms of them; `block(i)` is block i as it will be stored;
    `before` (empty where nothing is transformed) and `after` are profiles of every block; `figures` are by stage, the
    last of them those of the output; `learning` says how learning went, by stage; `parameters` counts what was fitted,
    codes aside; `precision` says how bits were allocated, None where all linears have the scheme's; `table_errors` are
    relative ones of embedding and head, where they are rounded.
    """

    model: QuantizedModel
    parts: ModelParts
    precision: dict[str, Any] | None
    block: Callable[[int], RoundedBlock]
    before: list[Profile]
    after: list[Profile]
    figures: dict[str, dict[str, Any]]
    learning: dict[str, LearningResult]
    parameters: int
    table_errors: dict[str, float]

    @property
    def final(self) -> dict[str, Any]:
        """Figures of the output."""
        return list(self.figures.values())[-1]
