"""The story of one run: configuration, training step, loop, evaluation, checkpoints, command-line modes.

    python train.py                                         a small Llama from nothing, adapted to 11 tasks
    python train.py --method=lora --steps=500               the same with another method
    python train.py --init_from=FOLDER --data=FILE,FOLDER   a real Llama on your own instructions
    python train.py --mode=eval                             the numbers of out/adapter.pt again
    python train.py --mode=sample --prompt="..."            one answer; without --prompt, one to every line
    python train.py --mode=compare                          methods side by side, on equal terms
    python train.py --mode=shapley                          what each expert of out/adapter.pt is worth
    python train.py --mode=bench --size=smollm2-135m        what a step costs, beside base and rivals
    python train.py --export=FOLDER                         base and adapter merged, if the method allows it
    torchrun --nproc_per_node=N train.py ...                the same run on N GPUs

The idea: without --init_from the run first makes its own base model and saves it as an ordinary Llama folder;
from there on both take the same road. A step's loss is a sum over its supervised tokens divided by their
number, however the step is cut into micro-batches.

What may surprise:
- No autocast and no GradScaler: the base is bf16 on CUDA, fp32 on the CPU and with --method=full, adapters
  fp32 and cast where used. On CUDA, products in fp32 are computed in TF32.
- The same seed gives the same examples in the same order for every method.
- Greedy exact match needs no generation: if the argmax is right at every answer position, greedy decoding
  is right.
- The loop waits for a GPU where it logs or saves alone (and, making the base, after every step), so that the
  next steps' batches are made while it computes.
- A step's examples and its dropout follow from (seed, step) alone, so a checkpoint holds no random state.
"""

import argparse
import functools
import gc
import importlib.util
import itertools
import json
import math
import os
import random
import shlex
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial, partialmethod
from pathlib import Path
from statistics import fmean as mean, median
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from model import (MAX_LOGITS, AdapterConfig, Llama, LlamaConfig, fingerprint, fresh_adapters, load_llama,
                   plain, queued, read_json, read_pickle, rotary_tables, save_llama)
from teamlora import (InputError, adapter_layers, balance_loss, coalition, distribution, entropy,
                      load_parameters, mean_usage, merge, mutual_information, only, parameter_state,
                      published_loop, restricted, shapley_interactions, shapley_values, top)


# ---- Configuration: a field is a flag

def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    mode: str = flag("train", "train, eval (the numbers of out_dir/adapter.pt again), sample (answer "
                              "--prompt, or the terminal), compare (methods side by side), shapley (the "
                              "worth of each expert) or bench (what a step costs)")
    out_dir: str = flag("out", "folder for everything a run writes")
    init_from: str = flag("", "folder of a real Llama, Hugging Face's or Meta's; empty: make the small "
                              "built-in base")
    data: str = flag("", "instruction files (.json, .jsonl) or folders of them, comma-separated; empty: "
                         "MiniCME")
    val_data: str = flag("", "files to evaluate on; empty: hold out a share of --data by content hash")
    val_share: float = flag(0.1, "share of each task's questions held out when --val_data is empty")
    val_examples: int = flag(100, "evaluate on at most so many examples per task; 0: all (of MiniCME, which "
                                  "has no end, 400)")
    max_length: int = flag(1024, "longest row in tokens; a longer prompt is shortened, never an answer")
    template: str = flag("paper", "paper, llama2, llama3, chatml, or a text with {instruction}, {input} and "
                                  "perhaps {output} and its end; {eos} is the end of sequence")
    method: str = flag("teamlora", "teamlora, lora, moelora, hydralora, full (train every weight) or none "
                                   "(bare base)")
    paper: bool = flag(False, "the paper's settings, as far as they are known, wherever no other flag says "
                              "otherwise")
    rank: int = flag(8, "rank r of one expert; the total rank is n_experts * rank")
    n_experts: int = flag(4, "number of experts E")
    alpha: float = flag(16.0, "the update is scaled by alpha / rank")
    dropout: float = flag(0.0, "dropout on A x")
    targets: tuple = flag(("gate_proj", "up_proj", "down_proj"), "adapted projections, comma-separated")
    balance: float = flag(0.0, "weight of the balance term, which evens out the use of the experts")
    steps: int = flag(1500, "optimizer steps")
    batch_size: int = flag(66, "examples per step")
    learning_rate: float = flag(3e-3, "peak learning rate; 1e-4 to 3e-4 suits a real Llama")
    warmup: float = flag(0.03, "share of the steps in which the learning rate rises")
    weight_decay: float = flag(0.0, "weight decay of AdamW")
    clip: float = flag(1.0, "largest gradient norm")
    max_tokens: int = flag(4096, "padded tokens per micro-batch: lower it to save memory, the result stays "
                                 "the same")
    checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, about a "
                                      "third more time")
    compile: bool = flag(False, "torch.compile every block, which takes up to a minute once")
    device: str = flag("auto", "cuda or cpu; auto: cuda if there is one")
    dtype: str = flag("auto", "of the base: float32 or bfloat16; auto: bfloat16 on CUDA, unless "
                              "--method=full, float32 otherwise")
    seed: int = flag(0, "seed of adapters, data order, dropout and sampling")
    deterministic: bool = flag(False, "on CUDA: only kernels that give the same bits every time, or an "
                                      "error; the CPU's do anyway")
    log_every: int = flag(10, "write a line of log.jsonl every so many steps")
    save_every: int = flag(200, "write a checkpoint every so many steps; 0: only where the run ends or is "
                               "stopped")
    stop_after: int = flag(0, "end this run after so many steps with a checkpoint, for --resume; 0: run to "
                              "the end")
    resume: bool = flag(False, "continue from out_dir/checkpoint.pt; start if there is none")
    prompt: str = flag("", "what to answer with --mode=sample; empty: every line that comes in, each for "
                           "itself")
    max_new_tokens: int = flag(64, "longest answer of --mode=sample")
    temperature: float = flag(0.0, "of --mode=sample; 0 is greedy")
    top_k: int = flag(0, "of --mode=sample: choose among the k likeliest tokens; 0: all")
    methods: tuple = flag(("none", "lora", "moelora", "hydralora", "teamlora", "full"), "of --mode=compare: "
                          "what to compare; all: with the ablations and other sizes")
    seeds: tuple = flag((0, 1, 2, 3, 4), "of --mode=compare: seeds; the learning rate is chosen with the "
                        "first")
    learning_rates: tuple = flag((1e-3, 3e-3, 1e-2), "of --mode=compare: to choose from on validation "
                                 "questions; where the best is at the edge, the next beyond it is tried too")
    reference: str = flag("lora", "of --mode=compare: the one of the methods to which differences are taken")
    plot: bool = flag(False, "of compare and shapley: draw pictures into out_dir, with matplotlib")
    export: str = flag("", "write out_dir/adapter.pt merged into its base to this new folder, in Hugging "
                           "Face's layout and --dtype, and end; with --method=none the base alone")
    size: str = flag("smollm2-135m", "of --mode=bench without --init_from: random weights of this size; a "
                                     "wrong name lists all")
    bench: tuple = flag(("2", "4", "8", "spread", "growth"), "what --mode=bench times: all methods with "
                        "these numbers of experts; the spread over E at one E*r; the growth with tokens, "
                        "layers, r and E")
    bench_layers: int = flag(0, "of --mode=bench: use only so many layers; 0: all")
    bench_rounds: int = flag(5, "of --mode=bench: how often every method takes its turn")
    base_steps: int = flag(2800, "built-in base: training steps")
    base_batch_size: int = flag(12, "built-in base: texts of the corpus per step")
    base_learning_rate: float = flag(0.02, "built-in base: peak learning rate of Muon; AdamW on the "
                                           "embedding takes 0.15 of it")
    base_layers: int = flag(4, "built-in base: layers")
    base_width: int = flag(128, "built-in base: width, in heads of 32")
    base_seed: int = flag(1, "built-in base: seed, apart from --seed so that runs share one base")

    @property
    def adapter(self):
        return AdapterConfig(**{f.name: getattr(self, f.name) for f in fields(AdapterConfig)})


# what --paper means: the paper's own where it gives them (E, r, targets, no balance term), else those of the
# code that it was forked from; the weights' sum E and M are the layer itself
PAPER = {"method": "teamlora", "n_experts": 4, "rank": 32, "alpha": 32.0, "dropout": 0.05, "balance": 0.0,
         "targets": ("gate_proj", "up_proj", "down_proj"), "learning_rate": 2e-4, "warmup": 0.03,
         "weight_decay": 0.0, "max_length": 1024}
# settings of a whole comparison, which shape none of its runs; the base's fingerprint stands for init_from
OF_COMPARISON = ("methods", "seeds", "learning_rates", "reference", "plot", "init_from")
# what no file remembers, what an adapter fixes for later use, and what may change when a run is resumed
OF_CALL = ("mode", "resume", "stop_after", "prompt", "out_dir", "device", "export")
OF_ADAPTER = ("method", "rank", "n_experts", "alpha", "targets", "template")
FREE_ON_RESUME = ("resume", "stop_after", "log_every", "save_every", "max_tokens", "checkpointing",
                  "compile", "device", "out_dir")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def parse_flags(argv):
    """Command line -> {name: value} of what the user wrote, no more: so it can override a checkpoint's."""
    def boolean(text):
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
        return text.lower() == "true"

    def listed(kind):
        def values(text):
            return tuple(map(kind, text.split(",")))
        values.__name__ = f"list of {kind.__name__}"             # argparse names it in its errors
        return values

    parser = Parser(prog="train.py", description=__doc__.split("\n\n")[1], allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        kind = type(f.default)
        shown = ",".join(map(str, f.default)) if kind is tuple else f.default
        options = {"nargs": "?", "const": True, "type": boolean} if kind is bool else {
            "type": listed(type(f.default[0])) if kind is tuple else kind}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar=kind.__name__.upper(),
                            help=f"{f.metadata['help'].replace('%', '%%')} [{shown}]", **options)
    return vars(parser.parse_args(argv))


