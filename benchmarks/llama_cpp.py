"""GGUF files of `parewell export` run by llama.cpp itself.

    python -m venv LLAMA && LLAMA/bin/pip install xllamacpp
    PAREWELL_DATA=... python -m benchmarks.llama_cpp --python LLAMA/bin/python

The runtime lives in an environment of its own. For each file: whether it cuts the text into the same tokens, and the
largest difference, over its 20 likeliest next tokens after the text, of their log-probabilities from parewell.load's.
Keys and values are kept in single precision, without flash attention; activations are rounded to 8 bits where weights
are Q4_0 or Q8_0, and the GELU of Gemma, GPT-2 and StarCoder2 is looked up in a table of half precision.

Then every architecture that is written, with weights drawn anew (tests/any_type.py) and the embedded tokenizer, and
scalings, biases, heads and windows besides; texts are longer than windows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import record
from calib import embedded
from compressor import Export, Quantize, export, load, quantize
from compressor.storage.gguf_architectures import GGUF_ARCHITECTURES
from tests import any_type
from tests.compressor.exporters.test_gguf import MORE

RUN = """
import json, sys, urllib.request, xllamacpp
given = json.load(open(sys.argv[2]))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
params.cpuparams.n_threads = 1
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
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


TEXT = 'Once upon a time, there was a girl named Lily. She said 3 times: "Hi é! What\'s up?"\n\nThe end'
ROPE = {"rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
}  # fmt: skip
LONGROPE_LENGTHS = {"max_position_embeddings": 512, "original_max_position_embeddings": 16}
TYPES: dict[str, dict[str, Any]] = {kind: {} for kind in sorted(GGUF_ARCHITECTURES)} | MORE
VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llama, biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama, wide heads", "llama", {"head_dim": 32}),
    ("llama, linear scaling", "llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    ("llama, Llama 3's scaling", "llama", {"rope_parameters": ROPE | LLAMA_3}),
    ("mixtral, Llama 3's scaling", "mixtral", {"rope_parameters": ROPE | LLAMA_3}),
    ("qwen3, YaRN", "qwen3", {"rope_parameters": ROPE | YARN}),
    ("phi3, LongRoPE beyond the old length", "phi3", {"rope_parameters": ROPE | LONGROPE} | LONGROPE_LENGTHS),
    ("olmo2, tied", "olmo2", {"tie_word_embeddings": True}),
    ("stablelm, tied, parallel residual", "stablelm", {"tie_word_embeddings": True, "use_parallel_residual": True}),
    ("qwen2_moe, tied", "qwen2_moe", {"tie_word_embeddings": True}),
    ("gemma3_text, untied, capped", "gemma3_text", {"tie_word_embeddings": False, "final_logit_softcapping": 3.0}),
)


def drawn(folder: Path, kind: str, more: dict[str, Any]) -> Path:
    """A model of a type with the embedded tokenizer, whatever the type's own class would make of that."""
    raw = any_type.config_of(kind).to_dict() | {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(**raw | {"pad_token_id": None} | TYPES[kind] | more)
    torch.manual_seed(0)
    any_type.drawn_anew(AutoModelForCausalLM.from_config(config).double().eval()).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded.MODEL / name, folder / name)
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    return folder


def compared(folder: Path, source: Path, dtype: str | None, python: str) -> dict[str, Any]:
    """What llama.cpp says of an export of `source`, beside parewell.load."""
    export(source, folder / "dst", Export(to="gguf", dtype=dtype, held_out=0))
    ours: Any = load(source)
    ids = AutoTokenizer.from_pretrained(source)(TEXT)["input_ids"]
    with torch.no_grad():
        log_p = ours(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    (folder / "given.json").write_text(json.dumps({"text": TEXT, "ids": ids}))
    command = [python, "-c", RUN, str(folder / "dst" / "model.gguf"), str(folder / "given.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("ANSWER"))[7:])
    return {
        "same tokens": answer["tokens"] == ids,
        "log-probability differs by": max(abs(p - float(log_p[i])) for i, p in answer["top"]),
        "same likeliest": answer["top"][0][0] == int(log_p.argmax()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that has xllamacpp")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stories = Path(os.environ["PAREWELL_DATA"]) / "stories260k"
    rows: list[dict[str, Any]] = []
    for model, scheme, dtype in (
        (stories, None, "float32"),
        (stories, None, "float16"),
        (embedded.MODEL, None, "float32"),
        (embedded.MODEL, "w8a16-g32", None),
        (embedded.MODEL, "w4a16-g32", None),
    ):
        with tempfile.TemporaryDirectory() as place:
            source, folder = model, Path(place)
            if scheme:
                source = folder / "out"
                quantize(model, source, Quantize(scheme=scheme, samples=4, held_out=1, length=128, learn=False))
            name = {"model": "embedded" if model == embedded.MODEL else model.name}
            stored = {"stored as": {None: dtype, "w8a16-g32": "Q8_0", "w4a16-g32": "Q4_0"}[scheme]}
            rows.append(name | stored | compared(folder, source, dtype, args.python))
    for label, kind, more in (*((kind, kind, {}) for kind in TYPES), *VARIANTS):
        with tempfile.TemporaryDirectory() as place:
            source = drawn(Path(place) / "model", kind, more)
            found = compared(Path(place), source, "float32", args.python)
            rows.append({"model": label, "stored as": "float32"} | found)
    record.write("llama_cpp", rows, (__doc__ or "").partition("\n")[0])


if __name__ == "__main__":
    main()
