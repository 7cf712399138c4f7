"""Facts in both directions, block by block: which block lets go of a fact, and in which direction.

A fact is a name and a description; "N is D" asks for the description, "D is N" for the name. A causal model is asked to
go on with the sentence; a masked one for tokens that are hidden from it in "N is D", all at once or one at a time
(pseudo-likelihood). What is learned in one direction is hardly known in the other by a causal model (arXiv:2309.12288);
the probes of blocks are after arXiv:2504.01928.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from calib import BadInput, first_line
from calib.data.prompts import Document
from calib.data.rows import positions_of, row_length
from calib.data.token_rows import encode_documents
from calib.model.blocks import block_names
from calib.model.checkpoint import find_model, read_tokenizer
from calib.model.config import is_quantized, read_json
from calib.model.conversion import pretrained
from calib.model.per_example_gradients import linear_layers, project_gradients, projections
from calib.model.task import Task, task_of_checkpoint
from calib.runtime.device import pick_device
from calib.runtime.progress import stage
from unlearn.audit.probes import read_records
from unlearn.data.facts import reversed_pair
from unlearn.options.audit import Audit

TOGETHER = 2**26  # numbers of logits that exist together
WIDTH = 16  # squared numbers that the gradient of a linear is projected to
DIRECTIONS = ("forward", "reversed")


def reciprocal_ranks(queries: Tensor, keys: Tensor) -> Tensor:
    """Reciprocal of the rank of each entity's own key among all keys, by dot product with its query.

    Equal products are ranked in random order, and the mean over these orders is given: 1 for a product above all
    others, H_n / n where all are equal, as for states drawn at random on average (arXiv:2504.01928 reports the mean
    over entities, MRR).  (n, d), (n, d) -> (n,) float64.
    """
    products = queries.double() @ keys.double().mT
    own = products.diagonal()[:, None]
    above, equal = (products > own).sum(1), (products == own).sum(1)
    harmonic = torch.cat([torch.zeros(1, dtype=torch.float64), 1 / torch.arange(1, len(keys) + 1).double()]).cumsum(0)
    return (harmonic[above.cpu() + equal.cpu()] - harmonic[above.cpu()]) / equal.cpu()


def entanglement(gradients: Tensor, entities: Tensor) -> tuple[float | None, float | None]:
    """Mean |cosine| of gradients of facts of different entities, and of the same; None where there are no such pairs.

    (m, D), int (m,): the entity that each fact is of.
    """
    unit = torch.nn.functional.normalize(gradients.double(), dim=1)
    cosines, same = (unit @ unit.mT).abs(), entities[:, None] == entities
    upper = torch.ones_like(same).triu(1)
    pairs = (cosines[upper & ~same], cosines[upper & same])
    between, within = (float(some.mean()) if len(some) else None for some in pairs)
    return between, within


@dataclass(frozen=True)
class FactModel:
    """A causal or a masked language model, the names of its blocks, and its tokenizer."""

    module: Any
    tokenizer: Any
    task: Task
    blocks: tuple[str, ...]
    length: int

    @property
    def masked(self) -> bool:
        """Whether the model is asked for tokens that are hidden from it."""
        return self.task is Task.MASKED_LM

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        found: torch.device = next(self.module.parameters()).device
        return found


@dataclass(frozen=True)
class Sentences:
    """Sentences "A is B" as tokens: ids, which of them are no padding, which are of A and which of B; (n, T) each."""

    ids: Tensor
    mask: Tensor
    subject: Tensor
    object: Tensor

    def __getitem__(self, some: slice) -> Sentences:
        return Sentences(self.ids[some], self.mask[some], self.subject[some], self.object[some])


def open_fact_model(model: str | Path, device: torch.device, length: int | None = None) -> FactModel:
    """Open a causal or a masked language model in single precision.  Raises BadInput for any other."""
    folder = find_model(model)
    file = folder / "config.json"
    known = read_json(file)
    if is_quantized(known):
        raise BadInput(f"{folder}: is quantized already, and gradients are taken of floats; give the float model")
    task = task_of_checkpoint(str(known.get("model_type")), known.get("architectures"))
    kinds = {Task.CAUSAL_LM: AutoModelForCausalLM, Task.MASKED_LM: AutoModelForMaskedLM}
    if task not in kinds:
        raise BadInput(f"{file}: facts are asked of causal and of masked language models, and this is neither")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library says it in many ways
        raise BadInput(f"{file}: cannot be used ({first_line(error)})") from error
    module, info = pretrained(kinds[task], folder, config=config, dtype=torch.float32)
    if info["missing_keys"]:
        raise BadInput(f"{folder}: lacks '{min(info['missing_keys'])}'; the checkpoint is incomplete")
    tokenizer = read_tokenizer(folder)
    if tokenizer is None or (task is Task.MASKED_LM and tokenizer.mask_token_id is None):
        what = "no tokenizer" if tokenizer is None else "a tokenizer that names no mask_token"
        raise BadInput(f"{folder}: has {what}, which facts are asked with; mend its files")
    blocks = block_names(module, module.config)
    if not blocks:
        raise BadInput(f"{folder}: the blocks of this model are not to be found, by which facts are probed")
    return FactModel(module.eval().to(device), tokenizer, task, tuple(blocks), row_length(length, positions_of(config)))


def tokenized(pairs: Sequence[tuple[str, str]], model: FactModel, source: str) -> Sentences:
    """Tokenize sentences "A is B" of pairs (A, B).  Raises BadInput for one that is too long, or whose tokens do not
    tell A from B."""
    texts = [f"{a} is {b}" for a, b in pairs]
    spans = [((0, len(a)), (len(a) + len(" is "), len(text))) for (a, _), text in zip(pairs, texts, strict=True)]
    both = [
        list(
            encode_documents([Document(t, (s[i],)) for t, s in zip(texts, spans, strict=True)], model.tokenizer, source)
        )
        for i in (0, 1)
    ]
    width = max(len(one.ids) for one in both[0])
    if width > model.length:
        raise BadInput(f"{source}: a fact takes {width} tokens, and rows have {model.length}; shorten it")
    ids = torch.full((len(pairs), width), model.tokenizer.pad_token_id or 0)
    mask, subject, object_ = (torch.zeros(len(pairs), width, dtype=torch.bool) for _ in range(3))
    special = torch.tensor(model.tokenizer.all_special_ids)
    for i, (first, second) in enumerate(zip(*both, strict=True)):
        n = len(first.ids)
        ids[i, :n], mask[i, :n] = torch.from_numpy(first.ids), True
        subject[i, :n], object_[i, :n] = torch.from_numpy(first.answers), torch.from_numpy(second.answers)
    object_ &= ~subject & ~torch.isin(ids, special)
    if not (subject.any(1) & object_.any(1)).all():
        raise BadInput(f"{source}: the tokens of a fact do not tell its name from its description; mend it")
    if int(ids.max()) >= model.module.config.vocab_size:
        raise BadInput(f"{source}: a token id is beyond the model's vocabulary; use the model's own tokenizer")
    return Sentences(*(x.to(model.device) for x in (ids, mask, subject, object_)))


def _parts(model: FactModel, some: Sentences) -> Iterator[slice]:
    """Sentences that pass together."""
    size = max(1, TOGETHER // (some.ids.shape[1] * int(model.module.config.vocab_size)))
    yield from (slice(i, i + size) for i in range(0, len(some.ids), size))


def _logits(model: FactModel, ids: Tensor, mask: Tensor) -> Tensor:
    found: Tensor = model.module(input_ids=ids, attention_mask=mask.long()).logits
    return found.float()


def _log_p(model: FactModel, some: Sentences, asked: Tensor, hidden: Tensor | None) -> Tensor:
    """Log-probability of the tokens `asked` (n, T), summed, (n,); a masked model does not see those that are
    `hidden`."""
    if hidden is None:
        logits, targets, asked = _logits(model, some.ids, some.mask)[:, :-1], some.ids[:, 1:], asked[:, 1:]
    else:
        ids = some.ids.where(~hidden, torch.full_like(some.ids, model.tokenizer.mask_token_id))
        logits, targets = _logits(model, ids, some.mask), some.ids
    each = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return (each * asked).sum(1)


def log_likelihood(model: FactModel, some: Sentences, asked: Tensor, *, at_once: bool = True) -> Tensor:
    """Log-probability in nats of the tokens `asked` (n, T) of each sentence, (n,) float64.

    A causal model is given what comes before each; a masked one all that is not hidden: with `at_once` all that are
    asked for are hidden together, else one at a time (pseudo-likelihood, arXiv:1910.14659).
    """
    if not model.masked:
        return torch.cat([_log_p(model, some[at], asked[at], None) for at in _parts(model, some)]).double()
    if at_once:
        return torch.cat([_log_p(model, some[at], asked[at], asked[at]) for at in _parts(model, some)]).double()
    found = torch.zeros(len(asked), dtype=torch.float64, device=asked.device)
    for place in asked.any(0).nonzero().flatten().tolist():
        only = torch.zeros_like(asked)
        only[:, place] = asked[:, place]
        found += torch.cat([_log_p(model, some[at], only[at], only[at]) for at in _parts(model, some)]).double()
    return found


def states_of_facts(model: FactModel, some: Sentences) -> tuple[Tensor, Tensor]:
    """States that leave each of L blocks at the last token of subjects and of objects, (L, n, d) each."""
    with _outputs(model) as seen:
        found = list[tuple[Tensor, Tensor]]()
        for at in _parts(model, some):
            seen.clear()
            model.module(input_ids=some.ids[at], attention_mask=some.mask[at].long())
            states, rows = torch.stack(seen), torch.arange(len(some.ids[at]), device=some.ids.device)
            last = [of[at].shape[1] - 1 - of[at].flip(1).float().argmax(1) for of in (some.subject, some.object)]
            found.append((states[:, rows, last[0]], states[:, rows, last[1]]))
    subjects, objects = (torch.cat(of, 1) for of in zip(*found, strict=True))
    return subjects, objects


@contextmanager
def _outputs(model: FactModel) -> Iterator[list[Tensor]]:
    """What leaves each block, in order."""
    seen = list[Tensor]()

    def keep(module: Any, given: Any, made: Any) -> None:
        seen.append((made[0] if isinstance(made, tuple) else made).detach())

    hooks = [model.module.get_submodule(name).register_forward_hook(keep) for name in model.blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def gradients_by_block(model: FactModel, some: Sentences, asked: Tensor, seed: int) -> list[Tensor]:
    """Gradients of each sentence's log-likelihood by the linears of each block, projected at random, (n, D) each."""
    prefixes = {block: f"{block}." for block in model.blocks}
    linears = {
        name: one for name, one in linear_layers(model.module).items() if name.startswith(tuple(prefixes.values()))
    }
    projected = projections(linears, WIDTH, seed, model.device)
    found = list[Tensor]()
    for at in _parts(model, some):
        rows, width = some.ids[at].shape
        index = torch.arange(rows, device=model.device).repeat_interleave(width)

        def run(at: slice = at) -> list[Tensor]:
            return [_log_p(model, some[at], asked[at], asked[at] if model.masked else None).sum()]

        found += project_gradients(linears, projected, run, index, rows)
    whole = torch.cat(found).split([projected[name].size for name in linears], 1)
    by_block = dict(zip(linears, whole, strict=True))
    return [torch.cat([by_block[n] for n in by_block if n.startswith(prefix)], 1) for prefix in prefixes.values()]


