"""Models that are held in memory whole: a student that is trained, a teacher that answers while it is.

A student may be fake-quantized. What is trained of a weight is its share of the reach of its grid, in single precision;
the weight itself is put on the grid anew in every step, with gradients straight through the rounding, and the grids'
scales are learned too (LSQ, arXiv:1902.08153). In these units one learning rate does for all rows and layers: Adam's
steps are alike for all parameters, and the steps of the grids of one model differ by a factor of fifty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig

from calib import BadInput, first_line
from calib.blockwise.arguments import hidden_of
from calib.blockwise.attention_hooks import EAGER
from calib.blockwise.in_memory import BlockParts, block_parts
from calib.blockwise.skeleton import skeleton
from calib.blockwise.thin import ThinProducts, drawn_lines
from calib.data.corpus import Corpus
from calib.losses.chunked_head import Head
from calib.model.conversion import pretrained
from calib.model.weights import Weights
from calib.probe.find import find_parts, walk_of_config
from calib.runtime.distributed import shard
from calib.stats.perplexity import Logits
from compressor.distillation.fake_quant import FakeQuantizer, NormalizedWeight

SAME_HEAD = 1e-4  # relative difference of logits that single precision leaves
ModelInputs = Tensor | Mapping[str, Tensor]  # ids (B, T) of a causal LM, or another model's arguments by name


def load_quantized(folder: Path, device: torch.device, bits: str) -> Any:
    """A model whose linears are kept in 4 or 8 bits by bitsandbytes: "nf4" or "int8"."""
    Weights(folder)  # refuses what is incomplete, or leads outside the folder
    four: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    options = BitsAndBytesConfig(**{"nf4": four, "int8": {"load_in_8bit": True}}[bits])
    return pretrained(
        AutoModelForCausalLM, folder, dtype=torch.float32, quantization_config=options, device_map={"": device}
    )[0]


def shard_student(model: Any, device: torch.device) -> Any:
    """A model whose blocks are sharded over all processes, which compute on `device`."""
    blocks = [model.get_submodule(block.name) for block in block_parts(model.config)]
    shard(model.base_model, blocks, device)
    return model


@torch.no_grad()
def check_head(config: PretrainedConfig, folder: Path) -> int:
    """Hold the head that losses go through against the library's own way from the last hidden state to logits, with
    parameters that are drawn and take no memory.

    Returns:
        Numbers in the state that the head reads.

    Raises:
        BadInput: they differ, or the model has no head of its own.
    """
    cpu = torch.device("cpu")
    model: Any = skeleton(config, cpu)
    drawn, start = drawn_lines(model, torch.float32, cpu, 0), f"{model.base_model_prefix}."
    body = {name.removeprefix(start): p for name, p in drawn.items() if name.startswith(start)}
    inputs = {"input_ids": torch.arange(6).view(1, 6) % config.get_text_config().vocab_size, "use_cache": False}
    reason = "it has no head of its own"
    try:
        with ThinProducts():
            logits = functional_call(model, drawn, (), inputs, strict=False, tie_weights=False).logits
            last = functional_call(model.base_model, body, (), inputs, strict=False, tie_weights=False)
        linear = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is linear)
        own = Head.as_configured(config, drawn[f"{name}.weight"], drawn.get(f"{name}.bias"))(last[0])
        apart = float((own - logits).abs().max() / logits.abs().max())
        reason = f"what stands between its last hidden state and its logits is not known (they differ by {apart:.0e})"
        if apart < SAME_HEAD:
            return last[0].shape[-1]
    except (AttributeError, IndexError, StopIteration, RuntimeError) as error:
        reason = f"{reason} ({first_line(error)})"
    raise BadInput(
        f"{folder / 'config.json'}: {config.model_type} is no teacher or student here, as {reason}; give another model"
    )


@dataclass(frozen=True)
class HiddenStates:
    """hidden (B, T, d): where all are asked for, before the first block and after each; what the head sees always,
    last.  attention (B, H, T, T): each block's distributions over keys, where they are asked for."""

    hidden: tuple[Tensor, ...]
    attention: tuple[Tensor, ...] = ()


