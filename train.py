"""The story of one run: configuration, training step, loop, evaluation, checkpoints, command-line modes.

    python train.py                                         adapts the built-in small Llama to 11 tasks
    python train.py --method=lora --steps=500               the same with another method
    python train.py --init_from=FOLDER --data=FILE,FOLDER   a real Llama on your own instructions
    python train.py --mode=eval                             the numbers of out/adapter.pt again
    python train.py --mode=sample --prompt="..."            one answer; without --prompt, one to every line
    python train.py --mode=export                           base and adapter merged, if the method allows it
    torchrun --nproc_per_node=N train.py ...                the same run on N GPUs

The idea: flags become one configuration; a step's examples follow from (seed, step) alone; a step's loss is a
sum over its supervised tokens divided by their number, however the step is cut into micro-batches.

Read it from `training_step` on; `fit` is the loop around it and `run_train` what is around that.

What may surprise:
- No autocast and no GradScaler: the base is bf16 on CUDA, fp32 on the CPU and with --method=full, adapters
  fp32 and cast where used. On CUDA, products in fp32 are computed in TF32.
- The same seed gives the same examples in the same order for every method.
- Greedy exact match needs no generation: if the argmax is right at every answer position, greedy decoding
  is right.
- The loop waits for a GPU only where it logs or saves, so that the next steps' batches are made while it
  computes.
- A step's dropout follows from (seed, step) too, so a checkpoint holds no random state.
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
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partialmethod
from pathlib import Path
from statistics import fmean as mean

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: Ctrl-C while PyTorch loads is no traceback

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from model import dequantise, fingerprint, load_llama, plain, queued, read_pickle, save_llama
from teamlora import (AdapterConfig, InputError, adapter_layers, balance_loss, collected_weights, flag,
                      load_parameters, mean_usage, merge, parameter_state)

BUILT_IN_BASE = Path(__file__).parent / "assets" / "base"


# ---- Configuration: a field is a flag

@dataclass(frozen=True)
class Config(AdapterConfig):
    mode: str = flag("train", "train, eval (the numbers of out_dir/adapter.pt again), sample (answer "
                              "--prompt, or the terminal) or export (write base and adapter as one model to "
                              "out_dir/export)", choices=("train", "eval", "sample", "export"))
    out_dir: str = flag("out", "folder for everything a run writes")
    init_from: str = flag("", "folder of a real Llama, Hugging Face's or Meta's; empty: the built-in base. "
                              "FOLDER,adapter.pt or adapter.pt alone: start from that adapter")
    data: str = flag("", "instruction files (.json, .jsonl) or folders of them, comma-separated; empty: "
                         "MiniCME")
    val_data: str = flag("", "files to evaluate on; empty: hold out a share of --data by content hash")
    val_share: float = flag(0.1, "share of each task's questions held out when --val_data is empty; 0: train "
                                 "on all rows and evaluate nothing", below=1)
    val_examples: int = flag(100, "evaluate on a fixed sample of at most so many examples per task; 0: all "
                                  "(of MiniCME, which has no end, 400)")
    max_length: int = flag(1024, "longest row in tokens; a longer prompt is shortened, never an answer",
                           least=1)
    template: str = flag("paper", "paper, llama2, llama3, chatml, or a text with {instruction}, {input} and "
                                  "perhaps {output} and its end; {eos} is the end of sequence")
    paper: bool = flag(False, "the paper's settings, as far as they are known, wherever no other flag says "
                              "otherwise")
    balance: float = flag(0.0, "weight of the balance term, which evens out the use of the experts")
    steps: int = flag(1200, "optimizer steps", least=1)
    batch_size: int = flag(66, "examples per step", least=1)
    learning_rate: float = flag(3e-3, "peak learning rate; 1e-4 to 3e-4 suits a real Llama", least=1e-12)
    warmup: float = flag(0.03, "share of the steps in which the learning rate rises", below=1)
    weight_decay: float = flag(0.0, "weight decay of AdamW")
    clip: float = flag(1.0, "largest gradient norm", least=1e-12)
    max_tokens: int = flag(4096, "padded tokens per micro-batch: lower it to save memory, the result stays "
                                 "the same", least=1)
    checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, about a "
                                      "third more time")
    compile: bool = flag(False, "torch.compile every block, which takes up to a minute once; steps with "
                                 "--balance run without")
    device: str = flag("auto", "cuda or cpu; auto: cuda if there is one", choices=("auto", "cuda", "cpu"))
    dtype: str = flag("auto", "of the base: float32 or bfloat16; auto: bfloat16 on CUDA, unless "
                              "--method=full, float32 otherwise; nf4: as auto, but the projections in four "
                              "bits", choices=("auto", "float32", "bfloat16", "nf4"))
    seed: int = flag(0, "seed of adapters, data order, dropout and sampling")
    deterministic: bool = flag(False, "on CUDA: only kernels that give the same bits every time, or an "
                                      "error; the CPU's do anyway")
    log_every: int = flag(10, "write a line of log.jsonl every so many steps", least=1)
    save_every: int = flag(200, "write a checkpoint every so many steps; 0: only where the run ends or is "
                               "stopped")
    stop_at: int = flag(0, "end this run after this step with a checkpoint, for --resume; 0: run to the end")
    resume: bool = flag(False, "continue from out_dir/checkpoint.pt; start if there is none")
    prompt: str = flag("", "what to answer with --mode=sample; empty: every line that comes in, each for "
                           "itself")
    max_new_tokens: int = flag(64, "longest answer of --mode=sample", least=1)
    temperature: float = flag(0.0, "of --mode=sample; 0 is greedy")
    top_k: int = flag(0, "of --mode=sample: choose among the k likeliest tokens; 0: all")

    def check(self):
        """Refuse settings that cannot work together, before anything is read or written."""
        super().check()
        needed = data.padded_length(data.Example("", range(self.max_length), 0), 8)
        if self.max_tokens < needed:
            raise InputError(f"--max_tokens={self.max_tokens} cannot hold a row of --max_length="
                             f"{self.max_length}, which padding makes {needed}; lower that too")
        if self.max_tokens < 512 and not self.data:
            raise InputError(f"--max_tokens={self.max_tokens} cannot hold the built-in texts; give at least "
                             "512")
        if not self.out_dir or Path(self.out_dir).is_file():
            raise InputError(f"--out_dir must be a folder, not '{self.out_dir}'")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device=cuda, but PyTorch finds no CUDA device here; leave the flag out to "
                             "run on the CPU")
        if self.dtype == "nf4" and self.method == "full":
            raise InputError("--method=full trains the base, which --dtype=nf4 keeps frozen; leave one of "
                             "the two out")
        if self.dtype == "nf4" and self.compile:
            raise InputError("--compile cannot look into --dtype=nf4; leave one of the two out")
        if self.val_data and not self.data:
            raise InputError("--val_data needs --data")
        data.read_template(self.template)

    @property
    def adapter(self):
        """The adapter's settings alone."""
        return AdapterConfig(**{f.name: getattr(self, f.name) for f in fields(AdapterConfig)})


