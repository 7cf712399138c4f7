"""GGUF files of `parewell export` run by llama.cpp itself.

    python -m venv LLAMA && LLAMA/bin/pip install xllamacpp
    PAREWELL_DATA=... python -m benchmarks.llama_cpp --python LLAMA/bin/python

The runtime lives in an environment of its own. For each file: whether it cuts the text into the same tokens, and the
largest difference, over its 20 likeliest next tokens after the text, of their log-probabilities from parewell.load's.
It keeps keys and values in half precision, and rounds activations to 8 bits where weights are Q4_0 or Q8_0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks import record
from calib import embedded
from compressor import Export, Quantize, export, load, quantize

RUN = """
import json, sys, urllib.request, xllamacpp
given = json.load(open(sys.argv[2]))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
ask = urllib.request.Request(server.listening_address + "/tokenize", method="POST",
    data=json.dumps({"content": given["text"], "add_special": True}).encode(),
    headers={"Content-Type": "application/json"})
tokens = json.load(urllib.request.urlopen(ask))["tokens"]
said = server.handle_completions(
    {"prompt": given["ids"], "n_predict": 1, "n_probs": 20, "temperature": 0, "logprobs": 20, "cache_prompt": False}
)
top = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("ANSWER", json.dumps({"tokens": tokens, "top": [(t["id"], t["logprob"]) for t in top]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that has xllamacpp")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stories = Path(os.environ["PAREWELL_DATA"]) / "stories260k"
    text = 'Once upon a time, there was a girl named Lily. She said 3 times: "Hi é! What\'s up?"\n\nThe end'
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for model, scheme, dtype in (
            (stories, None, "float32"),
            (stories, None, "float16"),
            (embedded.MODEL, None, "float32"),
            (embedded.MODEL, "w8a16-g32", None),
            (embedded.MODEL, "w4a16-g32", None),
        ):
            source = model
            if scheme:
                source = folder / "out"
                quantize(model, source, Quantize(scheme=scheme, samples=4, held_out=1, length=128, learn=False))
            export(source, folder / "dst", Export(to="gguf", dtype=dtype))
            ours: Any = load(source)
            ids = AutoTokenizer.from_pretrained(source)(text)["input_ids"]
            with torch.no_grad():
                log_p = ours(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            (folder / "given.json").write_text(json.dumps({"text": text, "ids": ids}))
            command = [args.python, "-c", RUN, str(folder / "dst" / "model.gguf"), str(folder / "given.json")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            answer = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("ANSWER"))[7:])
            rows.append(
                {
                    "model": "embedded" if model == embedded.MODEL else model.name,
                    "stored as": {None: dtype, "w8a16-g32": "Q8_0", "w4a16-g32": "Q4_0"}[scheme],
                    "same tokens": answer["tokens"] == ids,
                    "log-probability differs by": max(abs(p - float(log_p[i])) for i, p in answer["top"]),
                    "same likeliest": answer["top"][0][0] == int(log_p.argmax()),
                }
            )
    record.write("llama_cpp", rows, (__doc__ or "").partition("\n")[0])


if __name__ == "__main__":
    main()
