"""The story of one run: configuration, training step, loop, evaluation, checkpoints, and the modes of the command line.

    python train.py                                           a small Llama from nothing, adapted to eleven tasks
    python train.py --method=lora --steps=500                 the same with another method
    python train.py --init_from=FOLDER --data=FILE,FOLDER     a real Llama on your own instructions
    python train.py --mode=eval                               the numbers of out/adapter.pt again
    python train.py --mode=sample --prompt="..."              one answer

The idea: without --init_from the run first makes its own base model and saves it as an ordinary Llama folder; from
there on both take the same road. A step's loss is a sum over its supervised tokens divided by their number, however
the step is cut into micro-batches.

What may surprise:
- No autocast and no GradScaler: the base is bf16 on CUDA and fp32 on the CPU, adapters are fp32 and cast where used.
- The same seed gives the same examples in the same order for every method.
- Greedy exact match needs no generation: if the argmax is right at every answer position, greedy decoding is right.
- A step's examples and its dropout follow from (seed, step) alone, so a checkpoint holds no random state.
"""

import argparse
import functools
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
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
from model import AdapterConfig, Llama, LlamaConfig, fingerprint, load_llama, save_llama
from teamlora import InputError, adapter_layers, balance_loss, load_parameters, mean_usage, parameter_state


# ---- Configuration: a field is a flag

def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    mode: str = flag("train", "train, eval (the numbers of out_dir/adapter.pt again) or sample (answer --prompt)")
    out_dir: str = flag("out", "folder for everything a run writes")
    init_from: str = flag("", "folder of a real Llama in Hugging Face's layout; empty: make the small built-in base")
    data: str = flag("", "instruction files (.json, .jsonl) or folders of them, comma-separated; empty: MiniCME")
    val_data: str = flag("", "files to evaluate on; empty: hold out a share of --data by content hash")
    val_share: float = flag(0.1, "share of each task's questions held out when --val_data is empty")
    val_examples: int = flag(100, "evaluate on at most so many examples per task; 0: all (of MiniCME, which has no end, 400)")
    max_length: int = flag(1024, "longest row in tokens; a longer prompt is shortened, never an answer")
    method: str = flag("teamlora", "teamlora, lora, moelora, hydralora, full (train every weight) or none (bare base)")
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
    max_tokens: int = flag(4096, "padded tokens per micro-batch: lower it to save memory, the result stays the same")
    checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, about a third more time")
    device: str = flag("auto", "cuda or cpu; auto: cuda if there is one")
    dtype: str = flag("auto", "of the frozen base: float32 or bfloat16; auto: bfloat16 on CUDA, float32 otherwise")
    seed: int = flag(0, "seed of adapters, data order, dropout and sampling")
    deterministic: bool = flag(False, "on CUDA: only kernels that give the same bits every time, or an error; the CPU's do anyway")
    log_every: int = flag(10, "write a line of log.jsonl every so many steps")
    save_every: int = flag(200, "write a checkpoint every so many steps; 0: never")
    stop_after: int = flag(0, "end this run after so many steps with a checkpoint, for --resume; 0: run to the end")
    resume: bool = flag(False, "continue from out_dir/checkpoint.pt; start if there is none")
    prompt: str = flag("", "what to answer with --mode=sample")
    max_new_tokens: int = flag(64, "longest answer of --mode=sample")
    temperature: float = flag(0.0, "of --mode=sample; 0 is greedy")
    top_k: int = flag(0, "of --mode=sample: choose among the k likeliest tokens; 0: all")
    base_steps: int = flag(2800, "built-in base: training steps")
    base_batch_size: int = flag(12, "built-in base: texts of the corpus per step")
    base_learning_rate: float = flag(0.02, "built-in base: peak learning rate of Muon; AdamW on the embedding takes 0.15 of it")
    base_layers: int = flag(4, "built-in base: layers")
    base_width: int = flag(128, "built-in base: width, in heads of 32")
    base_seed: int = flag(1, "built-in base: seed, apart from --seed so that runs share one base")

    @property
    def adapter(self):
        return AdapterConfig(**{f.name: getattr(self, f.name) for f in fields(AdapterConfig)})


