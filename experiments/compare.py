"""Methods side by side on equal terms: one frozen base, one size, one order of data, a learning rate each.

    python -m experiments.compare --rank=4 --steps=200                       the methods, five seeds each
    python -m experiments.compare --rank=4 --steps=200 --methods=all --plot  with ablations and other sizes

The idea: every method gets the rank nearest to TeamLoRA's size and, with the first seed, the learning rate of
lowest validation loss. Then all seeds run, and test questions judge them, in pairs of equal seed. A run is
train.py's, in a folder of its own; what is measured on its adapter is a line of out_dir/compare.jsonl.

What may surprise:
- A line's "settings" say which run it is: variant, rate, seed, steps, whatever else shapes it, and hashes of
  base and rows. A run whose line is there is not made again; an interrupted one goes on.
- Where the best learning rate is the smallest or largest tried, the next beyond it is tried too. By how much
  it leads is printed, with the noise of that: validation rows in pairs, not seeds.
- --val_data is the test here: MiniCME's, or yours. The learning rate is chosen on --search_data: MiniCME's
  validation.jsonl, or else a share of the training rows, which are then not trained on.
- Choosing among options and routing to the top experts are measured on the first PROBES test rows of a task.
"""

import hashlib
import importlib.util
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean as mean, stdev

import torch

import data
import train
from experiments.shapley import top
from model import Llama
from teamlora import METHODS, InputError, adapter_parameters, changed_weights, flag, naming, read_adapter

# what shapes no run, or stands in its settings as a hash of the contents
SHAPELESS = (*train.OF_CALL, "init_from", "data", "val_data", "val_share", "max_tokens", "checkpointing",
             "compile", "log_every", "save_every")
PROBES, MOST_ANSWERS = 50, 10    # test rows per task; a task of more answers has no fixed set to choose from


@dataclass(frozen=True)
class CompareConfig(train.Config):
    methods: tuple = flag(("none", "lora", "moelora", "hydralora", "teamlora", "full"),
                          "what to compare; all: with the ablations and other sizes")
    seeds: tuple = flag((0, 1, 2, 3, 4), "seeds; the learning rate is chosen with the first")
    learning_rates: tuple = flag((1e-3, 3e-3, 1e-2), "to choose from by validation loss; where the best is "
                                                     "at the edge, the next beyond it is tried too")
    search_data: str = flag("", "files to choose the rate on; empty: MiniCME's, or --val_share of --data")
    search_steps: int = flag(0, "steps of the runs that choose the learning rate; 0: as many as the others")
    reference: str = flag("lora", "the one of the methods to which differences are taken")
    plot: bool = flag(False, "draw compare.png and experts.png into out_dir, with matplotlib")

    def check(self):
        super().check()
        for name in ("methods", "seeds", "learning_rates"):
            if len({*getattr(self, name)}) < len(getattr(self, name)):
                raise InputError(f"{name} must be distinct, not {','.join(map(str, getattr(self, name)))}")
        possible = variants(self)
        for name in (*(possible if self.methods == ("all",) else self.methods), self.reference):
            if name not in possible:
                raise InputError(f"methods, --reference: '{name}' is none of {', '.join(possible)}")
            run_config(self, possible[name], min(self.learning_rates), min(self.seeds))
        if self.adapter_from:
            raise InputError("adapter_from has no part in a comparison: every run begins anew; leave it out")
        if self.plot and not importlib.util.find_spec("matplotlib"):
            raise InputError("plot needs matplotlib: pip install matplotlib")


# ---- What is compared