@dataclass(frozen=True)
class Facts:
    """n facts: sentences in both directions, and both with a partner of another fact in place of what is given.

    asked: by direction, sentences and the tokens that are asked for; others: the same with other partners.
    names, descriptions: int (n,), which entity each is; equal texts are one.
    """

    asked: Mapping[str, tuple[Sentences, Tensor]]
    others: Mapping[str, tuple[Sentences, Tensor]]
    both: Mapping[str, Sentences]
    names: Tensor
    descriptions: Tensor


def read_fact_pairs(path: Path) -> list[tuple[str, str]]:
    """Names and descriptions of a file of rows with both.  Raises BadInput, also for fewer than two entities of a
    kind, among which nothing can be ranked."""
    pairs = []
    for record in read_records(path, ["name", "description"]):
        (prompt, response), _ = reversed_pair(record)
        pairs.append((prompt.removesuffix(" is"), response.strip()))
    if min(len({name for name, _ in pairs}), len({description for _, description in pairs})) < 2:
        raise BadInput(f"{path}: is about one name or one description, and facts are told from others; give more")
    return pairs


def facts_of(pairs: Sequence[tuple[str, str]], model: FactModel, source: str) -> Facts:
    """Facts as the model reads them.  Raises BadInput."""
    names, descriptions = ([pair[i] for pair in pairs] for i in (0, 1))
    numbers = [torch.tensor([texts.index(text) for text in texts]) for texts in (names, descriptions)]
    partners = _partners(pairs, source)

    def asked(names: Sequence[str], descriptions: Sequence[str], direction: str) -> tuple[Sentences, Tensor]:
        forward = list(zip(names, descriptions, strict=True))
        if direction == "forward":
            some = tokenized(forward, model, source)
            return some, some.object
        if model.masked:
            some = tokenized(forward, model, source)
            return some, some.subject
        some = tokenized([(d, n) for n, d in forward], model, source)
        return some, some.object

    return Facts(
        {d: asked(names, descriptions, d) for d in DIRECTIONS},
        {
            "forward": asked([names[i] for i in partners], descriptions, "forward"),
            "reversed": asked(names, [descriptions[i] for i in partners], "reversed"),
        },
        {
            "forward": tokenized(list(zip(names, descriptions, strict=True)), model, source),
            "reversed": tokenized(list(zip(descriptions, names, strict=True)), model, source),
        },
        *numbers,
    )


