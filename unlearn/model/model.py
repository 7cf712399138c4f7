"""What is to unlearn: a causal language model, a classifier of texts or of images, or any module of the user's own.

Whatever it is, it becomes a function of its parameters and of rows, and a way to write parameters back where they came
from. One model is in memory, in single precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from calib import BadInput, first_line
from calib.data.targets import MULTI, REGRESSION, SINGLE, problem_of
from calib.losses.chunked_head import Head
from calib.model.blocks import block_names
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.companions import copy_companions
from calib.model.config import is_quantized, read_json
from calib.model.conversion import pretrained
from calib.model.factory import WEIGHTS_FILE, drawn_module, factory_of, fill_module, weights_file
from calib.model.padding import agree_on_padding, keep_padding
from calib.model.per_example_gradients import LinearModule, linear_layers
from calib.model.weights import Weights
from unlearn.model.ensemble import Ensemble, Forward, Large, finite, learning_of, of_module, state_of
from unlearn.model.examples import Examples
from unlearn.options.methods import MICRO_BATCH_TOKENS

CHUNK_TOKENS = 8192  # that pass through the model together


CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
}
_HEADS = {"ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm", "ForImageClassification": "image-classification"}
_GIVES = {MULTI: "each row several labels", REGRESSION: "each row a number"}
_HEADS |= {"ForSequenceClassification": "sequence-classification"}


@dataclass
class TrainableModel:
    """A model: `module` gives what it is, `params` and `buffers` (those that are stored) what it knows, by name;
    `fresh` and `write` are about both.

    `labels` are its classes by name, where it has names for them; `states` its inner states at target positions, by the
    name of a module, where it is a language model; `stackable`: whether many of it can be trained at once.
    """

    task: str
    folder: Path
    module: nn.Module
    forward: Forward
    params: dict[str, Tensor]
    fresh: Callable[[int], dict[str, Tensor]]  # what training starts from, by seed
    write: Callable[[Path, Mapping[str, Tensor]], None]
    tokenizer: PreTrainedTokenizerBase | None = None
    labels: dict[str, int] = field(default_factory=dict)
    states: Callable[[str], Forward] | None = None
    linears: dict[str, LinearModule] = field(default_factory=dict)
    smooth: Forward | None = None  # the same as `forward`, where that cannot be differentiated forwards
    stackable: bool = False
    frozen: frozenset[str] = frozenset()
    adapters: frozenset[str] = frozenset()  # which no training of other models is about
    placed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None  # a folder's tensors by their names here
    buffers: dict[str, Tensor] = field(default_factory=dict)
    learning: Forward | None = None  # `forward` in training, where a model has running statistics
    large: Large | None = None
    at_once: int = MICRO_BATCH_TOKENS  # tokens that pass through one model together
    factory: bool = False

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return next(iter(self.params.values())).device

    @property
    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {**self.params, **self.buffers}

    def one(self) -> Ensemble:
        """The model as it is."""
        return self.many([self.state])

    def many(self, states: list[dict[str, Tensor]]) -> Ensemble:
        """Models of parameters and buffers."""
        if len(states) == 1:
            return self.of({name: p[None] for name, p in states[0].items() if name in self.state})
        return self.of({name: torch.stack([state[name] for state in states]) for name in self.state})

    def of(self, stacked: Mapping[str, Tensor]) -> Ensemble:
        """Make an ensemble of stacked parameters and buffers, (M, ...) each."""
        return Ensemble(
            self.forward, dict(stacked), self.stackable, self.frozen, frozenset(self.buffers), self.learning,
            self.large, self.at_once,
        )  # fmt: skip

    def tokens_at_once(self, most: int) -> int:
        """Tokens that may pass together where all their logits exist, of at most so many bytes."""
        if self.large is None:
            return CHUNK_TOKENS
        return max(1, min(CHUNK_TOKENS, most // (4 * len(self.large.head(self.params).rows))))


def task_of(model: Path, asked: str, factory: str | None) -> str:
    """Raises BadInput where it is not to be found out."""
    if factory is not None:
        if asked not in ("auto", "tensors"):
            raise BadInput(f"task {asked}: a factory's model takes tensors; leave out --task")
        return "tensors"
    if asked == "tensors":
        raise BadInput("task tensors: needs to know the model; give --factory package.module:function")
    if asked != "auto":
        return asked
    architectures = read_json(model / "config.json").get("architectures")
    architectures = architectures if isinstance(architectures, list) and architectures else [""]
    for ending, task in _HEADS.items():
        if str(architectures[0]).endswith(ending):
            return task
    raise BadInput(
        f"{model / 'config.json'}: says {architectures[0] or 'nothing'} of what the model does; give --task, one of "
        f"{', '.join(CLASSES)}"
    )


def open_model(
    model: str | Path,
    task: str,
    *,
    factory: str | None = None,
    base: Path | None = None,
    device: torch.device,
    lora: int = 0,
    only: tuple[str, ...] = (),
    seed: int = 0,
) -> TrainableModel:
    """Open a model that can be trained.

    Args:
        model: a directory, a name on the hub, or, of a factory's model, a safetensors file.
        task: as `task_of` gives it.
        factory: package.module:function that makes the model, where it is none of the library's.
        base: the directory that training starts from; default: weights drawn anew.
        device: where it runs.
        lora: rank of adapters that are trained instead of its own weights; 0: none.
        only: patterns of names of the weights that are trained; default: all.
        seed: of adapters, and of a head that the base lacks.

    Raises:
        BadInput: the directory, or what the factory gives, will not do.
    """
    if factory is not None:
        if lora:
            raise BadInput("lora: adapters are for the library's models, not a factory's model; use --only")
        trainable = _made(Path(model), factory, base, device)
    else:
        trainable = _library(find_model(model), task, base, device, lora, seed)
    for place, params in (
        (trainable.folder, trainable.state),
        (base, trainable.fresh(seed) if base is not None else {}),
    ):
        for name, p in params.items():
            if not finite(p):
                raise BadInput(f"{place}: tensor '{name}' contains NaN or Inf; get a sound copy")
    if only:
        fitting = {name for name in trainable.params if any(fnmatch(name, pattern) for pattern in only)}
        if not fitting:
            some = ", ".join(list(trainable.params)[:3])
            raise BadInput(
                f"only {', '.join(only)}: fits none of the model's weights, such as {some}; mend the pattern"
            )
        trainable.frozen = frozenset(trainable.params) - fitting
    return trainable


def limit_memory(trainable: TrainableModel, tokens: int, *, checkpointing: bool) -> TrainableModel:
    """Have at most so many tokens pass through the model together; with `checkpointing` it keeps what enters each
    block, and recomputes all else in the backward pass.  -> the same model."""
    trainable.at_once = tokens
    if checkpointing and not trainable.factory:
        for block in blocks_of(trainable):
            _checkpointed(trainable.module.get_submodule(block))
    return trainable


def _made(place: Path, factory: str, base: Path | None, device: torch.device) -> TrainableModel:
    torch.backends.mha.set_fastpath_enabled(False)  # which has no gradient

    def drawn(seed: int) -> nn.Module:
        return drawn_module(factory, seed).to(device)

    factory_of(factory)
    file = weights_file(place)
    module = drawn(0)
    stored, start = fill_module(module, file), None if base is None else drawn(0)
    if start is not None and base is not None:
        fill_module(start, base / WEIGHTS_FILE if base.is_dir() else base)

    def fresh(seed: int) -> dict[str, Tensor]:
        return _state(start or drawn(seed))

    def write(folder: Path, params: Mapping[str, Tensor]) -> None:
        _restore(module, params)
        whole = {n: t.detach().cpu().to(stored[n]).clone() for n, t in module.state_dict().items()}
        save_file(whole, folder / WEIGHTS_FILE)

    params, buffers = state_of(module)
    forward = of_module(module)
    return TrainableModel(
        "tensors", place, module, forward, params, fresh, write,
        linears=linear_layers(module), stackable=True, buffers=buffers, learning=learning_of(module, forward),
        factory=True,
    )  # fmt: skip


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, copied."""
    params, buffers = state_of(module)
    return {**params, **buffers}


