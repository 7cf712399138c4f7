"""Tasks of lm-evaluation-harness on any model that parewell loads, beside the model that it was made from."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from calib import BadInput, first_line
from calib.model.checkpoint import find_model, read_tokenizer
from calib.runtime.device import pick_device
from calib.runtime.precision import autocast_dtype
from compressor.engine.load import load
from compressor.engine.options import EvaluateTasks

Scores = dict[str, dict[str, dict[str, float]]]  # task -> metric -> value, and stderr where the harness gives one


def evaluate_tasks(model: str | Path, options: EvaluateTasks) -> dict[str, Any]:
    """Measure a language model by tasks of lm-evaluation-harness (the extra `lm-eval`).

    Quantized outputs run as parewell loads them, with everything they do at run time.

    Args:
        model: a directory, or a name on the hub.
        options: the tasks, how many documents of them, and a reference.

    Returns:
        `tasks`: by task and metric its `value` and `stderr` (as the harness gives them), with a reference also
        `reference` and `reference_stderr`; `documents`: how many of each task; `lm_eval`: the harness's version.

    Raises:
        BadInput: the harness is not installed, a task is unknown or its data cannot be had, a model will not do.
    """
    if options.tasks is None:
        raise BadInput("tasks: none are named; give some such as arc_easy,hellaswag")
    if find_spec("lm_eval") is None:
        raise BadInput("lm_eval: is not installed; pip install 'parewell[lm-eval]'")
    from importlib.metadata import version

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [find_model(model, base_model=options.base_model, dequantize=options.dequantize)]
    if options.reference is not None:
        folders.append(find_model(options.reference))
    with redirect_stdout(sys.stderr):  # task files may print
        manager = _manager(options)
        names = _checked_tasks(options, manager)
        scores, documents = _scores(folders[0], names, manager, options)
        for folder in folders[1:]:
            reference, _ = _scores(folder, names, manager, options)
            _put_beside(scores, reference)
    return {"tasks": scores, "documents": documents, "lm_eval": version("lm_eval")}


def _manager(options: EvaluateTasks) -> Any:
    """The harness's index of tasks; of its own 14,000, which take ten seconds to read, only where one is named."""
    from lm_eval.tasks import TaskManager

    if options.include_path is not None and not options.include_path.is_dir():
        raise BadInput(f"include-path {options.include_path}: is no folder; give one with task files (.yaml)")
    further = None if options.include_path is None else str(options.include_path)
    manager = TaskManager(include_path=further, include_defaults=False)
    if all(_is_path(name) or manager.match_tasks([name]) for name in options.named):
        return manager
    return TaskManager(include_path=further)


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


def _checked_tasks(options: EvaluateTasks, manager: Any) -> list[str]:
    """Names and files of tasks, all of which can be loaded.  Raises BadInput."""
    found = [task for name in options.named for task in _named_by(name, manager)]
    for name in found:
        try:
            tasks = manager.load([name])["tasks"]
        except Exception as error:  # of YAML, of functions beside it, of data sets and of the network
            raise BadInput(
                f"task {name}: cannot be loaded ({first_line(error)}); mend its file, or make its data reachable"
            ) from error
        fixed = [n for n, task in tasks.items() if options.num_fewshot and task.get_config("num_fewshot") == 0]
        if fixed:
            raise BadInput(f"num-fewshot: task {fixed[0]} is always asked without examples; leave one of them out")
    return found


def _named_by(name: str, manager: Any) -> list[str]:
    """Registered names, or task files, that a word of --tasks stands for.  Raises BadInput."""
    if matches := manager.match_tasks([name]):
        return [str(task) for task in matches]
    path = Path(name)
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return [str(path)]
    if path.is_dir() and (files := sorted(f for f in path.glob("*.yaml") if not f.name.startswith("_"))):
        return [str(file) for file in files]
    if _is_path(name):
        raise BadInput(f"task {name}: is no task file, nor a folder of them; they end in .yaml")
    near = get_close_matches(name, manager.all_tasks, 3)
    hint = f"is one of these meant: {', '.join(near)}?" if near else "lm_eval ls tasks lists what there is"
    raise BadInput(f"task '{name}': is none of lm-evaluation-harness's, nor a file; {hint}")


def _scores(folder: Path, names: Iterable[str], manager: Any, options: EvaluateTasks) -> tuple[Scores, dict[str, int]]:
    """-> what a model scores, and on how many documents."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    device = pick_device(options.device)
    if (tokenizer := read_tokenizer(folder)) is None:
        raise BadInput(f"{folder}: has no tokenizer, and tasks are text; put one beside the weights")
    products = autocast_dtype(options.precision, device)
    model = HFLM(
        pretrained=load(folder, device=device), tokenizer=tokenizer, batch_size=options.batch_size,
        mixed_precision_dtype=products,
    )  # fmt: skip
    limit = options.limit if options.limit is None or options.limit < 1 else int(options.limit)
    found = lm_eval.simple_evaluate(
        model, tasks=list(names), num_fewshot=options.num_fewshot, limit=limit, task_manager=manager,
        log_samples=False,
    )  # fmt: skip
    scores = Scores()
    for task, figures in found["results"].items():
        numbers = {key.removesuffix(",none"): v for key, v in figures.items() if "," in key and isinstance(v, float)}
        scores[task] = {}
        for key, value in numbers.items():
            if "_stderr" not in key:
                metric, comma, chosen = key.partition(",")
                error = numbers.get(f"{metric}_stderr{comma}{chosen}")
                scores[task][key] = {"value": value} | ({} if error is None else {"stderr": error})
    return scores, {task: int(count["effective"]) for task, count in found["n-samples"].items()}


def _put_beside(scores: Scores, reference: Scores) -> None:
    """Add what the reference scores to every figure."""
    for task, metrics in scores.items():
        for metric, figure in metrics.items():
            for name, value in reference[task][metric].items():
                figure["reference" if name == "value" else f"reference_{name}"] = value