def _partners(pairs: Sequence[tuple[str, str]], source: str) -> list[int]:
    """For each fact the next one that has nothing to do with it.  Raises BadInput where there is none."""
    known, n, found = set(pairs), len(pairs), list[int]()
    for i, (name, description) in enumerate(pairs):
        others = (j % n for j in range(i + 1, i + n))
        apart = (j for j in others if not {(pairs[j][0], description), (name, pairs[j][1])} & known)
        if (j := next(apart, None)) is None:
            raise BadInput(
                f"{source}: all facts are also about '{name}' or '{description}', so it is told from none; give more"
            )
        found.append(j)
    return found


def _of_entities(states: Tensor, numbers: Tensor) -> Tensor:
    """Mean states of each entity.  (n, d), int (n,) -> (entities, d)."""
    _, place = numbers.unique(return_inverse=True)
    total = states.new_zeros(int(place.max()) + 1, states.shape[1]).index_add(0, place.to(states.device), states)
    return total / place.bincount().to(states)[:, None]


@torch.no_grad()
def recall_of(model: FactModel, facts: Facts) -> dict[str, Any]:
    """Recall in both directions: probability a token of what is asked for, what the right partner gains over one of
    another fact in nats, and the difference of these gains, the reversal gap, with its standard error."""
    found, gains = dict[str, Any](), dict[str, Tensor]()
    for direction in DIRECTIONS:
        (some, asked), (others, asked_of_others) = facts.asked[direction], facts.others[direction]
        known = log_likelihood(model, some, asked, at_once=False)
        gains[direction] = known - log_likelihood(model, others, asked_of_others, at_once=False)
        found[direction] = {
            "probability": float((known / asked.sum(1)).exp().mean()), "gain": float(gains[direction].mean())
        }  # fmt: skip
        if model.masked:
            at_once = log_likelihood(model, some, asked)
            found[direction]["probability, all hidden at once"] = float((at_once / asked.sum(1)).exp().mean())
    gap = gains["forward"] - gains["reversed"]
    return found | {"gap": float(gap.mean()), "gap_error": float(gap.std() / len(gap) ** 0.5)}


