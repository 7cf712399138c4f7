"""Train a student that is held in memory on what a teacher says.

The gradient of the losses reaches the student's last hidden states some positions at a time
(`calib.losses.chunked_head`), and from there the library's own backward pass takes it through the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from calib import BadInput, Diverged
from calib.blockwise.model import micro_batches
from calib.data.corpus import Corpus, batch_order
from calib.jobs.journal import CheckpointSlot
from calib.jobs.training_loop import (
    Group,
    MovingAverage,
    OptimizerConfig,
    Parts,
    naming_rows,
    optimize,
    steps_done,
)
from calib.losses.chunked_head import Head, through_head
from calib.losses.top_k import SampledTargets, TopK
from calib.losses.weighting import Recap, by_gradient
from calib.runtime.device import fork_rng
from calib.runtime.distributed import all_reduce_sum_, group_by_kind, world_size
from calib.runtime.precision import upcast
from calib.runtime.progress import stage
from compressor.distillation.auxiliary_modules import AuxiliaryModules, aligned_states, auxiliary_modules, errors_of
from compressor.distillation.batches import Batch, Relations, Speaking, TrainingConfig, step_batch
from compressor.distillation.cross_tokenizer import CrossTokenizerTeacher
from compressor.distillation.loss_expression import (
    BIDIRECTIONAL_LOSSES,
    EXITS_LOSSES,
    LABELED_LOSSES,
    RELATIONS_LOSSES,
    REWARDED_LOSSES,
    SETS_LOSSES,
    SPANS_LOSSES,
    STATES_LOSSES,
    UNTAUGHT,
    LossTerm,
    Signal,
    of_rewards,
    of_sets,
    parse_loss,
    pointwise,
)
from compressor.distillation.loss_syntax import read_terms, rewarded_term
from compressor.distillation.losses.relations import watched_projections
from compressor.distillation.models import Student, Teacher, at_targets
from compressor.distillation.options import Distill
from compressor.on_policy.completions import RewardedPrompts
from compressor.on_policy.policy import Policy

SET = 64  # rows that Sinkhorn sees together, and 256 at most that Gram matrices are of
ELSEWHERE = {
    *BIDIRECTIONAL_LOSSES, *SETS_LOSSES, *SPANS_LOSSES, *STATES_LOSSES, *EXITS_LOSSES, *RELATIONS_LOSSES,
}  # not by position  # fmt: skip
REBALANCE_STEPS = 10  # steps between two looks at gradient norms


def optimizer_of(options: Distill) -> OptimizerConfig:
    """The optimizer's settings in a job's options."""
    return OptimizerConfig(
        steps=options.steps, warmup=options.warmup, clip=options.max_grad_norm, decay=options.decay,
        eight_bit=options.optimizer == "adamw8bit",
    )  # fmt: skip


def training_config(
    options: Distill, layers: list[tuple[int, int]], prompts: RewardedPrompts | None = None
) -> TrainingConfig:
    """The training settings in a job's options; `layers` are the pairs of states that losses compare, `prompts` what a
    student answers that is rewarded."""
    policy = None
    if prompts is not None:
        term = rewarded_term(read_terms(options.loss))
        divergence = None if term is None else str(term.arguments.get("divergence", "js"))
        policy = Policy(
            None if term is None else term.name, divergence, options, prompts, options.steps, options.micro_batch_tokens
        )
    return TrainingConfig(
        layers=layers, terms=parse_loss(options.loss), descent=optimizer_of(options), lr=options.rate,
        batch=options.batch, seed=options.seed, temperature=options.temperature, balance=options.balance,
        on_policy=options.on_policy, ema=options.ema, lr_scale=options.lr_scale, at_once=options.micro_batch_tokens,
        policy=policy, writing=options,
    )  # fmt: skip


def training_targets(corpus: Corpus, *, answers_only: bool) -> Tensor:
    """(N, T - 1): true where position t predicts a token that counts: a real one, of an answer if so asked."""
    counted = corpus.mask
    if answers_only:
        if corpus.answers is None:
            raise BadInput(f"{corpus.source}: has no prompts, so nothing is an answer; leave out --answers-only")
        counted = counted & corpus.answers
    if not (counted := counted[:, 1:]).any():
        raise BadInput(f"{corpus.source}: all tokens are masked, none is left to learn from; give longer rows")
    return counted


def to_be_answered(corpus: Corpus) -> Tensor:
    """(N, T - 1): of rows that are prompts alone, true where the last token of the prompt predicts the first of an
    answer that is still to be written.  Raises BadInput where a prompt leaves no room for one."""
    lengths = corpus.mask.sum(1)
    if (lengths >= corpus.ids.shape[1]).any():
        full = int((lengths >= corpus.ids.shape[1]).sum())
        raise BadInput(
            f"{corpus.source}: {full} prompts fill all {corpus.ids.shape[1]} tokens of a row; raise --length"
        )
    return torch.nn.functional.one_hot(lengths - 1, corpus.ids.shape[1] - 1).bool()


def train_student(
    student: Student,
    teacher: Speaking | None,
    corpus: Corpus,
    targets: Tensor,
    config: TrainingConfig,
    page: CheckpointSlot | None = None,
    *,
    rows_of_step: Sequence[list[int]] | None = None,
    name: str = "distil",
) -> list[dict[str, float]]:
    """Train the student.  -> each loss of every step, times its factor.

    corpus (N, T) are its rows, targets (N, T - 1) what counts in them; `teacher` may be None where none is needed. The
    numbers of each step's rows are drawn by the seed, where no `rows_of_step` are given; progress has a `name`. The
    loss of a step is a mean over all its tokens that count, however rows are split over micro-batches and processes;
    but for losses of sets and of Gram matrices, which see what passes through the student together.
    """
    if rows_of_step is None:
        rows_of_step = batch_order(len(corpus.ids), config.descent.steps, config.batch, config.seed)
    weights = _LossWeights(config)
    auxiliary = _auxiliary(student, teacher, corpus, targets, config)
    average = MovingAverage([*student.params, *student.scales], config.ema)
    speaking = None if all(term.name in UNTAUGHT for term in config.terms) else teacher
    at, seen, began = 0, 0, time.monotonic()

    def gradients(step: int) -> Parts:
        nonlocal at, seen
        at = step
        with fork_rng(student.device, config.seed + 1_000_003 * step):  # of what is drawn, and of dropout
            batch = step_batch(student, teacher, corpus, targets, rows_of_step[step], step, config)
            auxiliary.errors.clear()
            seen += batch.tokens
            values, rates = _step(student, speaking, batch, config, weights.factors, step, auxiliary)
        parts = {term.label: v * f for term, v, f in zip(config.terms, values, rates, strict=True)}
        figures = {} if batch.credit is None else batch.credit.figures  # the same in all processes
        return parts | errors_of(auxiliary) | {name: value / world_size() for name, value in figures.items()}

    def after(step: int, parts: Parts) -> None:
        found = weights.after_step(parts)
        average.update(step)
        listed = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        done(f"{listed}, {seen / (time.monotonic() - began):,.0f} tokens/s")

    groups = [Group(kind, config.lr) for kind in group_by_kind([*student.params, *auxiliary.params])]
    groups += [Group(student.scales, config.lr_scale)] if student.scales else []
    keep = {**weights.kept, **average.kept} | ({} if config.policy is None else config.policy.kept)
    with (
        stage(name, config.descent.steps, "steps", steps_done(page)) as done,
        naming_rows(rows_of_step, lambda: at),
    ):
        curve = optimize(groups, gradients, config.descent, after_step=after, keep=keep, page=page)
    average.write_back()
    return curve


def _auxiliary(
    student: Student, teacher: Speaking | None, corpus: Corpus, targets: Tensor, config: TrainingConfig
) -> AuxiliaryModules:
    """What is trained beside the student."""
    made = auxiliary_modules(
        config.terms, layers=len(config.layers), student_width=student.width,
        teacher_width=teacher.width if isinstance(teacher, Teacher) else student.width,
        seed=config.seed, device=student.device,
    )  # fmt: skip
    if not isinstance(teacher, Teacher) or all(term.name != "align" for term in config.terms):
        return made
    aligned = aligned_states(student, teacher, corpus, targets, config.terms, config.layers, config.seed)
    return replace(made, aligned=aligned)


class _LossWeights:
    """Factors of the losses, which a balance changes as they go."""

    def __init__(self, config: TrainingConfig) -> None:
        self._terms = config.terms
        self.factors = torch.tensor([term.weight for term in config.terms], dtype=torch.float64)
        self._recap = Recap(len(config.terms)) if config.balance == "recap" else None

    @property
    def kept(self) -> dict[str, Tensor]:
        """What changes from step to step."""
        state = self._recap.state() if self._recap else {}
        return {"factors": self.factors} | {f"recap.{name}": tensor for name, tensor in state.items()}

    def after_step(self, parts: Parts) -> dict[str, float]:
        """-> losses without their factors; which follow how these fell, where RECAP balances."""
        found = {name: value / float(f) for (name, value), f in zip(parts.items(), self.factors, strict=False)}
        if self._recap is not None:
            balanced = zip(self._recap.step([max(v, 0.0) for v in found.values()]), self._terms, strict=True)
            self.factors.copy_(torch.tensor([weight * term.weight for weight, term in balanced]))
        return found


@dataclass(frozen=True)
class MicroBatch:
    """Rows that pass through the student together: its last hidden states (n, d) at positions that count, the tokens
    that follow (n,), the teacher's signal at some of these positions, its hidden states there (n, D) if it has any,
    which sequence each position is in, and whether the next one is of the same span (n,); and, of rows that are
    rewarded, the credit of each position's row, advantage and pull, both (n,); and where a teacher with another
    tokenizer has read as much (n,)."""

    hidden: Tensor
    following: Tensor
    teacher_signal: Callable[[slice | Tensor], Signal]
    teacher_hidden: Tensor | None
    sequence: Tensor
    followed: Tensor | None
    layers: list[tuple[Tensor, Tensor]]  # states (n, D) and (n, d) of layers that are compared
    attention: list[tuple[Tensor, Tensor]]  # the same of distributions (B, H, T - 1, T) and (B, h, T - 1, T)
    counted: Tensor  # (B, T - 1)
    credit: tuple[Tensor, Tensor] | None = None
    heard: Tensor | None = None
    text: tuple[Tensor, Tensor, Tensor] | None = None  # ids (B, T), which are real, and which are hidden
    # The teacher's and the student's queries, keys and values (B, T, d), by number, and which tokens are real (B, T).
    relations: tuple[dict[int, Tensor], dict[int, Tensor], Tensor] | None = None


def _step(
    student: Student,
    teacher: Speaking | None,
    batch: Batch,
    config: TrainingConfig,
    factors: Tensor,
    step: int,
    auxiliary: AuxiliaryModules,
) -> tuple[list[float], list[float]]:
    """Add up the gradients.  -> this process's share of every loss, and the factors they were taken with."""
    totals = [0.0] * len(config.terms)
    student.begin()
    parts = list(micro_batches(len(batch.ids), batch.width, config.at_once))
    measured = config.balance == "gradient" and step % REBALANCE_STEPS == 0
    if measured:
        norms = torch.zeros(len(config.terms), dtype=torch.float64)
        micro = _micro_batch(student, teacher, batch, parts[0], config)
        # As if these rows were all there are: losses of tokens and of sets are means over what passes.
        pairs = 0 if micro.followed is None else int(micro.followed.sum())
        own = replace(batch, tokens=max(1, len(micro.hidden)), pairs=max(1, pairs))
        few = replace(config, batch=max(1, len(micro.sequence.unique())))
        for i, term in enumerate(auxiliary.terms):
            alone = replace(auxiliary, terms=[term])
            _, gradient, _ = _losses(student, micro, student.head.fixed, alone, [1.0], few, own)
            norms[i] = gradient.norm()
        for p in auxiliary.params:
            p.grad = None
        del micro, gradient
        all_reduce_sum_([norms])
        for term, norm in zip(config.terms, norms.tolist(), strict=True):
            if not math.isfinite(norm):
                raise Diverged(f"step {step}: the gradient of {term.label} is {norm}; lower the learning rate")
        factors.copy_(torch.tensor(by_gradient(norms.tolist(), [term.weight for term in config.terms])))
    for some in parts:
        micro = _micro_batch(student, teacher, batch, some, config)
        values, gradient, between = _losses(student, micro, student.head, auxiliary, factors.tolist(), config, batch)
        if between is None:
            micro.hidden.backward(gradient)
        else:
            torch.autograd.backward([micro.hidden, between], [gradient, None])
        totals = [a + b for a, b in zip(totals, values, strict=True)]
    student.end()
    return totals, factors.tolist()