def device_and_dtype(cfg):
    """Where a run computes, and the dtype of its base."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    # full training needs fp32 weights: bf16 optimizer steps below 1/256 of a weight are lost
    auto = "bfloat16" if device == "cuda" and cfg.method != "full" else "float32"
    return device, getattr(torch, auto if cfg.dtype in ("auto", "nf4") else cfg.dtype)


# ---- Past one GPU: torchrun starts RANKS of these processes; alone, nothing here does anything

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device):
    """Meet the other processes; from here on sums go over all of them."""
    if RANKS > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")


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


# ---- The training step

def schedule(step, steps, warmup):
    """Share of the peak learning rate: linear warm-up, then a cosine down to 0."""
    n_warmup = max(1, round(warmup * steps))
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, steps - n_warmup)))


def trained(model):
    """name -> parameter of what is trained: the adapters, or with method=full everything."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(model, cfg):
    """AdamW over everything that is trained."""
    return torch.optim.AdamW(trained(model).values(), lr=cfg.learning_rate, betas=(0.9, 0.99),
                             weight_decay=cfg.weight_decay, fused=True)


def micro_batches(model, examples, max_tokens):
    """data.cut at the price that starting one micro-batch more has on the model's device, in tokens."""
    if next(model.parameters()).device.type == "cpu":
        return data.cut(examples, max_tokens)
    # the host starts about 250 kernels a layer, 5 us each; meanwhile a GPU could compute, at 2e14 FLOP/s and
    # 4 FLOPs a weight, 300 tokens of Llama-2-7B or 260,000 of the built-in base, whose steps so stay whole
    seconds, N = 250 * model.config.num_hidden_layers * 5e-6, sum(p.numel() for p in model.parameters())
    return data.cut(examples, max_tokens, overhead=round(seconds * 2e14 / (4 * N)))


def to_device(batch, device):
    """A micro-batch where the model is. Targets stay: finding supervised ones on a GPU stalls the loop."""
    x, y, mask = batch
    return queued(x, device), y, queued(mask, device)


def balance_term(model, batches, weight):
    """weight * balance_loss of a whole step, and pull(weights, mask): a micro-batch's share of its gradient.

    The term is no sum over micro-batches, but its gradient is: with the step's mean usage u known from a pass
    without gradient, d term = sum over tokens of <d term / d u, d w> / tokens. That pass is the price.
    """
    usage = n = 0
    with torch.no_grad():
        for x, _, mask in batches:
            with collected_weights(model) as weights:
                model.hidden(x)
            usage = usage + mean_usage(torch.stack(weights), mask) * mask.sum()
            n = n + mask.sum()
    torch.manual_seed(torch.initial_seed())      # fit has just seeded: the second pass drops the same numbers
    sum_over_processes(usage)
    sum_over_processes(n)
    usage = (usage / n).requires_grad_()                                             # (L, E)
    term = weight * balance_loss(usage)
    slope, = torch.autograd.grad(term, usage)

    def pull(weights, mask):
        return (slope * mean_usage(torch.stack(weights), mask)).sum() * mask.sum() / n
    return term.detach(), pull


