"""The training loop against plain autograd over a dense loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calib import BadInput, Diverged
from calib.data.corpus import Corpus
from calib.data.teacher_cache import TeacherCache
from calib.jobs.journal import CheckpointSlot, Journal
from calib.jobs.training_loop import OptimizerConfig
from calib.losses.divergences import cross_entropy, dense, forward_kl, reverse_kl
from calib.losses.top_k import top_k
from calib.model.bidirectional import bico_loss
from calib.quant.scheme import Scheme
from compressor.distillation.auxiliary_modules import AuxiliaryModules, auxiliary_modules
from compressor.distillation.batches import Batch, TrainingConfig, step_batch
from compressor.distillation.fake_quant import FakeQuantizer, fake_quantizers
from compressor.distillation.loss_expression import parse_loss, pointwise
from compressor.distillation.losses.dac import clip_objective, dac_clipped, dac_learned, span_correlation
from compressor.distillation.losses.decoupled import ofa
from compressor.distillation.models import Student, Teacher
from compressor.distillation.train import _step, train_student, training_targets
from compressor.on_policy.policy import Credit
from compressor.on_policy.sampling import generate
from tests import tiny
from tests.architectures import ARCHITECTURES


def model(seed: int, model_type: str = "llama") -> torch.nn.Module:
    return tiny.model_of(tiny.config_of(model_type), seed=seed)


def corpus(rows: int = 6, length: int = 9) -> Corpus:
    """Padded on the right, each row to another length."""
    ids = torch.randint(2, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    lengths = 3 + torch.arange(rows) % (length - 2)
    return Corpus(ids, torch.arange(length) < lengths[:, None], "random", None)


def lesson(loss: str, **more: object) -> TrainingConfig:
    return replace(
        TrainingConfig(terms=parse_loss(loss), descent=OptimizerConfig(steps=3), lr=1e-2, batch=4, seed=0),
        **more,  # type: ignore[arg-type]
    )


def aside_of(student: Student, teacher: Teacher | TeacherCache, config: TrainingConfig) -> AuxiliaryModules:
    ours = student.width
    theirs = teacher.width if isinstance(teacher, Teacher) else ours
    return auxiliary_modules(
        config.terms, layers=len(config.layers), student_width=ours, teacher_width=theirs, seed=0, device=student.device
    )


def gradients(
    student: Student, teacher: Teacher | TeacherCache, data: Corpus, config: TrainingConfig
) -> tuple[list[float], Tensor]:
    """Of one step over all rows."""
    targets = training_targets(data, answers_only=False)
    words = step_batch(student, teacher, data, targets, list(range(len(data.ids))), 0, config)
    for p in (*student.params, *student.scales):
        p.grad = None
    factors = torch.tensor([term.weight for term in config.terms], dtype=torch.float64)
    torch.manual_seed(0)
    values, _ = _step(student, teacher, words, config, factors, 1, aside_of(student, teacher, config))
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (*student.params, *student.scales)]
    return values, torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3", "phi3"])
@pytest.mark.parametrize("at_once", [9, 20, 1000])
def test_a_step_is_plain_autograd_over_dense_logits(model_type: str, at_once: int) -> None:
    """Loss and gradients, tied head and soft-capping included; padding and micro-batches change nothing."""
    student = Student(model(1, model_type).requires_grad_(True), None, tiny.VOCAB, {})
    teacher, data = Teacher(model(2, model_type), None, tiny.VOCAB), corpus()
    values, ours = gradients(student, teacher, data, lesson("0.3*ce+forward-kl", at_once=at_once))

    for p in student.params:
        p.grad = None
    q, p = student.model(data.ids).logits[:, :-1], teacher.model(data.ids).logits[:, :-1]
    real = data.mask[:, 1:]
    ce = cross_entropy(data.ids[:, 1:], q)[real].mean()
    kl = dense(forward_kl, p, q)[real].mean()
    (0.3 * ce + kl).backward()
    plain = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in student.params])
    assert values == pytest.approx([ce.item(), kl.item()], rel=1e-6)
    assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-8)


def test_a_teacher_whose_every_token_is_kept_teaches_the_same(tmp_path: Path) -> None:
    student, teacher, data = (
        Student(model(1).requires_grad_(True), None, tiny.VOCAB, {}),
        Teacher(model(2), None, tiny.VOCAB),
        corpus(),
    )
    cache = TeacherCache(Journal(tmp_path))
    for row in range(len(data.ids)):
        cache.write(row, top_k(teacher.head(teacher.hidden(data.ids[row : row + 1]))[0], tiny.VOCAB))
    online, kept = (gradients(student, t, data, lesson("forward-kl")) for t in (teacher, cache))
    assert kept[0] == pytest.approx(online[0], rel=1e-6)
    assert torch.allclose(kept[1], online[1], rtol=1e-5, atol=1e-8)


def test_sequences_are_sets_of_their_own_whatever_passes_together() -> None:
    student, teacher, data = (
        Student(model(1).requires_grad_(True), None, tiny.VOCAB, {}),
        Teacher(model(2), None, tiny.VOCAB),
        corpus(),
    )
    options = lesson("ce+sinkhorn-sequence(0.5)")
    all_at_once, one_by_one = (gradients(student, teacher, data, replace(options, at_once=n)) for n in (1000, 9))
    assert all_at_once[0] == pytest.approx(one_by_one[0], rel=1e-4)
    assert torch.allclose(all_at_once[1], one_by_one[1], rtol=1e-2, atol=1e-4)


def test_quantized_weights_are_on_their_grids_and_gradients_go_straight_through() -> None:
    body = model(1).requires_grad_(True)
    student = Student(body, None, tiny.VOCAB, fake_quantizers(body, Scheme.parse("w8a16-channel"), torch.float64))
    teacher, data = Teacher(model(2), None, tiny.VOCAB), corpus()
    _, ours = gradients(student, teacher, data, lesson("forward-kl"))
    plain = Student(model(1).requires_grad_(True), None, tiny.VOCAB, {})
    for name, fake in student.fakes.items():
        weight = plain.model.get_parameter(name)
        weight.data.copy_(fake.value(weight).detach())
        assert torch.equal(weight, student.model.get_parameter(name))
    gradients(plain, teacher, data, lesson("forward-kl"))
    reach = {name: fake.reach() for name, fake in student.fakes.items()}  # shares of which are trained
    expected = torch.cat([(p.grad * reach.get(n, 1)).flatten() for n, p in plain.model.named_parameters()])
    # Inside the range the gradient of the weight is that of its value; 8 bits clip next to nothing.
    close = (ours[: len(expected)] - expected).abs() < 1e-6 * expected.abs().max()
    assert close.float().mean() > 0.98
    assert all(scale.grad is not None and scale.grad.any() for scale in student.scales)


def test_a_fake_quantized_weight_is_what_is_stored() -> None:
    weight = torch.randn(6, 16, dtype=torch.float64)
    fake = FakeQuantizer.fitted(weight, Scheme.parse("w3a16-g8").weights, torch.float16)
    rounded = fake.rounded(weight, torch.float16)
    assert rounded.scale.dtype == torch.float16
    assert torch.allclose(rounded.weight().double(), fake.value(weight).detach(), rtol=1e-3)


def test_students_learn_and_an_interrupted_lesson_ends_with_the_same_bytes(tmp_path: Path) -> None:
    data, options = (
        corpus(),
        lesson("forward-kl+0.5*ce", descent=OptimizerConfig(steps=12), balance="recap", ema=0.8),
    )
    targets = training_targets(data, answers_only=False)

    def run(page: CheckpointSlot | None) -> tuple[Student, list[dict[str, float]]]:
        student = Student(model(1).requires_grad_(True), None, tiny.VOCAB, {})
        return student, train_student(student, Teacher(model(2), None, tiny.VOCAB), data, targets, options, page)

    whole, curve = run(None)
    assert curve[-1]["forward-kl"] < curve[0]["forward-kl"]
    stop = Stopping(Journal(tmp_path), "distil", after=7)
    with pytest.raises(KeyboardInterrupt):
        run(stop)
    again, resumed = run(CheckpointSlot(Journal(tmp_path), "distil"))
    assert resumed == curve
    assert all(torch.equal(a, b) for a, b in zip(whole.params, again.params, strict=True))


class Stopping(CheckpointSlot):
    """Dies in the write after so many."""

    due = True  # type: ignore[assignment]

    def __init__(self, journal: Journal, name: str, after: int) -> None:
        super().__init__(journal, name)
        self._left = after

    def write(self, *arguments: object) -> None:  # type: ignore[override]
        super().write(*arguments)  # type: ignore[arg-type]
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt


def test_a_loss_that_is_no_number_names_step_part_and_rows() -> None:
    student = Student(model(1).requires_grad_(True), None, tiny.VOCAB, {})
    student.params[0].data[3] = float("nan")
    data = corpus()
    with pytest.raises(Diverged, match=r"step 0: forward-kl is nan.*\(rows \d"):
        train_student(
            student, Teacher(model(2), None, tiny.VOCAB), data, training_targets(data, answers_only=False),
            lesson("forward-kl", batch=6),
        )  # fmt: skip


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_inner_states_are_those_that_the_library_tells_of(model_type: str) -> None:
    net = tiny.model_of(tiny.config_of(model_type), seed=1, dtype=torch.float32)
    net.set_attn_implementation("eager")  # others have no distributions to tell of
    ids = corpus().ids
    told = net.model(input_ids=ids, use_cache=False, output_hidden_states=True, output_attentions=True)
    seen = Teacher(net, None, tiny.VOCAB).states(ids, every=True, attention=True)
    for ours, theirs in ((seen.hidden, told.hidden_states), (seen.attention, told.attentions)):
        assert len(ours) == len(theirs)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_a_gradient_norm_that_is_no_number_stops_the_balancing_too() -> None:
    student = Student(model(1).requires_grad_(True), None, tiny.VOCAB, {})
    student.params[0].data[3] = float("nan")
    data, options = corpus(), lesson("ce+forward-kl", batch=6, balance="gradient")
    with pytest.raises(Diverged, match=r"step 0: the gradient of ce is nan.*\(rows \d"):
        train_student(
            student, Teacher(model(2), None, tiny.VOCAB), data, training_targets(data, answers_only=False), options
        )


def test_a_loss_of_sets_pulls_at_the_student_and_says_how_well_its_plans_fit() -> None:
    """In SinKD's code the term is computed and never added."""
    teacher, data = Teacher(model(2), None, tiny.VOCAB), corpus()
    pulls = []
    for loss in ("forward-kl", "forward-kl+sinkhorn", "forward-kl+2*sinkhorn"):
        student = Student(model(1).requires_grad_(True), None, tiny.VOCAB, {})
        pulls.append(gradients(student, teacher, data, lesson(loss, at_once=1000))[1])
    first, second = pulls[1] - pulls[0], pulls[2] - pulls[0]
    assert first.norm() > 1e-3 * pulls[0].norm() and torch.allclose(second, 2 * first, atol=1e-4)
    student = Student(model(1).requires_grad_(True), None, tiny.VOCAB, {})
    curve = train_student(
        student, teacher, data, training_targets(data, answers_only=False), lesson("forward-kl+sinkhorn(0.1,1,1)")
    )
    errors = [parts["marginal error of sinkhorn(0.1,1,1)"] for parts in curve]
    assert all(0 < error < 2 for error in errors), "one sweep does not converge"


