"""Models that a job trains beside its own, a group at a time: each group is kept as soon as it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.func import vmap

from calib import BadInput, first_line
from calib.jobs.journal import CheckpointSlot, Journal, stop_if_asked
from calib.runtime.distributed import sharing, world_size
from calib.runtime.memory import is_out_of_memory
from calib.runtime.progress import Done, stage
from unlearn.model.ensemble import Ensemble, StackedParams, train_ensemble
from unlearn.model.examples import Examples
from unlearn.model.model import TrainableModel
from unlearn.model.training_recipe import Training

MODELS_PER_GROUP = 100  # stacked models in a group


@dataclass(frozen=True)
class EnsembleTrainer:
    """`reopen` opens the model again, in another process."""

    trainable: TrainableModel
    rows: Examples
    training: Training
    journal: Journal
    reopen: Callable[[], TrainableModel]
    workers: str = "here"

    def group(self, masks: Tensor) -> list[slice]:
        """Slices of models that are trained together."""
        size = MODELS_PER_GROUP if self.trainable.stackable else 1
        return [slice(i, min(i + size, len(masks))) for i in range(0, len(masks), size)]

    def train(
        self, name: str, masks: Tensor, seeds: Sequence[int], keep: Callable[[Ensemble], dict[str, Tensor]]
    ) -> Iterator[dict[str, Tensor]]:
        """Train a model on each of masks (M, n), with its seed.  -> what `keep` makes of each group of models.

        Groups are on pages `name-0`, `name-1`, ..., each computed once, by one of torchrun's processes, whoever asks
        for it again.
        """
        groups, epochs = self.group(masks), self.training.epochs
        left = [i for i in range(len(groups)) if f"{name}-{i}" not in self.journal]
        pages = {i: CheckpointSlot(self.journal, f"{name}-{i}-training") for i in left}
        begun = sum(int((page.notes() or {"epochs": 0})["epochs"]) for page in pages.values())
        begun += (len(groups) - len(left)) * epochs
        with stage(f"train {name}", len(groups) * epochs, "epochs", begun) as done:
            if self.workers == "ray" and len(left) > 1:
                self._by_ray(name, masks, seeds, keep, left, done)
            else:
                with sharing() as own:
                    for i in own(range(len(groups))):
                        if i not in pages:
                            continue
                        some = groups[i]
                        models = _trained(
                            self.trainable, self.rows, masks[some], seeds[some], self.training, pages[i], done
                        )
                        self._keep(name, i, keep(models))
        for i in range(len(groups)):
            yield self.journal.read(f"{name}-{i}")[0]

    def _keep(self, name: str, group: int, tensors: dict[str, Tensor]) -> None:
        self.journal.write(f"{name}-{group}", tensors, {})
        (self.journal.folder / f"{name}-{group}-training.page").unlink(missing_ok=True)
        stop_if_asked()

    def _by_ray(
        self, name: str, masks: Tensor, seeds: Sequence[int], keep: Callable[[Ensemble], dict[str, Tensor]],
        left: Sequence[int], done: Done,
    ) -> None:  # fmt: skip
        import ray  # not everyone has it

        groups, began = self.group(masks), not ray.is_initialized()
        if began:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            rows, reopen, training = ray.put(self.rows), self.reopen, self.training
            stackable = self.trainable.stackable
            threads = torch.get_num_threads()

            @ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]
            def task(rows: Examples, masks: Tensor, seeds: Sequence[int]) -> StackedParams:
                torch.set_num_threads(threads)
                return _trained(
                    replace(reopen(), stackable=stackable), rows, masks, seeds, training, None, lambda: None
                ).params

            waiting = {task.remote(rows, masks[groups[i]], seeds[groups[i]]): i for i in left}
            while waiting:
                (ready,), _ = ray.wait(list(waiting))
                models = self.trainable.of({n: p.to(self.trainable.device) for n, p in ray.get(ready).items()})
                self._keep(name, waiting.pop(ready), keep(models))
                done(units=training.epochs)
        finally:
            if began:
                ray.shutdown()

    def models(self, name: str, masks: Tensor, seeds: Sequence[int]) -> Ensemble:
        """Train a model on the rows of each mask, or read it where it is kept."""
        groups = list(self.train(name, masks, seeds, lambda models: models.params))
        device = self.trainable.device
        return self.trainable.of({n: torch.cat([group[n] for group in groups]).to(device) for n in groups[0]})


def check_workers(workers: str) -> None:
    """Check that the kind of workers is known and can be used here.  Raises BadInput."""
    if workers == "ray" and world_size() > 1:
        raise BadInput("workers ray: torchrun's processes share the models already; leave out one of the two")
    if workers == "ray" and find_spec("ray") is None:
        raise BadInput("ray: is not installed; pip install 'parewell[ray]'")


def check_learning(trainable: TrainableModel, rows: Examples) -> None:
    """Raises BadInput where the model cannot run in training mode; where many cannot at once, they will one by one."""
    if trainable.learning is None:
        return
    learning, some = trainable.learning, rows[:2].to(trainable.device)

    def tried(state: StackedParams) -> Tensor:
        own = {name: tensor.clone() for name, tensor in state.items()}
        return learning({**own, **{name: state[name] for name in trainable.params}}, some)

    state = {name: p.clone().requires_grad_(name in trainable.params) for name, p in trainable.state.items()}
    try:
        tried(state).sum().backward()
    except Exception as error:  # what a model is made of may raise anything
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{trainable.folder}: the model cannot run in training mode ({first_line(error)})") from error
    if trainable.stackable:
        two = {name: torch.stack([p, p]) for name, p in state.items()}
        try:
            vmap(tried, randomness="different")(two).sum().backward()
        except Exception as error:  # not every operation can run under vmap
            if is_out_of_memory(error):
                raise
            trainable.stackable = False


def _trained(
    trainable: TrainableModel,
    rows: Examples,
    masks: Tensor,
    seeds: Sequence[int],
    config: Training,
    page: CheckpointSlot | None,
    done: Callable[[], None],
) -> Ensemble:
    models = trainable.many([trainable.fresh(seed) for seed in seeds])
    whole = replace(models, frozen=trainable.adapters)  # whatever is moved later
    return train_ensemble(whole, rows, masks, seeds, config, page=page, done=done)


def all_rows_but(rows: int, deleted: Tensor) -> Tensor:
    """bool (rows,): true but at the numbers `deleted`."""
    mask = torch.ones(rows, dtype=torch.bool)
    mask[deleted] = False
    return mask