def training_step(model, batches, optimizer, clip=1.0, balance=0.0):
    """One optimizer step on micro-batches of (tokens, targets, mask), each (B, T); returns its numbers as
    0-dim tensors: loss, norm (of the gradient), supervised and all tokens, bad (not finite: nothing changed).

    The loss is a sum over all supervised tokens / their number, however the step is cut, plus the balance
    term. Under torchrun `batches` are this process's share; loss and gradient are those of all together.
    """
    supervised = queued(sum((y >= 0).sum() for _, y, _ in batches), batches[0][0].device)
    sum_over_processes(supervised)
    term, pull = balance_term(model, batches, balance) if balance else (0.0, None)
    loss = 0.0
    for x, y, mask in batches:
        with collected_weights(model) if balance else nullcontext() as weights:
            losses, _ = model(x, y)                                                  # (N,)
        part = losses.sum() / supervised
        loss = loss + part.detach()
        (part + pull(weights, mask) if balance else part).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # not DistributedDataParallel: it averages over processes where this must sum, and sends after every
    # micro-batch. Here gradients travel once a step.
    sum_over_processes(loss, *(p.grad for p in parameters))
    loss = loss + term                           # every process has all of it
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    bad = ~(norm.isfinite() & loss.isfinite())
    optimizer.found_inf = bad.float()            # where it is 1, fused AdamW does nothing, and nobody waits
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "norm": norm, "supervised": supervised, "bad": bad,
            "tokens": sum(mask.sum() for *_, mask in batches)}


# ---- The loop around it: when to log, to save, to stop

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


class Progress:
    """What a run has done. Counters stay on the device: reading one waits for the GPU."""

    def __init__(self, device, before=None):
        self.before = before or {"step": 0, "seconds": 0.0, "tokens": 0, "skipped": 0}
        self.begun = time.perf_counter() - self.before["seconds"]
        self.tokens, self.skipped, self.in_a_row = torch.zeros(3, dtype=torch.long, device=device)

    def add(self, numbers):
        """Count a step by what training_step returned."""
        self.tokens += numbers["tokens"]
        self.skipped += numbers["bad"]
        self.in_a_row += 1
        self.in_a_row *= numbers["bad"]

    def totals(self, step):
        """step, seconds, tokens (without padding), skipped (steps) since the run first began."""
        n = self.tokens.clone()
        sum_over_processes(n)
        return {"step": step, "seconds": time.perf_counter() - self.begun,
                "tokens": self.before["tokens"] + int(n),
                "skipped": self.before["skipped"] + int(self.skipped)}


def report(bar, log, numbers, totals, rate):
    """Show a step on the progress bar and give log a line of log.jsonl."""
    line = {"step": totals["step"], "loss": float(numbers["loss"]), "learning_rate": rate,
            "gradient_norm": float(numbers["norm"]), "supervised_tokens": int(numbers["supervised"]),
            "tokens_per_second": round(totals["tokens"] / totals["seconds"]), "skipped": totals["skipped"],
            "seconds": round(totals["seconds"], 2)}
    bar.set_postfix_str("loss {loss:.3f}, {tokens_per_second:,} tokens/s".format(**line), refresh=False)
    if log:
        attempt(log, line)


