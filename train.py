"""One run: configuration, training step, loop, evaluation, files, and the modes of the command line.

    python train.py                                         adapts the built-in small Llama to eleven tasks
    python train.py --init_from=FOLDER --data=FILE,FOLDER   a real Llama on your own instructions
    python train.py --resume                                goes on from out/checkpoint.pt
    python train.py --mode=eval                             the numbers of out/adapter.pt again
    python train.py --mode=sample --prompt="..."            one answer; without --prompt, one to every line
    python train.py --mode=export                           base and adapter merged, if the method allows it
    torchrun --nproc_per_node=N train.py ...                the same run on N GPUs

The idea: flags become one configuration; a step's examples and its dropout follow from (seed, step) alone; a
step's loss is a sum over its supervised tokens divided by their number, however it is split.
Read it from `training_step` on; `fit` is the loop around it and `run_train` what is around that.

What may surprise:
- No autocast and no GradScaler: the base is bf16 on CUDA, adapters are fp32 and cast where used.
- Greedy exact match needs no generation: where the argmax is right at every position, greedy decoding is.
- The loop waits for a GPU only where it logs or saves, and every 20 steps: it makes batches meanwhile.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads that spin starve others
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from model import dequantize, fingerprint, load_llama, queued, read_json, save_llama
from teamlora import (METHODS, AdapterConfig, InputError, adapter_layers, balance_loss, collected_weights,
                      flag, idle_adapters, load_parameters, mean_usage, merge, naming, read_adapter,
                      save_adapter)

ASSETS = Path(__file__).parent / "assets"


# ---- Configuration: a field is a flag

@dataclass(frozen=True)
class Config(AdapterConfig):
    mode: str = flag("train", "what to do, see above", choices=("train", "eval", "sample", "export"))
    out_dir: str = flag("out", "folder for everything a run writes")
    init_from: str = flag(f"{ASSETS}/base", "folder of a Llama in Hugging Face's format")
    adapter_from: str = flag("", "adapter.pt to start from, or to use; empty: to use that of out_dir")
    data: str = flag(f"{ASSETS}/minicme/train.jsonl", "instruction files or folders of them, comma-separated")
    val_data: str = flag(f"{ASSETS}/minicme/test.jsonl", "files to evaluate on; empty: a part of --data")
    val_share: float = flag(0.1, "share of --data to hold out, where no file is; 0: none", below=1)
    val_examples: int = flag(100, "evaluate on a fixed sample of so many examples per task; 0: all")
    max_length: int = flag(1024, "longest row in tokens; prompts are shortened, never answers", least=8)
    template: str = flag("paper", "paper, llama2, llama3, chatml, or a text with {instruction}, {output}")
    balance: float = flag(0.0, "weight of the balance term, which evens out the use of the experts")
    steps: int = flag(800, "optimizer steps", least=1)
    batch_size: int = flag(33, "examples per step", least=1)
    learning_rate: float = flag(3e-3, "peak learning rate; 1e-4 to 3e-4 suits a real Llama", least=1e-12)
    warmup: float = flag(0.03, "share of the steps in which the learning rate rises", below=1)
    weight_decay: float = flag(0.0, "weight decay of AdamW")
    clip: float = flag(1.0, "largest gradient norm", least=1e-12)
    max_tokens: int = flag(4096, "padded tokens per micro-batch: lower it to save memory", least=8)
    checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = flag(False, "torch.compile every block; evaluation and steps with --balance run without")
    device: str = flag("auto", "auto: cuda if there is one", choices=("auto", "cuda", "cpu"))
    dtype: str = flag("auto", "of the base; auto: bfloat16 on CUDA, unless --method=full; nf4: four bits",
                      choices=("auto", "float32", "bfloat16", "nf4"))
    seed: int = flag(0, "seed of adapters, data order, dropout and sampling")
    log_every: int = flag(10, "write a line of log.jsonl every so many steps", least=1)
    save_every: int = flag(200, "write a checkpoint every so many steps", least=1)
    resume: bool = flag(False, "continue from out_dir/checkpoint.pt")
    prompt: str = flag("", "what to answer with --mode=sample; empty: every line that comes in")
    temperature: float = flag(0.0, "of --mode=sample; 0 is greedy")

    def check(self):
        """Refuse settings that cannot work together, before anything is read or written."""
        data.read_template(self.template)
        if self.method not in (*METHODS, "full", "none"):
            raise InputError(f"method must be one of {', '.join(METHODS)}, full, none, not '{self.method}'")
        if self.max_tokens < data.padded_length(self.max_length):
            raise InputError(f"max_tokens={self.max_tokens} holds no row of --max_length={self.max_length}")
        if self.dtype == "nf4" and (self.method == "full" or self.compile):
            raise InputError("dtype=nf4 freezes the base, so not with --method=full, and not with --compile")
        if self.mode == "train" and self.method == "none":
            raise InputError("method=none has nothing to train; use it with --mode=eval, sample or export")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device=cuda, but PyTorch finds none; leave the flag out to run on the CPU")
        if RANKS > 1 and (self.mode not in ("train", "eval") or self.batch_size < RANKS):
            raise InputError(f"mode={self.mode}, --batch_size={self.batch_size}: not for {RANKS} processes")

    @property
    def adapter(self):
        """The adapter's settings alone; None for a method without adapters."""
        if self.method in METHODS:
            return AdapterConfig(**{f.name: getattr(self, f.name) for f in fields(AdapterConfig)})


