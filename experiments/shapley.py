"""What each expert of out_dir/adapter.pt is worth: exact Shapley values, beside the weights of its router.

    python -m experiments.shapley --out_dir=out --plot

The idea: a coalition is a set of experts that stays on, in all layers, while the weights of the others are 0.
Its value is the accuracy, or minus the loss, that is left. An expert's Shapley value is what it adds on
average over all orders in which experts can join (Shapley, 1953), here exact, from all 2^E coalitions. The
paper calls the router's softmax Shapley values; this compares the two.

What may surprise:
- Settings come from adapter.pt, as with train.py --mode=eval, whose questions are asked here too.
- An evaluation per coalition: 16 with four experts, 256 with eight; more are refused.
- The values of a task sum to what all experts together gain over the frozen base.
"""

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean

import torch

import data
import train
from teamlora import METHODS, InputError, adapter_layers, changed_weights, flag, mean_usage


@dataclass(frozen=True)
class ShapleyConfig(train.Config):
    mode: str = flag("eval", "how out_dir is read: as with train.py --mode=eval", choices=("eval",))
    plot: bool = flag(False, "draw usage.png into out_dir: mean weights by task and layer, with matplotlib")

    def check(self):
        super().check()
        if self.method not in METHODS or not 2 <= self.n_experts <= 8:
            raise InputError(f"out_dir={self.out_dir} must hold an adapter with 2 to 8 experts, not one of "
                             f"--method={self.method}, --n_experts={self.n_experts}")
        if self.plot and not importlib.util.find_spec("matplotlib"):
            raise InputError("plot needs matplotlib: pip install matplotlib")


# ---- Which experts take part: changes for changed_weights

def only(experts, E, device="cpu"):
    """Switch all of E experts off but these: their weights stay as they are, the others become 0."""
    kept = torch.tensor([e in experts for e in range(E)], device=device)         # once: a GPU waits for it
    return lambda w: w * kept


def top(k):
    """Keep the k largest weights of every token, scaled so that its weights sum to what they did."""
    def change(w):
        largest = w.topk(k, -1)
        kept = torch.zeros_like(w).scatter(-1, largest.indices, largest.values)
        return kept * (w.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))
    return change


def coalition(index):
    """The experts of coalition number `index` of 2^E: expert e takes part if bit e is set."""
    return [e for e in range(index.bit_length()) if index >> e & 1]


# ---- What they are worth

def shapley_values(value):
    """Exact Shapley value of each expert: value (2^E, ...) of all coalitions -> (E, ...).

    phi_e = sum over S without e of |S|! (E - |S| - 1)! / E! (v(S + e) - v(S)); they sum to v(all) - v(none).
    """
    E = len(value).bit_length() - 1
    return torch.stack([sum((value[S | 1 << e] - value[S]) / (E * math.comb(E - 1, S.bit_count()))
                            for S in range(2 ** E) if not S >> e & 1) for e in range(E)])


def shapley_interactions(value):
    """Shapley interaction index of each pair of experts (Grabisch, Roubens 1999): (2^E, ...) -> (E, E, ...).

    Above 0 a pair is worth more together than apart, below 0 they replace each other; the diagonal is 0.
    """
    E = len(value).bit_length() - 1
    index = value.new_zeros(E, E, *value.shape[1:])
    for i in range(E):
        for j in range(i):
            both = 1 << i | 1 << j
            index[i, j] = index[j, i] = sum(
                (value[S | both] - value[S | 1 << i] - value[S | 1 << j] + value[S]) / (
                    (E - 1) * math.comb(E - 2, S.bit_count())) for S in range(2 ** E) if not S & both)
    return index


def rank_correlation(a, b):
    """Spearman's rank correlation of two vectors, ties sharing their rank; None if one is constant."""
    if len(a) < 2:
        return None
    ranks = [(x[:, None] > x).double().sum(1) + 0.5 * (x[:, None] == x).double().sum(1) for x in (a, b)]
    correlation = torch.corrcoef(torch.stack(ranks))[0, 1].item()
    return None if math.isnan(correlation) else correlation