def test_the_share_that_the_student_writes_is_kept_over_steps() -> None:
    """Half of one row a step is a row every second step, not none."""
    student, data = Student(model(1).requires_grad_(True), None, tiny.VOCAB, {}), corpus()
    for share, batch, each in ((0.5, 1, [0, 1, 0, 1]), (0.1, 4, [0, 0, 1, 0, 1, 0]), (1.0, 2, [2, 2])):
        options, targets = (
            lesson("forward-kl", on_policy=share, batch=batch),
            training_targets(data, answers_only=False),
        )
        words = [
            step_batch(student, None, data, targets, list(range(batch)), step, options) for step in range(len(each))
        ]
        assert [w.numbers.count(-1) for w in words] == each


def test_words_are_drawn_as_the_model_says_whatever_its_settings_say() -> None:
    """Many checkpoints come with a low temperature, with top-p, or with a number of words to write."""
    own = model(1)
    own.generation_config.update(temperature=0.01, top_p=0.1, max_new_tokens=2, repetition_penalty=9.0)
    prompts = torch.arange(2, 6).expand(3000, -1)
    torch.manual_seed(0)
    rows, _ = generate(own, prompts, 5)
    assert rows.shape == (3000, 5) and own.generation_config.temperature == 0.01
    shares = torch.bincount(rows[:, 4], minlength=tiny.VOCAB) / 3000
    expected = own(prompts[:1]).logits[0, -1].softmax(-1)
    assert (shares - expected).abs().max() < 5 * 0.5 / 3000**0.5


