"""Options of an audit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from calib import BadInput
from calib.jobs.options import check_options, flag_name, option
from calib.runtime.choices import DEVICES
from unlearn.options.rows import RowOptions

FORMS = "w8a16-channel,w4a16-channel,nf4"  # that an audit brings models to
OF_FACTS = ("facts", "original", "oracle", "length", "seed", "device")  # options that an audit of facts reads


@dataclass(frozen=True, kw_only=True)
class Audit(RowOptions):
    """Options of an audit: which rows the original model was trained on, and which were forgotten, as for `Unlearn`."""

    original: Path | None = option(None, "the model before it forgot", group="basic")
    oracle: Path | None = option(None, "a model of the same kind, retrained without the forget set", group="basic")
    forms: str | None = option(
        None,
        "forms to quantize to: w4a16, nf4 and such by rounding to nearest, gptq:w4a16-g64 with GPTQ, learned:w4a16-g64 "
        f"with learned transforms; default: {FORMS}",
        group="basic",
    )
    facts: Path | None = option(
        None,
        "instead, rows with name and description: what MODEL, a causal or a masked language model, knows of them in "
        "both directions, block by block, beside --original and --oracle where they are given",
        group="basic",
    )
    data: Path | None = option(
        None, "calibration text of GPTQ and learned forms; default: the embedded text", group="data"
    )
    samples: int = option(128, "calibration rows of 512 tokens", group="data", ge=1)
    relearn: int = option(
        0, "steps of training on half of the forget set, to measure how much of the other half is recovered",
        group="proof", ge=0,
    )  # fmt: skip
    relearn_lr: float = option(
        1e-3, "learning rate of relearning (AdamW, 8 rows per step)", group="proof", gt=0, needs="relearn"
    )
    seed: int = option(0, "random seed", ge=0)
    device: str = option("auto", "where to compute", DEVICES, group="basic")

    def __post_init__(self) -> None:
        check_options(self)
        if self.facts is not None:
            self._check_alone()
            return
        self.check_rows()
        for name in ("original", "oracle"):
            if getattr(self, name) is None:
                raise BadInput(f"{name}: is not given; an audit compares models on rows, give --{name} PATH")
        if not self.named or len(set(self.named)) < len(self.named):
            raise BadInput(f"forms '{self.forms}': must name some, each once, such as w4a16,nf4")
        if self.data is not None and not any(":" in form for form in self.named):
            raise BadInput("data: rounding to nearest needs none; leave it out, or add a form such as gptq:w4a16-g64")

    def _check_alone(self) -> None:
        """Raises BadInput for an option that an audit of facts does not read."""
        for f in fields(self):
            if f.name not in OF_FACTS and getattr(self, f.name) != f.default:
                raise BadInput(
                    f"{flag_name(f.name)}: changes nothing with --facts, which are audited alone; leave it out"
                )

    @property
    def named(self) -> list[str]:
        """Names of the forms that models are quantized to."""
        return [form.strip() for form in (FORMS if self.forms is None else self.forms).split(",") if form.strip()]