def evaluate_coalitions(model, split, cfg):
    """({"accuracy", "loss"} -> value (2^E, tasks), mean weights (tasks, L, E) with all experts on)."""
    full, value, weights, tokens = 2 ** cfg.n_experts - 1, {"accuracy": [], "loss": []}, {}, {}

    def each(task, routing, mask):               # sums over tokens
        weights[task] = weights.get(task, 0) + mean_usage(routing, mask).double() * mask.sum()       # (L, E)
        tokens[task] = tokens.get(task, 0) + mask.sum()
    device = next(model.parameters()).device
    for index in range(full + 1):
        with changed_weights(model, only(coalition(index), cfg.n_experts, device)):
            results = train.evaluate(model, split, cfg.max_tokens, f"coalition {index + 1} of {full + 1}",
                                     each=each if index == full else None)
        for key, sign in (("accuracy", 1), ("loss", -1)):
            value[key].append([sign * results[task][key] for task in split])
    return ({key: torch.tensor(v, dtype=torch.float64) for key, v in value.items()},
            torch.stack([(weights[task] / tokens[task]).cpu() for task in split]))


def shapley(cfg, saved):
    """What every expert is worth by task, and whether its router knows; writes out_dir/shapley.json."""
    _, rows = train.read_data(cfg)
    model, encode, _ = train.prepare(cfg, saved)
    if not (split := data.by_task(data.encode_rows(encode, rows, cfg.max_length))):
        raise InputError("there is nothing to evaluate on: give --val_data")
    value, weights = evaluate_coalitions(model, split, cfg)
    usage = weights.mean(1)                                                          # (tasks, E)
    worth = {key: shapley_values(v).T for key, v in value.items()}                   # (tasks, E)
    pairs = shapley_interactions(value["loss"]).mean(-1)                             # (E, E)
    result = {"tasks": list(split), "value": value, "shapley": worth, "usage": usage,
              "rank_correlation": {key: [rank_correlation(a, b) for a, b in zip(w, usage)]
                                   for key, w in worth.items()}, "interaction": pairs}
    if M := [layer.interaction.detach() for _, layer in adapter_layers(model)
             if layer.interaction is not None]:
        learned = torch.stack(M).cpu().double().mean(0)
        upper = torch.triu_indices(*pairs.shape, 1).unbind()
        result |= {"learned_interaction": learned, "interaction_correlation": rank_correlation(
            pairs[upper], ((learned + learned.T) / 2)[upper])}
    text = json.dumps(result, default=torch.Tensor.tolist, indent=1, allow_nan=False) + "\n"
    train.write_atomically(Path(cfg.out_dir) / "shapley.json", lambda f: f.write(text.encode()))
    print_shapley(result)
    if cfg.plot:
        plot_usage(result["tasks"], weights, Path(cfg.out_dir) / "usage.png")
    return result


# ---- For the eye

def print_shapley(result):
    """Per task: what all experts are worth, each one's Shapley value (of minus the loss) and mean weight."""
    worth, usage, accuracy = result["shapley"]["loss"], result["usage"], result["value"]["accuracy"]
    gain, agreement = accuracy[-1] - accuracy[0], result["rank_correlation"]["loss"]
    E, width = worth.shape[1], max(map(len, [*result["tasks"], "mean"])) + 2
    print(f"\n{'task':{width}}{'accuracy gained':>16}   " + f"{'Shapley value, in nats of loss':{8 * E}}   "
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


def plot_usage(tasks, weights, path):
    """A picture of the mean weights (tasks, L, E)."""
    from matplotlib.figure import Figure
    (_, L, E), figure = weights.shape, Figure(figsize=(10, 3.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights.flatten(1), cmap="gray_r", aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xticks(torch.arange(L) * E - 0.5, range(L))
    axes.grid(axis="x", color="black", linewidth=0.5)
    axes.set_xlabel("adapted layer, one column per expert")
    figure.colorbar(image, label="mean weight")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    train.main(run=shapley, config=ShapleyConfig)