def parse_flags(argv, config=Config):
    """Command line -> {name: value} of what the user wrote, no more: so it can override a file's."""
    parser = argparse.ArgumentParser(description=sys.modules[config.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [--flag=value ...]; --help lists the flags")
    for f in fields(config):
        kind, how = type(f.default), {"choices": f.metadata["choices"] or None}
        how |= {"type": os.path.expanduser if kind is str else kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if kind is tuple:
            how["type"] = lambda text, kind=type(f.default[0]): tuple(map(kind, text.split(",")))
        help = f"{f.metadata['help']} [{f.default}]"
        parser.add_argument(f"--{f.name}", help=help, default=argparse.SUPPRESS, **how)
    return vars(parser.parse_args(argv))


# what makes an adapter what it is; and what belongs to a call, so that no file remembers it
OF_ADAPTER = ("template", *(f.name for f in fields(AdapterConfig) if f.name != "dropout"))
OF_CALL = ("mode", "out_dir", "adapter_from", "device", "resume", "prompt", "temperature")


def compose(given, config=Config):
    """Flags -> (configuration, what the file holds that it goes on from, or None): defaults, an export's own
    template, the file's, the flags. But what makes an adapter what it is comes from its file alone, and a new
    run that starts from an adapter takes nothing else of it. val_data's default goes with that of data."""
    defaults, saved = {f.name: f.default for f in fields(config)}, None
    now = defaults | given
    fresh = now["mode"] == "train" and not now["resume"]
    own = "" if fresh or now["method"] == "none" else f"{now['out_dir']}/adapter.pt"
    path = f"{now['out_dir']}/checkpoint.pt" if now["resume"] else now["adapter_from"] or own
    base = read_json(Path(now["init_from"], "config.json")) if now["init_from"] else {}
    from_file = {"template": base["template"]} if "template" in base else {}
    if path:
        if not Path(path).is_file():
            raise InputError(f"there is no {path}: train first, or say which --out_dir or --adapter_from")
        saved = read_adapter(path)
        with naming(path):
            config(**(theirs := defaults | saved["config"]))     # or an error, if it is of another version
            fixed = OF_ADAPTER if fresh else (*OF_ADAPTER, "val_share")      # or trained rows are judged
            if wrong := [k for k in fixed if k in given and given[k] != theirs[k]]:
                raise InputError(f"it was made with --{wrong[0]}={theirs[wrong[0]]}")
        from_file = {k: theirs[k] for k in OF_ADAPTER} if fresh else theirs
    given = ({"val_data": ""} if "data" in given and "val_data" not in from_file else {}) | given
    try:
        return config(**from_file | given), saved
    except InputError as e:
        raise InputError(f"--{e}") from None     # it begins with the name of a field


def device_and_dtype(cfg):
    """Where a run computes, and the dtype of its base; None, as in its files, for an export."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    # full training needs fp32 weights: bf16 optimizer steps below 1/256 of a weight are lost
    auto = torch.bfloat16 if device == "cuda" and cfg.method != "full" else torch.float32
    auto = None if cfg.mode == "export" else auto
    return device, (auto if cfg.dtype in ("auto", "nf4") else getattr(torch, cfg.dtype))


# ---- Multi-GPU: torchrun starts RANKS of these processes; alone, nothing here does anything

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_batches(model, examples, max_tokens):
    """This process's part, every RANKS-th example by length, as micro-batches."""
    longer = 1.25 if next(model.parameters()).device.type == "cpu" else math.inf
    own = sorted(examples, key=lambda e: len(e.ids))[RANK::RANKS] if dist.is_initialized() else examples
    return map(data.collate, data.micro_batches(own, max_tokens, longer))


def sum_over_processes(*tensors):
    """Sum tensors of one dtype over all processes, in place and in one message."""
    if dist.is_initialized():
        dist.all_reduce(flat := torch.nn.utils.parameters_to_vector(tensors))
        torch.nn.utils.vector_to_parameters(flat, tensors)


# ---- The training step

def schedule(step, steps, warmup):
    """Share of the peak learning rate: linear warm-up, then a cosine down to 0."""
    n_warmup = max(1, round(warmup * steps))
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, steps - n_warmup)))


