"""parewell's Python API: smaller transformer models, and models that forget, with proof that it worked.

    from parewell import Quantize, quantize

    report = quantize("model", "out", Quantize(scheme="w4a16-g64"))

Each job is a function of a model, an output directory and an options class, whose fields are the options of the command
of the same name; it returns its report, which is also written to report.json. Nothing heavy is imported before it is
used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib.runtime.lazy_imports import import_lazily

if TYPE_CHECKING:
    from calib import BadInput, Damaged, Diverged, Failed, NoSpace, Recovered
    from cli.gates import audit, gate
    from compressor import (
        Distill,
        Evaluate,
        EvaluateTasks,
        Export,
        Quantize,
        Soup,
        distill,
        evaluate,
        evaluate_tasks,
        export,
        load,
        quantize,
        soup,
    )
    from unlearn import Attribute, Audit, Unlearn, attribute, unlearn

__all__ = [
    "Attribute", "Audit", "BadInput", "Damaged", "Distill", "Diverged", "Evaluate", "EvaluateTasks", "Export", "Failed",
    "NoSpace", "Quantize", "Recovered", "Soup", "Unlearn", "attribute", "audit", "distill", "evaluate",
    "evaluate_tasks", "export", "gate", "load", "quantize", "soup", "unlearn",
]  # fmt: skip

import_lazily(
    __name__,
    dict.fromkeys(("BadInput", "Damaged", "Diverged", "Failed", "NoSpace", "Recovered"), "calib")
    | dict.fromkeys(("Distill", "Evaluate", "EvaluateTasks", "Export", "Quantize", "Soup"), "compressor")
    | dict.fromkeys(("distill", "evaluate", "evaluate_tasks", "export", "load", "quantize", "soup"), "compressor")
    | dict.fromkeys(("Attribute", "Audit", "Unlearn", "attribute", "unlearn"), "unlearn")
    | {"audit": "cli.gates", "gate": "cli.gates"},
)
