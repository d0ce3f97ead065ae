"""What a training step costs: TeamLoRA beside the frozen base, the baselines, a published loop and its peers.

    python -m experiments.bench --layers=6 --max_length=256 --max_tokens=1024 --groups=4 --rounds=15
    python -m experiments.bench --layers=12 --max_length=256 --max_tokens=1024 --groups=peers     see peers.py
    python -m experiments.bench --memory --rank=32       computed memory of real Llamas; none of them is made

The idea: an arm is one thing to time. All arms of a group share one base's weights and take turns, so that a
slow minute meets them all. The limit is a step of the frozen base that trains nothing: a forward pass and the
gradients of activations, 4 FLOPs per token for each of the base's weights.

What may surprise:
- A method can come out below the limit, which has gradients that adapters of the first layer do not need.
- Only shapes matter: token ids are random, and so are the weights without --init_from.
"""

import gc
import itertools
import json
import math
import os
import random
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import train
from experiments.peers import INSTALLED, PEERS
from model import MAX_LOGITS, NF4, PROJECTIONS, Llama, LlamaConfig, load_llama, queued, rotary_tables
from teamlora import METHODS, InputError, adapter_layers, flag

# the published shapes, for random weights
SIZES = {name: LlamaConfig(V, C, ffn, layers, H, K, D, rope_theta=theta, tie_word_embeddings=tied)
         for name, V, C, ffn, layers, H, K, D, theta, tied in (
             ("smollm2-135m", 49152, 576, 1536, 30, 9, 3, 64, 1e5, True),
             ("llama3.2-1b", 128256, 2048, 8192, 16, 32, 8, 64, 5e5, True),
             ("tinyllama-1.1b", 32000, 2048, 5632, 22, 32, 4, 64, 1e4, False),
             ("llama2-7b", 32000, 4096, 11008, 32, 32, 32, 128, 1e4, False),
             ("llama3-8b", 128256, 4096, 14336, 32, 32, 8, 128, 5e5, False))}
CARDS = (8, 12, 16, 24, 80)                      # GB, of which CUDA itself takes one


@dataclass(frozen=True)
class BenchConfig(train.Config):
    init_from: str = flag("", "folder of a Llama; empty: random weights, of --size")
    data: str = flag("", "files whose rows lend their lengths; empty: rows of --max_length")
    size: str = flag("smollm2-135m", "a published shape", choices=SIZES)
    groups: tuple = flag(("2", "4", "8", "spread", "growth"), "what to time: all methods with these numbers "
                         "of experts; spread over E at one E*r; growth with tokens, layers, r and E; peers")
    layers: int = flag(0, "use only so many layers; 0: all")
    rounds: int = flag(5, "how often every arm takes its turn", least=1)
    memory: bool = flag(False, "print the computed memory of a step of --method, and end")

    def check(self):
        super().check()
        for g in self.groups:
            if g not in ("spread", "growth", "peers") and not (g.isdecimal() and 1 <= int(g) <= 1024):
                raise InputError(f"groups takes numbers of experts to 1024, spread, growth, peers, not '{g}'")
        if "peers" in self.groups and (self.checkpointing or self.compile):
            raise InputError("groups=peers: not with --checkpointing or --compile, which not all have")
        if self.method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, not '{self.method}'")


# ---- What takes turns

class Arm(NamedTuple):
    """One thing to time. method: of METHODS or PEERS, 'looped', or 'none': the frozen base. rows: share."""
    method: str
    n_experts: int
    rank: int
    layers: int
    rows: float = 1.0

    @property
    def name(self):
        names = {"none": "frozen base", "looped": "moelora looped"}
        return PEERS[self.method][0] if self.method in PEERS else names.get(self.method, self.method)