def check(cfg):
    """Refuse settings that cannot work, before anything is read or written."""
    for name, allowed in (("mode", tuple(MODES)), ("device", ("auto", "cpu", "cuda")),
                          ("dtype", ("auto", "float32", "bfloat16")), ("size", tuple(SIZES))):
        if getattr(cfg, name) not in allowed:
            raise InputError(f"--{name} must be one of {', '.join(allowed)}, not '{getattr(cfg, name)}'")
    for name in ("rank", "n_experts", "steps", "batch_size", "max_tokens", "max_length", "log_every",
                 "base_steps", "base_batch_size", "base_layers", "base_width", "max_new_tokens",
                 "bench_rounds"):
        if getattr(cfg, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(cfg, name)}")
    for name, value in asdict(cfg).items():
        if type(value) is int and value >= 2 ** 31:
            raise InputError(f"--{name} must be below 2147483648, not {value}")
    for name in ("learning_rate", "base_learning_rate", "clip", "alpha"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise InputError(f"--{name} must be positive, not {getattr(cfg, name)}")
    for name in ("dropout", "warmup", "val_share"):
        if not 0 <= getattr(cfg, name) < 1:
            raise InputError(f"--{name} must lie in [0, 1), not {getattr(cfg, name)}")
    for name in ("balance", "weight_decay", "temperature", "top_k", "val_examples", "save_every",
                 "stop_after", "bench_layers", "seed", "base_seed"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise InputError(f"--{name} must not be negative, not {getattr(cfg, name)}")
    needed = data.padded_length(data.Example("", range(cfg.max_length), 0), 8)
    if cfg.max_tokens < needed:
        raise InputError(f"--max_tokens={cfg.max_tokens} cannot hold a row of --max_length={cfg.max_length}, "
                         f"which padding makes {needed}; lower that too")
    if cfg.max_tokens < 512 and cfg.mode != "bench" and not (cfg.init_from and cfg.data):
        raise InputError(f"--max_tokens={cfg.max_tokens} cannot hold the built-in texts; give at least 512")
    if not cfg.out_dir or Path(cfg.out_dir).is_file():
        raise InputError(f"--out_dir must be a folder, not '{cfg.out_dir}'")
    if cfg.base_width % 32:
        raise InputError(f"--base_width must be a multiple of 32, not {cfg.base_width}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device=cuda, but PyTorch finds no CUDA device here; leave the flag out to run on "
                         "the CPU")
    for name in ("seeds", "learning_rates"):
        values = getattr(cfg, name)
        if len(set(values)) < len(values) or not all(0 <= x < 2 ** 31 for x in values):
            raise InputError(f"--{name} must be distinct, from 0 to 2147483647, not {getattr(cfg, name)}")
    if cfg.mode == "train" and cfg.method == "none":
        raise InputError("--method=none has nothing to train; use it with --mode=eval or --mode=sample")
    if bool(cfg.export) != (cfg.mode == "export"):
        raise InputError("--export=FOLDER is a mode of its own: give it without --mode, and a folder with it")
    if cfg.export and Path(cfg.export).exists():
        raise InputError(f"--export={cfg.export} exists already; name a new folder")
    if bad := [g for g in cfg.bench if g not in ("spread", "growth") and not (g.isdecimal() and int(g))]:
        raise InputError(f"--bench takes numbers of experts, spread and growth, not '{bad[0]}'")
    if cfg.val_data and not cfg.data:
        raise InputError("--val_data needs --data")
    data.read_template(cfg.template)
    if RANKS > 1 and cfg.mode not in ("train", "eval"):
        raise InputError(f"--mode={cfg.mode} runs in one process: start it with python, not torchrun")
    if cfg.batch_size < RANKS:
        raise InputError(f"--batch_size={cfg.batch_size} leaves some of {RANKS} processes without an example")
    cfg.adapter                                  # validates method and targets
    return cfg


def device_and_dtype(cfg):
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    # full training needs fp32 weights: bf16 optimizer steps below 1/256 of a weight are lost
    auto = "bfloat16" if device == "cuda" and cfg.method != "full" else "float32"
    return device, getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)


# ---- Past one GPU: torchrun starts RANKS of these processes; alone, nothing here does anything

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device):
    """Wait for the others, up to an hour: process 0 makes the built-in base first. Then sums go over all."""
    if RANKS > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backends = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backends, timeout=timedelta(hours=1))
        dist.barrier()


def own_share(examples):
    """This process's part: every RANKS-th example by length, so that all get about as many tokens."""
    return sorted(examples, key=lambda e: len(e.ids))[RANK::RANKS] if dist.is_initialized() else examples


def sum_over_processes(*tensors):
    """Sum tensors of one dtype over all processes, in place and in one message."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))


# ---- Training

def schedule(step, steps, warmup):
    """Share of the peak learning rate: linear warm-up, then a cosine down to 0."""
    n_warmup = max(1, round(warmup * steps))
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, steps - n_warmup)))


def make_optimizers(model, cfg):
    """AdamW over everything that requires a gradient."""
    return [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.learning_rate,
                              betas=(0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)]


def make_base_optimizers(model, cfg):
    """Muon for the matrices inside the base, AdamW for embedding and norms: under AdamW alone it learns too
    slowly to copy lists, let alone to look things up, within minutes."""
    inner = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    outer = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed_tokens" in name]
    return [torch.optim.Muon(inner, lr=cfg.base_learning_rate, weight_decay=0.1),
            torch.optim.AdamW(outer, lr=0.15 * cfg.base_learning_rate, betas=(0.9, 0.95), weight_decay=0.0,
                              fused=True)]


def step_usage(model, batches):
    """Mean weight of each expert over all tokens of a step (L, E), without gradient, and their number."""
    with torch.no_grad():
        parts = [(mean_usage(model.hidden(x, want_routing=True)[1], m), m.sum()) for x, _, m in batches]
    total, n = sum(u * n for u, n in parts), sum(n for _, n in parts)
    sum_over_processes(total)
    sum_over_processes(n)
    return total / n, n


def accumulate_gradients(model, batches, balance=0.0):
    """Add the gradient of a step's loss, however cut into micro-batches; returns (loss, supervised tokens).

    loss = sum over supervised tokens / their number + balance * balance_loss(mean usage of the step). The
    balance term is no sum over micro-batches, but its gradient is: with the step's usage u known from a pass
    without gradient, d balance_loss = sum_tokens <d balance_loss / d u, d w> / tokens. That pass is the
    price of balance > 0. Under torchrun `batches` are this process's share; step, loss and gradient are
    those of all shares together.
    """
    n = queued(sum((y >= 0).sum() for _, y, _ in batches), batches[0][0].device)
    sum_over_processes(n)
    slope, total, term = None, torch.zeros((), device=n.device), 0.0
    if balance > 0:
        usage, n_tokens = step_usage(model, batches)
        term = balance * balance_loss(usage.requires_grad_())
        slope, = torch.autograd.grad(term, usage)                                    # (L, E)
        term = term.detach()
    for x, y, m in batches:
        hidden, routing = model.hidden(x, want_routing=slope is not None)
        loss = model.token_losses(hidden, y)[0].sum() / n
        total = total + loss.detach()
        if slope is not None:
            loss = loss + (slope * mean_usage(routing, m)).sum() * m.sum().to(slope.dtype) / n_tokens
        loss.backward()
    # not DistributedDataParallel: it averages over processes where this must sum, works through forward(),
    # which this loss does not take, and sends after every micro-batch. Here gradients travel once a step.
    sum_over_processes(total, *(p.grad for p in model.parameters() if p.requires_grad))
    return total + term, n


def to_device(batch, device):
    """A micro-batch where the model is. Targets stay: finding supervised ones on a GPU stalls the loop."""
    x, y, m = batch
    return queued(x, device), y, queued(m, device)


MOST_SKIPPED = 20                                # steps in a row that may be skipped before the run gives up


@contextmanager
def held_signals():
    """Yield a list that notes the first SIGINT or SIGTERM, so that a step can be finished; another kills."""
    noted, handlers = [], {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        noted.append(number)
        for s in handlers:
            signal.signal(s, signal.SIG_DFL)
        # not print: the signal may have come in the middle of one
        name = signal.Signals(number).name
        if RANK == 0:
            os.write(2, f"\n{name}: finishing this step and saving; a second one ends it at once\n".encode())
    for s in handlers:
        signal.signal(s, note)
    try:
        yield noted
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def stopped_anywhere(stopped):
    """Whether a signal has come to any of the processes, which must all leave at the same step."""
    n = torch.tensor(len(stopped))               # on the CPU, so that no GPU is waited for
    sum_over_processes(n)
    return bool(n)


def attempt(write, *args):
    """write(*args) and True; False and a warning if disk or folder cannot take it: the run goes on."""
    try:
        write(*args)
    except OSError as e:
        tqdm.write(f"warning: {e}; training goes on, what was written before stays, and the next time it is "
                   "tried again")
        return False
    return True


def fit(model, step_batches, optimizers, cfg, steps, *,
        name="train", resumed=None, log=None, save=None, stopped=()):
    """Train for `steps` steps. step_batches: step -> micro-batches; optimizers hold their peak rates.

    log(record) gets a dict at every logged step, save(optimizers, totals) is called when a checkpoint is due,
    resumed is what it saved. Returns totals: step, seconds, tokens (without padding), skipped steps. Raises
    KeyboardInterrupt, after saving, at stop_after or once `stopped` (see held_signals) holds something.
    """
    device = next(model.parameters()).device
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert set(map(id, parameters)) == {id(p) for p in model.parameters() if p.requires_grad}
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]
    totals = {"step": 0, "seconds": 0.0, "tokens": 0, "skipped": 0}
    if resumed:
        totals = dict(resumed["totals"])
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
    end = min(steps, cfg.stop_after) if cfg.stop_after else steps
    earlier, begun = totals, time.perf_counter() - totals["seconds"]
    tokens, skipped, in_a_row = torch.zeros(3, dtype=torch.long, device=device)  # of this process and call

    def totals_after(step):
        """Reading the counters waits for the GPU, which the loop does only where it logs or saves."""
        n = tokens.clone()
        sum_over_processes(n)
        return {"step": step, "seconds": time.perf_counter() - begun, "tokens": earlier["tokens"] + int(n),
                "skipped": earlier["skipped"] + int(skipped)}

    balance = cfg.balance if adapter_layers(model) else 0.0
    model.train()
    signalled = False
    bar = tqdm(range(totals["step"], end), initial=totals["step"], total=end, desc=name, unit="step",
               dynamic_ncols=True, mininterval=1)
    for step in bar:
        torch.manual_seed(random.Random(f"dropout {cfg.seed} {step} {RANK}").getrandbits(63))
        batches = [to_device(b, device) for b in step_batches(step)]
        share = schedule(step, steps, cfg.warmup)
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks):
            group["lr"] = peak * share
        try:
            loss, supervised = accumulate_gradients(model, batches, balance)
        except torch.OutOfMemoryError:           # nothing has changed since the step before
            model.zero_grad(set_to_none=True)
            if save and RANKS == 1 and attempt(save, optimizers, totals_after(step)):
                tqdm.write(f"out of memory; saved after step {step}")
            raise
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)
        bad = ~(norm.isfinite() & loss.isfinite())
        for optimizer in optimizers:
            if optimizer.defaults.get("fused"):
                optimizer.found_inf = bad.float()  # where it is 1, AdamW does nothing, and nobody waits
                optimizer.step()
            elif not bad:                        # Muon cannot skip by itself
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += sum(m.sum() for *_, m in batches)
        skipped += bad
        in_a_row += 1
        in_a_row *= bad
        log_due = (step + 1) % cfg.log_every == 0 or step + 1 == steps
        save_due = step + 1 == end or (cfg.save_every and (step + 1) % cfg.save_every == 0)
        signalled = stopped_anywhere(stopped)    # torchrun kills what has not ended 30 s after a signal
        if not (log_due or save_due or signalled):
            continue
        totals = totals_after(step + 1)
        stopping = signalled or step + 1 == end < steps
        if log_due:
            rate = round(totals["tokens"] / totals["seconds"])
            bar.set_postfix_str(f"loss {float(loss):.3f}, {rate:,} tokens/s", refresh=False)
            if log:
                attempt(log, {"step": step + 1, "loss": float(loss), "learning_rate": peaks[0] * share,
                              "gradient_norm": float(norm), "supervised_tokens": int(supervised),
                              "tokens_per_second": rate, "skipped": totals["skipped"],
                              "seconds": round(totals["seconds"], 2)})
        hopeless = int(in_a_row) >= MOST_SKIPPED
        if save and stopping:
            save(optimizers, totals)             # there is no next time: if it fails, so does the run
        elif save and (hopeless or save_due):
            attempt(save, optimizers, totals)
        if hopeless:
            raise InputError(f"{int(in_a_row)} steps in a row up to step {step + 1} had a loss or gradient "
                             "that is not finite; they changed nothing. Lower --learning_rate, or look for "
                             "bad numbers in the base")
        if stopping:
            break
    if totals["step"] < steps or signalled:
        raise KeyboardInterrupt(f"stopped after {totals['step']} of {steps} steps")
    return totals


# ---- Evaluation

@torch.no_grad()
def evaluate(model, split, max_tokens, name="evaluate"):
    """task -> {accuracy, loss, tokens, weights, entropy, usage} of all its examples, always the same ones.

    accuracy: share of examples whose whole answer greedy decoding would produce; loss: mean over supervised
    tokens; weights (N, L, E): mean weight of each expert over an example's tokens; entropy: of a token's
    weights, in bits, mean over layers and tokens; usage: mean weight of each expert over layers and tokens (E
    numbers), empty where nothing routes. Under torchrun every process takes its share of each task, and all
    return the same, save `weights`.
    """
    model.eval()
    device, results = next(model.parameters()).device, {}
    routed = bool(adapter_layers(model))
    shares = {task: own_share(examples) for task, examples in split.items()}
    with tqdm(total=sum(map(len, shares.values())), desc=name, unit="example", dynamic_ncols=True,
              mininterval=1) as bar:
        for task, examples in shares.items():
            # hits, loss, supervised tokens, all tokens, bits, experts' weights: a task waits for the GPU once
            sums = torch.zeros(5 + model.adapter.n_experts * routed, dtype=torch.float64, device=device)
            weights = []
            for batch in data.cut(examples, max_tokens):
                x, y, m = to_device(data.collate(batch), device)
                hidden, routing = model.hidden(x, want_routing=routed)
                losses, hit = model.token_losses(hidden, y)
                row = queued((y >= 0).nonzero()[:, 0], device)                       # (N,)
                misses = torch.zeros(len(batch), device=device).index_add_(0, row, (~hit).float())
                sums[0] += (misses == 0).sum()
                sums[1] += losses.sum()
                sums[2] += losses.numel()
                if routed:                       # (L, B, T, E)
                    sums[3] += m.sum()
                    sums[4] += (entropy(distribution(routing)).mean(0) * m).sum()
                    sums[5:] += mean_usage(routing, m).mean(0) * m.sum()
                    per_example = (routing * m[..., None]).sum(2) / m.sum(1)[:, None]    # (L, B, E)
                    weights.append(per_example.transpose(0, 1))                          # (B, L, E)
                bar.update(len(batch))
            sum_over_processes(sums)
            hits, loss, supervised, tokens, bits, *usage = sums.tolist()
            results[task] = {"accuracy": hits / len(split[task]), "loss": loss / supervised,
                             "tokens": int(supervised), "usage": [u / tokens for u in usage]}
            if routed:
                results[task]["entropy"] = bits / tokens
            if weights:                          # of this process's share, which may be empty
                results[task]["weights"] = torch.cat(weights).cpu()
    return results


def val_loss(results):
    """Loss over all tasks, weighted by tokens."""
    return sum(r["loss"] * r["tokens"] for r in results.values()) / sum(r["tokens"] for r in results.values())


def shade(x, low, high):
    """A character that is the darker the nearer x comes to `high`."""
    return " ░▒▓█"[round(4 * (x - low) / (high - low))] if high > low else "░"


def print_results(results, chance, before=None):
    """One line per task: chance, accuracy before and after, loss, each expert's mean weight as a shade."""
    usage = [w for r in results.values() for w in r["usage"]]
    low, high = (min(usage), max(usage)) if usage else (0, 0)
    width = max(map(len, [*results, "mean"])) + 2
    print(f"\n{'task':{width}}{'chance':>8}{'before':>8}{'after':>8}{'loss':>8}"
          + ("   weight of each expert" if usage else ""))
    for task, r in results.items():
        cells = "".join(f"  {2 * shade(w, low, high)} {w:.2f}" for w in r["usage"])
        old = f"{before[task]['accuracy']:8.3f}" if before else f"{'-':>8}"
        guess = f"{chance[task]:8.3f}" if task in chance else f"{'-':>8}"
        print(f"{task:{width}}{guess}{old}{r['accuracy']:8.3f}{r['loss']:8.3f} {cells}")
    old = f"{mean(r['accuracy'] for r in before.values()):8.3f}" if before else f"{'-':>8}"
    accuracy = mean(r["accuracy"] for r in results.values())
    print(f"{'mean':{width}}{'':8}{old}{accuracy:8.3f}{val_loss(results):8.3f}")


