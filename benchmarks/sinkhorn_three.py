"""Sinkhorn's loss against forward KL, reverse KL and JS as terms added to cross-entropy, for three architectures.

    PAREWELL_DATA=... python -m benchmarks.sinkhorn_three [--tasks SST-2 CoLA RTE] [--kinds bert llama t5]
    PAREWELL_DATA=... python -m benchmarks.sinkhorn_three --tasks TOFU --name sinkhorn-three-tofu

SinKD (arXiv:2402.17110) compares these on GLUE for encoder-only, decoder-only and encoder-decoder models. Here all
models are small and trained from nothing, so that each table takes less than an hour on a core: a teacher of four
layers (of each stack) and width 64, a student of two of them, which BERT classifies by and LLaMA and T5 by the one word
that answers a prompt. The teacher learns from `--rows` labelled rows, students from a quarter of them. The learning
rate of each loss, of two, is the one with the better cross-entropy on 200 rows apart from both; the figures are of the
rows with labels that GLUE calls dev (at most 872), for three seeds of the order of rows. Probabilities of LLaMA and T5
are of the two answers alone. Models this small learn little of CoLA and RTE: where the teacher is at chance a row says
nothing of its losses.

TOFU is the task of generation, for LLaMA and T5: questions about fictitious authors (arXiv:2401.06121), answered in a
sentence. Cross-entropy and KL to the teacher are per token of 400 answers that no model was taught, ROUGE-L recall is
of 100 of them, written greedily. In training rows are cut at 96 tokens, in these figures none are.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import BertConfig, LlamaConfig, PreTrainedTokenizerFast, T5Config

from benchmarks import record
from calib.data.targets import SINGLE
from calib.losses.divergences import cross_entropy, dense, forward_kl
from calib.stats.classification import metrics_of
from compressor import Distill, distill
from unlearn.audit.memorization import rouge_l_recall

LOSSES = ("ce", "ce+forward-kl", "ce+reverse-kl", "ce+js", "ce+sinkhorn", "ce+forward-kl+0.1*sinkhorn")
KINDS = {"bert": "sequence-classification", "llama": "causal-lm", "t5": "seq2seq"}
ANSWERS = ("<no>", "<yes>")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", *ANSWERS)
VOCAB, WIDTH, LAYERS, VALIDATION, TESTED, GENERATED = 2000, 64, 4, 200, 872, 100
Row = tuple[str, Any]  # a text, or a pair of them with a mark between, and its class, or its answer


def read_task(folder: Path, file: str) -> list[Row]:
    """Rows of a GLUE task as texts and classes 0 and 1, of TOFU as questions and answers."""
    if folder.name == "TOFU":
        of = {"train.tsv": "retain90.jsonl", "dev.tsv": "forget10.jsonl"}[file]
        written = (folder.parent.parent / "tofu" / of).read_text(encoding="utf-8").splitlines()
        return [(row["question"], row["answer"]) for row in map(json.loads, written)]
    with (folder / file).open(encoding="utf-8", newline="") as lines:
        cells = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if folder.name == "CoLA":
        return [(row[3], int(row[1])) for row in cells]
    if folder.name == "RTE":
        return [(f"{row[1]} | {row[2]}", int(row[3] == "entailment")) for row in cells[1:]]
    return [(row[0].strip(), int(row[1])) for row in cells[1:]]


@dataclass(frozen=True)
class Bench:
    """One architecture on one task of two classes: a directory for models and files, and the rows that are measured."""

    kind: str
    folder: Path
    tokenizer: Any
    validation: list[Row]
    tested: list[Row]
    options: Distill

    def file(self, name: str, rows: list[Row]) -> Path:
        """Write rows as this architecture reads them."""
        made = self.folder / f"{name}.jsonl"
        made.write_text("".join(json.dumps(self.line(row)) + "\n" for row in rows), encoding="utf-8")
        return made

    def line(self, row: Row) -> dict[str, Any]:
        """A row of data."""
        if self.kind == "bert":
            return {"sentence": row[0], "label": row[1]}
        return {"prompt": f"{self.cut(row[0])} ", "completion": ANSWERS[row[1]]}

    def cut(self, text: str) -> str:
        """The text as far as a row has room for it and its answer: of a pair the first text loses its beginning."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        room = int(self.options.length or 0) - 6
        return text if len(ids) <= room else str(self.tokenizer.decode(ids[-room:])).strip()

    def loaded(self, model: Path) -> Any:
        return getattr(transformers, CLASSES[self.kind]).from_pretrained(model).eval()

    @torch.no_grad()
    def logits(self, model: Path, rows: list[Row]) -> Tensor:
        """What a model says of each row (n, 2)."""
        loaded, parts = self.loaded(model), list[Tensor]()
        for start in range(0, len(rows), 64):
            texts = [text if self.kind == "bert" else f"{self.cut(text)} " for text, _ in rows[start : start + 64]]
            coded = self.tokenizer(
                texts, truncation=True, max_length=self.options.length, padding=True, return_tensors="pt"
            )
            given = {name: coded[name] for name in ("input_ids", "attention_mask")}
            if self.kind == "bert":
                parts.append(loaded(**given).logits)
                continue
            answers = self.tokenizer.convert_tokens_to_ids(list(ANSWERS))
            if self.kind == "t5":
                given["decoder_input_ids"] = torch.zeros(len(texts), 1, dtype=torch.int64)
                parts.append(loaded(**given).logits[:, 0, answers])
            else:
                last = given["attention_mask"].sum(1) - 1
                parts.append(loaded(**given).logits[torch.arange(len(texts)), last][:, answers])
        return torch.cat(parts)

    def validated(self, model: Path) -> float:
        """Cross-entropy on the validation rows, in nats: what learning rates are chosen by."""
        labels = torch.tensor([label for _, label in self.validation])
        return float(cross_entropy(labels, self.logits(model, self.validation)).mean())

    def measured(self, model: Path, expected: Tensor) -> dict[str, float]:
        """Figures on the rows that are reported, of which the teacher says `expected`."""
        labels = torch.tensor([label for _, label in self.tested])
        found = metrics_of(self.logits(model, self.tested), labels, expected, SINGLE)
        return {name: float(found[name]) for name in ("accuracy", "mcc", "ece", "kl")}


