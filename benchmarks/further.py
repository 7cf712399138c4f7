"""stories260k, 5 blocks to 3, forward KL: what closes more of the gap in the same 200 steps.

    PAREWELL_DATA=... python -m benchmarks.further

As `benchmarks.distil`, whose row of forward KL is the first; each row adds to the one before. The teacher writes
1,200 rows of 512 tokens once, from its start token on. Rates were chosen on the validation stories, seed 0.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import record
from benchmarks.distil import start, stories, written
from benchmarks.stories import model
from calib.data.corpus import pad_to
from calib.data.load import load_corpus
from calib.model.checkpoint import read_tokenizer
from compressor import Distill, distill
from compressor.engine.load import load
from compressor.on_policy.sampling import generate as written_by

LENGTH = 512
ROWS: dict[str, dict[str, Any]] = {
    "150 stories, 5 a step": {"lr": 4e-3},
    "and 1,200 rows of the teacher's": {"lr": 4e-3, "more": True},
    "20 rows a step, average of weights": {"lr": 6e-3, "more": True, "batch": 20, "ema": 0.9},
}


def with_rows(known: Path, rows: int, file: Path) -> Path:
    """The stories, and rows that the teacher writes, as token ids."""
    corpus = load_corpus(known, read_tokenizer(model()), vocab=512, length=LENGTH, by_document=True)
    corpus, teacher = pad_to(corpus, LENGTH), load(model()).eval()
    torch.manual_seed(0)
    parts = [written_by(teacher, corpus.ids[:50, :1], LENGTH) for _ in range(rows // 50)]
    ids, mask = (torch.cat([own, *(part[i] for part in parts)]) for i, own in enumerate((corpus.ids, corpus.mask)))
    save_file({"input_ids": ids, "attention_mask": mask.long()}, file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, all_of = Path(name), stories()
        common = Distill(
            layers=3, data=written(folder / "train.jsonl", all_of[:150]), by_document=True, batch=5, steps=200,
            held_out=33, held_out_data=written(folder / "test.jsonl", all_of[150:]), precision="float32",
        )  # fmt: skip
        common = replace(common, layers=None, student=start(folder, common))
        # Held-out stories come one a row, as they do beside a text file.
        test = load_corpus(folder / "test.jsonl", read_tokenizer(model()), vocab=512, length=LENGTH, by_document=True)
        ids = folder / "test.safetensors"
        save_file({"input_ids": test.ids, "attention_mask": test.mask.long()}, ids)
        assert common.data is not None
        more = with_rows(common.data, 1200, folder / "more.safetensors")
        for row in args.rows:
            options = dict(ROWS[row])
            if options.pop("more", False):
                options |= {"data": more, "held_out_data": ids, "by_document": False}
            reports = [
                distill(model(), folder / "out", replace(common, seed=seed, **options), resume=False)
                for seed in range(args.seeds)
            ]
            before = reports[0]["quality_by_stage"]["before"]["kl"]
            kls = [report["quality"]["kl"] for report in reports]
            perplexities = [report["quality"]["perplexity"] for report in reports]
            rows.append(
                {
                    "students": row,
                    "rate": options["lr"],
                    "KL": f"{statistics.mean(kls):.3f} ± {statistics.stdev(kls):.3f}",
                    "closed": f"{1 - statistics.mean(kls) / before:.1%}",
                    "perplexity": f"{statistics.mean(perplexities):.3f} ± {statistics.stdev(perplexities):.3f}",
                }
            )
            record.write("further", rows, str(__doc__).split("\n")[0])


if __name__ == "__main__":
    main()