def test_estimators_are_of_the_student_s_own_words() -> None:
    """k2 has the gradient of reverse KL, k3 that of forward KL, on tokens drawn from the student."""
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(1, 6, generator=g, dtype=torch.float64) for _ in range(2))
    q.requires_grad_()
    target = torch.multinomial(q.detach().softmax(-1)[0], 200_000, replacement=True, generator=g)
    for name, other in (("k2", reverse_kl), ("k3", forward_kl)):
        (term,) = parse_loss(name)
        value = pointwise(term, p.expand(len(target), -1), q.expand(len(target), -1), target, 1.0).mean()
        (gradient,) = torch.autograd.grad(value, q)
        (expected,) = torch.autograd.grad(dense(other, p, q).sum(), q)
        assert torch.allclose(gradient, expected, atol=0.01), name


def test_gradient_norms_are_balanced() -> None:
    """After balancing no loss pulls more than its share, though one is a thousand times the other."""
    student, teacher, data = (
        Student(model(1).requires_grad_(True), None, tiny.VOCAB, {}),
        Teacher(model(2), None, tiny.VOCAB),
        corpus(),
    )
    options = lesson("1000*ce+forward-kl", balance="gradient")
    targets = training_targets(data, answers_only=False)
    words = Batch(data.ids, targets, list(range(6)), int(targets.sum()))
    factors = torch.tensor([1000.0, 1.0], dtype=torch.float64)
    _, rates = _step(student, teacher, words, options, factors, 0, aside_of(student, teacher, options))
    plain = Student(model(1).requires_grad_(True), None, tiny.VOCAB, {})
    norms = []
    for name in ("ce", "forward-kl"):
        hidden = plain.hidden(data.ids)[:, :-1][targets].detach().requires_grad_()
        q, p = plain.head(hidden), teacher.head(teacher.hidden(data.ids)[:, :-1][targets])
        value = cross_entropy(data.ids[:, 1:][targets], q) if name == "ce" else dense(forward_kl, p, q)
        (gradient,) = torch.autograd.grad(value.mean(), hidden)
        norms.append(gradient.norm().item())
    pulls = [rate * norm for rate, norm in zip(rates, norms, strict=True)]
    assert pulls[0] / pulls[1] == pytest.approx(1000, rel=1e-3)