def _micro_batch(
    student: Student, teacher: Speaking | None, batch: Batch, some: slice, config: TrainingConfig
) -> MicroBatch:
    ids, counted = batch.ids[some].to(student.device), batch.counted[some].to(student.device)
    given, at = batch.given(some, student.device), partial(at_targets, counted=counted, ahead=batch.ahead)
    asked = {"every": bool(config.layers), "attention": any(term.name == "attention" for term in config.terms)}
    at_relations = config.relations or Relations((), (), 1)
    with watched_projections(at_relations.student) as ours:
        own = student.states(given, **asked)
    relations: tuple[dict[int, Tensor], dict[int, Tensor], Tensor] | None = None
    hidden = at(own.hidden[-1])
    teacher_hidden: Tensor | None = None
    heard: Tensor | None = None
    layers, attention = list[tuple[Tensor, Tensor]](), list[tuple[Tensor, Tensor]]()
    if isinstance(teacher, Teacher):
        with watched_projections(at_relations.teacher) as theirs:
            answers = teacher.states(given, **asked)
        if config.relations is not None and batch.real is not None:
            relations = theirs, ours, batch.real[some].to(ids.device)
        teacher_hidden, head = at(answers.hidden[-1]), teacher.head
        for theirs_at, ours_at in config.layers:
            layers.append((at(answers.hidden[theirs_at]), at(own.hidden[ours_at])))
            if asked["attention"]:  # block i comes before state i + 1
                pair = (answers.attention[theirs_at - 1], own.attention[ours_at - 1])
                attention.append((pair[0][:, :, :-1], pair[1][:, :, :-1]))
        teacher_signal: Callable[[slice | Tensor], Signal] = lambda positions: head(teacher_hidden[positions])  # noqa: E731
    elif isinstance(teacher, CrossTokenizerTeacher):
        across, (states, heard) = teacher, teacher.states(ids, counted)
        teacher_signal = lambda positions: across.signal(states[positions])  # noqa: E731
    elif teacher is not None:
        kept = _concatenated([teacher.read(n)[:-1][c] for n, c in zip(batch.numbers[some], counted.cpu(), strict=True)])
        kept = kept.to(student.device)
        teacher_signal = lambda positions: kept[positions]  # noqa: E731
    else:
        teacher_signal = lambda positions: hidden.new_empty(0)  # noqa: E731
    sequence = torch.arange(len(ids), device=ids.device)[:, None].expand_as(counted)[counted]
    followed = None if batch.followed is None else batch.followed[some].to(ids.device)[counted]
    text: tuple[Tensor, Tensor, Tensor] | None = None
    if batch.real is not None and batch.hidden is not None:
        text = ids, batch.real[some].to(ids.device), batch.hidden[some].to(ids.device)
    credit: tuple[Tensor, Tensor] | None = None
    if batch.credit is not None:
        advantage, pull = (of[some].to(ids.device)[sequence] for of in (batch.credit.advantage, batch.credit.pull))
        credit = advantage, pull
    return MicroBatch(
        hidden, ids[:, 1:][counted], teacher_signal, teacher_hidden, sequence, followed, layers, attention, counted,
        credit, heard, text, relations,
    )  # fmt: skip


