"""What jobs do and take on a GPU, in steps that need nine minutes together on one H100.

    python -m benchmarks.gpu STEP [--tiny] [--out DIR]     one step, a process of its own; gpu.sh runs them all
    python -m benchmarks.gpu report [--out DIR]            results.jsonl of DIR as benchmarks/results/gpu.md

`--tiny` takes shapes that a CPU runs in seconds, to try the steps where there is no GPU. Every step adds one line to
DIR/results.jsonl; what fails is written down with the line it comes from, and does not stop the step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.record import write

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
Found = dict[str, Any]


def waited() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """The median, after one run that does not count."""
    work()
    taken = list[float]()
    for _ in range(times):
        waited()
        began = time.perf_counter()
        work()
        waited()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def peaks() -> Found:
    """GiB: of RAM since the process began, of the device since `fresh_peak`."""
    found = {"RAM (GiB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    return found | ({"device (GiB)": torch.cuda.max_memory_allocated() / 2**30} if CUDA else {})


def fresh_peak() -> None:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def attempt(name: str, found: Found) -> Iterator[Found]:
    """Gives a dict to write to, kept with the seconds; a failure is kept, with where it comes from, and passes."""
    of: Found = found.setdefault(name, {})
    began = time.perf_counter()
    try:
        yield of
        waited()
        of["seconds"] = time.perf_counter() - began
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(own[-4:]))
        of["failed"] = f"{type(error).__name__}: {str(error)[:200]} ({where})"
        print(name, of["failed"], flush=True)


def environment(tiny: bool, place: Path) -> Found:
    """Versions, and what the machine can do at best."""
    import transformers

    from calib.quant.grid import fit_clipped
    from calib.quant.grid_types import Grid
    from compressor.quantization.gptq import Factor, factor_of, gptq

    found: Found = {
        "card": torch.cuda.get_device_name() if CUDA else "none", "torch": torch.__version__,
        "transformers": transformers.__version__, "CPUs": os.cpu_count(),
    }  # fmt: skip
    n = 256 if tiny else 4096
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        a = torch.randn(n, n, device=DEVICE).to(dtype)
        found[f"{dtype} TFLOP/s"] = 2 * n**3 / seconds(lambda a=a: a @ a) / 1e12
    host = torch.empty(2**20 if tiny else 2**28, dtype=torch.uint8, pin_memory=CUDA)
    found["to the device, pinned (GB/s)"] = len(host) / seconds(lambda: host.to(DEVICE, copy=True)) / 1e9
    weight, grid = torch.randn(n, n, device=DEVICE) * 0.02, Grid(4, group=64)
    x = torch.randn(2 * n, n, device=DEVICE)
    gram = (x.mT @ x).double()
    scale, zero = fit_clipped(weight, grid, torch.bfloat16)
    found[f"clip search, {n} x {n} (s)"] = seconds(lambda: fit_clipped(weight, grid, torch.bfloat16))
    found[f"factor of the Gram matrix, {n} (s)"] = seconds(lambda: factor_of(gram))
    factor = factor_of(gram)
    found[f"GPTQ, {n} x {n} (s)"] = seconds(lambda: gptq(weight, factor, scale, zero, grid))
    here = Factor(factor.order.cpu(), factor.upper.cpu())
    on_cpu = gptq(weight.cpu(), here, scale.cpu(), zero.cpu(), grid)[0]
    codes = gptq(weight, factor, scale, zero, grid)[0].cpu()
    found["GPTQ codes that are the CPU's"] = float((codes == on_cpu).double().mean())
    return found


def tests(tiny: bool, place: Path) -> Found:
    """The tests that run jobs on a device: the same bytes when interrupted and resumed."""
    chosen = ["tests/device/test_jobs.py", *(["-k", "not learned"] if tiny else [])]
    environment = os.environ | {"PAREWELL_DEVICE": "cuda" if CUDA else "pretend"}
    done = subprocess.run([sys.executable, "-m", "pytest", *chosen], capture_output=True, text=True, env=environment)
    lines = done.stdout.strip().splitlines()
    return {"status": done.returncode, "last line": lines[-1:], "failed": [x for x in lines if x.startswith("FAILED")]}


def gradients(tiny: bool, place: Path) -> Found:
    """Of what is learned: on the device, block by block, against double precision on the CPU."""
    from calib.blockwise.model import BlockwiseModel
    from calib.data.corpus import Corpus
    from calib.data.teacher_cache import TeacherCache
    from calib.jobs.context import RunContext
    from calib.jobs.journal import Journal
    from calib.losses.top_k import top_k
    from calib.model.weights import Weights
    from calib.quant.grid_types import Grid
    from calib.quant.scheme import Scheme
    from compressor.quantization.learn_transforms import LearnedModel, initial_transforms
    from compressor.quantization.objective import CalibrationData, Objective, calibration_gradients
    from tests import tiny as small

    ids = torch.randint(small.VOCAB, (5, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(11) < torch.tensor([11, 4, 11, 7, 2])[:, None]

    def taken(kind: str, device: torch.device, dtype: torch.dtype, products: torch.dtype | None) -> Tensor:
        model, folder = small.model_of(small.config_of(kind), dtype=torch.float64), place / kind
        if not folder.exists():
            small.save(model, folder)
        stream = BlockwiseModel(model.config, Weights(folder), device, dtype, products)
        pages = place / f"{kind}-teacher"
        pages.mkdir(exist_ok=True)
        teacher = TeacherCache(Journal(pages))
        for row in range(5):
            teacher.write(row, top_k(model(ids[row : row + 1]).logits[0], 9))
        start = initial_transforms(stream, "hadamard", Scheme.parse("w3a16kv4"), online=True, seed=0)
        learned = LearnedModel(stream, start, Scheme(Grid(3)), 10**9)
        options = Objective(steps=1, batch=5, loss="tail", cross_entropy=0.3, seed=0, at_once=22)
        corpus = Corpus(ids, mask, "drawn")
        gather = calibration_gradients(
            learned.function(), CalibrationData(corpus, teacher), options, RunContext(Journal(place), 10**9)
        )
        learned.begin(0)
        gather(list(range(5)))
        free = [*(r.tangent for r in learned.rotations), *(s for block in learned.blocks for s in block.scales)]
        return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().cpu() for p in free]).double()

    found: Found = {}
    for kind in ("llama", "gemma2") if tiny else ("llama", "qwen3", "gemma2", "mixtral"):
        exact = taken(kind, torch.device("cpu"), torch.float64, None)
        ways = {"float64": (torch.float64, None), "float32": (torch.float32, None)}
        ways |= {"bfloat16 products": (torch.float32, torch.bfloat16)} if CUDA else {}
        for name, (dtype, products) in ways.items():
            with attempt(f"{kind}, {name}", found) as of:
                of["relative error"] = float((taken(kind, DEVICE, dtype, products) - exact).norm() / exact.norm())
    return found


def jobs(tiny: bool, place: Path) -> Found:
    """One of each command on the embedded model: twice for the same bytes, and beside the CPU."""
    from calib import embedded
    from compressor import Distill, Quantize, distill, quantize
    from unlearn import Unlearn, unlearn

    found: Found = {}
    few: Found = {"samples": 8, "length": 32, "steps": 2} if tiny else {"samples": 64, "length": 256, "steps": 20}
    tuned = {"tune_steps": 2 if tiny else 10}
    rows = place / "rows.jsonl"
    pairs = [{"prompt": f"Where is person {i}?", "completion": f"In town {7 * i % 11}."} for i in range(40)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def one(command: str, out: Path, device: str) -> Found:
        if command == "quantize":
            return quantize(
                embedded.MODEL, out, Quantize(scheme="w4a16-g32", device=device, **few, **tuned), allow_damage=True
            )
        if command == "distill":
            return distill(
                embedded.MODEL, out, Distill(layers=2, batch=4, teacher_rows=0, device=device, **few), allow_damage=True
            )
        options = Unlearn(train=rows, forget_lines="1-6", method="npo", lr=1e-5, epochs=2, length=64, device=device)
        return unlearn(embedded.MODEL, out, options, allow_damage=True)

    for command in ("quantize", "distill", "unlearn"):
        with attempt(command, found) as of:
            digests, quality = list[str](), list[Any]()
            runs = {"first": str(DEVICE), "second": str(DEVICE)} | ({"cpu": "cpu"} if CUDA else {})
            for name, device in runs.items():
                report = one(command, place / f"{command}-{name}", device)
                weights = sorted((place / f"{command}-{name}").glob("*.safetensors"))
                digests.append(hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest())
                quality.append(report.get("quality", {}).get("kl"))
            of |= {"same bytes twice": digests[0] == digests[1], "KL": quality[0], "KL on the CPU": quality[-1]}
    return found


def made(folder: Path, blocks: int, *, tiny: bool, wide: bool = True) -> tuple[Path, Path]:
    """A LLaMA of random weights in the shapes of the 8B one (or, where not `wide`, of the 1B one), and token ids."""
    d, f, kv, v = (64, 128, 2, 256) if tiny else (4096, 14336, 8, 128256) if wide else (2048, 8192, 8, 128256)
    heads = 4 if tiny else 32
    h = d // heads
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": d, "intermediate_size": f,
        "num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": h,
        "vocab_size": v, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "hidden_act": "silu",
        "dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator, index = torch.Generator(DEVICE).manual_seed(0), dict[str, str]()

    def drawn(out: int, into: int, size: float) -> Tensor:
        return (torch.randn(out, into, device=DEVICE, generator=generator) * size / into**0.5).bfloat16().cpu()

    def kept(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / file)
        index.update(dict.fromkeys(tensors, file))

    embedding = drawn(v, d, 1.0)
    embedding[:, : max(1, d // 256)] *= 20  # a few loud channels, as trained models have them
    ends = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": drawn(v, d, 1.0),
        "model.norm.weight": torch.ones(d),
    }
    kept("ends.safetensors", {name: t.bfloat16() for name, t in ends.items()})
    shapes = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv * h, d), "self_attn.v_proj": (kv * h, d),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    for i in range(blocks):
        block = {f"model.layers.{i}.{name}.weight": drawn(*shape, 1.0) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        kept(
            f"block-{i}.safetensors", block | {f"model.layers.{i}.{n}.weight": torch.ones(d).bfloat16() for n in norms}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    rank = torch.rand(160, 32 if tiny else 1024, generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": (v**rank).long().clamp(max=v - 1)}, folder.parent / "ids.safetensors")  # about Zipf's law
    return folder, folder.parent / "ids.safetensors"


def large(tiny: bool, place: Path) -> Found:
    """`quantize` of blocks in the shapes of an 8B LLaMA, stage by stage, as it is and within 16 GB."""
    from calib.runtime.progress import recording
    from compressor import Quantize, quantize

    found: Found = {}
    blocks = 2 if tiny else 4
    model, ids = made(place / "model", blocks, tiny=tiny)
    options = Quantize(
        scheme="w4a16-g64", data=ids, samples=8 if tiny else 128, length=16 if tiny else 512, held_out=4,
        steps=2 if tiny else 21, block_steps=2, tune_steps=1 if tiny else 4, device=str(DEVICE),
    )  # fmt: skip
    for name, more in {"as it is": {}, "in 16 GB": {"device_memory": 16.0, "steps": 3, "tune_steps": 1}}.items():
        if name != "as it is" and not CUDA:
            continue
        with attempt(name, found) as of, recording() as log:
            fresh_peak()
            quantize(model, place / name.replace(" ", "-"), replace(options, **more), allow_damage=True)
            of |= peaks()
            of |= {f"{stage} (s, {len(s)} units)": sum(s) for stage, s in log.items() if s}
            if log.get("learn"):
                of["learning, tokens/s"] = options.batch * (options.length or 0) / statistics.median(log["learn"])
            of["32 blocks, default options (min)"] = _whole(log, 32 / blocks)
    if not tiny:
        with attempt("profile", found) as of:
            short = replace(options, steps=2, tune_steps=1, samples=16)
            of["busiest"] = _profiled(lambda: quantize(model, place / "profiled", short, allow_damage=True))
    return found


def _whole(log: dict[str, list[float]], times: float) -> float:
    """Minutes of a job of `times` as many blocks, 100 learning and 50 tuning steps, were every block alike."""
    steps = {"learn": 100, "tune": 50}
    fixed = ("teacher", "evaluate")
    total = 0.0
    for stage, units in log.items():
        mean = statistics.mean(units) if units else 0.0
        total += mean * steps[stage] * times if stage in steps else sum(units) * (1 if stage in fixed else times)
    return total / 60


def _profiled(work: Callable[[], Any]) -> dict[str, str]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]) as seen:
        work()
    events = sorted(seen.key_averages(), key=lambda e: -(e.self_device_time_total if CUDA else e.self_cpu_time_total))
    of = [(e, e.self_device_time_total if CUDA else e.self_cpu_time_total) for e in events[:25]]
    waits = [
        e for e in events if e.key in ("cudaStreamSynchronize", "cudaLaunchKernel", "aten::item", "cudaMemcpyAsync")
    ]
    return {e.key[:80]: f"{t / 1e6:.2f} s, {e.count} times" for e, t in of} | {e.key: f"{e.count} times" for e in waits}


def peers(tiny: bool, place: Path) -> Found:
    """GPTQ alone, of the same model and rows, by those of the others that are installed."""
    from compressor import Quantize, quantize

    found: Found = {}
    model, ids = made(place / "model", 1 if tiny else 2, tiny=tiny)
    rows, length = (4, 16) if tiny else (128, 512)
    with attempt("parewell, --no-learn", found) as of:
        fresh_peak()
        options = Quantize(
            scheme="w4a16-g64", data=ids, samples=rows, length=length, held_out=1, learn=False, device=str(DEVICE)
        )
        quantize(model, place / "own", options, allow_damage=True)
        of |= peaks()
    try:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import GPTQModifier
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        found["llm-compressor"] = {"left out": str(error)}
        return found
    with attempt("llm-compressor, GPTQ", found) as of:
        fresh_peak()
        taken = load_file(ids)["input_ids"][:rows, :length].tolist()
        data = Dataset.from_dict({"input_ids": taken, "attention_mask": [[1] * length] * rows})
        opened = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map=str(DEVICE))
        recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
        oneshot(model=opened, dataset=data, recipe=recipe, max_seq_length=length, num_calibration_samples=rows)
        of |= peaks()
    return found


def distilling(tiny: bool, place: Path) -> Found:
    """A step of a student of half the blocks at a vocabulary of 128,256."""
    from calib.runtime.progress import recording
    from compressor import Distill, distill

    found: Found = {}
    model, ids = made(place / "teacher", 2 if tiny else 16, tiny=tiny, wide=False)
    options = Distill(
        layers=1 if tiny else 8, data=ids, samples=40, length=16 if tiny else 1024, held_out=2, steps=3 if tiny else 8,
        batch=8, micro_batch_tokens=8192, device=str(DEVICE),
    )  # fmt: skip
    for name, more in {"forward KL": {}, "kept top-k": {"teacher": "top-k", "samples": 16}}.items():
        with attempt(name, found) as of, recording() as log:
            fresh_peak()
            distill(model, place / name.replace(" ", "-"), replace(options, **more), allow_damage=True)
            step = statistics.median(log["distil"])
            of |= {"step (s)": step, "tokens/s": 8 * ((options.length or 1) - 1) / step, **peaks()}
    return found


def ensembles(tiny: bool, place: Path) -> Found:
    """A hundred small models under vmap: the device's beside the CPU's."""
    from unlearn.model.ensemble import initial_ensemble, train_ensemble
    from unlearn.model.examples import plain_examples
    from unlearn.model.training_recipe import Training

    count, rows = (4, 64) if tiny else (100, 2000)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, 64, generator=g), torch.randint(10, (rows,), generator=g)
    masks = torch.rand(count, rows, generator=g) < 0.5
    params, found = dict[str, dict[str, Tensor]](), dict[str, Any]()
    for name in dict.fromkeys(("cpu", str(DEVICE))):
        with attempt(name, found) as of:
            models = initial_ensemble(
                lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)), range(count)
            )
            models = models.with_params({n: p.to(name) for n, p in models.params.items()})
            data = plain_examples(x, y).to(torch.device(name))
            done = train_ensemble(models, data, masks, range(count), Training(epochs=2 if tiny else 5))
            params[name] = {n: p.cpu() for n, p in done.params.items()}
            away = max(float((p - params["cpu"][n]).norm() / params["cpu"][n].norm()) for n, p in params[name].items())
            of["relative error"] = away
    return found


STEPS: dict[str, Callable[[bool, Path], Found]] = {
    "environment": environment, "gradients": gradients, "jobs": jobs, "ensembles": ensembles, "large": large,
    "distilling": distilling, "peers": peers, "tests": tests,
}  # fmt: skip


def report(out: Path) -> None:
    """results.jsonl as a table."""
    rows = list[Found]()
    for line in (out / "results.jsonl").read_text().splitlines():
        of = json.loads(line)
        for name, value in of["found"].items():
            inside = value.items() if isinstance(value, dict) else [("", value)]
            rows += [{"step": of["step"], "what": f"{name} {what}".strip(), "found": found} for what, found in inside]
    card = next((row["found"] for row in rows if row["what"] == "card"), "none")
    write(
        "gpu", rows, f"Card: {card}." + ("" if card != "none" else " A dry run with tiny shapes; nothing is claimed.")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=[*STEPS, "report"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    asked = parser.parse_args()
    if asked.step == "report":
        report(asked.out)
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f"parewell-{asked.step}-"))
    began = time.perf_counter()
    try:
        found = STEPS[asked.step](asked.tiny, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    line = json.dumps({"step": asked.step, "seconds": time.perf_counter() - began, "found": found})
    with (asked.out / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


if __name__ == "__main__":
    main()