def variants(cfg, model_config=None):
    """What can be compared: name -> settings that differ from cfg. Every rank keeps alpha / r, and is the one
    that brings a method closest to TeamLoRA's size on a Llama of model_config (None: is cfg's).

    Competition is two changes, M and the sum of the weights. The cells of that table are moelora (no M, sum
    1: H-LoRA as its code is), moelora_sum_E (no M, sum E: H-LoRA as its equation is), teamlora_sum_1 and
    teamlora. To scale all weights by E is to scale alpha, so these are runs of equal effective scale, too.
    """
    r, E, alpha = cfg.rank, cfg.n_experts, cfg.alpha

    def ranked(method, rank, n_experts):
        return {"method": method, "rank": rank, "n_experts": n_experts, "alpha": alpha / r * rank}

    def size(settings):
        with torch.device("meta"):
            model = Llama(model_config, run_config(cfg, settings, cfg.learning_rate, 0).adapter)
        return sum(p.numel() for p in adapter_parameters(model).values())

    def matched(method, n_experts):
        if not model_config:
            return ranked(method, r, n_experts)
        one, two = (size(ranked(method, rank, n_experts)) for rank in (1, 2))
        rank = 1 + round((size({"method": "teamlora"}) - one) / (two - one))
        return ranked(method, max(1, rank), n_experts)
    # nothing of a run shapes the frozen base
    result = {"none": {"method": "none", "mode": "eval", "steps": 1, "seed": 0, "learning_rate": 1e-3},
              "lora": matched("lora", 1)}
    result |= {method: matched(method, E) for method in METHODS if method != "lora"}
    lora, hydra = result["lora"], result["hydralora"]
    result |= {"full": {"method": "full"}, "moelora_sum_E": {"method": "moelora", "alpha": E * alpha},
               "teamlora_sum_1": {"method": "teamlora", "alpha": alpha / E},
               "hydralora_sum_E": {**hydra, "alpha": E * hydra["alpha"]},
               "teamlora_balanced": {"method": "teamlora", "balance": 0.1},
               "moelora_balanced": {"method": "moelora", "balance": 0.1 * E * E}}  # weights E times smaller
    result |= {f"teamlora_E{e}": ranked("teamlora", E * r // e, e)
               for e in (1, 2, 4, 8) if e != E and E * r % e == 0}
    result |= {"teamlora_router_x10": {"method": "teamlora"}}    # see fast_routers
    result |= {"teamlora_half_rank": ranked("teamlora", r // 2, E)} if r > 1 else {}
    return result | {"teamlora_rank_x8": ranked("teamlora", 8 * r, E),
                     "lora_rank_x8": ranked("lora", 8 * lora["rank"], 1), "lora_rank_1": ranked("lora", 1, 1)}


def run_config(cfg, settings, learning_rate, seed):
    """The configuration of one run; InputError if something that it derives cannot work."""
    values = {f.name: getattr(cfg, f.name) for f in fields(train.Config)}
    return train.Config(**values | {"learning_rate": learning_rate, "seed": seed} | settings)


def fast_routers(model, cfg, make_optimizer=train.make_optimizer):
    """train.make_optimizer, with router and M at ten times the rate of A and B."""
    optimizer, parameters = make_optimizer(model, cfg), adapter_parameters(model)
    fast = [p for name, p in parameters.items() if name.endswith(("router", "interaction"))]
    optimizer.param_groups[0]["params"] = [p for p in parameters.values() if p not in {*fast}]
    optimizer.add_param_group({"params": fast, "scale": 10})
    return optimizer


def split_rows(cfg):
    """(training rows, rows to choose the learning rate on, rows to judge on)."""
    rows, test = train.read_data(cfg)
    files = cfg.search_data
    if not files and cfg.data == train.Config.data:
        files = str(Path(cfg.data).with_name("validation.jsonl"))

    def place(row):                              # a hash of its own: --val_share may have taken a test before
        return data.hash_fraction(row._replace(instruction=f"validation{row.instruction}"))
    chosen_on = data.read_rows(data.list_files(files)) if files else [
        row for row in rows if place(row) < cfg.val_share]
    rows = [row for row in rows if files or place(row) >= cfg.val_share]
    if not (rows and chosen_on and test):
        raise InputError(f"{len(rows)} rows to train on, {len(chosen_on)} to choose the learning rate on, "
                         f"{len(test)} to judge on: change --val_share, or give --search_data, --val_data")
    by_task = data.by_task(sorted(chosen_on, key=data.hash_fraction))
    return rows, [row for some in by_task.values() for row in some[:cfg.val_examples or None]], test


# ---- What the experts do

def distribution(weights):
    """Weights (..., E) as shares of the experts: negative ones count as 0, and the shares sum to 1."""
    p = weights.clamp(min=0)
    return p / p.sum(-1, keepdim=True)


def entropy(p):
    """Entropy of shares (..., E) in bits: log2 E if the experts are used evenly, 0 if one does all."""
    return -torch.special.xlogy(p, p).sum(-1) / math.log(2)


def mutual_information(usage, groups):
    """Bits that the chosen expert tells about the group: usage (N, L, E), groups (N,) -> mean over layers of
    entropy of the mean over groups - mean over groups of their entropy, all groups weighing the same."""
    p = torch.stack([distribution(usage[groups == g]).mean(0) for g in groups.unique()])   # (groups, L, E)
    return (entropy(p.mean(0)) - entropy(p).mean(0)).mean()


class ExpertUse:
    """Takes the experts' weights from evaluate(each=...), for statistics by task."""

    def __init__(self):
        self.weights, self.bits, self.spread = defaultdict(list), defaultdict(list), defaultdict(list)

    def __call__(self, task, routing, mask):
        share = mask / mask.sum(1, keepdim=True)                                     # (B, T)
        self.weights[task].append(torch.einsum("lbte,bt->ble", routing, share).cpu())
        self.bits[task].append((entropy(distribution(routing)).mean(0) * share).sum(1).cpu())
        variation = routing.std(-1, correction=0) / routing.mean(-1)                 # (L, B, T)
        self.spread[task].append(torch.einsum("lbt,bt->bl", variation, share).cpu())

    def statistics(self):
        """What claims about load and specialisation need: see the keys. Tasks and layers weigh the same."""
        tasks = [torch.cat(w) for w in self.weights.values()]                        # (N, L, E) each
        groups = torch.cat([torch.full((len(w),), i) for i, w in enumerate(tasks)])
        shuffled = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]
        usage, means = torch.cat(tasks), torch.stack([w.mean(0) for w in tasks])     # means: (tasks, L, E)
        return {"usage_variation": (means.std(-1, correction=0) / means.mean(-1)).mean().item(),
                "token_variation": mean(torch.cat(s).mean().item() for s in self.spread.values()),
                "weight_entropy": mean(torch.cat(bits).mean().item() for bits in self.bits.values()),
                "task_information": mutual_information(usage, groups).item(),
                "task_information_shuffled": mutual_information(usage, shuffled).item()}


STATISTICS = ("usage_variation", "token_variation", "weight_entropy", "task_information",
              "task_information_shuffled", "top_1_accuracy", "top_2_accuracy", "top_all_accuracy")


# ---- The runs

def with_options(asked, rows):
    """task -> [(row, its options)] of the rows to judge on; options are what the question ends in, "Options:
    this; that", or else the task's answers in all these rows, if they are few; else []."""
    answers = defaultdict(set)
    for row in rows:
        answers[row.task].add(row.output)

    def options(row):
        question, listed = f"{row.instruction} {row.input}".strip(), sorted(answers[row.task])
        if "Options: " in question:
            listed = question.rpartition("Options: ")[2].split("; ")
        return listed if row.output in listed and len(listed) <= MOST_ANSWERS else []
    return {task: [(row, options(row)) for row in some] for task, some in data.by_task(asked).items()}


def majority(asked):
    """Share of a task's rows that one fixed answer, or one place in the options, gets right at best."""
    answers = Counter(row.output for row, _ in asked)
    places = Counter(options.index(row.output) for row, options in asked if options)
    return max(max(count.values(), default=0) for count in (answers, places)) / len(asked)


@torch.no_grad()
def row_losses(model, examples, max_tokens):
    """The loss of each example, a sum over its supervised tokens."""
    model.eval()
    device, losses = next(model.parameters()).device, {}
    for batch in data.micro_batches(examples, max_tokens):
        x, y, _ = data.collate(batch)
        row, loss = (y >= 0).nonzero()[:, 0].to(device), torch.zeros(len(batch), device=device)
        losses |= zip(map(id, batch), loss.index_add_(0, row, model(x.to(device), y)[0]).tolist())
    return [losses[id(e)] for e in examples]


def choice_accuracy(model, encode, asked, cfg):
    """task -> share of its first PROBES rows with options of which the right answer is the likeliest: its
    probability is the product over its tokens and the end of sequence, of whatever length."""
    result = {}
    for task, rows in asked.items():
        few = [([encode(row._replace(output=o)) for o in options], options.index(row.output))
               for row, options in rows if options]
        few = [(e, right) for e, right in few if max(len(o.ids) for o in e) <= cfg.max_length][:PROBES]
        losses = iter(row_losses(model, sum((e for e, _ in few), []), cfg.max_tokens))
        few = [([next(losses) for _ in e], right) for e, right in few]
        result |= {task: mean(loss.index(min(loss)) == right for loss, right in few)} if few else {}
    return result


def judge(cfg, model, encode, rows):
    """What test questions say of a trained model: the other entries of its line."""
    use, test = ExpertUse(), data.by_task(data.encode_rows(encode, rows[2], cfg.max_length))
    routed = cfg.method in METHODS and METHODS[cfg.method].routed and cfg.n_experts > 1
    results = train.evaluate(model, test, cfg.max_tokens, "test", each=use if routed else None)
    line = {"accuracy": {t: r["accuracy"] for t, r in results.items()},
            **dict(zip(("mean_accuracy", "test_loss"), train.overall(results))),
            "loss": {t: r["loss"] for t, r in results.items()},
            "examples": {t: len(e) for t, e in test.items()},
            "choice_accuracy": choice_accuracy(model, encode, with_options(rows[2], sum(rows, [])), cfg),
            "expert_usage": {t: r["usage"] for t, r in results.items()}}
    if routed:
        line |= use.statistics()
        few = {task: examples[:PROBES] for task, examples in test.items()}
        for k, word in ((1, "1"), (2, "2"), (cfg.n_experts, "all")):
            with changed_weights(model, top(k)):
                kept = train.evaluate(model, few, cfg.max_tokens, f"top {word}")
            line[f"top_{word}_accuracy"] = train.overall(kept)[0]
    return line


def lead(best, other):
    """(by how many nats a token the validation loss of one line is below another's; two standard errors of
    that, by their rows in pairs; None if a line does not have them)."""
    pairs, noise = [*zip(best.get("val_losses", ()), other.get("val_losses", ()))], None
    if len(pairs) > 1:
        tokens = sum(best["val_losses"]) / best["val_loss"]
        noise = 2 * stdev(b - a for a, b in pairs) * math.sqrt(len(pairs)) / tokens
    return other["val_loss"] - best["val_loss"], noise


def best_rate(rates, quality):
    """The learning rate of highest quality(rate). A best one at the edge says little about the best there
    is, so the next beyond it joins, up to three times."""
    rates = sorted(rates)
    if len(rates) == 1:
        return rates[0]
    for _ in range(3):
        best = max(rates, key=quality)
        if best not in (rates[0], rates[-1]):
            break
        beyond = best ** 2 / (rates[1] if best == rates[0] else rates[-2])
        rates = sorted({*rates, float(f"{beyond:.1g}")})
    return max(rates, key=quality)


class Runs:
    """The lines of a comparison: those of out_dir/compare.jsonl, and what they lack, made when asked for."""

    def __init__(self, cfg, possible, base, rows):
        self.cfg, self.possible, self.rows, self.done = cfg, possible, rows, {}
        self.seen = {"base": base, "rows": hashlib.sha256(repr(rows).encode()).hexdigest()[:16]}
        self.out, self.path = Path(cfg.out_dir), Path(cfg.out_dir) / "compare.jsonl"
        with naming(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        with naming(self.path):
            for text in self.path.read_text().splitlines() if self.path.is_file() else ():
                line = json.loads(text)
                self.done[json.dumps(line["settings"] | {}, sort_keys=True)] = line

    def settings(self, name, one):
        """Which run this is, whatever its folder: equal settings are equal runs."""
        first = {"variant": name, "learning_rate": one.learning_rate, "seed": one.seed, "steps": one.steps}
        shaping = {f.name: getattr(one, f.name) for f in fields(one) if f.name not in SHAPELESS}
        return first | shaping | self.seen

    def line(self, name, learning_rate, seed, steps, judged=True):
        """The line of a run, made if it is not there; what tests say is added when asked for."""
        one = run_config(self.cfg, {"steps": steps} | self.possible[name], learning_rate, seed)
        settings = self.settings(name, one)
        key = json.dumps(settings, sort_keys=True)
        if key not in self.done or judged and "accuracy" not in self.done[key]:
            folder = "-".join(str(settings[k]) for k in ("variant", "learning_rate", "seed", "steps"))
            folder = self.out / f"{folder}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
            text = json.dumps(self.made(one, settings, folder, judged))
            self.done[key] = json.loads(text)
            with open(self.path, "a") as f:
                f.write(text + "\n")
        return self.done[key]

    def made(self, one, settings, folder, judged):
        """Train in a folder what it lacks, and measure the adapter that is left in it."""
        summary, saved, path = {"seconds": 0.0, "trainable_parameters": 0}, None, self.out / "train.jsonl"
        if one.method != "none":
            text = "".join(json.dumps(row._asdict()) + "\n" for row in self.rows[0])
            train.write_atomically(path, lambda f: f.write(text.encode()))
            one = replace(one, out_dir=str(folder), data=str(path), val_data="", val_share=0.0)
            begun = folder / "checkpoint.pt"
            if not (folder / "summary.json").is_file():
                saved = read_adapter(begun) if begun.is_file() else None
                optimizer = fast_routers if "_router_" in settings["variant"] else train.make_optimizer
                train.run_train(replace(one, resume=begun.is_file()), saved, optimizer)
            summary = json.loads((folder / "summary.json").read_text())
            saved = read_adapter(folder / "adapter.pt")
            begun.unlink(missing_ok=True)
        model, encode, _ = train.prepare(one, saved)
        examples = data.encode_rows(encode, self.rows[1], one.max_length)
        losses = row_losses(model, examples, one.max_tokens)
        line = {"settings": settings, "trainable_parameters": summary["trainable_parameters"],
                "seconds": round(summary["seconds"], 1),
                "val_loss": sum(losses) / sum(len(e.ids) - e.n_prompt for e in examples),
                "val_losses": [round(loss, 4) for loss in losses]}
        return line | (judge(one, model, encode, self.rows) if judged else {})


def choose(runs, name):
    """The learning rate of the lowest validation loss with the first seed; prints by how much it leads."""
    cfg, lines = runs.cfg, {}

    def quality(rate):
        if rate not in lines:
            lines[rate] = runs.line(name, rate, cfg.seeds[0], cfg.search_steps or cfg.steps, judged=False)
        return -lines[rate]["val_loss"] if math.isfinite(lines[rate]["val_loss"]) else -math.inf
    best = best_rate(cfg.learning_rates, quality)
    if len(lines) > 1:
        second = max({*lines} - {best}, key=quality)
        ahead, noise = lead(lines[best], lines[second])
        said = ", noise unknown: a line has no losses by row" if noise is None else (
            f" ± {noise:.4f} (95%, rows in pairs), {'within' if ahead <= noise else 'beyond'} noise")
        print(f"\n{name}: validation loss " + ", ".join(
            f"{lines[rate]['val_loss']:.4f} at {rate:g}" for rate in sorted(lines))
            + f"; {best:g} leads {second:g} by {ahead:.4f}{said}")
    return best


def compare(cfg, saved):
    """Every method and seed at the learning rate that validation chose: name -> lines of the table."""
    rows = split_rows(cfg)
    model, _, base = train.prepare(cfg)
    possible = variants(cfg, model.config)
    del model                                    # every run makes its own
    runs, table = Runs(cfg, possible, base, rows), {}
    try:
        for name in possible if cfg.methods == ("all",) else cfg.methods:
            if name == "none":                   # the frozen base: nothing to choose and nothing random
                table[name] = [runs.line(name, 0.0, 0, 0)]
                continue
            rate = choose(runs, name)
            table[name] = [runs.line(name, rate, seed, cfg.steps) for seed in cfg.seeds]
            print_comparison(table, cfg.reference)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on again") from None
    print_details(table, with_options(rows[2], sum(rows, [])))
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
    return mean(differences), t * stdev(differences) / math.sqrt(n)


def print_comparison(table, reference):
    """A line per method: size, rate, time, test loss, mean accuracy of choosing the likeliest option, mean
    accuracy, its deviation over seeds, difference in pairs of equal seed. Then what the experts do."""
    width = max(map(len, [*table, "method"]))
    print(f"\n{'method':{width}}{'params':>11}{'rate':>9}{'s/step':>8}{'loss':>8}{'option':>8}{'mean':>8}"
          + f"{'sd':>7}" + f"   to {reference} (95%)" * (reference in table))
    for name, lines in table.items():
        rate = f"{lines[0]['settings']['learning_rate']:.0e}" if name != "none" else "-"
        options = [mean(line["choice_accuracy"].values()) for line in lines if line["choice_accuracy"]]
        values = [line["mean_accuracy"] for line in lines]
        cells = f"{mean(line['seconds'] / line['settings']['steps'] for line in lines):8.3f}"
        cells += f"{mean(line['test_loss'] for line in lines):8.3f}"
        cells += f"{mean(options):8.3f}" if options else f"{'-':>8}"
        cells += f"{mean(values):8.3f}" + (f"{stdev(values):7.3f}" if len(values) > 1 else f"{'-':>7}")
        if reference in table and name != reference:
            d, half = interval([v - other["mean_accuracy"] for v, other in zip(values, table[reference])])
            cells += f"   {d:+.3f}" + (f" ±{half:.3f}" if half is not None else "")
        print(f"{name:{width}}{lines[0]['trainable_parameters']:>11,}{rate:>9}{cells}")
    if routed := {name: lines for name, lines in table.items() if STATISTICS[0] in lines[0]}:
        print(f"\n{'':{width}}" + "".join(f"{key:>27}" for key in STATISTICS))
    for name, lines in routed.items():
        print(f"{name:{width}}" + "".join(f"{mean(line[key] for line in lines):27.3f}" for key in STATISTICS))


def print_details(table, asked):
    """Task by task: accuracy with the standard error that test rows have as a sample, beside what is right
    without reading them; accuracy of the likeliest option; loss."""
    def cell(lines, key, task):
        if task not in lines[0][key]:
            return "-"
        p, n = mean(line[key][task] for line in lines), lines[0]["examples"][task]
        return f"{p:.3f}" + (f" ±{math.sqrt(p * (1 - p) / n):.3f}" if key == "accuracy" else "")
    width = max(map(len, [*table, "majority"]))
    rows = {title: {name: [cell(lines, key, task) for task in asked] for name, lines in table.items()}
            for title, key in (("accuracy ± standard error", "accuracy"), ("loss, nats a token", "loss"),
                               (f"accuracy of the likeliest option, first {PROBES} rows", "choice_accuracy"))}
    rows["accuracy ± standard error"]["majority"] = [f"{majority(some):.3f}" for some in asked.values()]
    for title, cells in rows.items():
        print(f"\n{title}")
        for name, line in {"": [task[:13] for task in asked], **cells}.items():
            print(f"{name:{width}}" + "".join(f"{text:>14}" for text in line))


def plot_comparison(table, out):
    """compare.png: mean accuracy by method, with its deviation over seeds; experts.png: mean weight of every
    expert in every task with the first seed, over an even share."""
    from matplotlib.figure import Figure
    bars = {name: [line["mean_accuracy"] for line in table[name]] for name in table if name != "none"}
    figure = Figure(figsize=(1.5 + 0.7 * len(bars), 4), layout="constrained")
    axes, low = figure.subplots(), min(map(min, bars.values()))
    axes.bar(range(len(bars)), [*map(mean, bars.values())], color="0.8", edgecolor="black", capsize=4,
             yerr=[stdev(v) if len(v) > 1 else 0 for v in bars.values()])
    axes.set_ylim(max(0, low - 0.5 * (1 - low)), 1)
    axes.set_xticks(range(len(bars)), bars, rotation=60, ha="right")
    axes.set_ylabel("mean accuracy over tasks (axis cut)")
    figure.savefig(out / "compare.png", dpi=120)

    routed = {name: lines[0]["expert_usage"] for name, lines in table.items() if STATISTICS[0] in lines[0]}
    figure = Figure(figsize=(2 + 2.2 * len(routed), 4), layout="constrained")
    for i, (name, usage) in enumerate(routed.items(), 1):
        axes, share = figure.add_subplot(1, len(routed), i), torch.tensor([*usage.values()])     # (tasks, E)
        image = axes.imshow(share / share.mean(1, keepdim=True), cmap="gray_r", vmin=0, vmax=2, aspect="auto")
        axes.set(title=name, xlabel="expert", xticks=range(share.shape[1]))
        axes.set_yticks(range(len(usage)), usage if i == 1 else [""] * len(usage))
    if routed:
        figure.colorbar(image, label="mean weight over an even share")
        figure.savefig(out / "experts.png", dpi=120)


if __name__ == "__main__":
    train.main(run=compare, config=CompareConfig)