def _concatenated(parts: Sequence[TopK | SampledTargets]) -> TopK | SampledTargets:
    kind = type(parts[0])
    return kind(*(torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])))


def _losses(
    student: Student,
    micro: MicroBatch,
    head: Head,
    auxiliary: AuxiliaryModules,
    factors: Sequence[float],
    config: TrainingConfig,
    batch: Batch,
) -> tuple[list[float], Tensor, Tensor | None]:
    """-> each loss's share in the step's; the gradient at micro.hidden of the weighted sum of those that the last
    states alone decide; and something with the graph and the gradient of the weighted sum of the others.  The head
    gathers its own gradient."""
    terms, tokens = auxiliary.terms, batch.tokens
    values = [0.0] * len(terms)
    single = [i for i, term in enumerate(terms) if term.name not in ELSEWHERE]

    def loss(positions: slice, logits: Tensor) -> Tensor:
        signal, following, total = micro.teacher_signal(positions), micro.following[positions], logits.new_zeros(())
        for i in single:
            if terms[i].name in REWARDED_LOSSES and micro.credit is not None:
                credit = micro.credit[0][positions], micro.credit[1][positions]
                value = of_rewards(terms[i], signal, logits, following, credit).sum() / tokens
            else:
                each = pointwise(terms[i], signal, logits, following, config.temperature)
                if micro.heard is not None and terms[i].name not in LABELED_LOSSES:
                    each = each.where(micro.heard[positions], 0.0)
                value = each.sum() / tokens
            values[i] += float(value.detach())
            total = total + factors[i] * value
        return total

    gradient = torch.zeros_like(micro.hidden, requires_grad=False)
    if single:
        _, gradient = through_head(micro.hidden, head, loss)
    between: list[Tensor] = []
    for i, term in enumerate(terms if len(micro.hidden) else []):
        if term.name in SETS_LOSSES:
            leaf = micro.hidden.detach().requires_grad_()
            value, error = _of_sets(term, leaf, micro, head, config)
            auxiliary.errors[term.label] = error + auxiliary.errors.get(term.label, 0.0)
            values[i] = float(value.detach())
            (factors[i] * value).backward()
            assert leaf.grad is not None
            gradient += leaf.grad
        elif term.name in SPANS_LOSSES:
            values[i], more = _of_spans(term, factors[i], micro, head, config, batch.pairs)
            gradient += more
        elif term.name in STATES_LOSSES:
            value = _of_states(term, micro, auxiliary) * len(micro.hidden) / tokens
            values[i] = float(value.detach())
            between.append(factors[i] * value)
        elif (by_row := _by_row(term, student, micro, config)) is not None:
            value = by_row.sum() / config.batch
            values[i] = float(value.detach())
            between.append(factors[i] * value)
        elif term.name in EXITS_LOSSES:
            values[i], graph = _of_exits(term, factors[i], student, micro, head, auxiliary, config, tokens)
            between.append(graph)
    return values, gradient, torch.stack(between).sum() if between else None