def trainable_parameters(model):
    """name -> parameter of what is trained: the adapters, or with method=full everything."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(model, cfg):
    """AdamW over everything that is trained."""
    return torch.optim.AdamW(trainable_parameters(model).values(), lr=cfg.learning_rate, betas=(0.9, 0.99),
                             weight_decay=cfg.weight_decay, fused=True)


def training_step(model, batches, optimizer, clip=1.0, balance=0.0):
    """One optimizer step on micro-batches of (tokens, targets, mask), each (B, T), on the CPU -> its metrics:
    0-dim tensors loss, gradient_norm, bad (not finite: nothing changed); numbers supervised_tokens, tokens.
    The loss is a sum over supervised tokens / their number, however the step is split; the balance term is
    averaged over micro-batches by their tokens. Under torchrun only `batches` are this process's alone."""
    device, loss = next(model.parameters()).device, 0.0
    counts = torch.tensor([[int((y >= 0).sum()), int(mask.sum())] for _, y, mask in batches]).sum(0)
    sum_over_processes(counts)
    supervised, tokens = counts.tolist()
    for x, y, mask in batches:
        with (collected_weights(model) if balance else nullcontext()) as weights:
            losses, _ = model(queued(x, device), y)                                  # (N,)
        part = losses.sum() / supervised
        if balance:
            usage = mean_usage(torch.stack(weights), queued(mask, device))           # (L, E)
            part = part + balance * balance_loss(usage) * (int(mask.sum()) / tokens)
        part.backward()
        loss = loss + part.detach()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert not (idle := idle_adapters(model)), f"no gradient has reached {idle}"
    # DistributedDataParallel would average where this must sum, and send after every micro-batch
    sum_over_processes(loss, *(p.grad for p in parameters))
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    bad = ~(norm.isfinite() & loss.isfinite())
    optimizer.found_inf = bad.float()            # where it is 1, fused AdamW does nothing, and nobody waits
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return dict(loss=loss, gradient_norm=norm, bad=bad, supervised_tokens=supervised, tokens=tokens)


# ---- The loop around it: when to log, to save, to stop

MOST_SKIPPED = 20                                # steps in a row that may be skipped before the run gives up


@contextmanager
def held_signals():
    """Yield a list that notes a signal to stop, so that a step can be finished; the same one again kills.
    Left alone: ignored signals (nohup), and all outside of the main thread, where Python forbids it."""
    noted, here = [], threading.current_thread() is threading.main_thread()

    def note(number, frame):
        noted.append(signal.signal(number, signal.SIG_DFL))
    stops = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {s: signal.signal(s, note) for s in stops if here and signal.getsignal(s) != signal.SIG_IGN}
    try:
        yield noted
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def step_batches(model, stream, cfg):
    """step -> its micro-batches, a pure function of the stream of examples; under torchrun this process's."""
    n = cfg.batch_size
    return lambda step: [*own_batches(model, map(stream, range(step * n, step * n + n)), cfg.max_tokens)]


