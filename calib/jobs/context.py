"""What a running job carries from stage to stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from calib.blockwise.activation_store import ActivationStore
from calib.jobs.journal import CheckpointSlot, Journal
from calib.runtime.device import DeviceMemory


def _ignore(step: int, loss: float) -> None:
    pass


@dataclass(frozen=True)
class RunContext:
    """The services that a job's functions share: its journal, its memory budget, the slot of the training loop that
    runs now, and its progress.

    `memory_budget` is in bytes of RAM for hidden states; those that have no room there go into a nameless file in the
    journal's folder. `slot` is None where a loop is not to be resumed. `after_step(step, loss)` is called as it goes.
    """

    journal: Journal
    memory_budget: int
    slot: CheckpointSlot | None = None
    after_step: Callable[[int, float], None] = _ignore

    @property
    def folder(self) -> Path:
        """The journal's directory, for temporary files."""
        return self.journal.folder

    def without(self, memory: int) -> RunContext:
        """A copy with a memory budget of so many bytes less."""
        return replace(self, memory_budget=self.memory_budget - memory)

    def loop(self, name: str, after_step: Callable[[int, float], None]) -> RunContext:
        """A copy for a training loop that is resumed from the journal's entry `name`."""
        return replace(self, slot=CheckpointSlot(self.journal, name), after_step=after_step)

    def keeping(self, stores: Mapping[str, ActivationStore]) -> RunContext:
        """A copy whose training loop also keeps these stores, and finds them again as they were."""
        return self if self.slot is None else replace(self, slot=self.slot.keeping(stores))

    def store(self, shape: tuple[int, ...], dtype: torch.dtype, room: DeviceMemory) -> ActivationStore:
        """Room for hidden states of a shape: on the device, in RAM or on disk."""
        return ActivationStore(shape, dtype, self.memory_budget, self.folder, room)