def _by_row(term: LossTerm, student: Student, micro: MicroBatch, config: TrainingConfig) -> Tensor | None:
    """A loss (B,) of whole rows; None for others."""
    if term.name in BIDIRECTIONAL_LOSSES and micro.text is not None:
        rows: Tensor = term.loss(student.whole, *micro.text)
        return rows
    if term.name in RELATIONS_LOSSES and micro.relations is not None and config.relations is not None:
        theirs, ours = ([found[part] for part in range(3)] for found in micro.relations[:2])
        return term.loss(theirs, ours, micro.relations[2], config.relations.heads)
    return None


def _of_states(term: LossTerm, micro: MicroBatch, auxiliary: AuxiliaryModules) -> Tensor:
    """The mean over layers and positions; Gram matrices are of some of the positions."""
    if term.name == "attention":
        each = [term.loss(t, s, micro.counted).mean(1).sum() for t, s in micro.attention]
        return torch.stack(each).mean() / len(micro.hidden)
    if term.name == "align":
        each = [term.loss(t, s, own) for (t, s), own in zip(micro.layers, auxiliary.aligned, strict=True)]
        return torch.stack(each).mean()
    if term.name == "hidden":
        pairs = [(t, bridge(s)) for (t, s), bridge in zip(micro.layers, auxiliary.bridges, strict=True)]
    else:
        some = torch.randperm(len(micro.hidden))[: 4 * SET].to(micro.hidden.device)
        pairs = [(t[some], s[some]) for t, s in micro.layers]
    return torch.stack([term.loss(t, s) for t, s in pairs]).mean()