def out_of_memory(error):
    """Whether that is what a RuntimeError means; cuBLAS and cuDNN have words of their own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


@contextmanager
def rescued(model, optimizer, save, progress, step):
    """If a step runs out of memory, nothing has changed since the one before it: save that first."""
    try:
        yield
    except RuntimeError as e:
        model.zero_grad(set_to_none=True)
        if out_of_memory(e) and save and RANKS == 1 and attempt(save, optimizer, progress.totals(step)):
            tqdm.write(f"out of memory; saved after step {step}")
        raise


def fit(model, step_batches, optimizer, cfg, steps, *,
        name="train", resumed=None, log=None, save=None, stopped=()):
    """Train for `steps` steps. step_batches: step -> micro-batches; the optimizer holds its peak rates.

    log(record) and save(optimizer, totals) are called when due; resumed is what was saved, of which the
    optimizer has its part. Returns totals.
    Raises KeyboardInterrupt, after saving, at stop_at or once `stopped` (see held_signals) holds a signal.
    """
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(trained(model).values())
    for group in optimizer.param_groups:
        group.setdefault("peak", group["lr"])    # a resumed one has it
    device = next(model.parameters()).device
    balance = cfg.balance if adapter_layers(model) else 0.0
    progress = Progress(device, resumed and resumed["totals"])
    first, end = progress.before["step"], min(steps, cfg.stop_at or steps)
    totals, signalled = progress.before, False
    model.train()
    bar = tqdm(range(first, end), initial=first, total=end, desc=name, unit="step", dynamic_ncols=True,
               mininterval=1)
    for step in bar:
        torch.manual_seed(random.Random(f"dropout {cfg.seed} {step} {RANK}").getrandbits(63))
        share = schedule(step, steps, cfg.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        batches = [to_device(b, device) for b in step_batches(step)]
        with rescued(model, optimizer, save, progress, step):
            numbers = training_step(model, batches, optimizer, cfg.clip, balance)
        progress.add(numbers)
        log_due = (step + 1) % cfg.log_every == 0 or step + 1 == steps
        save_due = step + 1 == end or (cfg.save_every and (step + 1) % cfg.save_every == 0)
        signalled = stopped_anywhere(stopped)    # torchrun kills what has not ended 30 s after a signal
        if not (log_due or save_due or signalled):
            continue
        totals = progress.totals(step + 1)
        if log_due:
            report(bar, log, numbers, totals, optimizer.param_groups[0]["lr"])
        stopping, hopeless = signalled or step + 1 == end < steps, int(progress.in_a_row) >= MOST_SKIPPED
        if save and stopping:
            save(optimizer, totals)              # there is no next time: if it fails, so does the run
        elif save and (hopeless or save_due):
            attempt(save, optimizer, totals)
        if hopeless:
            raise InputError(f"{MOST_SKIPPED} steps in a row up to step {step + 1} were not finite in loss "
                             "or gradient; lower --learning_rate, or look for bad numbers in the base")
        if stopping:
            break
    if totals["step"] < steps or signalled:
        raise KeyboardInterrupt(f"stopped after {totals['step']} of {steps} steps")
    return totals


# ---- Evaluation

@torch.no_grad()
def evaluate(model, split, max_tokens, name="evaluate", each=None):
    """task -> {accuracy, loss, tokens, usage} over all its examples, always the same ones.

    accuracy: share of examples whose whole answer greedy decoding would produce; loss: mean over supervised
    tokens, of which there are `tokens`; usage: mean weight of each expert over layers and tokens, E numbers,
    none where nothing is adapted. each(task, routing (L, B, T, E), mask (B, T)) may look at every
    micro-batch. Under torchrun every process takes its share of each task, and all return the same.
    """
    if not split:
        return {}
    model.eval()
    device, results = next(model.parameters()).device, {}
    adapted = bool(adapter_layers(model))
    shares = {task: own_share(examples) for task, examples in split.items()}
    with tqdm(total=sum(map(len, shares.values())), desc=name, unit="example", dynamic_ncols=True,
              mininterval=1) as bar:
        for task, examples in shares.items():
            # right answers, loss, supervised tokens, all tokens, weights: a task waits for the GPU once
            sums = torch.zeros(4 + model.adapter.n_experts * adapted, dtype=torch.float64, device=device)
            for batch in micro_batches(model, examples, max_tokens):
                x, y, mask = to_device(data.collate(batch), device)
                with collected_weights(model) if adapted else nullcontext() as weights:
                    losses, hits = model(x, y)                                       # (N,) both
                row = queued((y >= 0).nonzero()[:, 0], device)                       # (N,)
                misses = torch.zeros(len(batch), device=device).index_add_(0, row, (~hits).float())
                sums[0] += (misses == 0).sum()
                sums[1] += losses.sum()
                sums[2] += losses.numel()
                if adapted:
                    routing = torch.stack(weights)                                   # (L, B, T, E)
                    sums[3] += mask.sum()
                    sums[4:] += mean_usage(routing, mask).mean(0) * mask.sum()
                    if each:
                        each(task, routing, mask)
                bar.update(len(batch))
            sum_over_processes(sums)
            right, loss, supervised, tokens, *usage = sums.tolist()
            results[task] = {"accuracy": right / len(split[task]), "loss": loss / supervised,
                             "tokens": int(supervised), "usage": [u / tokens for u in usage]}
    return results


def val_loss(results):
    """Loss over all tasks, weighted by tokens; None if nothing was evaluated."""
    n = sum(r["tokens"] for r in results.values())
    return sum(r["loss"] * r["tokens"] for r in results.values()) / n if n else None


def mean_accuracy(results):
    """Mean over tasks; None if nothing was evaluated."""
    return mean(r["accuracy"] for r in results.values()) if results else None


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
    old = f"{mean_accuracy(before):8.3f}" if before else f"{'-':>8}"
    print(f"{'mean':{width}}{'':8}{old}{mean_accuracy(results):8.3f}{val_loss(results):8.3f}")


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
    for batch in micro_batches(model, shown, cfg.max_tokens):
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
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__   # torch.save replaces the disk's error
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(temporary)) from None
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
            return read_saved(p, CHECKPOINT)
        except InputError as e:
            if p == paths[-1]:
                raise
            print(f"warning: {e}; continuing from {paths[-1]}, the checkpoint before it")


# what files must hold, of which type; the key None stands for every key
ADAPTER = {"config": dict, "fingerprint": str, "parameters": dict}
CHECKPOINT = ADAPTER | {
    "optimizer": {"state": {None: dict}, "param_groups": list}, "rows": str, "log_bytes": int,
    "totals": {"step": int, "seconds": float, "tokens": int, "skipped": int},
    "before": {None: {"accuracy": float, "loss": float, "tokens": int}}}


def fits(value, shape):
    """Whether a value is of this type or, for a dict, holds what the dict `shape` says."""
    if isinstance(shape, type):
        return isinstance(value, shape)
    return isinstance(value, dict) and all(
        all(fits(v, wanted) for v in (value.values() if key is None else [value.get(key)]))
        for key, wanted in shape.items())


def read_saved(path, shape=ADAPTER):
    """What an adapter file, or one of another shape, holds. Settings that it lacks are the defaults."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; train first, or point --out_dir to where it lies")
    saved, default = read_pickle(path), {f.name: f.default for f in fields(Config)}
    try:
        config = default | saved["config"] | {"targets": tuple(saved["config"]["targets"])}
        odd = [k for k in config if k not in default or type(config[k]) is not type(default[k])]
        odd += [k for k in shape if not fits(saved.get(k), shape[k])]
        odd += [k for k, t in saved["parameters"].items() if not plain(k, t) or not t.isfinite().all()]
    except (LookupError, TypeError, AttributeError) as e:
        odd = [e]
    if odd:
        raise InputError(f"{path}: not written by this train.py (an earlier one?): {odd[0]} is missing, "
                         "unknown, of another type or not finite")
    return {k: saved[k] for k in shape} | {"config": config}


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

    The lock is the kernel's: a killed run leaves none, just a file. Windows has no such call, so no guard.
    """
    try:
        import fcntl
    except ImportError:
        return None
    held = open(folder / "lock", "a+")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held.seek(0)
        raise InputError(f"{folder} is in use by process {held.read()}; wait for it, or choose another "
                         "--out_dir") from None
    held.truncate(0)
    held.write(str(os.getpid()))
    held.flush()
    return held                                  # kept by the cache, so that it stays open


# ---- The parts of a run

def adapter_content(cfg, base, model):
    """What an adapter file holds; the same bytes wherever and in however many calls it was made."""
    def one(v):                                  # pickle refers back to the same object, not to an equal one
        return sys.intern(v) if isinstance(v, str) else tuple(map(one, v)) if isinstance(v, tuple) else v
    config = {k: one(v) for k, v in asdict(cfg).items() if k not in OF_CALL}
    return {"config": config, "fingerprint": base, "parameters": parameter_state(trained(model))}


def checkpoint_content(cfg, base, model, optimizer, totals):
    """What continuing needs: no random state, for a step's examples and dropout follow from (seed, step)."""
    return adapter_content(cfg, base, model) | {"optimizer": optimizer.state_dict(), "totals": dict(totals)}


