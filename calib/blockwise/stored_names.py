"""Which stored tensors make which parameters of a model: the library's own conversion mapping, read as data.

The library's classes name and stack parameters otherwise than checkpoints do: a mixture's experts are one parameter
and many tensors, names were changed, prefixes left out. Its loader converts whole models; here one block's parameters
are made of their own tensors alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from calib import BadInput

# An expert's matrix under a name of its own, where the library keeps all of them in one tensor also on disk: so they
# are called here once they are quantized, as codes are packed by matrix.
_EXPERT = re.compile(r"(.+)\.(\d+)\.([^.]+)\.weight")


@dataclass(frozen=True)
class Source:
    """The stored tensors that parameters are made of, with the pattern that each fits, and the conversion, if there is
    one."""

    parameters: tuple[str, ...]
    tensors: tuple[tuple[str, str | None], ...]
    converter: WeightConverter | None

    @property
    def names(self) -> list[str]:
        """Names of the stored tensors."""
        return [name for name, _ in self.tensors]


@dataclass(frozen=True)
class Piece:
    """A stored tensor as a part of a parameter: of which of its stacked matrices (None: it is not stacked, or all of
    them), and which range of rows (None: all)."""

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """This part of a parameter."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix if self.rows is None else matrix[slice(*self.rows)]


class StoredNames:
    """The sources of a model's parameters among the tensors of a checkpoint.

    Args:
        model: the library's model, on the meta device.
        stored: names of the tensors that are stored.

    Attributes:
        sources: by name of a parameter or buffer, what it is made of.
        missing: names of parameters that nothing is stored for, those apart that are others' under a second name.
        unknown: stored names that the model has no place for.
    """

    def __init__(self, model: PreTrainedModel, stored: Iterable[str]) -> None:
        self._model = model
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        state = self._state = model.state_dict()
        self._rename = partial(rename_source_key, weight_renamings=renamings, weight_converters=converters,
                               base_model_prefix=model.base_model_prefix, meta_state_dict=state)  # fmt: skip
        found = dict[str, tuple[WeightConverter | None, list[tuple[str, str | None]]]]()
        self.unknown: list[str] = []
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = self._rename(name)
            if target not in state and name in state:
                target, pattern = name, None
            if target not in state and (stacked := _EXPERT.fullmatch(target)) is not None:
                target = f"{stacked[1]}.{stacked[3]}"  # of a parameter that the library stacks on disk as well
            if target not in state:
                self.unknown.append(name)
                continue
            converter = None if pattern is None else by_pattern[pattern]
            found.setdefault(target, (converter, []))[1].append((name, pattern))
        self.sources: dict[str, Source] = {}
        for target, (converter, tensors) in found.items():
            made = [target]
            if converter is not None:  # one that makes several is named for the first
                first, *others = converter.target_patterns
                made += [target.replace(first, other) for other in others]
            source = Source(tuple(made), tuple(tensors), converter)
            self.sources |= dict.fromkeys(made, source)
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        self.missing = [name for name in state if name not in self.sources and name not in tied]

    def read(
        self, parameters: Iterable[str], read: Callable[[Iterable[str]], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Make parameters from stored tensors.

        Args:
            parameters: their names.
            read: gives stored tensors by name; it is asked for no others than these are made of.

        Returns:
            The parameters, by name.
        """
        names = set(parameters)
        made = dict[str, Tensor]()
        for source in dict.fromkeys(self.sources[name] for name in names):
            made |= self._make(source, read(source.names))
        return {name: made[name] for name in names}

    def _make(self, source: Source, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if source.converter is None:
            whole = [tensors[name] for name in source.names]
            return {source.parameters[0]: whole[0] if len(whole) == 1 else torch.stack(whole)}
        converter = deepcopy(source.converter)
        for name, pattern in source.tensors:
            assert pattern is not None
            converter.add_tensor(source.parameters[0], name, pattern, partial(tensors.__getitem__, name))
        made = converter.convert(source.parameters[0], model=self._model, config=self._model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def converted(self, stacked: Collection[str]) -> bool:
        """Whether parameters of blocks other than those called `stacked`, and their like in other blocks, are made by a
        conversion of stored tensors."""
        plain = {re.sub(r"\d+", "#", name) for name in stacked}
        return any(
            source.converter is not None and re.sub(r"\d+", "#", name) not in plain
            for name, source in self.sources.items()
        )

    def pieces(self, parameter: str, rows: Callable[[str], int]) -> tuple[Piece, ...]:
        """The stored tensors that a parameter is put together from, so that it can be written as it was read.

        Args:
            parameter: its name.
            rows: number of rows of a stored tensor.

        Returns:
            What it consists of, in order; itself, by its own name, where stored tensors are more than put together.

        Raises:
            BadInput: they are, and a tensor of the parameter's own name would be taken for something else.
        """
        source = self.sources[parameter]
        if source.converter is None:
            whole = len(source.names) == 1
            return tuple(Piece(name, None if whole else number) for number, name in enumerate(source.names))
        places = self._places(source)
        if places is not None:
            stacked, found = len(places.shape) == 3, list[Piece]()
            for expert, column in enumerate(places if stacked else [places]):
                names, start = [source.names[int(number)] for number in column.flatten()], 0
                for name in names:
                    end = start + rows(name)
                    alone = len(names) == 1
                    found.append(Piece(name, expert if stacked else None, None if alone else (start, end)))
                    start = end
            return tuple(found)
        # What is turned where its shape tells that it has to be is read as it is once it lies as the library has it.
        by_shape = all(getattr(step, "check_dims", False) for step in source.converter.operations)
        if self._rename(parameter) != (parameter, None) and not by_shape:
            raise BadInput(
                f"{source.names[0]}: the library makes '{parameter}' of it by {self._steps(source)}, which cannot be "
                "undone here; save the model once with save_pretrained of transformers, or report its type"
            )
        return (Piece(parameter),)

    def _places(self, source: Source) -> Tensor | None:
        """Numbers of stored tensors where they come to lie, (rows, 1) or (experts, rows, 1); None where the conversion
        does more than stack and concatenate rows."""
        if len(source.parameters) > 1:
            return None
        marked = {name: torch.full((1, 1), number) for number, name in enumerate(source.names)}
        try:
            (places,) = self._make(source, marked).values()
        except Exception:  # a conversion that cannot be had so small is none of those that are looked for
            return None
        whole = places.dim() in (2, 3) and places.shape[-1] == 1 and places.numel() == len(marked)
        return places if whole else None

    @staticmethod
    def _steps(source: Source) -> str:
        assert source.converter is not None
        return " and ".join(type(step).__name__ for step in source.converter.operations)