def arms_of(group, cfg, layers):
    """The Arms of one of --groups."""
    arm = partial(Arm, n_experts=cfg.n_experts, rank=cfg.rank, layers=layers)
    if group == "spread":
        total = max(16, cfg.n_experts * cfg.rank // 16 * 16)
        return [arm("none"), *(arm("teamlora", n_experts=n, rank=total // n) for n in (1, 2, 4, 8, 16))]
    if group == "growth":
        sizes = ({}, {"rows": 0.5}, {"layers": max(1, layers // 2)})
        return [arm(method, **size) for size in sizes for method in ("none", "teamlora")] + [
            arm("teamlora", rank=4 * cfg.rank), arm("teamlora", n_experts=4 * cfg.n_experts)]
    arms = [arm(method, n_experts=int(group)) for method in ("none", *METHODS, "looped", "peft")] if (
        group != "peers") else [arm(method, n_experts=E) for method, many in (
            ("none", [4]), ("teamlora", [2, 4, 8]), ("moe_peft", [2, 4, 8]), ("peft", [4]), ("litgpt", [4]))
            for E in many]
    return [one for one in arms if one.method not in PEERS or one.method in INSTALLED]


def published_loop(layer, x):
    """forward(x) of a MoELoRA layer as published: each expert has a pass over x and adds its (..., out)."""
    a = layer.adapter
    experts = zip(layer.lora_A.to(x.dtype).split(a.rank), layer.lora_B.to(x.dtype).split(a.rank, 1))
    w = layer.gate(F.linear(x, layer.router.to(x.dtype))).to(x.dtype)                # (..., E)
    y = F.linear(x, layer.weight, layer.bias)
    for e, (A_e, B_e) in enumerate(experts):
        z = F.dropout(F.linear(x, A_e), a.dropout, layer.training)
        y += w[..., e:e + 1] * F.linear(z, B_e) * (a.alpha / a.rank)
    return y


def bench_batches(cfg, vocab_size, share):
    """Micro-batches of a step: rows of --max_length, or with --data as long as those rows (four bytes a
    token). Ids are random, the last quarter of a row is supervised."""
    lengths = [cfg.max_length] * (cfg.max_tokens // cfg.max_length)
    if cfg.data:
        rows = data.read_rows(data.list_files(cfg.data))
        drawn = random.Random(cfg.seed).sample(rows, min(cfg.batch_size, len(rows)))
        lengths = [min(cfg.max_length, 4 + len("".join(row[1:]).encode()) // 4) for row in drawn]
    lengths = lengths[:max(1, round(share * len(lengths)))]
    generator = torch.Generator().manual_seed(cfg.seed)
    examples = [data.Example("bench", torch.randint(vocab_size, (n + 1,), generator=generator).tolist(),
                             n + 1 - max(1, n // 4)) for n in lengths]
    longer = 1.25 if train.device_and_dtype(cfg)[0] == "cpu" else math.inf           # as train.own_batches
    return [data.collate(b) for b in data.micro_batches(examples, cfg.max_tokens, longer)]


def bench_base(cfg, device, dtype):
    """The frozen base whose weights all arms share: a real one, or random weights of a named size."""
    if cfg.init_from:
        base = load_llama(cfg.init_from, None, device, dtype, cfg.dtype == "nf4")
        if cfg.layers > (n := base.config.num_hidden_layers):
            raise InputError(f"--layers={cfg.layers}, but {cfg.init_from} has only {n} layers")
        return base
    config = SIZES[cfg.size]
    with torch.device(device):
        base = Llama(replace(config, num_hidden_layers=cfg.layers or config.num_hidden_layers))
    base.to(dtype).init_weights()
    for name, module in base.named_modules() if cfg.dtype == "nf4" else ():
        if name.endswith(PROJECTIONS):
            module.weight = nn.Parameter(NF4.of(module.weight.detach(), dtype), requires_grad=False)
    return base


def bench_model(base, arm, cfg):
    """The model of an arm, on the very weights of the base."""
    if arm.method in PEERS:
        return PEERS[arm.method][1](base, arm, cfg)
    adapter = None if arm.method == "none" else replace(
        cfg.adapter, method=arm.method.replace("looped", "moelora"), rank=arm.rank, n_experts=arm.n_experts)
    with torch.device("meta"):
        model = Llama(replace(base.config, num_hidden_layers=arm.layers), adapter)
    model.load_state_dict(base.state_dict(keep_vars=True), strict=False, assign=True)
    model.checkpointing = cfg.checkpointing
    for _, layer in adapter_layers(model):
        layer.add_adapter(adapter)
        if arm.method == "looped":
            layer.forward = partial(published_loop, layer)
    if arm.method == "none":  # gradients flow down to the embeddings: 4 N, and no parameter gets one
        model.model.embed_tokens.register_forward_hook(lambda module, args, x: x.requires_grad_())
    if cfg.compile:
        model.compile_blocks()
    return model


# ---- What is measured

def stored_bytes(tensors):
    """Bytes that tensors take in memory; NF4 has codes and scales."""
    return sum(part.nbytes for t in tensors for part in ((t.codes, t.scales) if isinstance(t, NF4) else (t,)))


def bench_runs(model, arm, batches, cfg):
    """Of an arm: a training step and a forward pass, to be called, and the bytes of weights and optimizer."""
    optimizer = train.make_optimizer(model, cfg) if arm.method != "none" else None
    p = next(model.parameters())

    def loss(x, y, m):
        if arm.method in PEERS:
            return PEERS[arm.method][2](model, x, y, m)
        return model(queued(x, p.device), y)[0].mean()

    def step():
        model.train()
        if arm.method not in ("none", *PEERS):
            train.training_step(model, batches, optimizer, cfg.clip)
            return
        for batch in batches:
            (loss(*batch) / len(batches)).backward()
        if optimizer:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], cfg.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def infer():
        model.eval()
        for batch in batches:
            loss(*batch)

    step()
    state = [t for s in optimizer.state.values() for t in s.values()] if optimizer else []
    return step, infer, stored_bytes([*model.parameters(), *state])


def timed(run, device):
    """Seconds that run() takes."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begun


def matmul_peak(device, dtype):
    """FLOPs per second of a large square matmul, the most that a step could reach."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(timed(lambda: a @ b, device) for _ in range(20))


def allocated_peak(run, device):
    """Most bytes allocated at once during run(), beyond those before; on the CPU from the profiler's log."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces itself otherwise
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    log = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(n for _, n in log))


# ---- What can be computed instead

BYTES_TRAINED = 4 + 4 + 4 + 4                    # of a parameter: itself, gradient, AdamW's moments; all fp32
BYTES_LOGIT = 4 + 4 + 4                          # itself, its softmax, its gradient


def training_memory(config, adapter, rows, length,
                    dtype=torch.bfloat16, checkpointing=False, supervised=0.25, nf4=False):
    """Bytes of a training step on rows * length tokens at its peak, by what needs them; none is allocated.

    weights: the frozen base; adapters: with gradients and optimizer; activations: of every layer what
    autograd keeps, traced without storage, or with checkpointing its input; working: the larger of the head's
    logits and the gradients inside an FFN (with checkpointing also what its layer keeps), with nf4 a matrix.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    kept, L, size = {}, config.num_hidden_layers, dtype.itemsize

    def keep(t):
        kept[t.untyped_storage()._cdata] = t
        return t
    with FakeTensorMode():
        block = Llama(replace(config, num_hidden_layers=1), adapter).model.layers[0]
        frozen = [p for p in block.parameters() if not p.requires_grad]
        for p in frozen:
            p.data = p.to(dtype)
        x = torch.empty(rows, length, config.hidden_size, dtype=dtype, requires_grad=True)
        rotary = rotary_tables(config, torch.arange(length), dtype)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            block(x, rotary)
        for t in (*rotary, *block.parameters()):  # shared, or counted as weights
            kept.pop(t.untyped_storage()._cdata, None)
        # a GPU's rms_norm keeps its x as it is, where the CPU's, traced here, keeps it in fp32
        layer = sum(t.untyped_storage().nbytes() // t.itemsize * min(t.itemsize, size) for t in kept.values())
    n_frozen = sum(p.numel() for p in frozen)
    matrices = [p.numel() for p in frozen if p.dim() == 2] if nf4 else []
    saved = sum(matrices) * (size - 17 / 32)     # four bits each, 16 for a block of 64
    n_trained = sum(p.numel() for p in block.parameters()) - n_frozen
    # tables and last norm
    n_shared = ((2 - config.tie_word_embeddings) * config.vocab_size + 1) * config.hidden_size
    n_logits = min(round(supervised * rows * length) * config.vocab_size, MAX_LOGITS)
    ffn = 3 * rows * length * config.intermediate_size * size
    return {"weights": (L * n_frozen + n_shared) * size - round(L * saved),
            "adapters": BYTES_TRAINED * L * n_trained,
            "activations": L * (x.numel() * size if checkpointing else layer),
            "working": max(BYTES_LOGIT * n_logits, ffn + layer if checkpointing else ffn)
            + (4 + size) * max(matrices, default=0)}


def print_memory(cfg):
    """training_memory of every size for 1 to 8 rows of --max_length tokens; of up to 64, how many fit."""
    dtype, many = torch.float32 if cfg.dtype == "float32" else torch.bfloat16, (1, 2, 4, 8, 16, 32, 64)
    nf4 = cfg.dtype == "nf4"
    print(f"computed memory of a step, in GB (10^9 bytes), base in {'nf4' if nf4 else dtype}; {cfg.method}, "
          f"E = {cfg.n_experts}, r = {cfg.rank}, {','.join(cfg.targets)}\n\n{'tokens in a micro-batch':32}"
          + "".join(f"{rows * cfg.max_length:8}" for rows in many[:4]) + "  most tokens on a card of "
          + ", ".join(map(str, CARDS)) + " GB")
    for size, config in SIZES.items():
        for checkpointing in (False, True):
            gb = {rows: sum(training_memory(config, cfg.adapter, rows, cfg.max_length, dtype, checkpointing,
                                            nf4=nf4).values()) / 1e9 for rows in many}
            fit = [max((rows * cfg.max_length for rows in many if gb[rows] <= card - 1), default="-")
                   for card in CARDS]
            print(f"{size + ' --checkpointing' * checkpointing:32}"
                  + "".join(f"{gb[rows]:8.1f}" for rows in many[:4]) + "  " + "".join(f"{n:>8}" for n in fit))


# ---- The benchmark

def those_that_fit(arms, work):
    """{arm: work(arm)} without arms that do not fit into the GPU's memory; the limit must."""
    results = {}
    for arm in arms:
        gc.collect()                             # a looped layer and its forward hold each other, and memory
        try:
            results[arm] = work(arm)
        except torch.OutOfMemoryError:
            if arm.method == "none":
                raise
            print(f"{arm.name}, E = {arm.n_experts}, does not fit into the GPU's memory and is left out")
    return results


def bench_group(group, arms, base, cfg, device, peak):
    """Rows of bench.json for the arms of a group, medians over rounds; peak: see matmul_peak."""
    batches = {share: bench_batches(cfg, base.config.vocab_size, share) for share in (0.5, 1.0)}
    runs = those_that_fit(arms, lambda arm: bench_runs(
        bench_model(base, arm, cfg), arm, batches[arm.rows], cfg))
    # once all are there, as they will be when they are timed
    memory = those_that_fit(runs, lambda arm: runs[arm][2] + allocated_peak(runs[arm][0], device))
    times = [{arm: [timed(run, device) for run in runs[arm][:2]] for arm in memory}
             for _ in tqdm(range(cfg.rounds), desc=group, unit="round", leave=False)]
    medians = {arm: [median(t) for t in zip(*(turn[arm] for turn in times))] for arm in memory}
    limits = {(arm.layers, arm.rows): step for arm, (step, _) in medians.items() if arm.method == "none"}
    rows = []
    for arm, (step, inference) in medians.items():
        tokens = sum(int(m.sum()) for *_, m in batches[arm.rows])
        supervised = sum(int((y >= 0).sum()) for _, y, _ in batches[arm.rows])
        blocks = sum(p.numel() for p in base.model.layers[:arm.layers].parameters() if p.dim() == 2)
        flops = 4 * (blocks * tokens + base.lm_head.weight.numel() * supervised)
        rows.append({"group": group, "name": arm.name, **arm._asdict(), "tokens": tokens,
                     "step_ms": round(1e3 * step, 2), "inference_ms": round(1e3 * inference, 2),
                     "over_limit": round(step / limits[arm.layers, arm.rows], 4),
                     "tokens_per_second": round(tokens / step), "utilisation": round(flops / step / peak, 4),
                     "peak_memory_mb": round(memory[arm] / 2 ** 20, 1)})
    return rows


def print_bench(rows):
    """A line per row of a group; where all methods are there, also the ratios that matter."""
    print(f"\n{'method':<19}{'E':>3}{'r':>4}{'layers':>7}{'tokens':>7}{'ms/step':>9}{'x limit':>8}"
          f"{'tokens/s':>10}{'of peak':>8}{'forward':>9}{'MB':>9}")
    for r in rows:
        print(f"{r['name']:<19}{r['n_experts']:>3}{r['rank']:>4}{r['layers']:>7}{r['tokens']:>7}"
              f"{r['step_ms']:>9.1f}{r['over_limit']:>8.3f}{r['tokens_per_second']:>10,}"
              f"{r['utilisation']:>8.1%}{r['inference_ms']:>9.1f}{r['peak_memory_mb']:>9.0f}")
    named = {r["name"]: r for r in rows}
    for own in rows if len(named) > 2 else ():
        for what, key in (("step", "step_ms"), ("memory", "peak_memory_mb")) * (own["method"] == "teamlora"):
            print(f"E = {own['n_experts']}: teamlora's {what} over " + ", ".join(
                f"{r['name']} {own[key] / r[key]:.3f}" for r in rows
                if r["n_experts"] == own["n_experts"] and r is not own))
    steps = [r["step_ms"] for r in rows if (r["group"], r["method"]) == ("spread", "teamlora")]
    if steps:
        print(f"spread over E: {max(steps) / min(steps):.3f}")


def bench(cfg, saved):
    """Time all groups of arms; prints them and writes bench.json. Returns its rows."""
    if cfg.memory:
        return print_memory(cfg)
    device, dtype = train.device_and_dtype(cfg)
    torch.manual_seed(cfg.seed)
    base = bench_base(cfg, device, dtype)
    layers, peak, rows = cfg.layers or base.config.num_hidden_layers, matmul_peak(device, dtype), []
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{cfg.init_from or cfg.size}, {layers} layers, {dtype}, --dtype={cfg.dtype}; {name}, matmul peak "
          f"{peak / 1e12:.2f} TFLOP/s")
    if missing := [name for peer, (name, *_) in PEERS.items() if peer not in INSTALLED]:
        print(f"left out: {', '.join(missing)}; how to install them stands in experiments/peers.py")
    for group in cfg.groups:
        rows += (new := bench_group(group, arms_of(group, cfg, layers), base, cfg, device, peak))
        print_bench(new)
    path = Path(cfg.out_dir) / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    train.write_atomically(path, lambda f: f.write((json.dumps(rows, indent=1) + "\n").encode()))
    print(f"\nwrote {path}")
    return rows


if __name__ == "__main__":
    train.main(run=bench, config=BenchConfig)
