"""SmolLM2-135M in GPTQ, AWQ and MLX, as GPTQModel and mlx-lm read it, beside parewell.load of what was exported.

    pip install 'mlx-lm[cpu]'
    PAREWELL_DATA=... python -m benchmarks.repacked

The model is turned into bfloat16 and rounded to nearest; nothing is learned. "weights differ": the largest difference
of a weight, as the reader's own code dequantizes the files in single precision, from what codes and scales stand for.
Logits are on rows of 128 tokens of WikiText-2, of mlx-lm in float32, of GPTQModel in float16 by its torch kernel:
"far" is the mean difference of the log-probability of the text's next token, in nats, "same" how often the most likely
token is the same. GPTQModel runs in the virtual environment of benchmarks/peers.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks import record
from benchmarks.peers import interpreter
from benchmarks.real_models import CACHE, real_model
from compressor import Export, Quantize, export, load, quantize
from compressor.engine.load import open_checkpoint

OF_GPTQMODEL = """
import json, sys
from pathlib import Path
import torch
from gptqmodel import BACKEND, GPTQModel, __version__
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model_dequant import convert_gptq_file
from safetensors.torch import load_file, save_file

folder, answers = Path(sys.argv[1]), Path(sys.argv[2])
how = json.loads((folder / "config.json").read_text())["quantization_config"]
found = {}
for file in folder.glob("model*.safetensors"):
    if how["quant_method"] == "gptq":
        found |= convert_gptq_file(file, torch.float32, how, device="cpu")
    else:
        held = load_file(file)
        for name in [n.removesuffix(".qweight") for n in held if n.endswith(".qweight")]:
            parts = [held[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
            values = dequantize_gemm(*parts[:2], parts[2].float(), 4, how["group_size"])
            found[f"{name}.weight"] = values.T.contiguous()
kernel = BACKEND.GPTQ_TORCH if how["quant_method"] == "gptq" else BACKEND.AWQ_TORCH
model = GPTQModel.load(str(folder), backend=kernel, device="cpu", dtype=torch.float16).model
rows = load_file(answers / "rows.safetensors")["input_ids"]
with torch.no_grad():
    found["logits"] = torch.cat([model(input_ids=row).logits.float() for row in rows.split(1)])
save_file(found, answers / "answers.safetensors")
print("VERSION", __version__)
"""
CASES = (("gptq", "w4a16-g64"), ("gptq", "w4a16-g64-asym"), ("awq", "w4a16-g64"), ("mlx", "w4a16-g64"))


def of_gptqmodel(folder: Path, rows: Tensor, cache: Path) -> tuple[str, dict[str, Tensor]]:
    """What it is, its weights by name, and "logits"."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "read.py").write_text(OF_GPTQMODEL)
        save_file({"input_ids": rows}, Path(place) / "rows.safetensors")
        done = subprocess.run(
            [interpreter("GPTQModel", cache), Path(place) / "read.py", folder, place],
            capture_output=True, text=True, check=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )  # fmt: skip
        version = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("VERSION"))
        return f"GPTQModel {version}", load_file(Path(place) / "answers.safetensors")


def of_mlx(folder: Path, rows: Tensor, cache: Path) -> tuple[str, dict[str, Tensor]]:
    import mlx.core as mx
    import numpy as np
    from mlx_lm import __version__
    from mlx_lm.utils import load_model

    how = json.loads((folder / "config.json").read_text())["quantization"]
    held: dict[str, Any] = {}
    for file in folder.glob("model*.safetensors"):
        held |= mx.load(str(file))
    found = dict[str, Tensor]()
    for name in [n.removesuffix(".scales") for n in held if n.endswith(".scales")]:
        scales, biases = (held[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        given = how.get(name, how)
        values = mx.dequantize(
            held[f"{name}.weight"], scales, biases, group_size=given["group_size"], bits=given["bits"]
        )
        found[f"{name}.weight"] = torch.from_numpy(np.array(values))
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    found["logits"] = torch.from_numpy(np.array(model(mx.array(rows.numpy()))))
    return f"mlx-lm {__version__}", found


Reader = Callable[[Path, Tensor, Path], tuple[str, dict[str, Tensor]]]
READERS: dict[str, Reader] = {"gptq": of_gptqmodel, "awq": of_gptqmodel, "mlx": of_mlx}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, text = real_model("smollm2", args.cache), Path(os.environ["PAREWELL_DATA"]) / "text"
    ids = AutoTokenizer.from_pretrained(model)((text / "wikitext2-raw-test.txt").read_text(), verbose=False)
    rows = torch.tensor(ids["input_ids"][: args.rows * 128]).view(args.rows, 128)
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        short = Path(place) / "bfloat16"
        export(model, short, Export(held_out=0, dtype="bfloat16"))
        for to, scheme in CASES:
            out, dst = Path(place) / scheme, Path(place) / f"{to}-{scheme}"
            if not out.exists():
                nearest = Quantize(
                    scheme=scheme, data=text / "c4-sample-1000.jsonl", samples=1, held_out=1, length=128, learn=False,
                    init="none", rounding="rtn",
                )  # fmt: skip
                quantize(short, out, nearest)
            report = export(out, dst, Export(to=to, held_out=0))
            name, found = READERS[to](dst, rows, args.cache)
            table.append({"to": to, "scheme": scheme, "bits per weight": report["bits_per_weight"], "read by": name}
                         | _difference(out, rows, found))  # fmt: skip
            record.write("repacked", table, (__doc__ or "").partition("\n\n")[0])


@torch.no_grad()
def _difference(out: Path, rows: Tensor, found: dict[str, Tensor]) -> dict[str, Any]:
    checkpoint = open_checkpoint(out, torch.device("cpu"))
    differ = max(
        float((found[f"{linear.name}.weight"] - checkpoint.rounded(linear).weight()).abs().max())
        for linear in checkpoint.linears()
    )
    ours, theirs = (
        logits[:, :-1].double().log_softmax(-1) for logits in (load(out)(input_ids=rows).logits, found["logits"])
    )
    ours_next, theirs_next = (log_p.gather(-1, rows[:, 1:, None])[..., 0] for log_p in (ours, theirs))
    return {
        "weights differ": differ,
        "perplexity, ours": math.exp(-float(ours_next.mean())),
        "theirs": math.exp(-float(theirs_next.mean())),
        "far": float((ours_next - theirs_next).abs().mean()),
        "same": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
    }


if __name__ == "__main__":
    main()