@torch.no_grad()
def ranks_by_block(model: FactModel, facts: Facts) -> dict[str, list[float]]:
    """MRR of entities at each block: of descriptions, which are the objects of the forward direction, and of names,
    those of the reversed one."""
    (names_as_subjects, descriptions_as_objects) = states_of_facts(model, facts.both["forward"])
    (descriptions_as_subjects, names_as_objects) = states_of_facts(model, facts.both["reversed"])
    pairs = {
        "forward": (descriptions_as_subjects, descriptions_as_objects, facts.descriptions),
        "reversed": (names_as_subjects, names_as_objects, facts.names),
    }
    return {
        direction: [
            float(reciprocal_ranks(_of_entities(q, numbers), _of_entities(k, numbers)).mean())
            for q, k in zip(queries, keys, strict=True)
        ]
        for direction, (queries, keys, numbers) in pairs.items()
    }


def entanglement_by_block(model: FactModel, facts: Facts, seed: int) -> dict[str, list[float | None]]:
    """Mean |cosine| of gradients at each block, of facts of different names in each direction, and of all facts of one
    name in both directions (`within`)."""
    gradients = {d: gradients_by_block(model, *facts.asked[d], seed) for d in DIRECTIONS}
    entities = facts.names.to(model.device)
    found: dict[str, list[float | None]] = {
        d: [entanglement(of, entities)[0] for of in blocks] for d, blocks in gradients.items()
    }
    whole = zip(*gradients.values(), strict=True)
    return found | {"within": [entanglement(torch.cat(both), entities.repeat(2))[1] for both in whole]}


def audit_facts(model: str | Path, options: Audit) -> dict[str, Any]:
    """Measure what a language model knows of facts in both directions, block by block, beside `options.original` and
    `options.oracle` where they are given.  Raises BadInput."""
    assert options.facts is not None
    device, pairs = pick_device(options.device), read_fact_pairs(Path(options.facts))
    given = {"original": options.original, "audited": model, "oracle": options.oracle}
    found, task = dict[str, Any](), None
    with stage("facts", sum(place is not None for place in given.values()), "models") as done:
        for name, place in given.items():
            if place is None:
                continue
            one = open_fact_model(place, device, options.length)
            if task not in (None, one.task):
                raise BadInput(f"{place}: is a {one.task.described}, and not of the kind that it is compared with")
            task, facts = one.task, facts_of(pairs, one, str(options.facts))
            found[name] = {
                "recall": recall_of(one, facts), "mrr": ranks_by_block(one, facts),
                "entanglement": entanglement_by_block(one, facts, options.seed),
            }  # fmt: skip
            done(name)
    assert task is not None
    counts = {"facts": len(pairs), "names": len({n for n, _ in pairs}), "descriptions": len({d for _, d in pairs})}
    chance = {
        "forward": _harmonic(counts["descriptions"]) / counts["descriptions"],
        "reversed": _harmonic(counts["names"]) / counts["names"],
    }
    return {"job": "audit facts", "task": task.described, "rows": counts, "chance": chance, "models": found}


def _harmonic(n: int) -> float:
    return sum(1 / k for k in range(1, n + 1))
