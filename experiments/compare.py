"""Methods side by side on equal terms: one frozen base, one size, one order of data, a learning rate each.

    python -m experiments.compare --rank=4 --steps=200                       the methods, five seeds each
    python -m experiments.compare --rank=4 --steps=200 --methods=all --plot  with ablations and other sizes

The idea: every method gets the rank that brings it closest to TeamLoRA's size, and the learning rate that is
best on validation questions with the first seed. Then all seeds run, and test questions judge them, seed by
seed beside --reference. A run is a line of out_dir/compare.jsonl; the folder that bears the name of its
"settings" holds its adapter.pt.

What may surprise:
- A run that is there already, with the same settings, base and rows, is not made again; one that was
  interrupted, while it trained or was judged, goes on from its folder's checkpoint.pt.
- Where the best learning rate is the smallest or largest tried, the next beyond it is tried too.
- With --data, validation questions are a share of the training rows; what train.py validates on is the test.
- Choosing among options and routing to the top experts are measured on the first PROBES test rows of a task.
"""

import importlib.util
import itertools
import json
import math
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean as mean

import torch
from tqdm import tqdm

import data
import train
from experiments.shapley import top
from model import Llama
from teamlora import METHODS, InputError, changed_weights, flag

# what shapes no run: beside settings of the call, paths, in whose place hashes of their contents stand
SHAPELESS = {*train.OF_CALL, *train.FREE_ON_RESUME} - {"steps"}
PROBES, MOST_ANSWERS = 50, 10    # test rows per task; a task of more answers has no fixed set to choose from
ROUTER = ("router", "interaction")