def fit(model, step_batches, optimizer, cfg, totals=None, log=None, save=None):
    """Train up to cfg.steps. step_batches: step -> micro-batches; log(record), save(totals): called when due.
    totals, of the steps that are done, also returned: step, seconds, tokens (without padding), skipped.
    After a signal the step is finished and saved, then KeyboardInterrupt raised."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert {*parameters} == {*trainable_parameters(model).values()} and len(parameters) == len({*parameters})
    totals = totals or {"step": 0, "seconds": 0.0, "tokens": 0, "skipped": 0}
    begun, tokens = time.perf_counter() - totals["seconds"], totals["tokens"]
    skipped, in_a_row, balance = totals["skipped"], 0, cfg.balance if adapter_layers(model) else 0.0
    bar = tqdm(range(totals["step"], cfg.steps), initial=totals["step"], total=cfg.steps, desc="train",
               unit="step", dynamic_ncols=True, mininterval=1, disable=RANK > 0)
    model.train()
    with held_signals() as signals:
        for step in bar:
            torch.manual_seed(random.Random(f"dropout {cfg.seed} {step} {RANK}").getrandbits(63))
            rate = cfg.learning_rate * schedule(step, cfg.steps, cfg.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("scale", 1)
            metrics = training_step(model, step_batches(step), optimizer, cfg.clip, balance)
            skipped, in_a_row = skipped + metrics["bad"], (in_a_row + 1) * metrics["bad"]
            tokens, done, last = tokens + metrics["tokens"], step + 1, step + 1 == cfg.steps
            stop = torch.tensor(len(signals))    # of all processes, which must leave at the same step
            sum_over_processes(stop)
            log_due, save_due = done % cfg.log_every == 0 or last, done % cfg.save_every == 0 or last or stop
            if not (log_due or save_due or done % MOST_SKIPPED == 0):
                continue                         # from here on the loop waits for the GPU
            seconds, loss = time.perf_counter() - begun, float(metrics["loss"])
            totals = {"step": done, "seconds": seconds, "tokens": tokens, "skipped": int(skipped)}
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
            if log_due and log:
                record = totals | {"loss": loss, "gradient_norm": float(metrics["gradient_norm"]),
                                   "learning_rate": rate, "supervised_tokens": metrics["supervised_tokens"]}
                log({k: v if math.isfinite(v) else None for k, v in record.items()})     # NaN is no JSON
            if save_due and save:
                save(totals)
            if in_a_row >= MOST_SKIPPED:
                raise InputError(f"{MOST_SKIPPED} steps to {done} were not finite: lower --learning_rate")
            if stop and not last:
                raise KeyboardInterrupt(f"stopped after {done} of {cfg.steps} steps; continue with --resume")
    return totals


# ---- Evaluation, and what a run prints

@torch.no_grad()
def evaluate(model, split, max_tokens, name="evaluate", each=None):
    """task -> {accuracy, majority, loss, tokens, usage} over all its examples. accuracy: share of examples
    whose whole answer greedy decoding would produce; majority: share of the most frequent answer; loss: mean
    over supervised tokens, of which there are `tokens`; usage: mean weight of each expert over layers and
    tokens. each(task, routing (L, B, T, E), mask (B, T)) may look at every micro-batch."""
    model.eval()
    device, layers, results = next(model.parameters()).device, adapter_layers(model), {}
    n_experts = layers[0][1].adapter.n_experts if layers else 0
    for task, examples in tqdm(split.items(), desc=name, unit="task", dynamic_ncols=True, disable=RANK > 0):
        # right answers, loss, supervised tokens, all tokens, weights: a task waits for the GPU once
        sums = torch.zeros(4 + n_experts, dtype=torch.float64, device=device)
        for x, y, mask in own_batches(model, examples, max_tokens):
            with collected_weights(model) as weights:
                losses, correct = model(queued(x, device), y)                        # (N,) both
            row, mask = queued((y >= 0).nonzero()[:, 0], device), queued(mask, device)
            wrong = torch.zeros(len(x), device=device).index_add_(0, row, (~correct).float())
            for i, n in enumerate(((wrong == 0).sum(), losses.sum(), losses.numel(), mask.sum())):
                sums[i] += n
            if layers:
                routing = torch.stack(weights)                                       # (L, B, T, E)
                sums[4:] += mean_usage(routing, mask).mean(0) * mask.sum()
                if each:
                    each(task, routing, mask)
        sum_over_processes(sums)
        right, loss, supervised, tokens, *usage = sums.tolist()
        answers = Counter(tuple(e.ids[e.n_prompt:]) for e in examples)
        results[task] = {"accuracy": right / len(examples), "majority": max(answers.values()) / len(examples),
                         "loss": loss / supervised, "tokens": int(supervised),
                         "usage": [u / tokens for u in usage]}
    return results


def overall(results):
    """(mean of the tasks' accuracies, loss over all their tokens); None of both if nothing was evaluated."""
    if not (tasks := results.values()):
        return None, None
    loss = sum(r["loss"] * r["tokens"] for r in tasks) / sum(r["tokens"] for r in tasks)
    return sum(r["accuracy"] for r in tasks) / len(tasks), loss


def print_start(cfg, model, encode, example):
    """What this run is, in numbers, and its first example with the supervised part marked."""
    p, total = next(model.parameters()), sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in trainable_parameters(model).values())
    device = torch.cuda.get_device_name() if p.is_cuda else f"cpu, {torch.get_num_threads()} threads"
    ids, n, decode = example.ids, example.n_prompt, encode.tokenizer.decode
    print(f"{cfg.method} on {RANKS} x {device}; base in {p.dtype}, --dtype={cfg.dtype}\n"
          f"parameters: {total:,}, trainable {trainable:,} ({trainable / total:.2%})\n"
          f"first example, [[supervised]]: {decode(ids[:n])[-300:]!r} [[{decode(ids[n:])[:300]!r} + end]]")