class Student:
    """A language model in single precision, all of it trained, or what requires gradients of it."""

    def __init__(
        self, model: Any, products: torch.dtype | None, vocab: int, fakes: Mapping[str, FakeQuantizer],
        blocks: Sequence[BlockParts] | None = None,
    ) -> None:  # fmt: skip
        """`fakes` are by name of the weight that they quantize; `products` is the dtype of matrix products; `blocks`
        are those whose states are compared, of a causal LM all."""
        self.model, self.fakes, self._products = model, dict(fakes), products
        self._whole = model.get_base_model() if hasattr(model, "get_base_model") else model  # past adapters
        self.head = Head.of(model, vocab)
        weights = dict(model.named_parameters())
        self._shares = {name: NormalizedWeight(weights[name], fake) for name, fake in self.fakes.items()}
        self._quantized: dict[str, Tensor] = {}
        self._blocks = blocks

    @property
    def whole(self) -> Any:
        """The library's model, adapters included."""
        return self._whole

    @property
    def params(self) -> list[Tensor]:
        """Parameters that are trained, without the scales of grids."""
        return [
            self._shares[name].trained if name in self._shares else p
            for name, p in self.model.named_parameters()
            if p.requires_grad
        ]

    @property
    def scales(self) -> list[Tensor]:
        """Logarithms of the scales of fake-quantized linears, which are trained too."""
        return [fake.log_scale for fake in self.fakes.values()]

    def train(self, *, checkpointing: bool) -> None:
        """Have the model learn, and keep fewer activations for that with `checkpointing`."""
        if checkpointing:  # the library's name for it has changed
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)()
        self.model.train()

    def begin(self) -> None:
        """Put all weights on their grids, once for all rows of a step."""
        for name, fake in self.fakes.items():
            self._quantized[name] = fake.value(self._shares[name].weight())
            with torch.no_grad():
                self.model.get_parameter(name).copy_(self._quantized[name])

    def end(self) -> None:
        """Pass the gradients that have gathered at the quantized weights on to shares and scales."""
        for name in list(self._quantized):
            quantized, p = self._quantized.pop(name), self.model.get_parameter(name)
            if p.grad is not None:
                quantized.backward(p.grad)
                p.grad = None

    @torch.no_grad()
    def keep_stored(self, dtype: torch.dtype) -> None:
        """Round everything to the dtypes that it is stored in: what is measured from now on is what will be loaded."""
        for name, p in self.model.named_parameters():
            if (fake := self.fakes.get(name)) is None:
                p.copy_(p.to(dtype))
            else:
                rounded = fake.rounded(self._shares[name].weight(), dtype)
                fake.log_scale.copy_(rounded.scale.to(p.dtype).log())
                p.copy_(rounded.weight())

    @property
    def device(self) -> torch.device:
        """The device that the student is on."""
        return self.head.weight.device

    @cached_property
    def blocks(self) -> list[BlockParts]:
        """The student's blocks, in the order in which it runs them."""
        return block_parts(self.model.config) if self._blocks is None else list(self._blocks)

    @property
    def width(self) -> int:
        """Numbers in a token's hidden state between blocks."""
        return int(self.model.config.get_text_config().hidden_size)

    @cached_property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the head; the identity where there is none."""
        norms = final_norms(self.model.config)
        return self._whole.get_submodule(norms[0]) if norms else nn.Identity()

    def states(self, ids: ModelInputs, *, every: bool = False, attention: bool = False) -> HiddenStates:
        """ids (B, T), or what else a model is given -> what goes through it; of all blocks where `every`."""
        blocks = self.blocks if every or attention else []
        return _states(self._whole, ids, self._products, blocks, attention=attention)

    def hidden(self, ids: ModelInputs) -> Tensor:
        """ids (B, T), or what else a model is given -> what the head sees (B, T, d)."""
        return self.states(ids).hidden[-1]

    @contextmanager
    def answering(self) -> Iterator[Any]:
        """Within it the student answers and learns nothing: no dropout, no graph, weights on their grids.  -> the
        library's model, adapters included."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            self.begin()
            try:
                yield self._whole
            finally:
                self._quantized.clear()
                self.model.train(training)


class Teacher:
    """A language model that answers; nothing of it is trained."""

    def __init__(
        self, model: Any, products: torch.dtype | None, vocab: int, blocks: Sequence[BlockParts] | None = None
    ) -> None:
        self.model, self._products = model.eval().requires_grad_(False), products
        self.head = Head.of(model, vocab)
        self._blocks = blocks

    @cached_property
    def blocks(self) -> list[BlockParts]:
        """The teacher's blocks, in the order in which it runs them."""
        return block_parts(self.model.config) if self._blocks is None else list(self._blocks)

    @property
    def width(self) -> int:
        """Numbers in a token's hidden state between blocks."""
        return int(self.model.config.get_text_config().hidden_size)

    @torch.no_grad()
    def states(self, ids: ModelInputs, *, every: bool = False, attention: bool = False) -> HiddenStates:
        """ids (B, T), or what else a model is given -> what goes through it; of all blocks where `every`."""
        blocks = self.blocks if every or attention else []
        return _states(self.model, ids, self._products, blocks, attention=attention)

    def hidden(self, ids: ModelInputs) -> Tensor:
        """ids (B, T), or what else a model is given -> what the head sees (B, T, d)."""
        return self.states(ids).hidden[-1]