def _of_exits(
    term: LossTerm,
    factor: float,
    student: Student,
    micro: MicroBatch,
    head: Head,
    auxiliary: AuxiliaryModules,
    config: TrainingConfig,
    tokens: int,
) -> tuple[float, Tensor]:
    """The mean over exits, and something with the graph and the gradient of `factor` times it."""
    value, graph = 0.0, micro.hidden.new_zeros(())
    for (_, state), exit in zip(micro.layers[:-1], auxiliary.exits, strict=True):

        def loss(positions: slice, logits: Tensor) -> Tensor:
            each = pointwise(
                term, micro.teacher_signal(positions), logits, micro.following[positions], config.temperature
            )
            return factor * each.sum() / tokens / len(auxiliary.exits)

        answer = student.final_norm(state @ exit.mT.to(state.dtype))
        total, gradient = through_head(answer, head, loss)
        value, graph = value + float(total) / factor, graph + (answer * gradient).sum()
    return value, graph


def _of_spans(
    term: LossTerm, factor: float, micro: MicroBatch, head: Head, config: TrainingConfig, pairs: int
) -> tuple[float, Tensor]:
    """The mean over neighbours in one span, and the gradient of `factor` times it at micro.hidden."""
    assert micro.followed is not None
    value, gradient = 0.0, torch.zeros_like(micro.hidden, requires_grad=False)
    for first in torch.where(micro.followed)[0].split(SET) if micro.followed.any() else ():
        rows = torch.stack([first, first + 1], -1).flatten()  # neighbours side by side, some of them twice
        leaf = micro.hidden[rows].detach().requires_grad_()
        teacher_signal = micro.teacher_signal(rows)
        assert isinstance(teacher_signal, Tensor)
        p, q = ((upcast(z) / config.temperature).softmax(-1) for z in (teacher_signal, head(leaf)))
        some = term.loss(p, q, [(i, i + 2) for i in range(0, len(rows), 2)]) * (len(first) / pairs)
        (factor * some).backward()
        assert leaf.grad is not None
        gradient.index_add_(0, rows, leaf.grad)
        value += float(some.detach())
    return value, gradient