def test_balancing_does_not_take_a_pass_for_a_whole_step() -> None:
    """Norms are measured on the first pass: here 2 tokens of 27. As shares of the step's mean they would be tiny, and
    factors large; as means of their own they are at most sqrt(27 / 2) times larger, as more tokens cancel more."""
    teacher, data = Teacher(model(2), None, tiny.VOCAB), corpus()
    targets, rates = training_targets(data, answers_only=False), []
    words = Batch(data.ids, targets, list(range(6)), int(targets.sum()))
    for at_once in (12, 1000):
        student = Student(model(1).requires_grad_(True), None, tiny.VOCAB, {})
        options = lesson("ce+forward-kl", balance="gradient", batch=6, at_once=at_once)
        factors = torch.ones(2, dtype=torch.float64)
        rates.append(_step(student, teacher, words, options, factors, 0, aside_of(student, teacher, options))[1])
    assert all(0.25 < few / whole < 1.1 for few, whole in zip(*rates, strict=True))


def test_the_student_writes_from_where_the_answer_begins_and_goes_on_training() -> None:
    student, data = Student(model(1).requires_grad_(True), None, tiny.VOCAB, {}), corpus()
    student.model.train()
    targets = training_targets(data, answers_only=False)
    targets[:, :4] = False
    options = lesson("forward-kl", on_policy=1.0, batch=len(data.ids))
    batches = []
    for _ in range(2):
        torch.manual_seed(0)
        batches.append(step_batch(student, None, data, targets, list(range(len(data.ids))), 0, options))
    words = batches[0]
    known = data.mask[:, 4] & targets.any(1)
    assert torch.equal(words.ids[known, :5], data.ids[known, :5]) and not words.counted[known, :4].any()
    assert words.counted[known, 4].all() and torch.equal(words.ids, batches[1].ids)
    assert student.model.training