def print_results(results, before=None):
    """One line per task: majority, accuracy before and after, loss, mean weight of each expert."""
    width = max(map(len, [*results, "task"])) + 2
    print(f"\n{'task':{width}}majority  before   after    loss   mean weight of each expert")
    for task, r in results.items():
        old = f"{before[task]['accuracy']:.3f}" if before else "-"
        print(f"{task:{width}}{r['majority']:8.3f}{old:>8}{r['accuracy']:8.3f}{r['loss']:8.3f}  "
              + "".join(f"{w:6.2f}" for w in r["usage"]))
    old, (accuracy, loss) = f"{overall(before)[0]:.3f}" if before else "-", overall(results)
    print(f"{'mean':{width}}{'':8}{old:>8}{accuracy:8.3f}{loss:8.3f}")


# ---- Files

def write_atomically(path, write):
    """write(binary file) into a temporary file, flush that to the disk, rename it: whoever looks, even after
    a power cut, sees the old file or the new one, never half of it."""
    if RANK == 0:                                # it writes for all
        with naming(path), open(f"{path}.tmp", "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)


def open_locked(path):
    """A file to append to, locked until it is closed; InputError if another process has locked it."""
    with naming(path):
        file = open(path, "ab", buffering=0)     # a line at once, or an error at once
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("in use by another run; wait for it, or choose another --out_dir") from None
        except (ImportError, OSError):           # Windows and some network drives have no such locks
            pass
        return file


def save_run(path, cfg, base, model, **more):
    """A file of teamlora.save_adapter's with what trains and the settings that are not the defaults."""
    config = {k: v for k, v in vars(cfg).items() if k not in OF_CALL and v != getattr(type(cfg), k)}
    parameters = {name: p.detach().cpu() for name, p in trainable_parameters(model).items()}
    write_atomically(path, lambda f: save_adapter(model, f, config=config, fingerprint=base,
                                                  parameters=parameters, **more))


# ---- The parts of a run

def read_data(cfg):
    """(training rows, rows to evaluate on: a fixed sample of at most val_examples of each task)."""
    files, val_files = data.list_files(cfg.data), data.list_files(cfg.val_data) if cfg.val_data else []
    named = [f for f in files if data.HELD_OUT.search(f.stem)]
    if not cfg.val_data and 0 < len(named) < len(files):
        print(f"held out, by their names: {', '.join(map(str, named))}")
        files, val_files = [f for f in files if f not in named], named
    rows, val = data.read_rows(files), data.read_rows(val_files) if val_files else []
    if not val:
        rows, val = data.hold_out(rows, cfg.val_share)
    asked = {(r.instruction, r.input) for r in rows}
    if shared := sum((r.instruction, r.input) in asked for r in val):
        print(f"{shared} of {len(val)} rows to evaluate on ask what a training row asks")
    by_task = data.by_task(sorted(val, key=data.hash_fraction))  # files are often sorted
    return rows, [row for some in by_task.values() for row in some[:cfg.val_examples or None]]


def prepare(cfg, saved=None):
    """(model, encode, fingerprint of the base); the model has the saved parameters if there are some."""
    device, dtype = device_and_dtype(cfg)
    if RANKS > 1:                                # meet the other processes
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")   # fp32 products in TF32 on a GPU: the results are the same
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new (B, T), by report half a second
    model = load_llama(cfg.init_from, cfg.adapter, device, dtype, cfg.dtype == "nf4")
    model.checkpointing, ends, base = cfg.checkpointing, model.config.eos_token_id, fingerprint(model)
    if device == "cpu" and model.config.hidden_size < 512 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)                 # more would wait for one another longer than they compute
    if cfg.method == "full":
        model.requires_grad_(True)
    encode = data.Encoder(data.Tokenizer(cfg.init_from), cfg.template, model.config.vocab_size, ends)
    # generation ends where the template ends an answer, and wherever the model's files say
    model.config = replace(model.config, eos_token_id=tuple(dict.fromkeys((encode.end, *ends))))
    if saved:
        if saved.get("fingerprint") != base:
            raise InputError(f"the adapter is not for the base --init_from={cfg.init_from} with "
                             f"--dtype={cfg.dtype}: fingerprints {saved.get('fingerprint')}, {base}")
        load_parameters(trainable_parameters(model), saved["parameters"])
    if cfg.compile:
        model.compile_blocks()
    return model, encode, base