# what no file remembers, what an adapter fixes for later use, and what may change when a run is resumed
OF_CALL = ("mode", "resume", "stop_after", "prompt", "out_dir", "device")
OF_ADAPTER = ("method", "rank", "n_experts", "alpha", "targets", "init_from")
FREE_ON_RESUME = ("resume", "stop_after", "log_every", "save_every", "max_tokens", "checkpointing", "device", "out_dir")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def parse_flags(argv):
    """Command line -> {name: value} of what the user wrote, and no more, so that it can override a checkpoint's settings."""
    def boolean(text):
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
        return text.lower() == "true"

    parser = Parser(prog="train.py", description=__doc__.split("\n\n")[1], allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        kind = type(f.default)
        shown = ",".join(f.default) if kind is tuple else f.default
        options = {"nargs": "?", "const": True, "type": boolean} if kind is bool else {
            "type": (lambda text: tuple(text.split(","))) if kind is tuple else kind}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar=kind.__name__.upper(),
                            help=f"{f.metadata['help'].replace('%', '%%')} [{shown}]", **options)
    return vars(parser.parse_args(argv))


def check(cfg):
    """Refuse settings that cannot work, before anything is read or written."""
    for name, allowed in (("mode", ("train", "eval", "sample")), ("device", ("auto", "cpu", "cuda")),
                          ("dtype", ("auto", "float32", "bfloat16"))):
        if getattr(cfg, name) not in allowed:
            raise InputError(f"--{name} must be one of {', '.join(allowed)}, not '{getattr(cfg, name)}'")
    for name in ("rank", "n_experts", "steps", "batch_size", "max_tokens", "max_length", "log_every", "base_steps",
                 "base_batch_size", "base_layers", "base_width", "max_new_tokens"):
        if getattr(cfg, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(cfg, name)}")
    for name in ("learning_rate", "base_learning_rate", "clip"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise InputError(f"--{name} must be positive, not {getattr(cfg, name)}")
    for name in ("dropout", "warmup", "val_share"):
        if not 0 <= getattr(cfg, name) < 1:
            raise InputError(f"--{name} must lie in [0, 1), not {getattr(cfg, name)}")
    for name in ("balance", "weight_decay", "temperature", "top_k", "val_examples", "save_every", "stop_after"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise InputError(f"--{name} must not be negative, not {getattr(cfg, name)}")
    if cfg.max_tokens < cfg.max_length:
        raise InputError(f"--max_tokens={cfg.max_tokens} cannot hold a row of --max_length={cfg.max_length}; lower that too")
    if cfg.base_width % 32:
        raise InputError(f"--base_width must be a multiple of 32, not {cfg.base_width}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device=cuda, but PyTorch finds no CUDA device here; leave the flag out to run on the CPU")
    if cfg.mode == "train" and cfg.method == "none":
        raise InputError("--method=none has nothing to train; use it with --mode=eval or --mode=sample")
    if cfg.mode == "sample" and not cfg.prompt:
        raise InputError("--mode=sample needs --prompt")
    if cfg.val_data and not cfg.data:
        raise InputError("--val_data needs --data")
    cfg.adapter                                  # validates method and targets
    return cfg


def device_and_dtype(cfg):
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    # full training needs fp32 weights: bf16 optimizer steps below 1/256 of a weight are lost
    auto = "bfloat16" if device == "cuda" and cfg.method != "full" else "float32"
    return device, getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)


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
    """Muon for the matrices inside the base, AdamW for embedding and norms: with AdamW alone the base had learnt to copy
    a list in hardly one case of ten after 350 steps, with Muon in nearly all after 250."""
    inner = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    outer = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed_tokens" in name]
    return [torch.optim.Muon(inner, lr=cfg.base_learning_rate, weight_decay=0.1),
            torch.optim.AdamW(outer, lr=0.15 * cfg.base_learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def step_usage(model, batches):
    """Mean weight of each expert over all tokens of a step (L, E), without gradient."""
    with torch.no_grad():
        parts = [(mean_usage(model.hidden(x, want_routing=True)[1], m), m.sum()) for x, _, m in batches]
    return sum(u * n for u, n in parts) / sum(n for _, n in parts)


def accumulate_gradients(model, batches, balance=0.0):
    """Add the gradient of one step's loss, whatever its cut into micro-batches; returns (loss, supervised tokens).

    loss = sum over supervised tokens / their number + balance * balance_loss(mean usage of the step). The balance term
    is no sum over micro-batches, but its gradient is: with the step's usage u known from a pass without gradient,
    d balance_loss = sum_tokens <d balance_loss / d u, d w> / tokens. That pass is the price of balance > 0.
    """
    n = sum(int((y >= 0).sum()) for _, y, _ in batches)
    slope, total = None, 0.0
    if balance > 0:
        usage = step_usage(model, batches).requires_grad_()
        term = balance * balance_loss(usage)
        slope, = torch.autograd.grad(term, usage)                                    # (L, E)
        n_tokens, total = sum(m.sum() for _, _, m in batches), term.detach()
    for x, y, m in batches:
        hidden, routing = model.hidden(x, want_routing=slope is not None)
        loss = model.token_losses(hidden, y)[0].sum() / n
        total = total + loss.detach()
        if slope is not None:
            loss = loss + (slope * mean_usage(routing, m)).sum() * m.sum().to(slope.dtype) / n_tokens
        loss.backward()
    return total, n


MOST_SKIPPED = 20                                # steps in a row that may be skipped before the run gives up


@contextmanager
def held_signals():
    """Yields a list that the first SIGINT or SIGTERM is noted in, so that a step can be finished; a second one kills."""
    noted, handlers = [], {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        noted.append(number)
        for s in handlers:
            signal.signal(s, signal.SIG_DFL)
        # not print: the signal may have come in the middle of one
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step and saving; a second one ends it at once\n".encode())
    for s in handlers:
        signal.signal(s, note)
    try:
        yield noted
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def attempt(write, *args):
    """write(*args) and True; False and a warning if the disk is full or the folder cannot be written: the run goes on."""
    try:
        write(*args)
    except OSError as e:
        tqdm.write(f"warning: {e}; training goes on, what was written before stays, and the next time it is tried again")
        return False
    return True


def fit(model, step_batches, optimizers, cfg, steps, *, name="train", resumed=None, log=None, save=None, stopped=()):
    """Train for `steps` steps. step_batches: step -> micro-batches; optimizers hold their peak learning rates.

    log(record) gets a dict at every logged step, save(optimizers, totals) is called when a checkpoint is due, resumed
    is what it saved. Returns totals: step, seconds, tokens (without padding), skipped steps.
    Raises KeyboardInterrupt, after saving, at stop_after or once `stopped` (see held_signals) holds something.
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
    end = min(steps, cfg.stop_after) if cfg.stop_after and save else steps
    begun = time.perf_counter() - totals["seconds"]
    balance = cfg.balance if adapter_layers(model) else 0.0
    model.train()
    bar = tqdm(range(totals["step"], end), initial=totals["step"], total=end, desc=name, unit="step", dynamic_ncols=True,
               mininterval=1)
    in_a_row = 0
    for step in bar:
        torch.manual_seed(random.Random(f"dropout {cfg.seed} {step}").getrandbits(63))
        batches = [[t.to(device) for t in b] for b in step_batches(step)]
        share = schedule(step, steps, cfg.warmup)
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks):
            group["lr"] = peak * share
        try:
            loss, supervised = accumulate_gradients(model, batches, balance)
        except torch.OutOfMemoryError:           # nothing has changed since the step before
            model.zero_grad(set_to_none=True)
            if save and attempt(save, optimizers, totals):
                tqdm.write(f"out of memory; saved after step {totals['step']}")
            raise
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, cfg.clip))
        finite = math.isfinite(norm) and math.isfinite(loss)
        totals["skipped"], in_a_row = totals["skipped"] + (not finite), 0 if finite else in_a_row + 1
        for optimizer in optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        totals["tokens"] += sum(int(m.sum()) for *_, m in batches)
        totals["step"], totals["seconds"] = step + 1, time.perf_counter() - begun
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            rate = round(totals["tokens"] / totals["seconds"])
            bar.set_postfix_str(f"loss {float(loss):.3f}, {rate:,} tokens/s", refresh=False)
            if log:
                attempt(log, {"step": step + 1, "loss": float(loss), "learning_rate": peaks[0] * share, "gradient_norm": norm,
                              "supervised_tokens": supervised, "tokens_per_second": rate, "skipped": totals["skipped"],
                              "seconds": round(totals["seconds"], 2)})
        stopping, hopeless = stopped or step + 1 == end < steps, in_a_row == MOST_SKIPPED
        if save and stopping:
            save(optimizers, totals)             # there is no next time: if it fails, so does the run
        elif save and (hopeless or step + 1 == steps or (cfg.save_every and (step + 1) % cfg.save_every == 0)):
            attempt(save, optimizers, totals)
        if hopeless:
            raise InputError(f"{in_a_row} steps in a row up to step {step + 1} had a loss or gradient that is not finite; they "
                             "changed nothing. Lower --learning_rate, or look for bad numbers in the base")
        if stopping:
            break
    if stopped or totals["step"] < steps:
        raise KeyboardInterrupt(f"stopped after {totals['step']} of {steps} steps")
    return totals


# ---- Evaluation

@torch.no_grad()
def evaluate(model, split, max_tokens, name="evaluate"):
    """task -> {accuracy, loss, tokens, usage}, each task's examples in full, always the same ones.

    accuracy: share of examples whose whole answer greedy decoding would produce; loss: mean over supervised tokens;
    usage: mean weight of each expert over layers and tokens (E numbers), empty where nothing routes.
    """
    model.eval()
    device, results = next(model.parameters()).device, {}
    routed = bool(adapter_layers(model))
    with tqdm(total=sum(map(len, split.values())), desc=name, unit="example", dynamic_ncols=True, mininterval=1) as bar:
        for task, examples in split.items():
            hits, loss, tokens, usage, n_usage = 0, 0.0, 0, 0.0, 0
            for batch in data.cut(examples, max_tokens):
                x, y, m = (t.to(device) for t in data.collate(batch))
                hidden, routing = model.hidden(x, want_routing=routed)
                losses, hit = model.token_losses(hidden, y)
                loss, tokens = loss + losses.sum().item(), tokens + losses.numel()
                hits += sum(h.all().item() for h in hit.split((y >= 0).sum(1).tolist()))
                if routed:
                    n = m.sum().item()
                    usage, n_usage = usage + mean_usage(routing, m).mean(0) * n, n_usage + n
                bar.update(len(batch))
            results[task] = {"accuracy": hits / len(examples), "loss": loss / tokens, "tokens": tokens,
                             "usage": (usage / n_usage).tolist() if routed else []}
    return results


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def val_loss(results):
    """Loss over all tasks, weighted by tokens."""
    return sum(r["loss"] * r["tokens"] for r in results.values()) / sum(r["tokens"] for r in results.values())


def print_results(results, chance, before=None):
    """One line per task: chance, accuracy before and after, loss, and the mean weight of each expert as a shade."""
    usage = [w for r in results.values() for w in r["usage"]]
    low, high = (min(usage), max(usage)) if usage else (0, 0)
    width = max(map(len, [*results, "mean"])) + 2
    print(f"\n{'task':{width}}{'chance':>8}{'before':>8}{'after':>8}{'loss':>8}" + ("   weight of each expert" if usage else ""))
    for task, r in results.items():
        cells = "".join("  " + " ░▒▓█"[round(4 * (w - low) / (high - low))] * 2 + f" {w:.2f}" if high > low else f"  {w:.2f}"
                        for w in r["usage"])
        old = f"{before[task]['accuracy']:8.3f}" if before else f"{'-':>8}"
        guess = f"{chance[task]:8.3f}" if task in chance else f"{'-':>8}"
        print(f"{task:{width}}{guess}{old}{r['accuracy']:8.3f}{r['loss']:8.3f} {cells}")
    old = f"{mean(r['accuracy'] for r in before.values()):8.3f}" if before else f"{'-':>8}"
    print(f"{'mean':{width}}{'':8}{old}{mean(r['accuracy'] for r in results.values()):8.3f}{val_loss(results):8.3f}")


def answer(model, tokenizer, prompt_ids, cfg, max_new_tokens=64):
    """The text that the model answers to a tokenised prompt."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(cfg.seed)
    new = model.eval().generate(torch.tensor([prompt_ids], device=device), max_new_tokens, temperature=cfg.temperature,
                                top_k=cfg.top_k, generator=generator)[0].tolist()
    ends = [i for i, t in enumerate(new) if t in model.config.eos_token_id]
    return tokenizer.decode(new[:ends[0]] if ends else new)


def print_samples(model, tokenizer, split, cfg, n=2):
    print("\ntwo answers per task (expected / given)")
    for task, examples in split.items():
        for e in examples[:n]:
            expected = tokenizer.decode([t for t in e.ids[e.n_prompt:] if t != tokenizer.eos])
            given = answer(model, tokenizer, e.ids[:e.n_prompt], cfg)
            question = tokenizer.decode(e.ids[:e.n_prompt]).strip().replace("\n", " ")
            print(f"  {task}: {question if len(question) < 100 else '...' + question[-97:]}\n"
                  f"      {expected!r} / {given!r}")


# ---- Files

def write_atomically(path, write, keep=None):
    """write(binary file) into a temporary file, flush that to the disk, rename it: whoever looks, even after a power cut,
    sees the old file or the new one, never half of it. The old one is kept as `keep`, if that is given."""
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
    """The checkpoint at path; the one before it, with a warning, if that is damaged; None if there is neither."""
    paths = [p for p in (path, previous(path)) if p.is_file()]
    for p in paths:
        try:
            return read_saved(p, "optimizers", "totals")
        except InputError as e:
            if p == paths[-1]:
                raise
            print(f"warning: {e}; continuing from {paths[-1]}, the checkpoint before it")


def read_saved(path, *more):
    """A checkpoint or adapter file, which must also hold `more`. Only tensors and plain values are read; code inside is
    refused. Settings that the file does not know have their defaults."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; train first, or point --out_dir to where it lies")
    try:
        with zipfile.ZipFile(path) as archive:   # torch.save leaves a checksum per tensor, torch.load never looks at it
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} fails its checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["config"]["targets"] = tuple(saved["config"]["targets"])
        for key, value in saved["config"].items():
            if type(value) is not type(getattr(Config, key, None)):
                raise ValueError(f"its setting {key}={value} is not one of this program's")
        if missing := {"parameters", "fingerprint", *more} - saved.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        for key, value in saved["parameters"].items():
            if not value.isfinite().all():
                raise ValueError(f"{key} has numbers that are not finite")
    except Exception as e:                       # torch raises anything from RuntimeError to UnpicklingError here
        raise InputError(f"{path}: not a readable checkpoint or adapter ({str(e).splitlines()[0]}); delete it "
                         "or put a good copy there") from None
    return saved | {"config": {f.name: f.default for f in fields(Config)} | saved["config"]}


class Log:
    """log.jsonl from `size` bytes on. What cannot be written waits in memory, so that a full disk loses no line."""

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
    """Keep other runs out of a folder until this process ends, however it ends. Raises InputError naming the holder.

    SQLite's lock is the kernel's, on every system, so a killed run leaves no stale one: only a file that nobody holds.
    """
    held = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)
    try:
        held.execute(f"PRAGMA user_version = {os.getpid()}")     # committed, so that others can read it
        held.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as e:
        if "locked" not in str(e):
            raise InputError(f"{folder}/lock: {e}; can the folder be written?") from None
        pid, = held.execute("PRAGMA user_version").fetchone()
        raise InputError(f"{folder} is in use by process {pid}; wait for it, or choose another --out_dir") from None
    return held


def compose(given):
    """Flags -> (Config, saved file or None): defaults, then what the file says, then the command line.

    Raises InputError if a flag contradicts the file.
    """
    cfg = check(Config(**given))
    if given.get("method") == "none":
        return cfg, None
    path = Path(cfg.out_dir) / ("checkpoint.pt" if cfg.mode == "train" else "adapter.pt")
    if cfg.mode == "train" and (path.parent / "lock").exists():
        lock(path.parent.resolve())              # before a checkpoint is read that another run may be about to replace
    saved = read_checkpoint(path) if cfg.mode == "train" else read_saved(path)
    if cfg.mode == "train" and not cfg.resume:
        if saved and saved["totals"]["step"] < saved["config"]["steps"]:
            raise InputError(f"{path} is at step {saved['totals']['step']} of {saved['config']['steps']} of a run that has not "
                             "ended: continue it with --resume, delete it, or choose another --out_dir")
        return cfg, None
    if not saved:
        print(f"nothing to resume in {cfg.out_dir} yet: starting")
        return cfg, None
    for name, value in given.items():
        fixed = name not in FREE_ON_RESUME if cfg.mode == "train" else name in OF_ADAPTER
        if fixed and saved["config"][name] != value:
            raise InputError(f"--{name}={value} contradicts {path}, which was made with {saved['config'][name]}")
    return check(replace(cfg, **{k: v for k, v in saved["config"].items() if k not in given and k not in OF_CALL})), saved


# ---- The parts of a run

def adapter_content(cfg, base, model):
    """What an adapter file holds; the same bytes wherever and in however many calls it was made."""
    config = {k: v for k, v in asdict(cfg).items() if k not in OF_CALL}
    return {"config": config, "fingerprint": base, "parameters": parameter_state(trained(model))}


def checkpoint_content(cfg, base, model, optimizers, totals):
    """What continuing needs: no random state, for a step's examples and dropout follow from (seed, step)."""
    return adapter_content(cfg, base, model) | {"optimizers": [o.state_dict() for o in optimizers], "totals": dict(totals)}


def make_base(cfg, device):
    """The small base model, made once: out_dir/base, an ordinary Llama folder, with made_from.json beside the weights."""
    folder = Path(cfg.out_dir) / "base"
    corpus = data.corpus(cfg.base_seed)
    recipe = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name.startswith("base_")}
    recipe["corpus"] = data.digest(corpus(i).output for i in range(0, 2 * data.N_LESSONS, 100))
    if (folder / "made_from.json").is_file() and json.loads((folder / "made_from.json").read_text()) == recipe:
        print(f"base: {folder}, made before")
        return folder
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
        with held_signals() as stopped:          # sentencepiece would make its own error of a KeyboardInterrupt
            data.make_tokenizer(temporary / "tokenizer.model", map(corpus, range(data.N_LESSONS, data.N_LESSONS + 5000)))
        if stopped:
            raise KeyboardInterrupt
    tokenizer = data.Tokenizer(temporary / "tokenizer.model")
    torch.manual_seed(cfg.base_seed)
    C = cfg.base_width
    sizes = LlamaConfig(vocab_size=tokenizer.size, hidden_size=C, intermediate_size=8 * C // 3 // 16 * 16,
                        num_hidden_layers=cfg.base_layers, num_attention_heads=C // 32, num_key_value_heads=C // 32,
                        head_dim=32, rope_theta=100.0, tie_word_embeddings=True, max_position_embeddings=256)
    model = Llama(sizes, AdapterConfig(method="full")).init_weights(positional=C // 32).to(device)
    if saved:
        load_parameters(trained(model), saved["parameters"])
        print(f"base: continuing {temporary} after {saved['totals']['step']} of {cfg.base_steps} steps")
    else:
        print(f"base: none made with these settings yet; training {sum(p.numel() for p in model.parameters()):,} parameters "
              f"on plain statements for {cfg.base_steps} steps")

    def save(optimizers, totals):
        content = checkpoint_content(cfg, made_from, model, optimizers, totals)
        write_atomically(checkpoint, lambda f: torch.save(content, f), previous(checkpoint))

    def step_batches(step):
        n = cfg.base_batch_size
        return [data.collate(b) for b in data.cut([data.encode(tokenizer, corpus(i)) for i in range(step * n, (step + 1) * n)],
                                                  cfg.max_tokens)]
    # the base follows from its recipe alone
    own = replace(cfg, stop_after=0, warmup=Config.warmup, clip=Config.clip, seed=Config.seed, balance=Config.balance)
    with held_signals() as stopped:
        fit(model, step_batches, make_base_optimizers(model, cfg), own, cfg.base_steps, name="base", resumed=saved, save=save,
            stopped=stopped)
    save_llama(model, temporary)
    (temporary / "made_from.json").write_text(made_from)
    for path in temporary.iterdir():
        with open(path, "rb+") as f:
            os.fsync(f.fileno())                 # on the disk before the name out/base is
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    for path in (checkpoint, previous(checkpoint)):
        (folder / path.name).unlink(missing_ok=True)
    return folder


def read_data(cfg):
    """(training rows, validation rows) of --data, or None for MiniCME; read before anything long or lasting happens."""
    if not cfg.data:
        return None
    rows = data.read_rows(cfg.data)
    return (rows, data.read_rows(cfg.val_data)) if cfg.val_data else data.hold_out(rows, cfg.val_share)


def encode_data(cfg, tokenizer, rows):
    """(training stream: i -> Example, validation split: task -> Examples, chance: task -> share)."""
    if rows is None:
        stream = data.minicme(cfg.seed)
        split = {task: [data.encode(tokenizer, row) for row in rows]
                 for task, rows in data.minicme_test(cfg.val_examples or 400).items()}
        return lambda i: data.encode(tokenizer, stream(i)), split, data.CHANCE
    train, val = (data.encode_rows(tokenizer, part, cfg.max_length, name) for part, name in zip(rows, ("training", "validation")))
    split = {}
    for e in val:
        examples = split.setdefault(e.task, [])
        if not cfg.val_examples or len(examples) < cfg.val_examples:
            examples.append(e)
    return data.shuffled(train, cfg.seed), split, {}


def peak_memory_mb():
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    if sys.platform == "win32":                  # which has no resource module
        return None
    import resource
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 10 if sys.platform == "linux" else 2 ** 20))


def trained(model):
    """name -> parameter of what is trained: the adapters, or with method=full everything."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def prepare(cfg, saved):
    """(model, tokenizer, fingerprint of the base); a saved adapter is loaded into the model if there is one."""
    device, dtype = device_and_dtype(cfg)
    folder = cfg.init_from or (make_base(cfg, device) if cfg.mode == "train" else Path(cfg.out_dir) / "base")
    torch.manual_seed(cfg.seed)
    model = load_llama(folder, cfg.adapter, device, dtype)
    tokenizer = data.open_tokenizer(folder, model.config.eos_token_id[0])
    if tokenizer.size > model.config.vocab_size:
        raise InputError(f"{tokenizer.path} has {tokenizer.size} pieces, the model only {model.config.vocab_size} embeddings")
    base = fingerprint(model)
    if saved and saved["fingerprint"] != base:
        raise InputError(f"the adapter in {cfg.out_dir} was made for another base (fingerprint {saved['fingerprint']}) "
                         f"than {folder} ({base})")
    if saved:
        load_parameters(trained(model), saved["parameters"])
        if adapter_layers(model) and not any(layer.lora_B.any() for _, layer in adapter_layers(model)):
            print(f"warning: every B of the adapter in {cfg.out_dir} is zero, so it changes nothing, although it was trained")
    model.checkpointing = cfg.checkpointing
    return model, tokenizer, base


def print_start(cfg, model, tokenizer, step_examples):
    """What this run is, in numbers, and its first example with the supervised part marked."""
    total, trainable = (sum(p.numel() for p in ps) for ps in (model.parameters(), trained(model).values()))
    p = next(model.parameters())
    device = torch.cuda.get_device_name() if p.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    padded = real = supervised = n = 0
    for step in range(min(10, cfg.steps)):
        for _, y, m in map(data.collate, data.cut(step_examples(step), cfg.max_tokens)):
            padded, real, supervised, n = padded + m.numel(), real + int(m.sum()), supervised + int((y >= 0).sum()), n + 1
    steps = min(10, cfg.steps)
    print(f"device: {device}, base in {str(p.dtype)[6:]}; method: {cfg.method}\n"
          f"parameters: {total:,}, trainable {trainable:,} ({trainable / total:.2%})\n"
          f"a step: {cfg.batch_size} examples, {real // steps:,} tokens ({supervised // steps:,} supervised) "
          f"in {n / steps:.1f} micro-batches, {1 - real / padded:.1%} padding")
    e = step_examples(0)[0]
    prompt, expected = tokenizer.decode(e.ids[:e.n_prompt]), tokenizer.decode(e.ids[e.n_prompt:-1])
    print(f"first example, supervised part in [[ ]]: {prompt if len(prompt) < 300 else '...' + prompt[-297:]!r} "
          f"[[{expected if len(expected) < 300 else expected[:297] + '...'!r} + end of sequence]]")


def run_train(cfg, saved):
    """Base, data, evaluation before, training, evaluation after; writes log.jsonl, adapter.pt and summary.json."""
    out = Path(cfg.out_dir)
    rows = read_data(cfg)
    model, tokenizer, base = prepare(cfg, saved)
    stream, split, chance = encode_data(cfg, tokenizer, rows)
    rows_digest = data.digest(map(str, rows[0] + rows[1])) if rows else ""
    if saved and saved["rows"] != rows_digest:
        raise InputError(f"the rows of --data are not those that the checkpoint in {out} was made with")
    out.mkdir(parents=True, exist_ok=True)
    lock(out.resolve())

    def step_examples(step):
        return [stream(i) for i in range(step * cfg.batch_size, (step + 1) * cfg.batch_size)]

    print_start(cfg, model, tokenizer, step_examples)
    before = saved["before"] if saved else evaluate(model, split, cfg.max_tokens, "before")
    if not saved:
        for path in (out / "checkpoint.pt", previous(out / "checkpoint.pt")):
            path.unlink(missing_ok=True)         # of a run that has ended: a later --resume means this one
    log = Log(out / "log.jsonl", saved["log_bytes"] if saved else 0)

    def save(optimizers, totals):
        log.flush(sync=True)                     # a checkpoint is never ahead of the log
        content = checkpoint_content(cfg, base, model, optimizers, totals) | {
            "before": before, "rows": rows_digest, "log_bytes": log.size}
        write_atomically(out / "checkpoint.pt", lambda f: torch.save(content, f), previous(out / "checkpoint.pt"))

    def step_batches(step):
        return [data.collate(b) for b in data.cut(step_examples(step), cfg.max_tokens)]

    with held_signals() as stopped:
        totals = fit(model, step_batches, make_optimizers(model, cfg), cfg, cfg.steps, resumed=saved, log=log, save=save,
                     stopped=stopped)
    results = evaluate(model, split, cfg.max_tokens, "after")
    write_atomically(out / "adapter.pt", lambda f: torch.save(adapter_content(cfg, base, model), f))
    summary = summarise(cfg, model, totals, before, results, chance)
    write_atomically(out / "summary.json", lambda f: f.write((json.dumps(summary, indent=1) + "\n").encode()))
    print_results(results, chance, before)
    print_samples(model, tokenizer, split, cfg)
    print(f"\nmean accuracy {summary['mean_accuracy']:.3f}, before {summary['base_mean_accuracy']:.3f}; {summary['seconds']:.0f} s of "
          f"training, {summary['tokens_per_second']:,} tokens/s, {totals['skipped']} steps skipped; wrote {out}/")
    return summary


def summarise(cfg, model, totals, before, results, chance):
    p = next(model.parameters())
    return {"method": cfg.method, "seed": cfg.seed, "steps": cfg.steps, "seconds": round(totals["seconds"], 1),
            "tokens_per_second": round(totals["tokens"] / totals["seconds"]), "skipped_steps": totals["skipped"],
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


def run_sample(cfg, saved):
    model, tokenizer, _ = prepare(cfg, saved)
    row = data.Row("sample", cfg.prompt, "", "")
    # the bare base continues the text, an adapter answers it
    ids = tokenizer.prefix + tokenizer.encode(cfg.prompt) if cfg.method == "none" else data.encode(tokenizer, row).ids[:-1]
    print(answer(model, tokenizer, ids, cfg, cfg.max_new_tokens))


def main(argv=None):
    given = {}
    try:
        given = parse_flags(argv)
        cfg, saved = compose(given)
        torch.set_float32_matmul_precision("high")
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(cfg.deterministic)
        return {"train": run_train, "eval": run_eval, "sample": run_sample}[cfg.mode](cfg, saved)
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: out of GPU memory ({str(e).partition('. ')[0]}); lower --max_tokens or add --checkpointing; a run "
                 "that was training continues with the same flags, these changed, and --resume")
    except KeyboardInterrupt as e:
        if given.get("mode", "train") != "train":
            sys.exit("error: interrupted")
        flags = [f"--{k}={','.join(v) if isinstance(v, tuple) else v}" for k, v in given.items() if k not in ("resume", "stop_after")]
        print(f"{str(e) or 'stopped'}; continue with: {shlex.join(['python', 'train.py', *flags, '--resume'])}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)    # outside of training too, a SIGTERM is like Ctrl-C
    main()