@pytest.mark.parametrize("at_once", [10, 4096])
def test_every_answer_gets_its_own_credit(at_once: int) -> None:
    """KDRL's gradient, in one pass or several, against a loop over rows: -A log pi + pull (log T / pi)^2 / 2 at the
    tokens that count, over all of them."""
    data, teacher = corpus(), Teacher(model(2), None, tiny.VOCAB)
    targets = training_targets(data, answers_only=False)
    credit = Credit(torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0, 0.3]), torch.tensor([0.1, 0.0, 0.4, 0.2, 0.0, 1.0]))
    words = Batch(data.ids, targets, [-1] * 6, int(targets.sum()), credit=credit)
    options, student = lesson("kdrl", at_once=at_once), Student(model(1).requires_grad_(True), None, tiny.VOCAB, {})
    values, _ = _step(student, teacher, words, options, torch.ones(1), 1, aside_of(student, teacher, options))
    plain, total = model(1).requires_grad_(True), torch.zeros(())
    for row in range(6):
        log_q, log_p = (m(data.ids[row : row + 1]).logits[0, :-1].log_softmax(-1) for m in (plain, teacher.model))
        for place in range(8):
            if targets[row, place]:
                q, p = (x[place, data.ids[row, place + 1]] for x in (log_q, log_p))
                total = total - credit.advantage[row] * q + credit.pull[row] * (p.detach() - q) ** 2 / 2
    (total / targets.sum()).backward()
    assert values[0] == pytest.approx(float(total.detach() / targets.sum()), rel=1e-4)
    for ours, theirs in zip(student.params, plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("at_once", [10, 4096])
def test_hidden_tokens_are_told_row_by_row(at_once: int) -> None:
    """The mean over rows of `bico_loss`, whatever passes together; no padding is hidden, and others the next step."""
    data, options = corpus(), lesson("ce+bico(0.4)", batch=6, at_once=at_once)
    student, targets = (
        Student(model(1).requires_grad_(True), None, tiny.VOCAB, {}),
        training_targets(corpus(), answers_only=False),
    )
    first, second = (step_batch(student, None, data, targets, list(range(6)), step, options) for step in (0, 1))
    assert first.hidden is not None and second.hidden is not None and not torch.equal(first.hidden, second.hidden)
    assert not (first.hidden & ~data.mask).any() and first.hidden.any(1).all()
    values, _ = _step(
        student, None, first, options, torch.ones(2), 1, aside_of(student, Teacher(model(2), None, tiny.VOCAB), options)
    )
    plain = model(1).requires_grad_(True)
    expected = bico_loss(plain, data.ids, data.mask, first.hidden).mean()
    log_q = plain(data.ids).logits[:, :-1].log_softmax(-1).gather(-1, data.ids[:, 1:, None])[..., 0]
    (expected - log_q[targets].mean()).backward()
    assert values[1] == pytest.approx(float(expected.detach()), rel=1e-4)
    for ours, theirs in zip(student.params, plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)  # type: ignore[arg-type]


def test_what_counts() -> None:
    data = corpus()
    assert torch.equal(training_targets(data, answers_only=False), data.mask[:, 1:])
    with pytest.raises(BadInput, match="leave out --answers-only"):
        training_targets(data, answers_only=True)
    answers = torch.zeros_like(data.mask)
    answers[:, 4:] = True
    # Position 3 predicts the first token of the answer: a mask on unshifted logits would lose it, and keep the last.
    prompted = replace(data, answers=answers)
    counted = training_targets(prompted, answers_only=True)
    assert counted[5, 3] and not counted[:, :3].any() and counted.shape == (6, 8)
    with pytest.raises(BadInput, match="all tokens are masked"):
        training_targets(replace(data, answers=torch.zeros_like(answers)), answers_only=True)


@pytest.mark.parametrize("loss", ["hidden", "cka", "gram"])
def test_hidden_states_are_compared_and_gradients_reach_the_projection(loss: str) -> None:
    """At equality the loss is zero; where widths differ a projection is learned, and the loss falls."""
    teacher, data = Teacher(model(2), None, tiny.VOCAB), corpus()
    same = Student(model(2).requires_grad_(True), None, tiny.VOCAB, {})
    layers = [(1, 1), (2, 2)]
    options = lesson(f"ce+{loss}", layers=layers, descent=OptimizerConfig(steps=1), lr=0.0)
    targets = training_targets(data, answers_only=False)
    assert train_student(same, teacher, data, targets, options)[0][loss] == pytest.approx(0, abs=1e-9)
    narrow = tiny.model_of(tiny.config_of("llama", hidden_size=16, num_attention_heads=4, head_dim=8), seed=4)
    student = Student(narrow.requires_grad_(True), None, tiny.VOCAB, {})
    options = lesson(f"0.01*ce+{loss}", layers=layers, descent=OptimizerConfig(steps=40), lr=0.02)
    curve = train_student(student, teacher, data, targets, options)
    assert curve[-1][loss] < 0.8 * curve[0][loss]


def of_every_row(model: torch.nn.Module, data: Corpus, **asked: bool) -> Any:
    """What the library's own eager model gives."""
    model.set_attn_implementation("eager")
    return model(data.ids, **asked)


@pytest.mark.parametrize(("model_type", "ours"), [("llama", 1), ("gemma2", 2), ("qwen3", 1)])
@pytest.mark.parametrize("at_once", [9, 1000])
def test_attention_is_compared_block_by_block(model_type: str, ours: int, at_once: int) -> None:
    student = Student(model(1, model_type).requires_grad_(True), None, tiny.VOCAB, {})
    teacher, data = Teacher(model(2, model_type), None, tiny.VOCAB), corpus()
    values, found = gradients(student, teacher, data, lesson("attention", layers=[(2, ours)], at_once=at_once))

    for p in student.params:
        p.grad = None
    p = of_every_row(teacher.model, data, output_attentions=True).attentions[1]
    q = of_every_row(student.model, data, output_attentions=True).attentions[ours - 1]
    seen = p > 0  # neither later keys nor those beyond a window
    kl = (p * (p.where(seen, 1).log() - q.where(seen, 1).log())).sum(-1)[:, :, :-1].mean(1)  # of each query
    value = kl[data.mask[:, 1:]].mean()
    value.backward()
    plain = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in student.params])
    assert values == pytest.approx([value.item()], rel=1e-6)
    assert torch.allclose(found, plain, rtol=1e-5, atol=1e-8) and found.any()