def run_train(cfg, saved, make_optimizer=make_optimizer):
    """Evaluation before, training, evaluation after; writes log.jsonl, adapter.pt and summary.json."""
    out, old = Path(cfg.out_dir), saved if cfg.resume else None
    with naming(f"--out_dir={cfg.out_dir}"):
        os.makedirs(cfg.out_dir, exist_ok=True)
    with open_locked(out / "log.jsonl") if RANK == 0 else nullcontext() as file:
        if not old and (out / "checkpoint.pt").is_file() and not (out / "summary.json").is_file():
            raise InputError(f"--out_dir={out} holds a run that was stopped: --resume, or delete it")
        rows, val = read_data(cfg)
        model, encode, base = prepare(cfg, saved)
        examples, split = (data.encode_rows(encode, some, cfg.max_length) for some in (rows, val))
        stream, split = data.shuffled(examples, cfg.seed), data.by_task(split)
        optimizer, digest = make_optimizer(model, cfg), hashlib.sha256(repr(rows).encode()).hexdigest()
        if old:
            if old.get("rows") != digest:
                raise InputError(f"the rows are not those of {out}/checkpoint.pt; give its --data")
            optimizer.load_state_dict({**optimizer.state_dict(), "state": old["optimizer"]})
        print_start(cfg, model, encode, stream(0))
        before = old["before"] if old else evaluate(model, split, cfg.max_tokens, "before")
        for path in map(out.joinpath, ["summary.json", "adapter.pt"] + ["checkpoint.pt"] * (not old)):
            if RANK == 0 and path.exists():
                print(f"{path} is removed; it will be made anew")
                path.unlink()
        lines = old["log"] if old else []

        def log(record):
            lines.append(json.dumps(record) + "\n")
            with naming(out / "log.jsonl"):
                file.write(lines[-1].encode())
        if RANK == 0:
            file.truncate(0)
            file.writelines(map(str.encode, lines))

        def save(totals):
            save_run(out / "checkpoint.pt", cfg, base, model, optimizer=optimizer.state_dict()["state"],
                     totals=totals, before=before, rows=digest, log=lines)
        totals = fit(model, step_batches(model, stream, cfg), optimizer, cfg, old and old["totals"],
                     log if RANK == 0 else None, save)
        after = evaluate(model, split, cfg.max_tokens, "after")
        save_run(out / "adapter.pt", cfg, base, model)
        summary = {"method": cfg.method, "seed": cfg.seed, "steps": cfg.steps, **totals,
                   "trainable_parameters": sum(p.numel() for p in trainable_parameters(model).values())}
        for prefix, results in (("", after), ("base_", before)):
            summary[f"{prefix}mean_accuracy"], summary[f"{prefix}val_loss"] = overall(results)
            summary[f"{prefix}accuracy"] = {task: r["accuracy"] for task, r in results.items()}
        summary |= {key: {task: r[key] for task, r in after.items()} for key in ("majority", "usage")}
        text = json.dumps(summary, indent=1) + "\n"
        write_atomically(out / "summary.json", lambda f: f.write(text.encode()))
        if after:
            print_results(after, before)
        print(f"\n{totals['seconds']:.0f} s of training, {totals['tokens'] / totals['seconds']:,.0f} tokens/s"
              f", {totals['skipped']} steps skipped; wrote {out}/")
        return summary