@dataclass(frozen=True)
class CompareConfig(train.Config):
    methods: tuple = flag(("none", "lora", "moelora", "hydralora", "teamlora", "full"),
                          "what to compare; all: with the ablations and other sizes")
    seeds: tuple = flag((0, 1, 2, 3, 4), "seeds; the learning rate is chosen with the first")
    learning_rates: tuple = flag((1e-3, 3e-3, 1e-2), "to choose from on validation questions; where the "
                                 "best is at the edge, the next beyond it is tried too")
    search_steps: int = flag(0, "steps of the runs that choose the learning rate, with their own cosine; 0: "
                                "they are runs like the others")
    reference: str = flag("lora", "the one of the methods to which differences are taken")
    plot: bool = flag(False, "draw compare.png and experts.png into out_dir, with matplotlib")

    def check(self):
        super().check()
        for name in ("methods", "seeds", "learning_rates"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise InputError(f"--{name} must be distinct, not {','.join(map(str, values))}")
        possible = variants(self)
        if self.dtype == "nf4" and {"full", "all"} & {*self.methods}:
            raise InputError("--methods with full, which trains the base, and --dtype=nf4, which keeps it "
                             "frozen; name other --methods")
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
    result |= {"teamlora_router_x10": {"method": "teamlora"}}    # see make_optimizer
    result |= {"teamlora_half_rank": ranked("teamlora", r // 2, E)} if r > 1 else {}
    return result | {"teamlora_rank_x8": ranked("teamlora", 8 * r, E),
                     "lora_rank_x8": ranked("lora", 8 * lora["rank"], 1), "lora_rank_1": ranked("lora", 1, 1)}


def run_config(cfg, settings, learning_rate, seed):
    """The configuration of one run; InputError if something that it derives cannot work."""
    values = {f.name: getattr(cfg, f.name) for f in fields(train.Config)}
    values |= {"learning_rate": learning_rate, "seed": seed, "stop_at": 0}
    return train.Config(**values | settings)


def make_optimizer(model, cfg, name):
    """train.make_optimizer; *_router_x10 trains router and M at ten times the rate of A and B."""
    optimizer = train.make_optimizer(model, cfg)
    if name.endswith("_router_x10"):
        routers = [p for key, p in train.trained(model).items() if key.endswith(ROUTER)]
        group, chosen = optimizer.param_groups[0], set(map(id, routers))
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        optimizer.add_param_group({"params": routers, "lr": 10 * cfg.learning_rate})
    return optimizer


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
        spread = torch.stack([torch.cat(s).mean(0) for s in self.spread.values()])   # (tasks, L)
        return {"usage_variation": (means.std(-1, correction=0) / means.mean(-1)).mean().item(),
                "token_variation": spread.mean().item(),
                "token_variation_by_task": dict(zip(self.spread, spread.mean(1).tolist())),
                "token_variation_by_layer": spread.mean(0).tolist(),
                "weight_entropy": mean(torch.cat(bits).mean().item() for bits in self.bits.values()),
                "task_information": mutual_information(usage, groups).item(),
                "task_information_shuffled": mutual_information(usage, shuffled).item()}


STATISTICS = ("usage_variation", "token_variation", "weight_entropy", "task_information",
              "task_information_shuffled", "top_1_accuracy", "top_2_accuracy", "top_all_accuracy")


# ---- The runs

@cache
def minicme_test():
    """task -> MiniCME's test rows, more than most comparisons ask."""
    return data.minicme_held_out("test", 400)


def with_options(cfg, rows):
    """task -> [(row, its options)] of the test rows that train.encode_held_out takes. Options are what the
    question ends in, "Options: this; that", or else the task's answers, if they are few; else []."""
    split = defaultdict(list) if rows else minicme_test()
    for row in sorted(rows[2], key=data.place) if rows else ():
        split[row.task].append(row)
    answers = defaultdict(set)
    for row in itertools.chain(*split.values(), *(rows or ())):
        answers[row.task].add(row.output)

    def options(row):
        question, listed = f"{row.instruction} {row.input}".strip(), sorted(answers[row.task])
        if "Options: " in question:
            listed = question.rpartition("Options: ")[2].split("; ")
        return listed if row.output in listed and len(listed) <= MOST_ANSWERS else []
    return {task: [(row, options(row)) for row in rows[:cfg.val_examples or None]]
            for task, rows in split.items()}


def majority(asked):
    """Share of a task's rows that one fixed answer, or one place in the options, gets right at best."""
    answers = Counter(row.output for row, _ in asked)
    places = Counter(options.index(row.output) for row, options in asked if options)
    return max(max(count.values(), default=0) for count in (answers, places)) / len(asked)


@torch.no_grad()
def choice_accuracy(model, tokenizer, asked, cfg):
    """task -> share of its first PROBES rows with options of which the right answer is the likeliest: its
    probability is the product over its tokens and the end of sequence, of whatever length."""
    model.eval()
    device, result = next(model.parameters()).device, {}
    for task, rows in asked.items():
        few = []
        for row, options in rows:
            examples = [data.to_example(tokenizer, row._replace(output=o)) for o in options]
            if examples and max(len(e.ids) for e in examples) <= cfg.max_length:
                few.append((examples, examples[options.index(row.output)]))
        few, losses = few[:PROBES], {}
        for batch in train.micro_batches(model, [e for examples, _ in few for e in examples], cfg.max_tokens):
            x, y, _ = train.to_device(data.collate(batch), device)
            row = (y >= 0).nonzero()[:, 0].to(device)                                # (N,)
            loss = torch.zeros(len(batch), device=device).index_add_(0, row, model(x, y)[0])
            losses |= zip(map(id, batch), loss.tolist())
        chosen = [min(examples, key=lambda e: losses[id(e)]) is right for examples, right in few]
        result |= {task: mean(chosen)} if few else {}
    return result


def fit(cfg, name, prepared, stream, saved, folder, log):
    """Train one variant, from what its folder's checkpoint holds if it was interrupted; returns totals."""
    model, _, base = prepared
    folder.mkdir(exist_ok=True)
    optimizer = make_optimizer(model, cfg, name)
    if saved:
        train.take_up(cfg, saved, folder.name, optimizer)

    def save(optimizer, totals):
        content = train.checkpoint_content(cfg, base, model, optimizer, totals) | {
            "before": {}, "rows": folder.name, "log_bytes": 0}
        train.write_atomically(folder / "checkpoint.pt", lambda f: torch.save(content, f))
    with train.held_signals() as stopped:
        return train.fit(model, train.step_batches(cfg, model, stream), optimizer, cfg, cfg.steps,
                         name=name, resumed=saved, log=log, save=save, stopped=stopped)


def train_variant(cfg, name, rows, folder, searching, log):
    """One run of a comparison -> its row: trains, leaves its adapter in the folder, and is evaluated on
    validation questions; unless it is one of a search, test questions judge it, too."""
    saved = train.read_checkpoint(folder / "checkpoint.pt")
    model, tokenizer, base = prepared = train.prepare(cfg, saved)
    stream, validation, _ = train.encode_data(cfg, tokenizer, rows and rows[:2], "validation")
    totals = {"seconds": 0.0} if cfg.method == "none" else fit(
        cfg, name, prepared, stream, saved, folder, log)
    if cfg.method in METHODS:
        train.write_atomically(folder / "adapter.pt",
                               lambda f: torch.save(train.adapter_content(cfg, base, model), f))
    chosen_by = train.evaluate(model, validation, cfg.max_tokens, "validation")
    row = {"method": cfg.method, "variant": name, "seed": cfg.seed,
           "learning_rate": 0.0 if cfg.method == "none" else cfg.learning_rate, "steps": cfg.steps,
           "n_experts": cfg.n_experts, "trainable_parameters": n_trained(model),
           "seconds": round(totals["seconds"], 1), "val_loss": train.val_loss(chosen_by),
           "val_accuracy": train.mean_accuracy(chosen_by)}
    return row if searching else row | judge(cfg, model, tokenizer, rows)


def judge(cfg, model, tokenizer, rows):
    """What test questions say of a trained model: the other entries of its row."""
    use = ExpertUse()
    test = train.encode_held_out(cfg, tokenizer, rows and rows[2], "test")
    routed = cfg.method in METHODS and cfg.method != "lora" and cfg.n_experts > 1
    results = train.evaluate(model, test, cfg.max_tokens, "test", each=use if routed else None)
    row = {"accuracy": {t: r["accuracy"] for t, r in results.items()},
           "mean_accuracy": train.mean_accuracy(results), "test_loss": train.val_loss(results),
           "loss": {t: r["loss"] for t, r in results.items()},
           "examples": {t: len(e) for t, e in test.items()},
           "choice_accuracy": choice_accuracy(model, tokenizer, with_options(cfg, rows), cfg),
           "expert_usage": {t: r["usage"] for t, r in results.items()}}
    if routed:
        row |= use.statistics()
        few = {task: examples[:PROBES] for task, examples in test.items()}
        for k, word in ((1, "1"), (2, "2"), (cfg.n_experts, "all")):
            with changed_weights(model, top(k)):
                kept = train.evaluate(model, few, cfg.max_tokens, f"top {word}")
            row[f"top_{word}_accuracy"] = train.mean_accuracy(kept)
    return row


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
    """The runs of a comparison: those of out_dir/compare.jsonl, and what they lack, made when asked for.

    Says what that takes: steps before they start; tokens and time when ten steps are made.
    """

    def __init__(self, cfg, possible, base, rows):
        self.cfg, self.possible, self.rows, self.done, self.left = cfg, possible, rows, {}, 0
        self.seen = [base, train.digest_of(rows), *(str(len(part)) for part in rows or ())]
        self.path = Path(cfg.out_dir) / "compare.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        train.lock(self.path.parent.resolve())
        for number, row in data.read_objects(self.path) if self.path.is_file() else ():
            if not isinstance(row, dict) or not isinstance(row.get("settings"), str):
                raise InputError(f"{self.path}, line {number}: not a run of a comparison; move the file away")
            self.done[row["settings"]] = row

    def settings(self, name, learning_rate, seed, searching):
        """(the configuration of a run, its hash)."""
        one = run_config(self.cfg, self.possible[name], learning_rate, seed)
        one = replace(one, steps=self.cfg.search_steps) if searching else one
        shaping = {k: v for k, v in asdict(one).items() if k not in SHAPELESS} | {"searching": searching}
        shaping |= {"variant": name} if name.endswith("_router_x10") else {}     # no setting says so
        return one, data.digest([*self.seen, json.dumps(shaping, sort_keys=True)])

    def row(self, name, learning_rate, seed, searching=False):
        """The row of a run."""
        one, settings = self.settings(name, learning_rate, seed, searching)
        if settings not in self.done:
            folder = self.path.parent / settings
            row = train_variant(one, name, self.rows, folder, searching, self.log)
            self.done[settings] = row | {"settings": settings}
            lines = "".join(json.dumps(row) + "\n" for row in self.done.values())
            train.write_atomically(self.path, lambda f: f.write(lines.encode()))
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        return self.done[settings]

    def announce(self, names):
        """Print how many steps these methods take, and how many of them are there."""
        cfg, rates = self.cfg, self.cfg.learning_rates
        search = cfg.search_steps > 0
        tried = [(rate, cfg.seeds[0], search) for rate in rates if len(rates) > 1]
        judged = [(rate, seed, False) for rate in rates for seed in cfg.seeds]   # of one of the rates
        n = len(cfg.seeds) + len(tried) - (not search and len(tried) > 0)
        steps = len(names) * (n * cfg.steps + search * len(tried) * (cfg.search_steps - cfg.steps))
        there = {hash: one.steps for name in names for key in (*tried, *judged)
                 for one, hash in [self.settings(name, *key)] if hash in self.done}
        self.left = max(0, steps - sum(there.values()))
        print(f"{steps:,} steps of {cfg.batch_size} examples, more where the best learning rate lies at the "
              f"edge; {sum(there.values()):,} are there")

    def log(self, record):
        if self.left:
            seconds = record["seconds"] / record["step"]
            tokens = record["tokens_per_second"] * seconds
            tqdm.write(f"{tokens:,.0f} tokens and {seconds:.2f} s a step: about "
                       f"{self.left * seconds / 3600:.1f} h for those that are left, evaluation aside")
        self.left = 0


def compare(cfg, saved):
    """Every method and seed at the learning rate that validation chose; returns name -> rows of the table."""
    rows = train.read_data(cfg)
    if rows:
        rows = (*data.hold_out(rows[0], cfg.val_share, "validation"), rows[1])
    model, _, base = train.prepare(cfg)
    possible = variants(cfg, model.config)
    del model                                    # every run makes its own
    runs, table, first = Runs(cfg, possible, base, rows), {}, cfg.seeds[0]
    names = possible if cfg.methods == ("all",) else cfg.methods
    runs.announce([name for name in names if name != "none"])

    @cache                                       # so each is printed once
    def quality(name, rate):
        row = runs.row(name, rate, first, cfg.search_steps > 0)
        accuracy, loss = row["val_accuracy"], row["val_loss"]
        print(f"{name} at {rate:g}, {row['steps']} steps: validation accuracy {accuracy:.3f}, "
              f"loss {loss:.3f}")
        return accuracy, -loss if loss < math.inf else -math.inf     # accuracies may be equal early, or all 0
    for name in names:
        if name == "none":                       # the frozen base: nothing to choose and nothing random
            table[name] = [runs.row(name, cfg.learning_rates[0], first)]
            continue
        rate = best_rate(cfg.learning_rates, partial(quality, name))
        table[name] = [runs.row(name, rate, seed) for seed in cfg.seeds]
        print_comparison(table, cfg.reference)
    asked = with_options(cfg, rows)
    print_details(table, {task: f"{majority(asked[task]):.3f}" for task in asked})
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
    """A line per method: size, rate, time, mean accuracy of choosing the likeliest option, mean accuracy, its
    deviation over seeds, difference."""
    width = max(map(len, [*table, "method"]))
    print(f"\n{'method':{width}}{'params':>11}{'rate':>9}{'s/step':>8}{'option':>8}{'mean':>8}{'sd':>7}"
          + f"   to {reference} (95%)" * (reference in table))
    for name, rows in table.items():
        deviation = f"{accuracies(rows).std():7.3f}" if len(rows) > 1 else f"{'-':>7}"
        difference = ""
        if reference in table and name != reference:
            d, half = interval([r["mean_accuracy"] - other["mean_accuracy"]
                                for r, other in zip(rows, table[reference])])
            difference = f"   {d:+.3f}" + (f" ±{half:.3f}" if half is not None else "")
        print(f"{name:{width}}{rows[0]['trainable_parameters']:>11,}{rows[0]['learning_rate']:>9.0e}"
              f"{mean(r['seconds'] / r['steps'] for r in rows):>8.3f}"
              + (f"{mean(mean(r['choice_accuracy'].values()) for r in rows):8.3f}" if
                 rows[0]["choice_accuracy"] else f"{'-':>8}")
              + f"{accuracies(rows).mean():8.3f}{deviation}{difference}")
    # beside the base's 0 all others look alike
    print_bars({name: accuracies(rows) for name, rows in table.items() if name != "none"})
    routed = {name: rows for name, rows in table.items() if STATISTICS[0] in rows[0]}
    if routed:
        print(f"\n{'':{width}}" + "".join(f"{key:>27}" for key in STATISTICS))
    for name, rows in routed.items():
        print(f"{name:{width}}" + "".join(f"{mean(r[key] for r in rows):27.3f}" for key in STATISTICS))


def standard_error(rows, task):
    """Of a task's accuracy, mean over the runs: what another sample of as many test rows would change."""
    p = mean(r["accuracy"][task] for r in rows)
    return math.sqrt(p * (1 - p) / rows[0]["examples"][task])


def print_details(table, simple):
    """Task by task: accuracy with its standard error, that of choosing the likeliest option, and the loss.
    simple: task -> what is right without reading the question, see majority."""
    tasks, width = list(simple), max(map(len, [*table, "majority"]))

    def line(name, cells):
        print(f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells))

    def block(title, cell):
        print(f"\n{title}")
        line("", (t[:13] for t in tasks))
        for name, rows in table.items():
            line(name, (cell(rows, t) for t in tasks))

    def average(key):
        return lambda rows, t: f"{mean(r[key][t] for r in rows):.3f}" if t in rows[0][key] else "-"
    block("accuracy ± standard error, of the test rows as a sample",
          lambda rows, t: average("accuracy")(rows, t) + f" ±{standard_error(rows, t):.3f}")
    line("majority", simple.values())
    block(f"accuracy of the likeliest option, of the first {PROBES} test rows", average("choice_accuracy"))
    block("loss, nats per token of the answer", average("loss"))


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
    """compare.png: mean accuracy, deviation over seeds, by method; experts.png: by E at equal total rank;
    experts_by_task.png: mean weight of every expert in every task, first seed."""
    adapted = {name: accuracies(rows) for name, rows in table.items() if name != "none"}
    by_E = {rows[0]["n_experts"]: adapted[name] for name, rows in table.items()
            if name == "teamlora" or name.startswith("teamlora_E")}
    if adapted:
        plot_bars(out / "compare.png", adapted)
    if len(by_E) > 1:
        plot_bars(out / "experts.png", dict(sorted(by_E.items())), "experts E, equal total rank")
    if routed := {name: rows[0]["expert_usage"] for name, rows in table.items() if STATISTICS[0] in rows[0]}:
        plot_usage(out / "experts_by_task.png", routed)


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


def plot_usage(path, routed):
    """A panel per method, tasks by experts: the share of an expert, times E, so that 1 is an even share."""
    from matplotlib.figure import Figure
    tasks = list(next(iter(routed.values())))
    figure = Figure(figsize=(2 + 2.2 * len(routed), 1 + 0.3 * len(tasks)), layout="constrained")
    for axes, (name, usage) in zip(figure.subplots(1, len(routed), squeeze=False)[0], routed.items()):
        share = torch.tensor([usage[t] for t in tasks])                              # (tasks, E)
        share = share / share.mean(1, keepdim=True)
        image = axes.imshow(share.numpy(), cmap="gray_r", vmin=0, vmax=2, aspect="auto")
        for i, e in itertools.product(*map(range, share.shape)):
            axes.text(e, i, f"{share[i, e]:.2f}", ha="center", va="center", size=7,
                      color="white" if share[i, e] > 1.3 else "black")
        axes.set_title(name, size=9)
        axes.set_xticks(range(share.shape[1]), [f"expert {e + 1}" for e in range(share.shape[1])], size=7)
        axes.set_yticks(range(len(tasks)), tasks if axes is figure.axes[0] else [""] * len(tasks), size=8)
    figure.colorbar(image, label="mean weight over an even share")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    train.main(run=compare, config=CompareConfig)