def read_data(cfg):
    """(training rows, validation rows) of --data, None for MiniCME; read before anything long or lasting."""
    if not cfg.data:
        return None
    rows, *val = data.read_rows(*filter(None, (cfg.data, cfg.val_data)))
    if not val:
        return (rows, []) if cfg.mode == "train" and not cfg.val_share else data.hold_out(rows, cfg.val_share)
    val, prompts = val[0], {(r.instruction, r.input) for r in rows}
    if shared := sum((r.instruction, r.input) in prompts for r in val):
        print(f"{shared} of {len(val)} validation rows ask what a training row asks; without --val_data they "
              "would stay together")
    return rows, val


def digest_of(rows):
    """Hash of the rows that read_data returned; of MiniCME, of its first ones."""
    rows = rows or [map(data.minicme(0), range(100))]
    return data.digest(str(row) for part in rows for row in part)


def encode_held_out(cfg, tokenizer, rows, name):
    """task -> at most --val_examples Examples, of these rows or, without any, of MiniCME's split `name`."""
    if rows is None:
        return {task: [data.to_example(tokenizer, row) for row in rows]
                for task, rows in data.minicme_held_out(name, cfg.val_examples or 400).items()}
    split = {}
    rows = sorted(rows, key=data.place)          # a sample, for files are often sorted
    for e in data.to_examples(tokenizer, rows, cfg.max_length, name) if rows else ():
        examples = split.setdefault(e.task, [])
        if not cfg.val_examples or len(examples) < cfg.val_examples:
            examples.append(e)
    return split


def encode_data(cfg, tokenizer, rows, held_out="test"):
    """(training stream: i -> Example, held-out split: task -> Examples, chance: task -> share)."""
    if rows is None:
        stream = data.minicme(cfg.seed)
        split = encode_held_out(cfg, tokenizer, None, held_out)
        return lambda i: data.to_example(tokenizer, stream(i)), split, data.CHANCE
    train = data.to_examples(tokenizer, rows[0], cfg.max_length, "training")
    split = encode_held_out(cfg, tokenizer, rows[1], "validation")
    tasks = {r.task for part in rows for r in part}
    for name, left in (("training", {e.task for e in train}), ("validation", split.keys() or tasks)):
        if tasks - left:
            print(f"no {name} row is left of: {', '.join(sorted(tasks - left))}")
    return data.shuffled(train, cfg.seed), split, {}


def peak_memory_mb():
    """Most memory at once, of the GPU or else of this process; None on Windows, which does not tell."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    if sys.platform == "win32":
        return None
    import resource
    per_mb = 2 ** 10 if sys.platform == "linux" else 2 ** 20
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_mb)


def prepare(cfg, saved=None):
    """(model, tokenizer, fingerprint of the base); the model has the saved adapter if there is one."""
    device, dtype = device_and_dtype(cfg)
    folder = cfg.init_from or BUILT_IN_BASE
    join_processes(device)
    torch.manual_seed(cfg.seed)
    model = load_llama(folder, cfg.adapter, device, dtype, cfg.dtype == "nf4")
    tokenizer = data.open_tokenizer(folder, next(iter(model.config.eos_token_id), None))
    tokenizer.limit = model.config.vocab_size
    tokenizer.use(cfg.template)
    if cfg.data and cfg.max_length > (most := model.config.max_position_embeddings):
        print(f"warning: --max_length={cfg.max_length} is beyond the base's max_position_embeddings={most}")
    # generation ends where the template ends an answer, and wherever the model's files say
    ends = dict.fromkeys((tokenizer.end, *model.config.eos_token_id))
    model.config = replace(model.config, eos_token_id=tuple(i for i in ends if i < tokenizer.limit))
    base = fingerprint(model)
    if saved and saved["fingerprint"] != base:
        then = saved["config"]["dtype"]
        raise InputError(f"the adapter was made for another base (fingerprint {saved['fingerprint']}, "
                         f"--dtype={then}) than {folder} ({base}, --dtype={cfg.dtype})")
    if saved:
        load_parameters(trained(model), saved["parameters"])
        if adapter_layers(model) and not any(layer.lora_B.any() for _, layer in adapter_layers(model)):
            print("warning: every B of the adapter is zero, so it changes nothing, although it was trained")
    model.checkpointing = cfg.checkpointing
    if cfg.compile:
        model.compile_blocks()
    return model, tokenizer, base


def step_batches(cfg, model, stream, share=own_share):
    """step -> its micro-batches, a pure function of the stream of examples; under torchrun this process's."""
    n = cfg.batch_size
    return lambda step: [data.collate(b) for b in micro_batches(
        model, share([stream(i) for i in range(step * n, (step + 1) * n)]), cfg.max_tokens)]


def print_start(cfg, model, tokenizer, stream):
    """What this run is, in numbers, and its first example with the supervised part marked."""
    total, trainable = (sum(p.numel() for p in ps) for ps in (model.parameters(), trained(model).values()))
    p = next(model.parameters())
    on_gpu = p.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    device += f", times {RANKS}" if RANKS > 1 else ""
    four_bits = ", its projections in nf4" if cfg.dtype == "nf4" else ""
    padded = real = supervised = n = 0
    for step in range(min(10, cfg.steps)):
        for _, y, m in step_batches(cfg, model, stream, share=list)(step):
            padded, real = padded + m.numel(), real + int(m.sum())
            supervised, n = supervised + int((y >= 0).sum()), n + 1
    steps = min(10, cfg.steps)
    print(f"device: {device}, base in {str(p.dtype)[6:]}{four_bits}; method: {cfg.method}\n"
          f"parameters: {total:,}, trainable {trainable:,} ({trainable / total:.2%})\n"
          f"a step: {cfg.batch_size} examples, {real // steps:,} tokens ({supervised // steps:,} supervised) "
          f"in {n / steps:.1f} micro-batches, {1 - real / padded:.1%} padding")
    e = stream(0)
    prompt, expected = tokenizer.decode(e.ids[:e.n_prompt]), tokenizer.decode(e.ids[e.n_prompt:-1])
    prompt = prompt if len(prompt) < 300 else "..." + prompt[-297:]
    expected = expected if len(expected) < 300 else expected[:297] + "..."
    opening = " ".join(f"{i} ({tokenizer.names.get(i)})" for i in tokenizer.prefix) or "none"
    print(f"ids that open a text: {opening}\n"
          f"first example, supervised part in [[ ]]: {prompt!r} [[{expected!r} + end of sequence]]")


def refuse_to_overwrite(cfg, path):
    """InputError if there is nothing to train, or if path is the checkpoint of a run that has not ended."""
    if cfg.method == "none":
        raise InputError("--method=none has nothing to train; use it with --mode=eval or --mode=sample")
    try:
        saved = None if cfg.resume else read_checkpoint(path)
    except InputError as e:
        raise InputError(f"{e}; delete it, or choose another --out_dir") from None
    if saved and saved["totals"]["step"] < saved["config"]["steps"]:
        raise InputError(f"{path} is at step {saved['totals']['step']} of {saved['config']['steps']} of a "
                         "run that has not ended: continue it with --resume, delete it, or choose another "
                         "--out_dir")


def take_up(cfg, saved, rows_digest, optimizer):
    """Load a checkpoint's optimizer, and say what other --steps mean. InputError if it is of another run."""
    done, planned = saved["totals"]["step"], saved["config"]["steps"]
    if saved["rows"] != rows_digest:
        raise InputError(f"the rows are not those of the checkpoint in {cfg.out_dir}")
    if cfg.steps < done:
        raise InputError(f"--steps={cfg.steps}, but the run in {cfg.out_dir} has done {done} already")
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except (LookupError, TypeError, ValueError) as e:
        raise InputError(f"the checkpoint in {cfg.out_dir} holds another optimizer ({e})") from None
    if cfg.steps != planned:
        now, then = (cfg.learning_rate * schedule(done, n, cfg.warmup) for n in (cfg.steps, planned))
        print(f"--steps={cfg.steps}, {planned} before: the learning rate goes on at {now:.2g}, not at "
              f"{then:.2g}, for its cosine now ends there")