def answers(model, tokenizer, prompts, cfg, max_new_tokens=64, on_token=None):
    """The texts that the model answers to tokenised prompts, all at once; on_token: see generate."""
    device, lengths = next(model.parameters()).device, torch.tensor([len(ids) for ids in prompts])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)  # B, T
    generator = torch.Generator(device).manual_seed(cfg.seed)
    new = model.eval().generate(tokens.to(device), max_new_tokens, lengths=lengths.to(device),
                                temperature=cfg.temperature, top_k=cfg.top_k, generator=generator,
                                on_token=on_token).tolist()                          # (B, new tokens)
    ends = [[i for i, t in enumerate(row) if t in model.config.eos_token_id] for row in new]
    return [tokenizer.decode(row[:end[0]] if end else row) for row, end in zip(new, ends)]


def print_samples(model, tokenizer, split, cfg, n=2):
    print("\ntwo answers per task (expected / given)")
    shown, given = [e for examples in split.values() for e in examples[:n]], {}
    for batch in data.cut(shown, cfg.max_tokens):
        given |= zip(map(id, batch), answers(model, tokenizer, [e.ids[:e.n_prompt] for e in batch], cfg))
    for e in shown:
        expected = tokenizer.decode(e.ids[e.n_prompt:-1])
        question = tokenizer.decode(e.ids[:e.n_prompt]).strip().replace("\n", " ")
        print(f"  {e.task}: {question if len(question) < 100 else '...' + question[-97:]}\n"
              f"      {expected!r} / {given[id(e)]!r}")


# ---- Files

def write_atomically(path, write, keep=None):
    """write(binary file) into a temporary file, flush that to the disk, rename it: whoever looks, even after
    a power cut, sees the old file or the new one, never half of it. keep: a new name for the old one."""
    if RANK > 0:                                 # process 0 writes for all
        return
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if keep and path.is_file():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)        # half a file would keep a full disk full


def previous(path):
    """Where the checkpoint before the one at path lies."""
    return path.with_name("previous_" + path.name)


def read_checkpoint(path):
    """The checkpoint at path; the one before it, with a warning, if that is damaged; None without either."""
    paths = [p for p in (path, previous(path)) if p.is_file()]
    for p in paths:
        try:
            return read_saved(p, "optimizers", "totals")
        except InputError as e:
            if p == paths[-1]:
                raise
            print(f"warning: {e}; continuing from {paths[-1]}, the checkpoint before it")


