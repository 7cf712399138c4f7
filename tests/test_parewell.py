"""`import parewell`: everything a pipeline needs, from one module, without torch until it is used."""

from __future__ import annotations

import dataclasses
import inspect
import sys

import parewell
from tests.processes import run


def test_every_name_is_there_and_is_the_one_of_the_package() -> None:
    for name in parewell.__all__:
        value = getattr(parewell, name)
        assert callable(value) and value.__module__.split(".")[0] in ("calib", "compressor", "unlearn", "cli"), name
    assert set(parewell.__all__) <= set(dir(parewell))


def test_each_job_takes_its_options_class() -> None:
    jobs = {"quantize": "Quantize", "distill": "Distill", "evaluate": "Evaluate", "export": "Export",
            "unlearn": "Unlearn", "audit": "Audit"}  # fmt: skip
    for job, options in jobs.items():
        assert dataclasses.is_dataclass(getattr(parewell, options))
        assert options in str(inspect.signature(getattr(parewell, job)).parameters["options"].annotation)


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    script = (
        "import sys, parewell; parewell.Quantize(scheme='w4a16-channel'); parewell.BadInput;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules;"
        "assert not hasattr(parewell, 'nothing')"
    )
    done = run([sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr
