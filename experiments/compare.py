"""Methods side by side on equal terms: one frozen base, one size, one order of data, a learning rate each.

    python -m experiments.compare --rank=4 --steps=200                       the methods, five seeds each
    python -m experiments.compare --rank=4 --steps=200 --methods=all --plot  with ablations and other sizes

The idea: every method gets the rank that brings it closest to TeamLoRA's size, and the learning rate that is
best on validation questions with the first seed. Then all seeds run, and test questions judge them, seed by
seed beside --reference. A run is a line of out_dir/compare.jsonl.

What may surprise:
- A run that is there already, with the same settings, base and rows, is not made again.
- Where the best learning rate is the smallest or largest tried, the next beyond it is tried too.
- With --data, validation questions are a share of the training rows; what train.py validates on is the test.
"""

import importlib.util
import itertools
import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean as mean

import torch

import data
import train
from experiments.shapley import top
from model import Llama
from teamlora import METHODS, InputError, changed_weights, flag

# what shapes no run: beside settings of the call, paths, in whose place hashes of their contents stand
SHAPELESS = {*train.OF_CALL, *train.FREE_ON_RESUME} - {"steps"}


@dataclass(frozen=True)
class CompareConfig(train.Config):
    methods: tuple = flag(("none", "lora", "moelora", "hydralora", "teamlora", "full"),
                          "what to compare; all: with the ablations and other sizes")
    seeds: tuple = flag((0, 1, 2, 3, 4), "seeds; the learning rate is chosen with the first")
    learning_rates: tuple = flag((1e-3, 3e-3, 1e-2), "to choose from on validation questions; where the "
                                 "best is at the edge, the next beyond it is tried too")
    reference: str = flag("lora", "the one of the methods to which differences are taken")
    plot: bool = flag(False, "draw compare.png and experts.png into out_dir, with matplotlib")

    def check(self):
        super().check()
        for name in ("methods", "seeds", "learning_rates"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise InputError(f"--{name} must be distinct, not {','.join(map(str, values))}")
        possible = variants(self)
        for name in (*(possible if self.methods == ("all",) else self.methods), self.reference):
            if name not in possible:
                raise InputError(f"--methods, --reference: '{name}' is none of {', '.join(possible)}")
            for rate, seed in itertools.product(self.learning_rates, self.seeds):
                run_config(self, possible[name], rate, seed)
        if self.plot and not importlib.util.find_spec("matplotlib"):
            raise InputError("--plot needs matplotlib: pip install matplotlib")


# ---- What is compared

def variants(cfg, model_config=None):
    """What can be compared: name -> settings that differ from cfg.

    Every rank keeps alpha / r. Every method gets the rank that brings it closest to TeamLoRA's size on a
    Llama of model_config, for a router takes parameters too; without it that rank is cfg's. Competition is
    two changes, M and the sum of the weights; the cells of that table are moelora (no M, sum 1: H-LoRA as its
    code is), moelora_sum_E (no M, sum E: H-LoRA as its equation is), teamlora_sum_1 and teamlora. To scale
    all weights by E is to scale alpha, so these are the runs of equal effective scale as well.
    """
    r, E, alpha = cfg.rank, cfg.n_experts, cfg.alpha

    def ranked(method, rank, n_experts):
        return {"method": method, "rank": rank, "n_experts": n_experts, "alpha": alpha / r * rank}

    def size(settings):
        with torch.device("meta"):
            return n_trained(Llama(model_config, replace(cfg.adapter, **settings)))

    def matched(method, n_experts):
        if not model_config:
            return ranked(method, r, n_experts)
        one, two = (size(ranked(method, rank, n_experts)) for rank in (1, 2))
        rank = 1 + round((size({"method": "teamlora"}) - one) / (two - one))
        return ranked(method, max(1, rank), n_experts)
    result = {"none": {"method": "none"}, "lora": matched("lora", 1)}
    result |= {method: matched(method, E) for method in METHODS if method != "lora"}
    lora, hydra = result["lora"], result["hydralora"]
    result |= {"full": {"method": "full"}, "moelora_sum_E": {"method": "moelora", "alpha": E * alpha},
               "teamlora_sum_1": {"method": "teamlora", "alpha": alpha / E},
               "hydralora_sum_E": {**hydra, "alpha": E * hydra["alpha"]},
               "teamlora_balanced": {"method": "teamlora", "balance": 0.1},
               "moelora_balanced": {"method": "moelora", "balance": 0.1 * E * E}}  # weights E times smaller
    result |= {f"teamlora_E{e}": ranked("teamlora", E * r // e, e)
               for e in (1, 2, 4, 8) if e != E and E * r % e == 0}
    result |= {"teamlora_half_rank": ranked("teamlora", r // 2, E)} if r > 1 else {}
    return result | {"teamlora_rank_x8": ranked("teamlora", 8 * r, E),
                     "lora_rank_x8": ranked("lora", 8 * lora["rank"], 1), "lora_rank_1": ranked("lora", 1, 1)}


def run_config(cfg, settings, learning_rate, seed):
    """The configuration of one run; InputError if something that it derives cannot work."""
    values = {f.name: getattr(cfg, f.name) for f in fields(train.Config)}
    values |= {"learning_rate": learning_rate, "seed": seed, "stop_at": 0}
    return train.Config(**values | settings)


def n_trained(model):
    return sum(p.numel() for p in train.trained(model).values())


# ---- What the experts do

def distribution(weights):
    """Weights (..., E) as shares of the experts: negative ones count as 0, and the shares sum to 1."""
    p = weights.clamp(min=0)
    return p / p.sum(-1, keepdim=True)


def entropy(p):
    """Entropy of shares (..., E) in bits: log2 E if the experts are used evenly, 0 if one does all."""
    return -torch.special.xlogy(p, p).sum(-1) / math.log(2)


def mutual_information(usage, groups):
    """Bits that the chosen expert tells about the group: usage (N, L, E), groups (N,) -> mean over layers.

    I = entropy of the mean over groups - mean over groups of their entropy, all groups weighing the same.
    """
    p = torch.stack([distribution(usage[groups == g]).mean(0) for g in groups.unique()])   # (groups, L, E)
    return (entropy(p.mean(0)) - entropy(p).mean(0)).mean()


class ExpertUse:
    """Takes the experts' weights from evaluate(each=...), for statistics by task."""

    def __init__(self):
        self.weights, self.bits = defaultdict(list), defaultdict(list)

    def __call__(self, task, routing, mask):
        share = mask / mask.sum(1, keepdim=True)                                     # (B, T)
        self.weights[task].append(torch.einsum("lbte,bt->ble", routing, share).cpu())
        self.bits[task].append((entropy(distribution(routing)).mean(0) * share).sum(1).cpu())

    def statistics(self):
        """What claims about load and specialisation need: see the keys. Tasks and layers weigh the same."""
        tasks = [torch.cat(w) for w in self.weights.values()]                        # (N, L, E) each
        groups = torch.cat([torch.full((len(w),), i) for i, w in enumerate(tasks)])
        shuffled = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]
        usage, means = torch.cat(tasks), torch.stack([w.mean(0) for w in tasks])     # means: (tasks, L, E)
        return {"usage_variation": (means.std(-1, correction=0) / means.mean(-1)).mean().item(),
                "weight_entropy": mean(torch.cat(bits).mean().item() for bits in self.bits.values()),
                "task_information": mutual_information(usage, groups).item(),
                "task_information_shuffled": mutual_information(usage, shuffled).item()}


STATISTICS = ("usage_variation", "weight_entropy", "task_information", "task_information_shuffled",
              "top_1_accuracy", "top_2_accuracy")


# ---- The runs

def train_variant(cfg, name, rows):
    """One run of a comparison: trains, evaluates on validation and on test questions, returns its row."""
    model, tokenizer, _ = train.prepare(cfg)
    stream, validation, _ = train.encode_data(cfg, tokenizer, rows and rows[:2], "validation")
    test, use = train.encode_held_out(cfg, tokenizer, rows and rows[2], "test"), ExpertUse()
    torch.manual_seed(cfg.seed)
    totals = {"seconds": 0.0} if cfg.method == "none" else train.fit(
        model, train.step_batches(cfg, model, stream), train.make_optimizer(model, cfg), cfg, cfg.steps,
        name=name)
    routed = cfg.method in METHODS and cfg.method != "lora" and cfg.n_experts > 1
    results = train.evaluate(model, test, cfg.max_tokens, "test", each=use if routed else None)
    chosen_by = train.evaluate(model, validation, cfg.max_tokens, "validation")
    row = {"method": cfg.method, "variant": name, "seed": cfg.seed,
           "learning_rate": 0.0 if cfg.method == "none" else cfg.learning_rate, "steps": cfg.steps,
           "n_experts": cfg.n_experts, "trainable_parameters": n_trained(model),
           "seconds": round(totals["seconds"], 1), "accuracy": {t: r["accuracy"] for t, r in results.items()},
           "mean_accuracy": train.mean_accuracy(results), "val_loss": train.val_loss(chosen_by),
           "val_accuracy": train.mean_accuracy(chosen_by), "test_loss": train.val_loss(results),
           "expert_usage": {t: r["usage"] for t, r in results.items()}}
    if routed:
        row |= use.statistics()
        for k in (1, 2):
            with changed_weights(model, top(k)):
                kept = train.evaluate(model, test, cfg.max_tokens, f"top {k}")
            row[f"top_{k}_accuracy"] = train.mean_accuracy(kept)
    return row


def best_rate(rates, accuracy):
    """The learning rate of highest accuracy(rate). A best one at the edge says little about the best there
    is, so the next beyond it joins, up to three times."""
    rates = sorted(rates)
    for _ in range(3):
        best = max(rates, key=accuracy)
        if len(rates) == 1 or best not in (rates[0], rates[-1]):
            break
        beyond = best ** 2 / (rates[1] if best == rates[0] else rates[-2])
        rates = sorted({*rates, float(f"{beyond:.1g}")})
    return max(rates, key=accuracy)


def compare(cfg, saved):
    """Every method and seed at the learning rate that validation chose; returns name -> rows of the table."""
    path, rows = Path(cfg.out_dir) / "compare.jsonl", train.read_data(cfg)
    if rows:
        rows = (*data.hold_out(rows[0], cfg.val_share, "validation"), rows[1])
    model, _, base = train.prepare(cfg)
    possible = variants(cfg, model.config)
    del model                                    # every run makes its own
    path.parent.mkdir(parents=True, exist_ok=True)
    train.lock(path.parent.resolve())
    done = {}
    for number, row in data.read_objects(path) if path.is_file() else ():
        if not isinstance(row, dict) or not isinstance(row.get("settings"), str):
            raise InputError(f"{path}, line {number}: not a run of a comparison; move the file away")
        done[row["settings"]] = row
    seen = [base, train.digest_of(rows), *(str(len(part)) for part in rows or ())]

    def run(name, learning_rate, seed):
        one = run_config(cfg, possible[name], learning_rate, seed)
        shaping = {k: v for k, v in asdict(one).items() if k not in SHAPELESS}
        settings = data.digest([*seen, json.dumps(shaping, sort_keys=True)])
        if settings not in done:
            done[settings] = train_variant(one, name, rows) | {"settings": settings}
            lines = "".join(json.dumps(row) + "\n" for row in done.values())
            train.write_atomically(path, lambda f: f.write(lines.encode()))
        return done[settings]

    table, first = {}, cfg.seeds[0]
    for name in possible if cfg.methods == ("all",) else cfg.methods:
        if name == "none":                       # the frozen base: nothing to choose and nothing random
            table[name] = [run(name, cfg.learning_rates[0], first)]
            continue
        rate = best_rate(cfg.learning_rates, lambda rate: run(name, rate, first)["val_accuracy"])
        table[name] = [run(name, rate, seed) for seed in cfg.seeds]
        print_comparison(table, cfg.reference)
    if cfg.plot:
        plot_comparison(table, Path(cfg.out_dir))
    return table


# ---- For the eye

def interval(differences):
    """(mean, half width of its 95% interval by Student's t) of paired differences; None with fewer than 2."""
    n = len(differences)
    if n < 2:
        return mean(differences), None
    t = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)[min(n, 10) - 2]
    return mean(differences), t * torch.tensor(differences).std().item() / math.sqrt(n)


def accuracies(rows):
    return torch.tensor([r["mean_accuracy"] for r in rows], dtype=torch.float64)


def print_comparison(table, reference):
    """A line per method: size, rate, time, accuracy by task, mean, deviation over seeds, difference."""
    tasks = list(next(iter(table.values()))[0]["accuracy"])
    width = max(map(len, [*table, "method"]))
    print(f"\n{'method':{width}}{'params':>11}{'rate':>9}{'s/step':>8} "
          + "".join(f"{t[:7]:>8}" for t in tasks) + f"{'mean':>8}{'sd':>7}"
          + f"   to {reference} (95%)" * (reference in table))
    for name, rows in table.items():
        deviation = f"{accuracies(rows).std():7.3f}" if len(rows) > 1 else f"{'-':>7}"
        difference = ""
        if reference in table and name != reference:
            d, half = interval([r["mean_accuracy"] - other["mean_accuracy"]
                                for r, other in zip(rows, table[reference])])
            difference = f"   {d:+.3f}" + (f" ±{half:.3f}" if half is not None else "")
        print(f"{name:{width}}{rows[0]['trainable_parameters']:>11,}{rows[0]['learning_rate']:>9.0e}"
              f"{mean(r['seconds'] / r['steps'] for r in rows):>8.3f} "
              + "".join(f"{mean(r['accuracy'][t] for r in rows):8.3f}" for t in tasks)
              + f"{accuracies(rows).mean():8.3f}{deviation}{difference}")
    # beside the base's 0 all others look alike
    print_bars({name: accuracies(rows) for name, rows in table.items() if name != "none"})
    routed = {name: rows for name, rows in table.items() if STATISTICS[0] in rows[0]}
    if routed:
        print(f"\n{'':{width}}" + "".join(f"{key:>27}" for key in STATISTICS))
    for name, rows in routed.items():
        print(f"{name:{width}}" + "".join(f"{mean(r[key] for r in rows):27.3f}" for key in STATISTICS))


def print_bars(bars, width=60):
    """A bar to the mean of a method's accuracies, up to 1; grey reaches a deviation over seeds either way."""
    low = math.floor(10 * min(v.min().item() for v in bars.values())) / 10
    print(f"\nmean accuracy, from {low:.1f} to 1")
    for name, v in bars.items():
        m, s = v.mean().item(), v.std().item() if len(v) > 1 else 0.0
        places = [low + (i + 0.5) / width * (1 - low) for i in range(width)]
        bar = "".join("█" if x < m - s else "▒" if x < m + s else "·" for x in places)
        print(f"{name:{max(map(len, bars))}} {bar}")


def plot_comparison(table, out):
    """compare.png: mean accuracy, deviation over seeds, by method; experts.png: by E at equal total rank."""
    adapted = {name: accuracies(rows) for name, rows in table.items() if name != "none"}
    by_E = {rows[0]["n_experts"]: adapted[name] for name, rows in table.items()
            if name == "teamlora" or name.startswith("teamlora_E")}
    if adapted:
        plot_bars(out / "compare.png", adapted)
    if len(by_E) > 1:
        plot_bars(out / "experts.png", dict(sorted(by_E.items())), "experts E, equal total rank")


def plot_bars(path, bars, label=""):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(1.5 + 0.7 * len(bars), 4), layout="constrained")
    axes, low = figure.subplots(), min(v.min().item() for v in bars.values())
    axes.bar(range(len(bars)), [v.mean().item() for v in bars.values()], color="0.8", edgecolor="black",
             capsize=4, yerr=[v.std().item() if len(v) > 1 else 0 for v in bars.values()])
    for i, v in enumerate(bars.values()):
        axes.plot([i] * len(v), v, "k.", markersize=4)
    axes.set_ylim(max(0, low - 0.5 * (1 - low)), 1)
    axes.set_xticks(range(len(bars)), bars, rotation=0 if label else 60, ha="center" if label else "right")
    axes.set_xlabel(label)
    axes.set_ylabel("mean accuracy over tasks (axis cut)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    train.main(run=compare, config=CompareConfig)