def read_saved(path, *more):
    """A checkpoint or adapter file, which must also hold `more`. Settings that it lacks are the defaults."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; train first, or point --out_dir to where it lies")
    saved, default = read_pickle(path), asdict(Config())
    try:
        config = default | saved["config"] | {"targets": tuple(saved["config"]["targets"])}
        odd = [k for k in config if k not in default or type(config[k]) is not type(default[k])]
        odd += [k for k in ("fingerprint", "parameters", *more) if k not in saved]
        odd += [k for k, t in saved["parameters"].items() if not plain(k, t) or not t.isfinite().all()]
    except (LookupError, TypeError, AttributeError) as e:
        odd = [e]
    if odd:
        raise InputError(f"{path}: not written by train.py: {odd[0]} is missing, unknown, of another type or "
                         "not finite")
    return saved | {"config": config}


class Log:
    """log.jsonl from `size` bytes on. What cannot be written waits in memory: a full disk loses no line."""

    def __init__(self, path, size=0):
        with open(path, "ab") as f:
            if f.tell() < size:
                print(f"warning: {path} is shorter than it was at the checkpoint; its last lines are lost")
            self.path, self.size, self.waiting = path, min(size, f.tell()), b""
            f.truncate(self.size)                # steps that are about to be done again

    def __call__(self, record):
        # NaN is no JSON
        record = {k: v if math.isfinite(v) else None for k, v in record.items()}
        self.waiting += (json.dumps(record) + "\n").encode()
        self.flush()

    def flush(self, sync=False):
        with open(self.path, "r+b") as f:
            f.seek(self.size)
            f.write(self.waiting)
            f.flush()
            if sync:
                os.fsync(f.fileno())
        self.size, self.waiting = self.size + len(self.waiting), b""


@functools.cache
def lock(folder):
    """Keep other runs out of a folder until this process ends, however it ends; InputError names the holder.

    SQLite's lock is the kernel's, on every system: a killed run leaves no stale one, just a file.
    """
    held = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)
    try:
        held.execute(f"PRAGMA user_version = {os.getpid()}")     # committed, so that others can read it
        held.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as e:
        if "locked" not in str(e):
            raise InputError(f"{folder}/lock: {e}; can the folder be written?") from None
        pid, = held.execute("PRAGMA user_version").fetchone()
        raise InputError(f"{folder} is in use by process {pid}; wait for it, or choose another "
                         "--out_dir") from None
    return held


def compose(given):
    """Flags -> (Config, saved file or None): defaults, then what the file says, then the command line.

    Raises InputError if a flag contradicts the file.
    """
    if given.get("paper"):
        given = PAPER | given
    if given.get("export"):
        given = {"mode": "export"} | given
    made = [name for name in given if name.startswith("base_")]
    if made and given.get("init_from"):
        raise InputError(f"--{made[0]} is about the built-in base, but --init_from={given['init_from']} "
                         "takes another")
    cfg = check(Config(**given))
    if cfg.mode in ("compare", "bench") or given.get("method") == "none":
        return cfg, None
    path = Path(cfg.out_dir) / ("checkpoint.pt" if cfg.mode == "train" else "adapter.pt")
    if RANK == 0 and cfg.mode == "train" and (path.parent / "lock").exists():
        lock(path.parent.resolve())  # before a checkpoint is read that another run may be about to replace
    saved = read_checkpoint(path) if cfg.mode == "train" else read_saved(path)
    if cfg.mode == "train" and not cfg.resume:
        if saved and saved["totals"]["step"] < saved["config"]["steps"]:
            raise InputError(f"{path} is at step {saved['totals']['step']} of {saved['config']['steps']} of "
                             "a run that has not ended: continue it with --resume, delete it, or choose "
                             "another --out_dir")
        return cfg, None
    if not saved:
        print(f"nothing to resume in {cfg.out_dir} yet: starting")
        return cfg, None
    for name, value in given.items():
        fixed = name not in FREE_ON_RESUME if cfg.mode == "train" else name in OF_ADAPTER
        if fixed and saved["config"][name] != value:
            raise InputError(f"--{name}={value} contradicts {path}, which was made with "
                             f"{saved['config'][name]}")
    if cfg.mode != "train":                      # an adapter may be a stranger's: no path in it is followed
        for name in ("init_from", "data", "val_data")[:3 if cfg.mode in ("eval", "shapley") else 1]:
            if name not in given and saved["config"][name]:
                raise InputError(f"{path} was made with --{name}={saved['config'][name]}; say --{name} here "
                                 "too, for no path in a file is followed")
    kept = {k: v for k, v in saved["config"].items() if k not in given and k not in OF_CALL}
    return check(replace(cfg, **kept)), saved


# ---- The parts of a run

def adapter_content(cfg, base, model):
    """What an adapter file holds; the same bytes wherever and in however many calls it was made."""
    def one(v):                                  # pickle refers back to the same object, not to an equal one
        return sys.intern(v) if isinstance(v, str) else tuple(map(one, v)) if isinstance(v, tuple) else v
    config = {k: one(v) for k, v in asdict(cfg).items() if k not in OF_CALL}
    return {"config": config, "fingerprint": base, "parameters": parameter_state(trained(model))}


def checkpoint_content(cfg, base, model, optimizers, totals):
    """What continuing needs: no random state, for a step's examples and dropout follow from (seed, step)."""
    return adapter_content(cfg, base, model) | {"optimizers": [o.state_dict() for o in optimizers],
                                                "totals": dict(totals)}