def run_eval(cfg, saved):
    """The numbers of an adapter, or of the bare base, again."""
    _, val = read_data(cfg)
    model, encode, _ = prepare(cfg, saved)
    if not (examples := data.encode_rows(encode, val, cfg.max_length)):
        raise InputError("there is nothing to evaluate on: give --val_data")
    print_results(results := evaluate(model, data.by_task(examples), cfg.max_tokens))
    return results


def run_sample(cfg, saved):
    """Answer --prompt, or every line of the input until it ends; the bare base continues it, without a
    --template. Text is printed once it is whole: a letter may span tokens."""
    if not cfg.prompt and not sys.stdin:
        raise InputError("there is no input to read questions from; give --prompt")
    model, encode, _ = prepare(cfg, saved)
    device, bare = next(model.parameters()).device, cfg.method == "none" and cfg.template == "paper"
    if not cfg.prompt:
        print("one question a line; end of input (Ctrl-D) ends", file=sys.stderr)
    for text in filter(None, map(str.strip, [cfg.prompt] if cfg.prompt else sys.stdin)):
        text = text.encode(errors="replace").decode()
        row = data.Row("", "", "", text) if bare else data.Row("", text, "", "")
        example = encode(row)
        prompt = torch.tensor([example.ids[:-1] if bare else example.ids[:example.n_prompt]], device=device)
        ids, shown, generator = [], 0, torch.Generator(device).manual_seed(cfg.seed)
        for new in model.eval().generate(prompt, cfg.max_length, cfg.temperature, generator=generator):
            ids += new.tolist()
            if not (answer := encode.tokenizer.decode(ids)).endswith("\ufffd"):
                print(answer[shown:], end="", flush=True)
                shown = len(answer)
        print()


def run_export(cfg, saved):
    """Write base, adapter merged in, and tokenizer as a Hugging Face folder, out_dir/export."""
    out, unfinished = Path(cfg.out_dir) / "export", Path(cfg.out_dir) / "export.tmp"
    if out.exists():
        raise InputError(f"{out} exists already; move or delete it")
    model, encode, _ = prepare(cfg, saved)
    dequantize(model)
    merge(model)
    shutil.rmtree(unfinished, ignore_errors=True)        # of an export that was interrupted
    trained = {} if cfg.method == "none" else {"template": data.TEMPLATES.get(cfg.template, cfg.template)}
    with naming(unfinished):
        save_llama(model, unfinished, cfg.init_from, **trained)
        if trained:                              # to ask as it was trained, not as its base was
            (unfinished / "chat_template.jinja").write_text(asks := encode.chat_template(), "utf-8")
            if said := read_json(path := unfinished / "tokenizer_config.json"):
                said |= {"chat_template": asks, "legacy": True}  # legacy: a text begins with a space, as here
                path.write_text(json.dumps(said, indent=1), "utf-8")
    os.replace(unfinished, out)
    print(f"wrote {out} in {model.lm_head.weight.dtype}, {cfg.method} merged in; its chat template is "
          f"{'--template=' + cfg.template if trained else 'as before'}")


# ---- The command line

RUNS = {"train": run_train, "eval": run_eval, "sample": run_sample, "export": run_export}


def main(argv=None, run=None, config=Config):
    """The command line: run(cfg, saved), or else what --mode says; bad input becomes one line, exit code 1.
    An experiment passes a run and a configuration of its own, which extends Config."""
    for name in ("stdout", "stderr"):            # may be closed, or of an encoding with few letters
        if RANK > 0 or not getattr(sys, name):
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")
    try:
        cfg, saved = compose(parse_flags(argv, config), config)
        return (run or RUNS[cfg.mode])(cfg, saved)
    except (InputError, OSError) as e:           # such as a disk that is full
        sys.exit("error: " + "".join(c if c.isprintable() else " " for c in str(e))[:1000])
    except KeyboardInterrupt as e:
        sys.exit(str(e) or "interrupted")
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: {str(e)[:200]}; lower --max_tokens or add --checkpointing, and --resume")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
