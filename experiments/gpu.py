"""What a GPU must show, in one call of ten minutes; a table of its figures beside their targets comes last.

    pip install peft transformers        for one of the arms
    python -m experiments.gpu            on an H100 or H200
    python -m experiments.gpu --dry      the same on the CPU at tiny sizes, to see that it runs

The idea: the default job as a user starts it, the tests, the benchmark at Llama-2-7B's shape. That one has
8,192 tokens in a micro-batch, a base in bf16, adapters of total rank E*r = 128 on the FFN, and 16 of the 32
layers: it changes no ratio, and PEFT's LoRA fits into 80 GB. More flags are the benchmark's (--layers=32).
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import train
from experiments import bench

TOTAL_RANK = 128
SHAPE = ["--device=cuda", "--size=llama2-7b", "--layers=16", "--max_length=1024", "--max_tokens=8192",
         "--out_dir=out/gpu"]
DRY = ["--device=cpu", "--size=smollm2-135m", "--layers=1", "--max_length=16", "--max_tokens=128",
       "--out_dir=out/dry", "--rounds=1"]


def run(*command):
    """(seconds, whether it ended well) of python with these arguments; it may print."""
    print("\n$ python " + " ".join(command), flush=True)
    begun = time.perf_counter()
    well = subprocess.run([sys.executable, *command], cwd=Path(train.__file__).parent).returncode == 0
    return time.perf_counter() - begun, well


def computed_memory(cfg):
    """MB of a step of TeamLoRA."""
    config = replace(bench.SIZES[cfg.size], num_hidden_layers=cfg.layers)
    parts = bench.training_memory(config, cfg.adapter, cfg.max_tokens // cfg.max_length, cfg.max_length,
                                  train.device_and_dtype(cfg)[1], nf4=cfg.dtype == "nf4")
    return sum(parts.values()) / 2 ** 20


def figures(rows, memory):
    """(what, figure, least, most) of the benchmark's rows; memory: E -> computed MB of a step. The figure of
    an arm that did not fit into memory is NaN."""
    found = {(r["group"], r["name"]): r for r in rows}
    for E, loop in (("2", math.inf), ("4", 0.65), ("8", 0.50)):
        def over(a, b):
            a, b = found.get((E, a)), found.get((E, b))
            return a["step_ms"] / b["step_ms"] if a and b else math.nan
        yield f"E = {E}: TeamLoRA over the frozen base", over("teamlora", "frozen base"), 0, 1.10
        yield f"E = {E}: TeamLoRA over LoRA of its total rank", over("teamlora", "lora"), 0, 1.03
        yield f"E = {E}: TeamLoRA over looped MoELoRA", over("teamlora", "moelora looped"), 0, loop
        yield f"E = {E}: PEFT's LoRA over TeamLoRA", over("PEFT's LoRA", "teamlora"), 1.5, math.inf
        if own := found.get((E, "teamlora")):
            yield f"E = {E}: peak memory over the computed", own["peak_memory_mb"] / memory[int(E)], 0.9, 1.1
    steps = [r["step_ms"] for r in rows if (r["group"], r["method"]) == ("spread", "teamlora")]
    yield "slowest over fastest of E = 1 .. 16", max(steps) / min(steps), 0, 1.05


def measure(cfg, saved):
    """Everything, in turn; cfg is the benchmark's."""
    dry, begun, rows, memory = cfg.device == "cpu", time.perf_counter(), [], {}
    less = ["--device=cpu", "--steps=3", "--val_examples=1"] if dry else []
    with tempfile.TemporaryDirectory() as out:
        seconds, well = run("train.py", f"--out_dir={out}", *less)
        accuracy = json.loads(Path(out, "summary.json").read_text())["mean_accuracy"] if well else 0.0
    _, well = run("-m", "pytest", "-q", *["tests/test_cuda.py"] * dry)
    for group, E in (("2", 2), ("4", 4), ("8", 8), ("spread", 4)):
        one = replace(cfg, groups=(group,), n_experts=E, rank=TOTAL_RANK // E,
                      out_dir=f"{cfg.out_dir}/{group}")
        rows, memory[E] = rows + bench.bench(one, None), computed_memory(one)
    print(f"\n{'figure':48}{'measured':>10}   target")
    for what, figure, least, most in (
            ("python train.py, seconds from start to table", seconds, 0, 70),
            ("its mean accuracy", accuracy, 0.97, 1), ("tests pass", well, 1, 1), *figures(rows, memory)):
        target = f"{least} to {most}" if least and most < math.inf else (
            f">= {least}" if least else f"<= {most}" if most < math.inf else "")
        print(f"{what:48}{figure:10.3f}   {target:12}{'' if least <= figure <= most else 'missed'}")
    print(f"\n{time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    train.main(DRY if sys.argv[1:] == ["--dry"] else [*SHAPE, *sys.argv[1:]], measure, bench.BenchConfig)
