"""Options of `quantize` side by side, for defaults to be chosen by measurement.

    PAREWELL_DATA=... python -m benchmarks.settings --settings "default:" "long:block_steps=300"

A setting is a name and options, as a config file has them; what it does not say is the default. stories260k, unless
`--model DIR` names another: it calibrates on stories, SmolLM2 and others on C4. Two sets of rows measure, stories that
do not calibrate or WikiText-2: settings are chosen on the rows of `--part choose` and reported on those of `--part
score`. KL from the float model in nats a token, perplexity, CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks import record
from benchmarks.stories import model
from compressor import Quantize, quantize

STORIES = 131  # that calibrate, of 183


def parsed(setting: str) -> tuple[str, dict[str, Any]]:
    """Read a setting: "name:option=value option=value"."""
    name, _, options = setting.partition(":")
    lines = (word.split("=", 1) for word in options.split())
    return name, tomllib.loads("\n".join(f"{key} = {_value(value)}" for key, value in lines))


def _value(text: str) -> str:
    """As TOML has it: words that are neither numbers nor true or false in quotes."""
    plain = text in ("true", "false") or text.replace(".", "", 1).replace("e-", "", 1).isdigit()
    return text if plain else f'"{text}"'


def stories() -> list[str]:
    text = (Path(os.environ["PAREWELL_DATA"]) / "text/tinystories-a-clean.txt").read_text()
    return [s for s in (part.strip() for part in text.split("<|endoftext|>")) if s]


def scored(some: list[str]) -> list[str]:
    """The stories that figures are taken on, on which nothing was chosen."""
    others = some[STORIES:]
    return others[len(others) // 2 :]


def rows_of(folder: Path, where: Path | None, part: str) -> dict[str, Any]:
    """The options that say which rows calibrate and which measure."""
    text = Path(os.environ["PAREWELL_DATA"]) / "text"
    if where is None:
        others = stories()[STORIES:]
        some = others[: len(others) // 2] if part == "choose" else scored(stories())
        files = {"data": stories()[:STORIES], "held_out_data": some}
        for name, lines in files.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in lines))
        return {name: folder / f"{name}.jsonl" for name in files} | {"samples": 100, "length": 256, "held_out": 40}
    tokenizer = AutoTokenizer.from_pretrained(where)
    ids = tokenizer((text / "wikitext2-raw-test.txt").read_text(), verbose=False)["input_ids"]
    begin = ids[:1] if ids[0] == tokenizer.bos_token_id else []  # a model that wants it has it before every row
    ids, own = ids[len(begin) :], 512 - len(begin)
    numbers = range(20) if part == "score" else range(20, 30)
    rows = torch.tensor([begin + ids[i * own : (i + 1) * own] for i in numbers])
    test, count = folder / "test.safetensors", len(rows)
    save_file({"input_ids": rows}, test)
    data = text / "c4-sample-1000.jsonl"
    return {"data": data, "held_out_data": test, "samples": 32, "length": 512, "held_out": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", required=True)
    parser.add_argument("--schemes", nargs="+", default=["w4a16-channel", "w3a16-channel", "w2a16-channel"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--part", choices=("choose", "score"), default="choose")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--name", default="settings")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        common = rows_of(Path(name), args.model, args.part)
        for scheme in args.schemes:
            for setting, options in map(parsed, args.settings):
                kls, perplexities, seconds = list[float](), list[float](), list[float]()
                for seed in args.seeds:
                    began = time.process_time()
                    report = quantize(
                        args.model or model(), Path(name) / "out",
                        Quantize(**{"scheme": scheme, "seed": seed} | common | options),
                        resume=False, allow_damage=True,
                    )  # fmt: skip
                    seconds.append(time.process_time() - began)
                    kls.append(report["quality"]["kl"])
                    perplexities.append(report["quality"]["perplexity"])
                rows.append(
                    {
                        "scheme": scheme,
                        "setting": setting,
                        "KL": statistics.fmean(kls),
                        "KL, spread": max(kls) - min(kls),
                        "perplexity": statistics.fmean(perplexities),
                        "float": report["quality"]["reference_perplexity"],
                        "CPU seconds": statistics.fmean(seconds),
                        "options": " ".join(f"{key}={value}" for key, value in options.items()),
                    }
                )
                record.write(args.name, rows, str(__doc__).split("\n")[0])


if __name__ == "__main__":
    main()