def run_train(cfg, saved):
    """Base, data, evaluation before, training and after; writes log.jsonl, adapter.pt and summary.json."""
    out, path = Path(cfg.out_dir), Path(cfg.out_dir) / "checkpoint.pt"
    refuse_to_overwrite(cfg, path)
    rows = read_data(cfg)
    model, tokenizer, base = prepare(cfg, saved)
    saved = saved if saved and "totals" in saved else None  # an adapter to start from is no run to go on with
    stream, split, chance = encode_data(cfg, tokenizer, rows)
    rows_digest, optimizer = digest_of(rows), make_optimizer(model, cfg)
    if saved:
        take_up(cfg, saved, rows_digest, optimizer)
    out.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        lock(out.resolve())
    print_start(cfg, model, tokenizer, stream)
    before = saved["before"] if saved else evaluate(model, split, cfg.max_tokens, "before")
    if RANK == 0 and not saved:
        for old in (path, previous(path)):
            old.unlink(missing_ok=True)          # of a run that has ended: a later --resume means this one
    log = Log(out / "log.jsonl", saved["log_bytes"] if saved else 0) if RANK == 0 else None

    def save(optimizer, totals):
        log.flush(sync=True)                     # a checkpoint is never ahead of the log
        content = checkpoint_content(cfg, base, model, optimizer, totals) | {
            "before": before, "rows": rows_digest, "log_bytes": log.size}
        write_atomically(path, lambda f: torch.save(content, f), previous(path))

    with held_signals() as stopped:
        totals = fit(model, step_batches(cfg, model, stream), optimizer, cfg, cfg.steps,
                     resumed=saved, log=log, save=save if RANK == 0 else None, stopped=stopped)
    results = evaluate(model, split, cfg.max_tokens, "after")
    write_atomically(out / "adapter.pt", lambda f: torch.save(adapter_content(cfg, base, model), f))
    summary = summarise(cfg, model, totals, before, results, chance)
    write_atomically(out / "summary.json", lambda f: f.write((json.dumps(summary, indent=1) + "\n").encode()))
    scores = ""
    if results:
        print_results(results, chance, before)
        if RANK == 0:
            print_samples(model, tokenizer, split, cfg)
        scores = "mean accuracy {mean_accuracy:.3f}, before {base_mean_accuracy:.3f}; ".format(**summary)
    print(f"\n{scores}{summary['seconds']:.0f} s of training, {summary['tokens_per_second']:,} tokens/s, "
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
            "mean_accuracy": mean_accuracy(results), "base_mean_accuracy": mean_accuracy(before),
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
        if wrong := data.fault("prompt", text) or ("is blank" if cfg.prompt and not text.strip() else ""):
            raise InputError(f"the prompt {wrong}")
        # the bare base continues the text, unless a template of its own is named; an adapter answers it
        bare = cfg.method == "none" and cfg.template == "paper"
        row = data.Row("sample", "", "", text) if bare else data.Row("sample", text, "", "")
        ids = data.to_example(tokenizer, row).ids[:-1]
        if text.strip():
            if not 0 < len(ids) <= cfg.max_length:
                raise InputError(f"the prompt has {len(ids)} tokens; give 1 to {cfg.max_length}, or raise "
                                 "--max_length")
            answers(model, tokenizer, [ids], cfg, cfg.max_new_tokens,
                    printer(tokenizer, model.config.eos_token_id))
            print()


def run_export(cfg, saved):
    """Write base, adapter merged in, and tokenizer as a Hugging Face folder, out_dir/export."""
    out = Path(cfg.out_dir) / "export"
    if out.exists():
        raise InputError(f"{out} exists already; move or delete it")
    model, tokenizer, _ = prepare(cfg, saved)
    if n := dequantise(model):
        print(f"{n} projections are written as the matrices that their four bits stand for")
    merge(model)
    save_llama(model, unfinished := Path(f"{out}.tmp"))
    for pattern in ("*token*.*", "chat_template*"):  # tokenizer.json, special_tokens_map.json, ...
        for file in filter(Path.is_file, tokenizer.path.parent.glob(pattern)):
            shutil.copy(file, unfinished)
    if settings := data.read_object(tokenizer.path.with_name(name := "generation_config.json")):
        settings["eos_token_id"] = list(model.config.eos_token_id)   # the template's end among them
        (unfinished / name).write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(unfinished, out)
    n = sum(p.numel() for p in model.base_parameters().values())
    print(f"wrote {out}: {n:,} parameters, method {cfg.method} merged in")


# ---- The command line

# what --paper means: the paper's own where it gives them (E, r, targets, no balance term), else those of the
# code that it was forked from; the weights' sum E and M are the layer itself
PAPER = {"method": "teamlora", "n_experts": 4, "rank": 32, "alpha": 32.0, "dropout": 0.05, "balance": 0.0,
         "targets": ("gate_proj", "up_proj", "down_proj"), "learning_rate": 2e-4, "warmup": 0.03,
         "weight_decay": 0.0, "max_length": 1024}
# what no file remembers, what an adapter fixes for later use, and what may change when a run is resumed
OF_CALL = ("mode", "resume", "stop_at", "prompt", "out_dir", "device")
OF_ADAPTER = (*(f.name for f in fields(AdapterConfig)), "template")
PATHS = ("out_dir", "init_from", "data", "val_data")  # a resumed run's files may move: it compares contents
FREE_ON_RESUME = ("resume", "stop_at", "log_every", "save_every", "max_tokens", "checkpointing",
                  "compile", "device", "steps", *PATHS)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def parse_flags(argv, config=Config, skip=()):
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

    about = sys.modules[config.__module__].__doc__.split("\n\n")
    parser = Parser(description="\n\n".join(about[:2]), allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(config):
        kind = type(f.default)
        if f.name in skip:
            continue
        shown = ",".join(map(str, f.default)) if kind is tuple else f.default
        options = {"nargs": "?", "const": True, "type": boolean} if kind is bool else {
            "type": listed(type(f.default[0])) if kind is tuple else kind}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar=kind.__name__.upper(),
                            help=f"{f.metadata['help'].replace('%', '%%')} [{shown}]", **options)
    return vars(parser.parse_args(argv))


def compose(given, config=Config):
    """Flags -> (configuration, what the file holds that it goes on from, in out_dir or --init_from, or None).

    Defaults, then what the file says, then the flags; InputError if a flag contradicts the file.
    """
    given = (PAPER if given.get("paper") else {}) | given | {
        k: ",".join(map(os.path.expanduser, given[k].split(","))) for k in PATHS if k in given}
    mode, out = given.get("mode", config.mode), Path(given.get("out_dir", config.out_dir))
    path, saved, adapter = out / "checkpoint.pt", None, ""
    if config is Config and given.get("init_from", "").endswith(".pt"):
        given["init_from"], _, adapter = given["init_from"].rpartition(",")
    if mode == "train" and given.get("resume"):
        if out.is_dir() and RANK == 0:
            lock(out.resolve())  # before a checkpoint is read that another run may be about to replace
        if not (saved := read_checkpoint(path)):
            print(f"nothing to resume in {out} yet: starting")
    resumed = bool(saved)
    if not saved and (adapter if mode == "train" else given.get("method") != "none"):
        path = Path(adapter or out / "adapter.pt")
        saved = read_saved(path)
    if not saved:
        return config(**given), None
    for name, value in given.items():            # val_share, or else trained rows would be evaluated
        fixed = name not in FREE_ON_RESUME if resumed else (
            name in OF_ADAPTER or name == "val_share" and mode == "eval")
        if fixed and saved["config"].get(name, value) != value:
            raise InputError(f"--{name}={value} contradicts {path}, which was made with "
                             f"{saved['config'][name]}")
    if mode != "train":                          # an adapter may be a stranger's: no path in it is followed
        for name in ("init_from", "data", "val_data")[:3 if mode == "eval" else 1]:
            if name not in given and saved["config"][name]:
                raise InputError(f"{path} was made with --{name}={saved['config'][name]}; say --{name} here "
                                 "too, for no path in a file is followed")
    kept = OF_ADAPTER if mode == "train" and not resumed else saved["config"].keys() - OF_CALL
    return config(**{k: saved["config"][k] for k in kept} | given), saved


MODES = {"train": run_train, "eval": run_eval, "sample": run_sample, "export": run_export}


def start_torch(cfg):
    """PyTorch's own settings, for all of a run."""
    # fp32 products in TF32 on a GPU: --method=full came out the same with its 10 bits in every product
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention makes a plan for every new (B, T), half a second each by report, and ours vary
    torch.backends.cuda.enable_cudnn_sdp(False)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.deterministic)


