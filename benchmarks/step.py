"""One distillation step through the head, 2 x 512 tokens, width 576, vocabulary 49,152, float32: memory and time.

    python -m benchmarks.step [--rounds 5]

Forward KL from a teacher's hidden states to a student's, each with a head of its own, gradients of the student's hidden
states and head. "dense" is plain PyTorch, "checkpointed" remakes chunks of 256 positions on the way back, "TRL-GKD"
and "TRL-chunked" are its two ways to a generalised JSD, at beta 0 (in a virtual environment of its own under --cache),
"parewell" is `calib.losses.chunked_head`. Each way
runs in processes of its own, by turns; memory is the peak above both resident heads and hidden states. Gradients are
compared element by element with those of "dense".
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS, WIDTH, VOCAB, CHUNK = 1024, 576, 49_152, 256
TRL = ("torch==2.13.0", "trl==1.16.0")


def dense(hidden: Any, head: Any, theirs: Any, their_head: Any) -> None:
    import torch

    with torch.no_grad():
        log_p = (theirs @ their_head.mT).log_softmax(-1)
    log_q = (hidden @ head.mT).log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()


def checkpointed(hidden: Any, head: Any, theirs: Any, their_head: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    def chunk(x: Any, y: Any) -> Any:
        log_p = (y @ their_head.mT).log_softmax(-1)
        log_q = (x @ head.mT).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum() / TOKENS

    parts = zip(hidden.split(CHUNK), theirs.split(CHUNK), strict=True)
    sum(checkpoint(chunk, x, y, use_reentrant=False) for x, y in parts).backward()


def trl_gkd(hidden: Any, head: Any, theirs: Any, their_head: Any) -> None:
    import torch
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher = theirs @ their_head.mT
    loss = GKDTrainer.generalized_jsd_loss(
        (hidden @ head.mT)[None], teacher[None], labels=None, beta=0.0, temperature=1.0, reduction="sum"
    )
    (loss / TOKENS).backward()


def trl_chunked(hidden: Any, head: Any, theirs: Any, their_head: Any) -> None:
    import torch
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(hidden))
    _chunked_divergence_loss(hidden[None], theirs[None], head, their_head, mask, beta=0.0)[0].backward()


def parewell(hidden: Any, head: Any, theirs: Any, their_head: Any) -> None:
    from calib.losses.chunked_head import Head, through_head
    from calib.losses.divergences import dense as divergence
    from calib.losses.divergences import forward_kl

    teacher = Head(their_head)

    def loss(positions: slice, logits: Any) -> Any:
        return divergence(forward_kl, teacher(theirs[positions]), logits).sum() / TOKENS

    _, hidden.grad = through_head(hidden, Head(head), loss)


WAYS: dict[str, Callable[..., None]] = {
    "dense": dense,
    "checkpointed": checkpointed,
    "TRL-GKD": trl_gkd,
    "TRL-chunked": trl_chunked,
    "parewell": parewell,
}


def status(what: str) -> int:
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(what))
    return int(line.split()[1]) * 1024


def run(way: str, steps: int, kept: Path | None) -> None:
    """One line of JSON: bytes above what is resident, seconds of the median step after the first."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, WIDTH), (VOCAB, WIDTH)) * 2
    tensors = [torch.randn(shape, generator=generator).mul_(0.2) for shape in shapes]
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    small = [t[:8].detach().requires_grad_(i < 2) for i, t in enumerate(tensors)]
    WAYS[way](*small)  # everything is imported
    resident, seconds = status("VmRSS"), []
    for _ in range(steps):
        for tensor in tensors[:2]:
            tensor.grad = None
        began = time.perf_counter()
        WAYS[way](*tensors)
        seconds.append(time.perf_counter() - began)
    if kept:
        save_file({"hidden": tensors[0].grad, "head": tensors[1].grad}, kept)
    print(json.dumps({"bytes": status("VmHWM") - resident, "seconds": statistics.median(seconds[1:])}))


def interpreter(way: str, cache: Path) -> Path:
    if not way.startswith("TRL"):
        return Path(sys.executable)
    home = cache / "venv-trl"
    if not (home / "complete").exists():
        venv.create(home, clear=True, with_pip=True)
        subprocess.run([home / "bin/python", "-m", "pip", "install", "--quiet", *TRL], check=True)
        (home / "complete").touch()
    return home / "bin/python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/parewell-benchmarks")
    parser.add_argument("--run", nargs=2, metavar=("WAY", "KEEP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.run[0], args.steps, Path(args.run[1]) if args.run[1] != "-" else None)
        return
    import torch
    from safetensors.torch import load_file

    from benchmarks import record

    torch.set_num_threads(1)
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for n in range(args.rounds):
            for way in WAYS:
                script = [Path(__file__).resolve()] if way.startswith("TRL") else ["-m", "benchmarks.step"]
                keep = f"{folder}/{way}" if n == 0 else "-"
                command = [interpreter(way, args.cache), *script, "--run", way, keep, "--steps", str(args.steps)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{way}: {done.stderr[-3000:]}")
                results[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(way, results[way][-1], flush=True)
        gradients = {way: load_file(f"{folder}/{way}") for way in WAYS}
    median = {w: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for w, rs in results.items()}

    def apart(way: str) -> float:
        """Largest difference of an element, over the largest element."""
        pairs = [(gradients[way][name], gradients["dense"][name]) for name in gradients["dense"]]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    rows = [
        {
            "way": way,
            "peak MiB": median[way]["bytes"] / 2**20,
            "of dense": median[way]["bytes"] / median["dense"]["bytes"],
            "seconds": median[way]["seconds"],
            "of dense's time": statistics.median(
                a["seconds"] / b["seconds"] for a, b in zip(results[way], results["dense"], strict=True)
            ),
            "gradients apart": apart(way),
        }
        for way in WAYS
    ]
    record.write("step", rows, __doc__.partition("\n")[0])


if __name__ == "__main__":
    main()