class Answers(Bench):
    """The same for answers of any length, each token of which counts, the end too."""

    def line(self, row: Row) -> dict[str, Any]:
        return {"prompt": row[0], "completion": f" {row[1]}"}

    def asked(self, row: Row) -> list[int]:
        """Tokens of a question, as a row of data begins."""
        ids = self.tokenizer(row[0], add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id] if self.kind == "t5" else [self.tokenizer.bos_token_id, *ids]

    def targets(self, rows: list[Row]) -> Tensor:
        """The tokens of all answers (n,)."""
        return torch.tensor([token for row in rows for token in self.answer(row)])

    def answer(self, row: Row) -> list[int]:
        return [*self.tokenizer(f" {row[1]}", add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def padded(self, rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        """Token ids and mask (n, T)."""
        coded = self.tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        return coded["input_ids"], coded["attention_mask"]

    @torch.no_grad()
    def logits(self, model: Path, rows: list[Row]) -> Tensor:
        """What a model says before each token of the answers (n, vocabulary)."""
        loaded, parts = self.loaded(model), list[Tensor]()
        for start in range(0, len(rows), 50):
            some = rows[start : start + 50]
            questions, answers = [self.asked(row) for row in some], [self.answer(row) for row in some]
            if self.kind == "t5":
                ids, mask = self.padded(questions, "right")
                before, _ = self.padded([[0, *answer[:-1]] for answer in answers], "right")
                found, begins = (
                    loaded(input_ids=ids, attention_mask=mask, decoder_input_ids=before).logits,
                    [0] * len(some),
                )
            else:
                ids, mask = self.padded([q + a[:-1] for q, a in zip(questions, answers, strict=True)], "right")
                found, begins = loaded(input_ids=ids, attention_mask=mask).logits, [len(q) - 1 for q in questions]
            parts += [f[b : b + len(a)] for f, b, a in zip(found, begins, answers, strict=True)]
        return torch.cat(parts)

    @torch.no_grad()
    def written(self, model: Path, rows: list[Row]) -> list[str]:
        """A greedy answer to each question."""
        ids, mask = self.padded([self.asked(row) for row in rows], "left")
        made = self.loaded(model).generate(input_ids=ids, attention_mask=mask, max_new_tokens=64, do_sample=False)
        made = made if self.kind == "t5" else made[:, ids.shape[1] :]
        return list(self.tokenizer.batch_decode(made, skip_special_tokens=True))

    def validated(self, model: Path) -> float:
        return float(cross_entropy(self.targets(self.validation), self.logits(model, self.validation)).mean())

    def measured(self, model: Path, expected: Tensor) -> dict[str, float]:
        logits, answered = self.logits(model, self.tested), self.tested[:GENERATED]
        recalls = map(rouge_l_recall, (answer for _, answer in answered), self.written(model, answered))
        return {
            "cross_entropy": float(cross_entropy(self.targets(self.tested), logits).mean()),
            "rouge_l_recall": statistics.mean(recalls),
            "kl": float(dense(forward_kl, expected, logits).mean()),
        }


CLASSES = {"bert": "AutoModelForSequenceClassification", "llama": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}


def tokenizer_of(kind: str, texts: list[str], ended: bool) -> PreTrainedTokenizerFast:
    """A tokenizer learned from texts, which ends them as the architecture wants it; LLaMA's rows where `ended`."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    around = {"bert": "<s> $A </s>", "llama": "<s> $A </s>" if ended else "<s> $A", "t5": "$A </s>"}[kind]
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def drawn_model(kind: str, vocab: int, length: int, folder: Path, seed: int = 0) -> None:
    """Write a model with weights drawn anew."""
    usual = {"vocab_size": vocab, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
             "intermediate_size": 2 * WIDTH, "max_position_embeddings": length, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config: Any
    if kind == "bert":
        config = BertConfig(**usual, num_labels=2)
    elif kind == "llama":
        config = LlamaConfig(**usual, tie_word_embeddings=True)
    else:
        config = T5Config(
            vocab_size=vocab, d_model=WIDTH, d_kv=16, d_ff=2 * WIDTH, num_layers=LAYERS, num_decoder_layers=LAYERS,
            num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
    torch.manual_seed(seed)
    getattr(transformers, CLASSES[kind]).from_config(config).save_pretrained(folder)


def prepared(kind: str, task: Path, root: Path, args: argparse.Namespace) -> tuple[Bench, Path, Path]:
    """The bench, its teacher, trained, and the student cut out of it, not trained."""
    rows = read_task(task, "train.tsv")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    validation, train = [rows[i] for i in order[:VALIDATION]], [rows[i] for i in order[VALIDATION:][: args.rows]]
    tested = read_task(task, "test.tsv" if task.name == "SST-2" else "dev.tsv")[:TESTED]
    folder = root / f"{kind}-{task.name}"
    folder.mkdir()
    bench_of, length = (Answers, 96) if task.name == "TOFU" else (Bench, 48)
    texts = [f"{text} {answer}" if bench_of is Answers else text for text, answer in train]
    tokenizer = tokenizer_of(kind, texts, ended=bench_of is Answers)
    drawn_model(kind, len(tokenizer), length, folder / "drawn")
    tokenizer.save_pretrained(folder / "drawn")
    more = {"answers_only": True, "by_document": True} if kind == "llama" else {}
    bench = bench_of(kind, folder, tokenizer, validation, tested, Distill(
        task=KINDS[kind], student=folder / "drawn", data=folder / "train.jsonl", loss="ce", lr=2e-3, batch=16,
        steps=args.teacher_steps, warmup=20, length=length, precision="float32", held_out=16,
        held_out_data=folder / "validation.jsonl", **more,  # type: ignore[arg-type]
    ))  # fmt: skip
    bench.file("train", train)
    bench.file("few", train[: max(64, len(train) // 4)])
    bench.file("validation", validation)
    distill(folder / "drawn", folder / "teacher", bench.options, resume=False, allow_damage=True)
    layers: Any = f"{LAYERS // 2},{LAYERS // 2}" if kind == "t5" else LAYERS // 2
    cut = replace(bench.options, student=None, layers=layers, loss="forward-kl", lr=1e-12, steps=1)
    distill(folder / "teacher", folder / "student", cut, resume=False, allow_damage=True)
    return bench, folder / "teacher", folder / "student"


def one_loss(bench: Bench, teacher: Path, student: Path, loss: str, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the table: figures over seeds at the rate that is best on the validation rows."""
    how = replace(bench.options, student=student, data=bench.folder / "few.jsonl", loss=loss, steps=args.steps)
    expected = bench.logits(teacher, bench.tested)

    def trained(rate: float, seed: int) -> tuple[float, dict[str, float]]:
        out = bench.folder / "out"
        distill(teacher, out, replace(how, lr=rate, seed=seed), resume=False, allow_damage=True)
        return bench.validated(out), bench.measured(out, expected)

    tried = {rate: trained(rate, 0) for rate in args.rates}
    best = min(tried, key=lambda rate: tried[rate][0])
    figures = [tried[best][1], *(trained(best, seed)[1] for seed in range(1, args.seeds))]
    row: dict[str, Any] = {"loss": loss}
    for name in figures[0]:
        values = [of[name] for of in figures]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        row[name] = f"{statistics.mean(values):.3f}{spread}"
    return row | {"rate": best, "cross-entropy on validation": " ".join(f"{r:g}: {v[0]:.3f}" for r, v in tried.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["SST-2", "CoLA", "RTE"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 2e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--name", default="sinkhorn-three")
    args = parser.parse_args()
    torch.set_num_threads(1)
    glue, rows = Path(os.environ["PAREWELL_DATA"]) / "glue", list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as root:
        for task in args.tasks:
            for kind in [kind for kind in args.kinds if (task, kind) != ("TOFU", "bert")]:
                bench, teacher, student = prepared(kind, glue / task, Path(root), args)
                named, expected = {"task": task, "model": kind}, bench.logits(teacher, bench.tested)
                for name, model in (("(the teacher)", teacher), ("(the student, cut)", student)):
                    figures = {n: f"{v:.3f}" for n, v in bench.measured(model, expected).items()}
                    rows.append(named | {"loss": name} | figures)
                for loss in args.losses:
                    rows.append(named | one_loss(bench, teacher, student, loss, args))
                    record.write(args.name, rows, str(__doc__).split("\n\n")[0])


if __name__ == "__main__":
    main()