def _of_sets(
    term: LossTerm, hidden: Tensor, micro: MicroBatch, head: Head, config: TrainingConfig
) -> tuple[Tensor, float]:
    """Sets of up to SET positions: of each sequence, or of all that pass together; weighted by their sequences.

    -> the loss, and the marginal error of their plans, both as this pass's share in the step's mean over sets.
    """
    names = micro.sequence.unique().tolist()
    members = [torch.where(micro.sequence == s)[0] for s in names] if "sequence" in term.name else [None]
    total, errors = hidden.new_zeros(()), 0.0
    for of in members:
        here = torch.arange(len(hidden), device=hidden.device) if of is None else of
        some = here[torch.randperm(len(here))[:SET].sort().values.to(here.device)]
        if term.name == "sinkhorn-hidden":
            assert micro.teacher_hidden is not None
            p, q = micro.teacher_hidden[some], hidden[some]
        else:
            teacher_signal = micro.teacher_signal(some)
            assert isinstance(teacher_signal, Tensor)
            p, q = teacher_signal, head(hidden[some])
        value, error = of_sets(term, p[None], q[None], config.temperature)
        total, errors = total + value[0], errors + float(error)
    rows = config.batch * (1 if config.policy is None else config.policy.group)
    share = len(names) / rows / len(members)
    return total * share, errors * share