class _HeadReached(Exception):
    """A model has made all that its head reads."""


def states_before_head(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """Run a model of the library's up to its head, which is not run.

    Args:
        model: with output embeddings; encoder-decoders and masked language models too.
        given: arguments of its forward, by name.

    Returns:
        What the output embeddings are given (B, T, d), with a graph: scaled, as T5's are where they are tied, and
        transformed, as BERT's are.
    """
    found = list[Tensor]()

    def reached(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(inputs[0])
        raise _HeadReached

    hook = model.get_output_embeddings().register_forward_pre_hook(reached)
    try:
        model(**given, **({"use_cache": False} if "decoder_input_ids" in given else {}))
    except _HeadReached:
        pass
    finally:
        hook.remove()
    return found[0]


def given_of(corpus: Corpus) -> ModelInputs:
    """Inputs of models for all rows of a corpus: the ids alone, which a causal LM reads from left to right, or a
    forward's arguments by name."""
    return corpus.ids if corpus.sources is None and corpus.hidden is None else corpus.inputs


def inputs_on(given: ModelInputs, device: torch.device, some: slice = slice(None)) -> ModelInputs:
    """Some rows of what models are given, on a device."""
    if isinstance(given, Tensor):
        return given[some].to(device)
    return {name: value[some].to(device) for name, value in given.items()}


def at_targets(states: Tensor, counted: Tensor, *, ahead: bool = True) -> Tensor:
    """The states (n, ...) that tell the tokens that count.

    Args:
        states: (B, T, ...), one for each position.
        counted: (B, T - 1), true where the token at the next position counts.
        ahead: a token is told at the position before it; else at its own, as by a masked language model.
    """
    return (states[:, :-1] if ahead else states[:, 1:])[counted]


def logits_by_row(model: Student | Teacher, corpus: Corpus) -> Logits:
    """A model's logits, for `calib.stats.perplexity.compare`, which asks for one row after the other."""
    kept: dict[int, Tensor] = {}

    def logits(row: int, positions: slice) -> Tensor:
        if row not in kept:
            kept.clear()
            kept[row] = model.hidden(inputs_on(given_of(corpus[row : row + 1]), model.head.weight.device))[0]
        return model.head(kept[row][positions])

    return logits


def _states(
    model: Any, given: ModelInputs, products: torch.dtype | None, blocks: Sequence[BlockParts], *, attention: bool
) -> HiddenStates:
    """What goes through a model, of `blocks` and at the end."""
    device = (given if isinstance(given, Tensor) else next(iter(given.values()))).device
    if attention and model.config._attn_implementation != EAGER:
        model.set_attn_implementation(EAGER)
    # Rows are padded on the right: what comes later cannot reach what came before, so no mask is needed.
    states, distributions = list[Tensor](), list[Tensor]()
    with ExitStack() as watched, torch.autocast(device.type, products, enabled=products is not None):
        # Not the library's own capture: that goes by the model's class, which is another where blocks are sharded.
        for block in blocks:
            module = model.get_submodule(block.name)
            hooks = [
                module.register_forward_pre_hook(lambda _, *given: states.append(hidden_of(given)), with_kwargs=True)
            ]
            for name in block.attention if attention else ():
                layer = module.get_submodule(name)
                hooks.append(layer.register_forward_hook(lambda _, given, made: distributions.append(made[1])))
            for hook in hooks:
                watched.callback(hook.remove)
        if isinstance(given, Tensor):
            last = model.base_model(input_ids=given, use_cache=False).last_hidden_state
        else:
            last = states_before_head(model, given)
    hidden = (*states, last)
    return HiddenStates(
        tuple(x.float() for x in hidden) if products else hidden, tuple(distributions) if attention else ()
    )


def final_norms(config: PretrainedConfig) -> list[str]:
    """Find the names of the norms between the last block and the head of a model of this config."""
    return [norm.name for norm in find_parts(walk_of_config(config)).end.norms]