def make_base(cfg, device):
    """The small base model, made once: out_dir/base, an ordinary Llama folder, made_from.json beside it."""
    folder = Path(cfg.out_dir) / "base"
    corpus = data.corpus(cfg.base_seed)
    recipe = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name.startswith("base_")}
    recipe["corpus"] = data.digest(corpus(i).output for i in range(0, 2 * data.N_LESSONS, 100))
    if (folder / "made_from.json").is_file() and read_json(folder / "made_from.json") == recipe:
        print(f"base: {folder}, made before")
        return
    temporary = Path(f"{folder}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock(folder.parent.resolve())
    made_from = json.dumps(recipe, indent=1) + "\n"
    checkpoint = temporary / "checkpoint.pt"
    saved = read_checkpoint(checkpoint)
    if saved and saved["fingerprint"] != made_from:
        saved = None
    if not saved:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with held_signals() as stopped:  # sentencepiece would make its own error of a KeyboardInterrupt
            texts = map(corpus, range(data.N_LESSONS, data.N_LESSONS + 5000))
            data.make_tokenizer(temporary / "tokenizer.model", texts)
        if stopped:
            raise KeyboardInterrupt
    tokenizer = data.Tokenizer(temporary / "tokenizer.model")
    torch.manual_seed(cfg.base_seed)
    C = cfg.base_width
    sizes = LlamaConfig(vocab_size=tokenizer.size, hidden_size=C, intermediate_size=8 * C // 3 // 16 * 16,
                        num_hidden_layers=cfg.base_layers, num_attention_heads=C // 32,
                        num_key_value_heads=C // 32, head_dim=32, rope_theta=100.0, tie_word_embeddings=True,
                        max_position_embeddings=256)
    model = Llama(sizes, AdapterConfig(method="full")).init_weights(positional=C // 32).to(device)
    if saved:
        load_parameters(trained(model), saved["parameters"])
        print(f"base: continuing {temporary} after {saved['totals']['step']} of {cfg.base_steps} steps")
    else:
        n = sum(p.numel() for p in model.parameters())
        print(f"base: none made with these settings yet; training {n:,} parameters on plain statements for "
              f"{cfg.base_steps} steps")

    def save(optimizers, totals):
        content = checkpoint_content(cfg, made_from, model, optimizers, totals)
        write_atomically(checkpoint, lambda f: torch.save(content, f), previous(checkpoint))

    # the base follows from its recipe alone
    own = replace(cfg, stop_after=0, warmup=Config.warmup, clip=Config.clip, seed=Config.seed,
                  balance=Config.balance, batch_size=cfg.base_batch_size)
    with held_signals() as stopped:
        batches = step_batches(own, lambda i: data.encode(tokenizer, corpus(i)))
        fit(model, batches, make_base_optimizers(model, cfg), own, cfg.base_steps, name="base",
            resumed=saved, save=save, stopped=stopped)
    save_llama(model, temporary)
    (temporary / "made_from.json").write_text(made_from)
    for path in temporary.iterdir():
        with open(path, "rb+") as f:
            os.fsync(f.fileno())                 # on the disk before the name out/base is
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    for path in (checkpoint, previous(checkpoint)):
        (folder / path.name).unlink(missing_ok=True)


def read_data(cfg):
    """(training rows, validation rows) of --data, None for MiniCME; read before anything long or lasting."""
    if not cfg.data:
        return None
    rows = data.read_rows(cfg.data)
    if not cfg.val_data:
        return data.hold_out(rows, cfg.val_share)
    val, prompts = data.read_rows(cfg.val_data), {(r.instruction, r.input) for r in rows}
    if shared := sum((r.instruction, r.input) in prompts for r in val):
        print(f"{shared} of {len(val)} validation rows ask what a training row asks; without --val_data they "
              "would stay together")
    return rows, val


def digest_of(rows):
    """Hash of the rows that read_data returned; empty for MiniCME, which a seed tells."""
    return data.digest(str(row) for part in rows for row in part) if rows else ""


def encode_held_out(cfg, tokenizer, rows, name):
    """task -> at most --val_examples Examples, of these rows or, without any, of MiniCME's split `name`."""
    if rows is None:
        return {task: [data.encode(tokenizer, row) for row in rows]
                for task, rows in data.minicme_held_out(name, cfg.val_examples or 400).items()}
    split = {}
    for e in data.encode_rows(tokenizer, rows, cfg.max_length, name):
        examples = split.setdefault(e.task, [])
        if not cfg.val_examples or len(examples) < cfg.val_examples:
            examples.append(e)
    return split


def encode_data(cfg, tokenizer, rows, held_out="test"):
    """(training stream: i -> Example, held-out split: task -> Examples, chance: task -> share)."""
    if rows is None:
        stream = data.minicme(cfg.seed)
        split = encode_held_out(cfg, tokenizer, None, held_out)
        return lambda i: data.encode(tokenizer, stream(i)), split, data.CHANCE
    train = data.encode_rows(tokenizer, rows[0], cfg.max_length, "training")
    split = encode_held_out(cfg, tokenizer, rows[1], "validation")
    tasks = {r.task for part in rows for r in part}
    for name, left in (("training", {e.task for e in train}), ("validation", split.keys())):
        if tasks - left:
            print(f"no {name} row is left of: {', '.join(sorted(tasks - left))}")
    return data.shuffled(train, cfg.seed), split, {}


def peak_memory_mb():
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    if sys.platform == "win32":                  # which has no resource module
        return None
    import resource
    per_mb = 2 ** 10 if sys.platform == "linux" else 2 ** 20
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_mb)


def trained(model):
    """name -> parameter of what is trained: the adapters, or with method=full everything."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def prepare(cfg, saved):
    """(model, tokenizer, fingerprint of the base); the model has the saved adapter if there is one."""
    device, dtype = device_and_dtype(cfg)
    folder = cfg.init_from or Path(cfg.out_dir) / "base"
    if cfg.mode == "train" and not cfg.init_from and RANK == 0:
        make_base(cfg, device)  # alone, so that it is the same base whatever the number of processes
    join_processes(device)
    torch.manual_seed(cfg.seed)
    model = load_llama(folder, cfg.adapter, device, dtype)
    tokenizer = data.open_tokenizer(folder, model.config.eos_token_id[0])
    if tokenizer.size > model.config.vocab_size:
        raise InputError(f"{tokenizer.path} has {tokenizer.size} pieces, the model only "
                         f"{model.config.vocab_size} embeddings")
    tokenizer.use(cfg.template)
    # generation ends where the template ends an answer, and wherever the model's files say
    ends = tuple(dict.fromkeys((tokenizer.end, *model.config.eos_token_id)))
    model.config = replace(model.config, eos_token_id=ends)
    base = fingerprint(model)
    if saved and saved["fingerprint"] != base:
        raise InputError(f"the adapter in {cfg.out_dir} was made for another base (fingerprint "
                         f"{saved['fingerprint']}) than {folder} ({base})")
    if saved:
        load_parameters(trained(model), saved["parameters"])
        if adapter_layers(model) and not any(layer.lora_B.any() for _, layer in adapter_layers(model)):
            print(f"warning: every B of the adapter in {cfg.out_dir} is zero, so it changes nothing, "
                  "although it was trained")
    model.checkpointing = cfg.checkpointing
    if cfg.compile:
        model.compile_blocks()
    return model, tokenizer, base


def step_batches(cfg, stream, share=own_share):
    """step -> its micro-batches, a pure function of the stream of examples; under torchrun this process's."""
    n = cfg.batch_size
    return lambda step: [data.collate(b) for b in data.cut(
        share([stream(i) for i in range(step * n, (step + 1) * n)]), cfg.max_tokens)]


def print_start(cfg, model, tokenizer, stream):
    """What this run is, in numbers, and its first example with the supervised part marked."""
    total, trainable = (sum(p.numel() for p in ps) for ps in (model.parameters(), trained(model).values()))
    p = next(model.parameters())
    on_gpu = p.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    device += f", times {RANKS}" if RANKS > 1 else ""
    padded = real = supervised = n = 0
    for step in range(min(10, cfg.steps)):
        for _, y, m in step_batches(cfg, stream, share=list)(step):
            padded, real = padded + m.numel(), real + int(m.sum())
            supervised, n = supervised + int((y >= 0).sum()), n + 1
    steps = min(10, cfg.steps)
    print(f"device: {device}, base in {str(p.dtype)[6:]}; method: {cfg.method}\n"
          f"parameters: {total:,}, trainable {trainable:,} ({trainable / total:.2%})\n"
          f"a step: {cfg.batch_size} examples, {real // steps:,} tokens ({supervised // steps:,} supervised) "
          f"in {n / steps:.1f} micro-batches, {1 - real / padded:.1%} padding")
    e = stream(0)
    prompt, expected = tokenizer.decode(e.ids[:e.n_prompt]), tokenizer.decode(e.ids[e.n_prompt:-1])
    prompt = prompt if len(prompt) < 300 else "..." + prompt[-297:]
    expected = expected if len(expected) < 300 else expected[:297] + "..."
    print(f"first example, supervised part in [[ ]]: {prompt!r} [[{expected!r} + end of sequence]]")


def run_train(cfg, saved):
    """Base, data, evaluation before, training and after; writes log.jsonl, adapter.pt and summary.json."""
    out = Path(cfg.out_dir)
    rows = read_data(cfg)
    model, tokenizer, base = prepare(cfg, saved)
    stream, split, chance = encode_data(cfg, tokenizer, rows)
    rows_digest = digest_of(rows)
    if saved and saved["rows"] != rows_digest:
        raise InputError(f"the rows of --data are not those that the checkpoint in {out} was made with")
    out.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        lock(out.resolve())
    print_start(cfg, model, tokenizer, stream)
    before = saved["before"] if saved else evaluate(model, split, cfg.max_tokens, "before")
    for r in before.values():
        r.pop("weights", None)                   # by example; a checkpoint has no use for them
    if RANK == 0 and not saved:
        for path in (out / "checkpoint.pt", previous(out / "checkpoint.pt")):
            path.unlink(missing_ok=True)         # of a run that has ended: a later --resume means this one
    log = Log(out / "log.jsonl", saved["log_bytes"] if saved else 0) if RANK == 0 else None

    def save(optimizers, totals):
        log.flush(sync=True)                     # a checkpoint is never ahead of the log
        content = checkpoint_content(cfg, base, model, optimizers, totals) | {
            "before": before, "rows": rows_digest, "log_bytes": log.size}
        path = out / "checkpoint.pt"
        write_atomically(path, lambda f: torch.save(content, f), previous(path))

    with held_signals() as stopped:
        totals = fit(model, step_batches(cfg, stream), make_optimizers(model, cfg), cfg, cfg.steps,
                     resumed=saved, log=log, save=save if RANK == 0 else None, stopped=stopped)
    results = evaluate(model, split, cfg.max_tokens, "after")
    write_atomically(out / "adapter.pt", lambda f: torch.save(adapter_content(cfg, base, model), f))
    summary = summarise(cfg, model, totals, before, results, chance)
    write_atomically(out / "summary.json", lambda f: f.write((json.dumps(summary, indent=1) + "\n").encode()))
    print_results(results, chance, before)
    if RANK == 0:
        print_samples(model, tokenizer, split, cfg)
    print(f"\nmean accuracy {summary['mean_accuracy']:.3f}, before {summary['base_mean_accuracy']:.3f}; "
          f"{summary['seconds']:.0f} s of training, {summary['tokens_per_second']:,} tokens/s, "
          f"{totals['skipped']} steps skipped; wrote {out}/")
    return summary


def summarise(cfg, model, totals, before, results, chance):
    p = next(model.parameters())
    return {"method": cfg.method, "seed": cfg.seed, "steps": cfg.steps,
            "seconds": round(totals["seconds"], 1),
            "tokens_per_second": round(totals["tokens"] / totals["seconds"]),
            "skipped_steps": totals["skipped"],
            "trainable_parameters": sum(p.numel() for p in trained(model).values()),
            "total_parameters": sum(p.numel() for p in model.parameters()),
            "accuracy": {t: r["accuracy"] for t, r in results.items()}, "chance": chance,
            "base_accuracy": {t: r["accuracy"] for t, r in before.items()},
            "mean_accuracy": mean(r["accuracy"] for r in results.values()),
            "base_mean_accuracy": mean(r["accuracy"] for r in before.values()),
            "val_loss": val_loss(results), "base_val_loss": val_loss(before),
            "expert_usage": {t: r["usage"] for t, r in results.items()}, "peak_memory_mb": peak_memory_mb(),
            "device": torch.cuda.get_device_name() if p.device.type == "cuda" else "cpu"}


def run_eval(cfg, saved):
    rows = read_data(cfg)
    model, tokenizer, _ = prepare(cfg, saved)
    _, split, chance = encode_data(cfg, tokenizer, rows)
    results = evaluate(model, split, cfg.max_tokens)
    print_results(results, chance)
    return results


def printer(tokenizer, ends):
    """A function that prints each new token (1, 1) when its text is whole, for a letter may span several."""
    ids, shown = [], 0

    def show(new):
        nonlocal shown
        ids.extend(t for t in new[0].tolist() if t not in ends)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            print(text[shown:], end="", flush=True)
            shown = len(text)
    return show


def run_sample(cfg, saved):
    """Answer --prompt, or every line of the standard input until it ends, printing tokens as they come."""
    model, tokenizer, _ = prepare(cfg, saved)
    if not cfg.prompt:
        print("one question a line; end of input (Ctrl-D) ends", file=sys.stderr)
    for text in [cfg.prompt] if cfg.prompt else (line.rstrip("\n") for line in sys.stdin):
        if wrong := data.fault("prompt", text, not cfg.prompt):
            raise InputError(f"the prompt {wrong}")
        # the bare base continues the text, unless a template of its own is named; an adapter answers it
        bare = cfg.method == "none" and cfg.template == "paper"
        ids = tokenizer.prefix + tokenizer.encode(text) if bare else (
            data.encode(tokenizer, data.Row("sample", text, "", "")).ids[:-1])
        if text.strip():
            if not 0 < len(ids) <= cfg.max_length:
                raise InputError(f"the prompt has {len(ids)} tokens; give 1 to {cfg.max_length}, or raise "
                                 "--max_length")
            answers(model, tokenizer, [ids], cfg, cfg.max_new_tokens,
                    printer(tokenizer, model.config.eos_token_id))
            print()


def run_export(cfg, saved):
    """Write the base with its adapter merged in, and its tokenizer, as a Hugging Face folder."""
    model, tokenizer, _ = prepare(cfg, saved)
    merge(model)
    out = Path(f"{Path(cfg.export)}.tmp")
    save_llama(model, out)
    for file in tokenizer.path.parent.glob("*token*.*"):  # tokenizer.json, special_tokens_map.json, ...
        shutil.copy(file, out)
    os.replace(out, cfg.export)
    n = sum(p.numel() for p in model.base_parameters().values())
    print(f"wrote {cfg.export}: {n:,} parameters, method {cfg.method} merged in")


# ---- The benchmark: whole steps in turns, beside the limit, a step of the frozen base that trains nothing

# the published shapes, for random weights
SIZES = {name: LlamaConfig(V, C, ffn, layers, H, K, D, rope_theta=theta, tie_word_embeddings=tied)
         for name, V, C, ffn, layers, H, K, D, theta, tied in (
             ("smollm2-135m", 49152, 576, 1536, 30, 9, 3, 64, 1e5, True),
             ("llama3.2-1b", 128256, 2048, 8192, 16, 32, 8, 64, 5e5, True),
             ("tinyllama-1.1b", 32000, 2048, 5632, 22, 32, 4, 64, 1e4, False),
             ("llama2-7b", 32000, 4096, 11008, 32, 32, 32, 128, 1e4, False))}


class Arm(NamedTuple):
    """One thing to time. method 'none': frozen base; 'peft': its LoRA of rank E*r; rows: share of all."""
    method: str
    n_experts: int
    rank: int
    layers: int
    looped: bool = False
    rows: float = 1.0

    @property
    def name(self):
        names = {"none": "frozen base", "peft": "PEFT's LoRA"}
        return names.get(self.method, self.method + " looped" * self.looped)


def bench_arms(cfg, layers):
    """group -> its Arms, for every group that --bench names."""
    E, r, total = cfg.n_experts, cfg.rank, max(16, cfg.n_experts * cfg.rank // 16 * 16)
    have_peft = all(importlib.util.find_spec(name) for name in ("peft", "transformers"))
    if not have_peft:
        print("PEFT's LoRA is left out: for it, pip install peft transformers")
    groups = {}
    for group in cfg.bench:
        if group == "spread":
            arms = [Arm("none", E, r, layers),
                    *(Arm("teamlora", n, total // n, layers) for n in (1, 2, 4, 8, 16))]
        elif group == "growth":
            arms = [Arm(method, E, r, n, rows=rows)
                    for n, rows in ((layers, 1), (layers, 0.5), (max(1, layers // 2), 1))
                    for method in ("none", "teamlora")]
            arms += [Arm("teamlora", E, 4 * r, layers), Arm("teamlora", 4 * E, r, layers)]
        else:
            arms = [Arm(method, int(group), r, layers) for method in ("none", "lora")]
            arms += [Arm(method, int(group), r, layers, looped) for looped in (False, True)
                     for method in ("teamlora", "moelora", "hydralora")]
            arms += [Arm("peft", int(group), r, layers)] * have_peft
        groups[group] = arms
    return groups


def bench_batches(cfg, vocab_size, share):
    """Micro-batches of a step: rows of --max_length, or with --data as long as those rows (four bytes a
    token). Ids are random, the last quarter of a row is supervised."""
    lengths = [cfg.max_length] * (cfg.max_tokens // cfg.max_length)
    if cfg.data:
        rows = data.read_rows(cfg.data)
        drawn = random.Random(cfg.seed).sample(rows, min(cfg.batch_size, len(rows)))
        lengths = [min(cfg.max_length, 4 + len("".join(row[1:]).encode()) // 4) for row in drawn]
    lengths = lengths[:max(1, round(share * len(lengths)))]
    generator = torch.Generator().manual_seed(cfg.seed)
    examples = [data.Example("bench", torch.randint(vocab_size, (n + 1,), generator=generator).tolist(),
                             n + 1 - max(1, n // 4)) for n in lengths]
    return [data.collate(b) for b in data.cut(examples, cfg.max_tokens)]


def bench_base(cfg, device, dtype):
    """The frozen base whose weights all arms share: a real one, or random weights of a named size."""
    if cfg.init_from:
        return load_llama(cfg.init_from, device=device, dtype=dtype)
    config = SIZES[cfg.size]
    torch.set_default_dtype(dtype)               # so that a 7B never exists in fp32
    with torch.device(device):
        n = cfg.bench_layers or config.num_hidden_layers
        base = Llama(replace(config, num_hidden_layers=n)).init_weights()
    torch.set_default_dtype(torch.float32)
    return base


def peft_model(base, arm, cfg):
    """transformers' Llama on the base's weights, PEFT's LoRA of rank E*r: what a user would pick instead."""
    import peft
    import transformers
    c = replace(base.config, num_hidden_layers=arm.layers)
    config = transformers.LlamaConfig(**asdict(c) | {"eos_token_id": c.eos_token_id[0], "rope_parameters": {
        "rope_type": "default", "rope_theta": c.rope_theta}})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(base.state_dict(keep_vars=True), strict=False, assign=True)
    with base.lm_head.weight.device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # a table that no checkpoint holds
    if cfg.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return peft.get_peft_model(model, peft.LoraConfig(
        r=arm.n_experts * arm.rank, lora_alpha=arm.n_experts * cfg.alpha, lora_dropout=cfg.dropout,
        target_modules=list(cfg.targets)))


def bench_model(base, arm, cfg):
    """The model of an arm, on the very weights of the base."""
    if arm.method == "peft":
        return peft_model(base, arm, cfg)
    with torch.device("meta"):
        model = Llama(replace(base.config, num_hidden_layers=arm.layers),
                      replace(cfg.adapter, method=arm.method, n_experts=arm.n_experts, rank=arm.rank))
    model.load_state_dict(base.state_dict(keep_vars=True), strict=False, assign=True)
    fresh_adapters(model, base.lm_head.weight.device)
    model.checkpointing = cfg.checkpointing
    for _, layer in adapter_layers(model) if arm.looped else ():
        layer.forward = partial(published_loop, layer)
    if arm.method == "none":  # gradients flow down to the embeddings: 4 N, and no parameter gets one
        model.model.embed_tokens.register_forward_hook(lambda module, args, x: x.requires_grad_())
    if cfg.compile:
        model.compile_blocks()
    return model


def bench_runs(model, arm, batches, cfg):
    """Of an arm: a training step and a forward pass, to be called, and the bytes of weights and optimizer."""
    optimizers = make_optimizers(model, cfg) if arm.method != "none" else []
    if arm.method == "peft":                     # transformers takes -100 for our -1 and shifts to the left
        batches = [(x, y.where(y >= 0, -100).roll(1, 1).to(x.device), m) for x, y, m in batches]
    half = next(model.parameters()).dtype == torch.bfloat16    # PEFT then under autocast, as users have it

    def peft_loss(x, y, m):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            return model(input_ids=x, attention_mask=m.long(), labels=y, use_cache=False).loss

    def step():
        model.train()
        if arm.method == "peft":
            for batch in batches:
                (peft_loss(*batch) / len(batches)).backward()
        else:
            accumulate_gradients(model, batches)
        for optimizer in optimizers:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], cfg.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def infer():
        model.eval()
        for x, y, m in batches:
            peft_loss(x, y, m) if arm.method == "peft" else model.token_losses(model.hidden(x)[0], y)

    step()
    state = [t for o in optimizers for s in o.state.values() for t in s.values()]
    return step, infer, sum(t.numel() * t.element_size() for t in [*model.parameters(), *state])


def timed(run, device):
    """Seconds that run() takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
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


def training_memory(config, adapter, rows, length,
                    dtype=torch.bfloat16, checkpointing=False, supervised=0.25):
    """Bytes of a training step on rows * length tokens at its peak, by what needs them; none is allocated.

    weights: the frozen base; adapters: fp32, with gradients and the two moments of AdamW; activations: of
    every layer what autograd keeps, traced without storage, or with checkpointing its input; working: the
    larger of the head's logits with their softmax and gradient, and the gradients inside an FFN (with
    checkpointing also what its layer keeps).
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
        rotary = rotary_tables(config, 0, length, "cpu")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            block(x, rotary)
        for t in (*rotary, *block.parameters()):  # shared, or counted as weights
            kept.pop(t.untyped_storage()._cdata, None)
        layer = sum(t.untyped_storage().nbytes() for t in kept.values())
    n_frozen = sum(p.numel() for p in frozen)
    n_trained = sum(p.numel() for p in block.parameters()) - n_frozen
    # tables and last norm
    n_shared = ((2 - config.tie_word_embeddings) * config.vocab_size + 1) * config.hidden_size
    n_logits = min(round(supervised * rows * length) * config.vocab_size, MAX_LOGITS)
    ffn = 3 * rows * length * config.intermediate_size * size
    return {"weights": (L * n_frozen + n_shared) * size, "adapters": 16 * L * n_trained,
            "activations": L * (x.numel() * size if checkpointing else layer),
            "working": max(12 * n_logits, ffn + layer if checkpointing else ffn)}


def bench_group(group, arms, base, cfg, device, peak):
    """Rows of bench.json for the arms of a group, which take turns, so that a slow minute meets them all. An
    arm that does not fit into the GPU's memory is left out, unless it is the limit."""
    batches = {share: [to_device(b, torch.device(device))
                       for b in bench_batches(cfg, base.config.vocab_size, share)]
               for share in {arm.rows for arm in arms}}

    def tried(arm, work):
        gc.collect()                             # a looped layer and its forward hold each other, and memory
        try:
            return work()
        except torch.OutOfMemoryError:
            if arm.method == "none":
                raise
            print(f"{arm.name}, E = {arm.n_experts}, does not fit into the GPU's memory and is left out")
    runs = {arm: tried(arm, lambda: bench_runs(bench_model(base, arm, cfg), arm, batches[arm.rows], cfg))
            for arm in arms}
    # once all are there, as they will be when they are timed
    memory = {arm: run and tried(arm, lambda: run[2] + allocated_peak(run[0], device))
              for arm, run in runs.items()}
    runs = {arm: run for arm, run in runs.items() if memory[arm]}
    times = [{arm: (timed(step, device), timed(infer, device)) for arm, (step, infer, _) in runs.items()}
             for _ in tqdm(range(cfg.bench_rounds), desc=group, unit="round", leave=False)]
    medians = {arm: [median(t) for t in zip(*(turn[arm] for turn in times))] for arm in runs}
    rows = []
    for arm, (step, inference) in medians.items():
        limit = next(m for a, (m, _) in medians.items()
                     if (a.method, a.layers, a.rows) == ("none", arm.layers, arm.rows))
        tokens = sum(int(m.sum()) for *_, m in batches[arm.rows])
        supervised = sum(int((y >= 0).sum()) for _, y, _ in batches[arm.rows])
        blocks = sum(p.numel() for block in base.model.layers[:arm.layers]
                     for p in block.parameters() if p.dim() == 2)
        flops = 4 * (blocks * tokens + base.lm_head.weight.numel() * supervised)
        rows.append({"group": group, "name": arm.name, "method": arm.method, "n_experts": arm.n_experts,
                     "rank": arm.rank, "looped": arm.looped, "layers": arm.layers, "tokens": tokens,
                     "step_ms": round(1e3 * step, 2), "inference_ms": round(1e3 * inference, 2),
                     "over_limit": round(step / limit, 4),
                     "tokens_per_second": round(tokens / step), "utilisation": round(flops / step / peak, 4),
                     "peak_memory_mb": round(memory[arm] / 2 ** 20, 1)})
    return rows


def print_bench(rows):
    """A line per row of a group; for a group of all methods also the ratios that matter."""
    print(f"\n{'method':<17}{'E':>3}{'r':>4}{'layers':>7}{'tokens':>7}{'ms/step':>9}{'x limit':>8}"
          f"{'tokens/s':>10}{'of peak':>8}{'forward':>9}{'MB':>9}")
    for r in rows:
        print(f"{r['name']:<17}{r['n_experts']:>3}{r['rank']:>4}{r['layers']:>7}{r['tokens']:>7}"
              f"{r['step_ms']:>9.1f}{r['over_limit']:>8.3f}{r['tokens_per_second']:>10,}"
              f"{r['utilisation']:>8.1%}{r['inference_ms']:>9.1f}{r['peak_memory_mb']:>9.0f}")
    named = {r["name"]: r for r in rows}
    if "lora" in named and (team := named.get("teamlora")):
        print("teamlora's step over " + ", ".join(f"{name} {team['step_ms'] / r['step_ms']:.3f}"
                                                  for name, r in named.items() if r != team))
        print("teamlora's memory over " + ", ".join(
            f"{name} {team['peak_memory_mb'] / named[name]['peak_memory_mb']:.3f}"
            for name in ("frozen base", "lora")))
    steps = [r["step_ms"] for r in rows if (r["group"], r["method"]) == ("spread", "teamlora")]
    if steps:
        print(f"spread over E: {max(steps) / min(steps):.3f}")


def run_bench(cfg, saved):
    """Time all groups of arms; prints them and writes bench.json."""
    device, dtype = device_and_dtype(cfg)
    torch.manual_seed(cfg.seed)
    base = bench_base(cfg, device, dtype)
    layers, peak = cfg.bench_layers or base.config.num_hidden_layers, matmul_peak(device, dtype)
    if layers > base.config.num_hidden_layers:
        raise InputError(f"--bench_layers={layers}, but {cfg.init_from} has only "
                         f"{base.config.num_hidden_layers} layers")
    batches = bench_batches(cfg, base.config.vocab_size, 1.0)
    real, padded = (sum(f(m) for *_, m in batches) for f in (lambda m: int(m.sum()), torch.numel))
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{cfg.init_from or cfg.size}, {layers} layers, {str(dtype)[6:]} on {name}; matmul peak "
          f"{peak / 1e12:.2f} TFLOP/s; a step: {real} tokens in {len(batches)} micro-batches, "
          f"{1 - real / padded:.1%} padding")
    largest = max((m.shape for *_, m in batches), key=math.prod)
    estimate = training_memory(replace(base.config, num_hidden_layers=layers), cfg.adapter, *largest, dtype,
                               cfg.checkpointing)
    print(f"computed memory of a step of {cfg.method}, in MB: {sum(estimate.values()) / 2 ** 20:,.0f} = "
          + " + ".join(f"{n / 2 ** 20:,.0f} {name}" for name, n in estimate.items()))
    rows = []
    for group, arms in bench_arms(cfg, layers).items():
        rows += (new := bench_group(group, arms, base, cfg, device, peak))
        print_bench(new)
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "bench.json", lambda f: f.write((json.dumps(rows, indent=1) + "\n").encode()))
    print(f"\nwrote {out}/bench.json")
    return rows


# ---- Experiments: methods side by side, and what the experts are worth

def variants(cfg, model_config):
    """What a comparison can train: name -> settings that differ from cfg.

    Every rank keeps alpha / r, and LoRA and HydraLoRA get the rank that brings them closest to TeamLoRA's
    size, for a router takes parameters too. Competition changes two things, M and the sum of the weights; the
    cells of that table are moelora (no M, sum 1: H-LoRA as its code is), moelora_sum_E (no M, sum E: H-LoRA
    as its equation is), teamlora_sum_1 and teamlora. To scale all weights by E is to scale alpha, so these
    are the runs of equal effective scale as well.
    """
    def size(**settings):
        with torch.device("meta"):
            model = Llama(model_config, replace(cfg, **settings).adapter)
        return sum(p.numel() for p in trained(model).values())

    def ranked(method, rank, n_experts):
        return {"method": method, "rank": rank, "n_experts": n_experts, "alpha": cfg.alpha / cfg.rank * rank}

    def matched(method, n_experts):
        one, two = (size(**ranked(method, rank, n_experts)) for rank in (1, 2))
        return ranked(method, max(1, 1 + round((size(method="teamlora") - one) / (two - one))), n_experts)

    r, E = cfg.rank, cfg.n_experts
    hydra, lora = matched("hydralora", E), matched("lora", 1)
    result = {"none": {"method": "none"}, "lora": lora, "moelora": {"method": "moelora"}, "hydralora": hydra,
              "teamlora": {"method": "teamlora"}, "full": {"method": "full"},
              "moelora_sum_E": {"method": "moelora", "alpha": E * cfg.alpha},
              "teamlora_sum_1": {"method": "teamlora", "alpha": cfg.alpha / E},
              "hydralora_sum_E": {**hydra, "alpha": E * hydra["alpha"]},
              "teamlora_balanced": {"method": "teamlora", "balance": 0.1},
              "moelora_balanced": {"method": "moelora", "balance": 0.1 * E * E}}  # weights E times smaller
    result |= {f"teamlora_E{e}": ranked("teamlora", E * r // e, e)
               for e in (1, 2, 4, 8) if e != E and E * r % e == 0}
    result |= {"teamlora_half_rank": ranked("teamlora", r // 2, E)} if r > 1 else {}
    return result | {"teamlora_rank_x8": ranked("teamlora", 8 * r, E),
                     "lora_rank_x8": ranked("lora", 8 * lora["rank"], 1), "lora_rank_1": ranked("lora", 1, 1)}


def expert_statistics(model, results, test, max_tokens):
    """What claims about load and specialisation need: see the keys. Tasks and layers weigh the same."""
    usage = torch.cat([r["weights"] for r in results.values()])                      # (N, L, E)
    groups = torch.cat([torch.full((len(r["weights"]),), i) for i, r in enumerate(results.values())])
    shuffled = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]
    per_task = torch.stack([usage[groups == g].mean(0) for g in groups.unique()])    # (tasks, L, E)
    statistics = {"usage_variation": (per_task.std(-1, correction=0) / per_task.mean(-1)).mean().item(),
                  "weight_entropy": mean(r["entropy"] for r in results.values()),
                  "task_information": mutual_information(usage, groups).item(),
                  "task_information_shuffled": mutual_information(usage, shuffled).item()}
    for k in (1, 2):
        with restricted(model, top(k)):
            kept = evaluate(model, test, max_tokens, f"top {k}")
        statistics[f"top_{k}_accuracy"] = mean(r["accuracy"] for r in kept.values())
    return statistics


def train_variant(cfg, name, rows):
    """One run of a comparison: trains, evaluates on validation and on test questions, returns its row."""
    model, tokenizer, _ = prepare(cfg, None)
    stream, validation, _ = encode_data(cfg, tokenizer, rows and rows[:2], "validation")
    test = encode_held_out(cfg, tokenizer, rows and rows[2], "test")
    torch.manual_seed(cfg.seed)
    totals = {"seconds": 0.0} if cfg.method == "none" else fit(
        model, step_batches(cfg, stream), make_optimizers(model, cfg), cfg, cfg.steps, name=name)
    results = evaluate(model, test, cfg.max_tokens, "test")
    chosen_by = evaluate(model, validation, cfg.max_tokens, "validation")
    row = {"method": cfg.method, "variant": name, "seed": cfg.seed, "learning_rate": cfg.learning_rate,
           "steps": cfg.steps, "n_experts": cfg.n_experts,
           "trainable_parameters": sum(p.numel() for p in trained(model).values()),
           "seconds": round(totals["seconds"], 1),
           "accuracy": {t: r["accuracy"] for t, r in results.items()},
           "mean_accuracy": mean(r["accuracy"] for r in results.values()), "val_loss": val_loss(chosen_by),
           "val_accuracy": mean(r["accuracy"] for r in chosen_by.values()), "test_loss": val_loss(results),
           "expert_usage": {t: r["usage"] for t, r in results.items()}}
    if cfg.method not in ("none", "lora", "full") and cfg.n_experts > 1:
        row |= expert_statistics(model, results, test, cfg.max_tokens)
    return row


def run_compare(cfg, _):
    """Every method and seed at the learning rate that validation chose; a line of compare.jsonl per run.

    Runs that are there already with the same settings are not made again. Returns name -> rows of the table.
    """
    path, rows = Path(cfg.out_dir) / "compare.jsonl", read_data(cfg)
    if rows:
        rows = (*data.hold_out(rows[0], cfg.val_share, "validation"), rows[1])
    rows_digest = digest_of(rows)
    model, _, base = prepare(replace(cfg, mode="train"), None)
    cfg = replace(cfg, init_from=cfg.init_from or str(Path(cfg.out_dir) / "base"))
    possible = variants(cfg, model.config)
    del model                                    # every run makes its own
    names = tuple(possible) if cfg.methods == ("all",) else cfg.methods
    for name in (*names, cfg.reference):
        if name not in possible:
            raise InputError(f"--methods, --reference: '{name}' is none of {', '.join(possible)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock(path.parent.resolve())
    done = {r["settings"]: r for _, r in data.read_objects(path)} if path.is_file() else {}

    def run(name, learning_rate, seed):
        one = replace(cfg, mode="train", stop_after=0, learning_rate=learning_rate, seed=seed,
                      **possible[name])
        shaping = {k: v for k, v in asdict(one).items() if k not in FREE_ON_RESUME + OF_COMPARISON}
        settings = data.digest(filter(None, [base, json.dumps(shaping, sort_keys=True), rows_digest]))
        if settings not in done:
            done[settings] = train_variant(one, name, rows) | {"settings": settings}
            lines = "".join(json.dumps(row) + "\n" for row in done.values())
            write_atomically(path, lambda f: f.write(lines.encode()))
        return done[settings]

    table = {}
    for name in names:
        if name == "none":                       # the frozen base: nothing to choose and nothing random
            table[name] = [run(name, 0.0, cfg.seeds[0])]
            continue
        rates = sorted(cfg.learning_rates)
        sweep = {rate: run(name, rate, cfg.seeds[0]) for rate in rates}
        while len(rates) > 1:                    # a best value at the edge says little about the best value
            best = max(rates, key=lambda rate: sweep[rate]["val_accuracy"])
            beyond = {rates[0]: rates[0] ** 2 / rates[1], rates[-1]: rates[-1] ** 2 / rates[-2]}.get(best)
            if beyond is None or len(rates) >= len(cfg.learning_rates) + 3:
                break
            beyond = float(f"{beyond:.1g}")
            sweep[beyond] = run(name, beyond, cfg.seeds[0])
            rates = sorted([*rates, beyond])
        best = max(rates, key=lambda rate: sweep[rate]["val_accuracy"])
        table[name] = [run(name, best, seed) for seed in cfg.seeds]
        print_comparison(table, cfg.reference)
    if cfg.plot:
        plot_comparison(table, Path(cfg.out_dir))
    return table


def interval(differences):
    """(mean, half width of its 95% interval by Student's t) of paired differences; None with fewer than 2."""
    n = len(differences)
    if n < 2:
        return mean(differences), None
    t = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)[min(n, 10) - 2]
    return mean(differences), t * torch.tensor(differences).std().item() / math.sqrt(n)


def print_comparison(table, reference):
    """A line per method: size, rate, time, accuracy by task, mean, deviation over seeds, difference."""
    tasks = list(next(iter(table.values()))[0]["accuracy"])
    width = max(map(len, [*table, "method"]))
    print(f"\n{'method':{width}}{'params':>11}{'rate':>9}{'s/step':>8} "
          + "".join(f"{t[:7]:>8}" for t in tasks) + f"{'mean':>8}{'sd':>7}"
          + f"   to {reference} (95%)" * (reference in table))
    for name, rows in table.items():
        means = torch.tensor([r["mean_accuracy"] for r in rows], dtype=torch.float64)
        deviation = f"{means.std().item():7.3f}" if len(rows) > 1 else f"{'-':>7}"
        difference = ""
        if reference in table and name != reference:
            d, half = interval([r["mean_accuracy"] - other["mean_accuracy"]
                                for r, other in zip(rows, table[reference])])
            difference = f"   {d:+.3f}" + (f" ±{half:.3f}" if half is not None else "")
        print(f"{name:{width}}{rows[0]['trainable_parameters']:>11,}{rows[0]['learning_rate']:>9.0e}"
              f"{mean(r['seconds'] / r['steps'] for r in rows):>8.3f} "
              + "".join(f"{mean(r['accuracy'][t] for r in rows):8.3f}" for t in tasks)
              + f"{means.mean().item():8.3f}{deviation}{difference}")
    bars = {name: torch.tensor([r["mean_accuracy"] for r in rows]) for name, rows in table.items()}
    bars.pop("none", None)                       # beside the base's 0 all others look alike
    if bars:
        print_bars(bars)
    keys = [k for k in ("usage_variation", "weight_entropy", "task_information", "task_information_shuffled",
                        "top_1_accuracy", "top_2_accuracy") if any(k in rows[0] for rows in table.values())]
    if keys:
        print(f"\n{'':{width}}" + "".join(f"{k:>27}" for k in keys))
    for name, rows in table.items():
        if keys and keys[0] in rows[0]:
            print(f"{name:{width}}" + "".join(f"{mean(r[k] for r in rows):27.3f}" for k in keys))


def print_bars(values, width=60):
    """A bar to the mean of each tensor of values, up to 1; grey reaches a deviation over seeds either way."""
    low = math.floor(10 * min(v.min().item() for v in values.values())) / 10
    print(f"\nmean accuracy, from {low:.1f} to 1")
    for name, v in values.items():
        m, s = v.mean().item(), v.std().item() if len(v) > 1 else 0.0
        places = [low + (i + 0.5) / width * (1 - low) for i in range(width)]
        bar = "".join("█" if x < m - s else "▒" if x < m + s else "·" for x in places)
        print(f"{name:{max(map(len, values))}} {bar}")


def rank_correlation(a, b):
    """Spearman's rank correlation of two vectors, ties sharing their rank; None if one is constant."""
    ranks = [(x[:, None] > x).double().sum(1) + 0.5 * (x[:, None] == x).double().sum(1) for x in (a, b)]
    correlation = torch.corrcoef(torch.stack(ranks))[0, 1].item()
    return None if math.isnan(correlation) else correlation


def run_shapley(cfg, saved):
    """The exact Shapley value of each expert by task, beside its mean weight; writes out_dir/shapley.json."""
    if cfg.method in ("full", "none") or not 1 < cfg.n_experts <= 8:
        raise InputError(f"--mode=shapley needs an adapter with 2 to 8 experts; {cfg.out_dir}/adapter.pt has "
                         f"method={cfg.method} and n_experts={cfg.n_experts}")
    rows = read_data(cfg)
    model, tokenizer, _ = prepare(cfg, saved)
    _, split, _ = encode_data(cfg, tokenizer, rows)
    tasks, E, value = list(split), cfg.n_experts, {"accuracy": [], "loss": []}
    for index in range(2 ** E):
        with restricted(model, only(coalition(index))):
            results = evaluate(model, split, cfg.max_tokens, f"coalition {index + 1} of {2 ** E}")
        for key, sign in (("accuracy", 1), ("loss", -1)):
            value[key].append([sign * results[t][key] for t in tasks])
    value = {key: torch.tensor(v, dtype=torch.float64) for key, v in value.items()}  # (2^E, tasks)
    usage = torch.tensor([results[t]["usage"] for t in tasks], dtype=torch.float64)  # (tasks, E)
    worth = {key: shapley_values(v).T for key, v in value.items()}                   # (tasks, E)
    agreement = {key: [rank_correlation(a, b) for a, b in zip(w, usage)] for key, w in worth.items()}
    pairs = shapley_interactions(value["loss"]).mean(-1)                             # (E, E)
    M = [layer.interaction.detach().double().cpu()
         for _, layer in adapter_layers(model) if layer.interaction is not None]
    upper = torch.triu_indices(E, E, 1).unbind()
    result = {"tasks": tasks, "value": value, "shapley": worth, "usage": usage, "rank_correlation": agreement,
              "interaction": pairs}
    if M:
        learned = torch.stack(M).mean(0)
        result |= {"learned_interaction": learned, "interaction_correlation": rank_correlation(
            pairs[upper], ((learned + learned.T) / 2)[upper])}
    plain = json.dumps(result, default=torch.Tensor.tolist, indent=1, allow_nan=False)
    write_atomically(Path(cfg.out_dir) / "shapley.json", lambda f: f.write((plain + "\n").encode()))
    print_shapley(result)
    print_layers(results)
    if cfg.plot:
        plot_experts(result, results, Path(cfg.out_dir))
    return result


def print_shapley(result):
    """Per task: what all experts are worth, each one's Shapley value (of minus the loss) and mean weight."""
    worth, usage, accuracy = result["shapley"]["loss"], result["usage"], result["value"]["accuracy"]
    gain, agreement = accuracy[-1] - accuracy[0], result["rank_correlation"]["loss"]
    E, width = worth.shape[1], max(map(len, [*result["tasks"], "mean"])) + 2
    print(f"\n{'task':{width}}{'accuracy gained':>16}   " + f"{'Shapley value, in nats of loss':{8 * E}}   " +
          f"{'mean weight of the router':{8 * E}}  rank correlation")
    for i, task in enumerate(result["tasks"]):
        print(f"{task:{width}}{gain[i]:16.3f}   " + "".join(f"{x:8.3f}" for x in worth[i]) + "   "
              + "".join(f"{x:8.3f}" for x in usage[i])
              + "{:>18}".format("-" if agreement[i] is None else f"{agreement[i]:.2f}"))
    for key, agreement in result["rank_correlation"].items():
        known = [a for a in agreement if a is not None]
        if known:
            print(f"rank correlation of Shapley value by {key} and mean weight: {mean(known):+.2f}, "
                  f"mean over {len(known)} tasks")
    if result.get("interaction_correlation") is not None:  # LoRA and its like have no M; one pair, no rank
        print("pairwise interaction against the learned M: "
              f"rank correlation {result['interaction_correlation']:+.2f} over {E * (E - 1) // 2} pairs")


def print_layers(results):
    """Mean weight of every expert by task (lines) and adapted layer (groups of E), as shades."""
    usage = torch.stack([r["weights"].mean(0) for r in results.values()])            # (tasks, L, E)
    low, high = usage.min().item(), usage.max().item()
    width = max(map(len, results)) + 2
    print(f"\nmean weight by layer, from {low:.2f} (blank) to {high:.2f} (full)")
    for task, layers in zip(results, usage.tolist()):
        print(f"{task:{width}}" + " ".join("".join(shade(w, low, high) for w in layer) for layer in layers))


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def plot_comparison(table, out):
    """compare.png: mean accuracy, deviation over seeds, by method; experts.png: by E at equal total rank."""
    plt = pyplot()
    by_experts = {int(name[10:]): rows for name, rows in table.items() if name.startswith("teamlora_E")}
    if by_experts and "teamlora" in table:
        by_experts[table["teamlora"][0]["n_experts"]] = table["teamlora"]
    by_experts = dict(sorted(by_experts.items()))
    adapted = {name: rows for name, rows in table.items() if name != "none"}
    for file, label, bars in (("compare.png", "", adapted),
                              ("experts.png", "experts E, equal total rank", by_experts)):
        if not bars:
            continue
        means = [torch.tensor([r["mean_accuracy"] for r in rows]) for rows in bars.values()]
        figure, axes = plt.subplots(figsize=(1.5 + 0.7 * len(bars), 4), layout="constrained")
        axes.bar(range(len(bars)), [m.mean().item() for m in means], color="0.8", edgecolor="black",
                 capsize=4, yerr=[m.std().item() if len(m) > 1 else 0 for m in means])
        for i, m in enumerate(means):
            axes.plot([i] * len(m), m, "k.", markersize=4)
        low = min(m.min().item() for m in means)
        axes.set_ylim(max(0, low - 0.5 * (1 - low)), 1)
        axes.set_xticks(range(len(bars)), bars, rotation=0 if label else 60,
                        ha="center" if label else "right")
        axes.set_xlabel(label)
        axes.set_ylabel("mean accuracy over tasks (axis cut)")
        figure.savefig(out / file, dpi=120)
        plt.close(figure)


def plot_experts(result, results, out):
    """usage.png: each expert's mean weight by task and layer; shapley.png: Shapley value over mean weight."""
    plt = pyplot()
    usage = torch.stack([r["weights"].mean(0) for r in results.values()])            # (tasks, L, E)
    figure, axes = plt.subplots(figsize=(10, 3.5), layout="constrained")
    image = axes.imshow(usage.flatten(1), cmap="gray_r", aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(results)), results)
    axes.set_xticks(torch.arange(usage.shape[1]) * usage.shape[2] - 0.5, range(usage.shape[1]))
    axes.grid(axis="x", color="black", linewidth=0.5)
    axes.set_xlabel("adapted layer, one column per expert")
    figure.colorbar(image, label="mean weight")
    figure.savefig(out / "usage.png", dpi=120)
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for e, marker in zip(range(usage.shape[2]), "o^sxD+v*"):
        axes.plot(result["usage"][:, e], result["shapley"]["loss"][:, e], "k" + marker, fillstyle="none",
                  label=f"expert {e}")
    axes.set_xlabel("mean weight of the router")
    axes.set_ylabel("Shapley value (nats of loss saved)")
    axes.legend()
    figure.savefig(out / "shapley.png", dpi=120)
    plt.close("all")


MODES = {"train": run_train, "eval": run_eval, "sample": run_sample, "export": run_export,
         "compare": run_compare, "shapley": run_shapley, "bench": run_bench}


def main(argv=None):
    given = {}
    try:
        if RANK > 0:                             # process 0 speaks for all
            sys.stdout = open(os.devnull, "w")
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
        given = parse_flags(argv)
        cfg, saved = compose(given)
        torch.set_float32_matmul_precision("high")
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(cfg.deterministic)
        return MODES[cfg.mode](cfg, saved)
    except (InputError, OSError, UnicodeDecodeError) as e:
        # names from files may hold line ends and terminal codes
        sys.exit("error: " + "".join(c if c.isprintable() else " " for c in str(e))[:1000])
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: out of GPU memory ({str(e).partition('. ')[0]}); lower --max_tokens or add "
                 "--checkpointing; a run that was training continues with the same flags, these changed, and "
                 "--resume")
    except KeyboardInterrupt as e:
        if given.get("mode", "train") != "train":
            sys.exit("error: interrupted")
        flags = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
                 for k, v in given.items() if k not in ("resume", "stop_after")]
        program = ["torchrun", f"--nproc_per_node={RANKS}"] if RANKS > 1 else ["python"]
        command = shlex.join([*program, "train.py", *flags, "--resume"])
        print(f"{str(e) or 'stopped'}; continue with: {command}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # outside of training, too, like Ctrl-C
    main()