@pytest.mark.parametrize("at_once", [9, 1000])
def test_a_student_is_asked_for_its_answer_after_each_block(at_once: int) -> None:
    """The loss of OFA-KD, through the student's own norm and head, and a map that starts as the identity."""
    student = Student(model(1).requires_grad_(True), None, tiny.VOCAB, {})
    teacher, data = Teacher(model(2), None, tiny.VOCAB), corpus()
    options = lesson("0.7*ofa-exits(1.3)", layers=[(1, 1), (2, 2)], at_once=at_once)
    values, ours = gradients(student, teacher, data, options)

    for p in student.params:
        p.grad = None
    result = student.model(data.ids, output_hidden_states=True)
    q = student.head(student.model.model.norm(result.hidden_states[1]))[:, :-1]
    real, p = data.mask[:, 1:], teacher.model(data.ids).logits[:, :-1]
    value = ofa(p[real], q[real], data.ids[:, 1:][real], 1.3).mean()
    (0.7 * value).backward()
    plain = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in student.params])
    assert values == pytest.approx([value.item()], rel=1e-6)
    assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-8) and ours.any()


@pytest.mark.parametrize("at_once", [9, 1000])
def test_neighbours_are_compared_within_spans_that_were_given(at_once: int) -> None:
    student = Student(model(1).requires_grad_(True), None, tiny.VOCAB, {})
    teacher, data = Teacher(model(2), None, tiny.VOCAB), corpus()
    spans = torch.full_like(data.ids, -1)
    spans[3, 1:4], spans[4, 1:3], spans[4, 3:6], spans[5, 4:] = 0, 1, 2, 3
    values, ours = gradients(student, teacher, replace(data, spans=spans), lesson("spans", at_once=at_once))

    for p in student.params:
        p.grad = None
    # The token at t is said at t - 1.
    parts, pairs = [], 0
    for row, start, end in ((3, 1, 4), (4, 1, 3), (4, 3, 6), (5, 4, int(data.mask[5].sum()))):
        p, q = (m(data.ids[row : row + 1]).logits[0].softmax(-1) for m in (teacher.model, student.model))
        parts.append(span_correlation(p, q, [(start - 1, end - 1)]) * (end - start - 1))
        pairs += end - start - 1
    value = torch.stack(parts).sum() / pairs
    value.backward()
    plain = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in student.params])
    assert values == pytest.approx([value.item()], rel=1e-6)
    assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-8) and ours.any()