def main(argv=None, run=None, config=Config):
    """The command line: run(cfg, saved), or else what --mode says; an error becomes one line and exit code 1.

    An experiment passes a run and a configuration of its own, which extends Config.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGTERM outside of training, too, like Ctrl-C
        signal.signal(number, signal.default_int_handler)
    given = {}
    try:
        if RANK > 0:                             # process 0 speaks for all
            sys.stdout = open(os.devnull, "w")
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
        given = parse_flags(argv, config, skip=("mode", "resume", "stop_at") if run else ())
        cfg, saved = compose(given, config)
        if RANKS > 1 and (run or cfg.mode not in ("train", "eval") or cfg.batch_size < RANKS):
            raise InputError(f"{RANKS} processes are for --mode=train and eval, with an example in every "
                             "step for each; start anything else with python, not torchrun")
        start_torch(cfg)
        return (run or MODES[cfg.mode])(cfg, saved)
    except (InputError, OSError, UnicodeDecodeError) as e:
        # names from files may hold line ends and terminal codes
        sys.exit("error: " + "".join(c if c.isprintable() else " " for c in str(e))[:1000])
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        resume = "" if run else " and --resume"
        sys.exit(f"error: out of GPU memory ({str(e).partition('. ')[0]}); lower --max_tokens or add "
                 "--checkpointing; a run that was training continues with the same flags, these changed"
                 f"{resume}")
    except KeyboardInterrupt as e:
        if run or given.get("mode", "train") != "train":
            sys.exit("error: interrupted; the same command begins or goes on again")
        flags = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
                 for k, v in given.items() if k not in ("resume", "stop_at")]
        program = ["torchrun", f"--nproc_per_node={RANKS}"] if RANKS > 1 else ["python"]
        command = shlex.join([*program, "train.py", *flags, "--resume"])
        print(f"{str(e) or 'stopped'}; continue with: {command}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