@torch.no_grad()
def _restore(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module parameters, which it then shares, and buffers."""
    for name, p in module.named_parameters():
        if name in state:
            p.data = state[name].detach()
    for name, buffer in module.named_buffers():
        if name in state:
            buffer.copy_(state[name])


def _library(folder: Path, task: str, base: Path | None, device: torch.device, lora: int, seed: int) -> TrainableModel:
    model, stored = _sound(folder, task)
    start = None if base is None else _base(base, folder, model, task, seed)
    tokenizer = None if task == "image-classification" else read_tokenizer(folder)
    if task == "sequence-classification" and tokenizer is not None:
        agree_on_padding(model, tokenizer, folder)
    model.to(device)
    if lora > getattr(model.config, "hidden_size", lora):
        raise BadInput(f"lora {lora}: is more than the model is wide; ask for a lower rank")
    if lora:
        model = _adapted(model, lora, seed)
    params, buffers = state_of(model)
    begun = {**params, **buffers}

    def placed(plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By the model's own names: adapters as they begin, when they change nothing."""
        return {n: p if "lora_" in n else plain[_plain_name(n)].to(device, p.dtype) for n, p in begun.items()}

    def fresh(seed: int) -> dict[str, Tensor]:
        if start is not None:
            return placed(_state(start))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = CLASSES[task].from_config(model.config, dtype=torch.float32)
        return placed(_state(drawn))

    def write(into: Path, params: Mapping[str, Tensor]) -> None:
        _restore(model, params)
        whole = model.merge_and_unload() if lora else model
        whole.to(stored).save_pretrained(into)
        copy_companions(folder, into)
        if task == "sequence-classification" and tokenizer is not None:
            keep_padding(tokenizer, into)

    answering = _Answering(model)
    forward = _answers(answering) if task == "causal-lm" else _decides(model)
    trainable = TrainableModel(
        task, folder, model, forward, params, fresh, write, tokenizer=tokenizer, linears=linear_layers(model),
        smooth=_eagerly(model, forward), placed=placed, buffers=buffers, learning=learning_of(model, forward),
        frozen=frozenset(name for name, p in model.named_parameters() if lora and not p.requires_grad),
        adapters=frozenset(name for name in begun if "lora_" in name),
    )  # fmt: skip
    if task == "causal-lm":
        _complete_language_model(trainable, answering)
    else:
        trainable.labels = _labels(model.config, folder / "config.json")
    return trainable


def _sound(folder: Path, task: str) -> tuple[Any, torch.dtype]:
    """The library's model in a folder, and the dtype that its weights are stored in.  Raises BadInput."""
    Weights(folder)  # refuses what is incomplete, or leads outside the folder
    if is_quantized(read_json(folder / "config.json")):
        raise BadInput(f"{folder}: is quantized; unlearn in the float model it was made from, then quantize that")
    model = _read(folder, task)
    if task != "causal-lm" and (problem := problem_of(model.config, folder / "config.json")) != SINGLE:
        raise BadInput(
            f"{folder / 'config.json'}: is of a model that gives {_GIVES[problem]} ({problem}); what is unlearned are "
            "classes, one a row"
        )
    dtypes = (entry.dtype for entry in Weights(folder).entries.values())
    return model, next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _base(base: Path, folder: Path, model: Any, task: str, seed: int) -> Any:
    """The model that training starts from.  Raises BadInput where it is of another architecture."""
    Weights(base)
    classes = getattr(model.config, "num_labels", None) if task != "causal-lm" else None
    with torch.random.fork_rng(devices=[]):  # a base without a head gets one that is drawn
        torch.manual_seed(seed)
        start = _read(base, task, num_labels=classes)
    if [p.shape for p in start.parameters()] != [p.shape for p in model.parameters()]:
        raise BadInput(f"{base}: is another architecture than {folder}; give the model that this one was trained from")
    return start


def _complete_language_model(trainable: TrainableModel, answering: _Answering) -> None:
    """What only language models have: states of blocks, and a head whose product is taken at target positions."""
    model: Any = trainable.module
    trainable.states = lambda name: _inside(answering, name)
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = model.get_output_embeddings().weight
    name = next(n for n, p in model.named_parameters() if p is head)
    trainable.linears = {n: one for n, one in trainable.linears.items() if one.module.weight is not head}
    trainable.linears[name] = LinearModule(answering.scores, head.shape[1], head.shape[0])
    trainable.large = Large(
        _answers(answering, inner=True), lambda params: replace(Head.of(whole), weight=params[name])
    )  # fmt: skip


def _labels(config: Any, file: Path) -> dict[str, int]:
    """A classifier's classes by name.  Raises BadInput where its config gives them no numbers, or wrong ones."""
    try:
        labels = {str(name): int(number) for name, number in config.label2id.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{file}: label2id names no classes by number; mend it") from error
    if any(not 0 <= number < config.num_labels for number in labels.values()):
        raise BadInput(f"{file}: label2id has numbers beyond {config.num_labels} classes")
    return labels


def _read(folder: Path, task: str, **more: Any) -> Any:
    """A folder of the library's."""
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, **{k: v for k, v in more.items() if v is not None}
        )
    except Exception as error:  # the library says it in many ways
        raise BadInput(f"{folder / 'config.json'}: cannot be used for {task} ({first_line(error)})") from error
    model, info = pretrained(CLASSES[task], folder, config=config, dtype=torch.float32)
    if info["missing_keys"] and not more:
        raise BadInput(
            f"{folder}: lacks '{min(info['missing_keys'])}'; the checkpoint is incomplete, or of another task"
        )
    return model.eval()


def _plain_name(name: str) -> str:
    """Of a weight, without what peft puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _adapted(model: Any, rank: int, seed: int) -> Any:
    if find_spec("peft") is None:
        raise BadInput("peft: is not installed; pip install 'parewell[lora]'")
    from peft import LoraConfig, get_peft_model  # not everyone has it

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")).eval()


def _decides(model: Any) -> Forward:
    def forward(params: Mapping[str, Tensor], rows: Examples) -> Tensor:
        logits: Tensor = functional_call(model, dict(params), (), dict(rows.inputs)).logits
        return logits.float()

    return forward


def _eagerly(model: Any, forward: Forward) -> Forward:
    """With plain attention, which the library's faster ones cannot replace where derivatives are taken forwards."""

    def smooth(params: Mapping[str, Tensor], rows: Examples) -> Tensor:
        usual = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            return forward(params, rows)
        finally:
            model.set_attn_implementation(usual)

    return smooth


class _Scores(nn.Module):
    """A head's product as a module of its own, so that it can be seen into like other linears; without the scaling and
    soft-capping that follow, which are none of the weight's."""

    def forward(self, hidden: Tensor, head: Head) -> Tensor:
        return hidden @ head.rows.mT


class _Answering(nn.Module):
    """Logits where something is decided, and nowhere else: over a whole vocabulary they are large."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.scores = model, _Scores()

    def forward(self, input_ids: Tensor, target_mask: Tensor, *, inner: bool = False) -> Tensor:
        whole = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        # Rows are padded on the right: what comes later cannot reach what came before, so no mask is needed.
        hidden = whole.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        if inner:
            return hidden[target_mask]
        head = Head.of(whole)
        return head.finish(self.scores(hidden[target_mask], head))


def _answers(answering: _Answering, *, inner: bool = False) -> Forward:
    """Logits at target positions, or the last states there."""

    def forward(params: Mapping[str, Tensor], rows: Examples) -> Tensor:
        named, target_mask = {f"model.{name}": p for name, p in params.items()}, rows.target_mask
        used = int(target_mask.any(0).nonzero().max()) + 1  # what comes after the last target position decides nothing
        given = (rows.inputs["input_ids"][:, :used], target_mask[:, :used])
        return functional_call(answering, named, given, {"inner": inner})

    return forward


def running(module: Any) -> Ensemble:
    """A causal language model that is in memory already, whatever it does at run time."""
    params, buffers = state_of(module)
    stacked = {name: p[None] for name, p in {**params, **buffers}.items()}
    answering = _Answering(module)
    large = Large(_answers(answering, inner=True), lambda _: Head.of(module))
    return Ensemble(_answers(answering), stacked, stacked=False, buffers=frozenset(buffers), large=large)


def _inside(answering: _Answering, name: str) -> Forward:
    """What comes out of the module `name`, at target positions (d, width)."""
    answer, module = _answers(answering, inner=True), answering.model.get_submodule(name)

    def forward(params: Mapping[str, Tensor], rows: Examples) -> Tensor:
        with _seen(module) as seen:
            answer(params, rows)
        return seen[0][rows.target_mask[:, : seen[0].shape[1]]]

    return forward


@contextmanager
def _seen(module: nn.Module) -> Any:
    seen = list[Tensor]()
    hook = module.register_forward_hook(
        lambda _, given, made: seen.append(made[0] if isinstance(made, tuple) else made)
    )
    try:
        yield seen
    finally:
        hook.remove()


def blocks_of(trainable: TrainableModel) -> list[str]:
    """Names of a language model's blocks, in order.  Raises BadInput where they are not to be found."""
    if found := block_names(trainable.module, trainable.module.config):
        return found
    raise BadInput(
        f"{trainable.folder}: the blocks of this model are not to be found, which method rmu, --grid and "
        "--gradient-checkpointing need; leave these out"
    )


def _checkpointed(block: Any) -> None:
    """Let a block keep nothing for the way back but what enters it, with whatever parameters it is called.

    The library's own switch would run it again with the parameters that the module has by then.
    """

    def forward(*given: Any, **named: Any) -> Any:
        own = dict(block.named_parameters()) | dict(block.named_buffers())
        again = block.__dict__.pop("forward")

        def run(*given: Any, **named: Any) -> Any:
            before = block.__dict__.pop("forward", None)
            try:
                return functional_call(block, own, given, named)
            finally:
                if before is not None:
                    block.forward = before

        try:
            if not any(p.requires_grad for p in own.values()):
                return run(*given, **named)
            return checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False, **named)
        finally:
            block.forward = again

    block.forward = forward