def test_a_clip_that_is_learned_moves_beside_the_student() -> None:
    """The student goes down the clipped KL at the limits there are; the net goes down its own objective."""
    student = Student(model(1).requires_grad_(True), None, tiny.VOCAB, {})
    teacher, data = Teacher(model(2), None, tiny.VOCAB), corpus()
    options = lesson("dac")
    values, ours = gradients(student, teacher, data, options)
    for p in student.params:
        p.grad = None
    real = data.mask[:, 1:]
    q, p = (m(data.ids).logits[:, :-1][real].log_softmax(-1) for m in (student.model, teacher.model))
    net = aside_of(student, teacher, options).clips[0]
    value = dac_clipped(p, q, *net(p, q)).mean()
    value.backward()
    plain = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in student.params])
    assert values == pytest.approx([value.item()], rel=1e-5)
    assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-7)

    log_p, log_q = p.detach(), q.detach()
    both = dac_learned(net, log_p, log_q.requires_grad_())
    assert torch.equal(both, dac_clipped(log_p, log_q, *net(log_p, log_q)))
    moved = torch.autograd.grad(both.sum(), [*net.parameters()])
    own = torch.autograd.grad(clip_objective(log_p, log_q, *net(log_p, log_q)).sum(), [*net.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(moved, own, strict=True)) and any(g.any() for g in own)


def test_rows_that_a_model_writes_end_with_the_end() -> None:
    own = model(3).float()
    torch.manual_seed(0)
    ids, mask = generate(own, torch.full((40, 2), 5), 30)
    assert ids.shape == mask.shape == (40, 30) and (ids[:, :2] == 5).all()
    ends = 1
    assert (ids == ends).any()
    for row, real in zip(ids, mask, strict=True):
        length = int(real.sum())
        assert real[:length].all() and not row[length:].any()
        inside = row[2:length]
        assert ends not in inside[:-1] and (length == 30 or inside[-1] == ends)
