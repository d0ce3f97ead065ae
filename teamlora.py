"""TeamLoRA, one adapted linear layer, and the baselines it is compared with.

The idea: a frozen linear map W gets one down-projection A for all experts and an up-projection B_e for each.
A router weighs the experts for every token; a small trained matrix M lets them raise or lower each other.
Paper: Lin et al., "TeamLoRA", ACL 2025, arXiv 2408.09856; the equations here follow its authors' layer.

    z   = A x                    expert e owns slice z_e of it, r numbers, which is A_e x
    phi = softmax(R x)           what the paper calls Shapley values; none is computed
    w   = phi + phi M            M's diagonal starts at 0; then w is scaled: a token's weights sum to E
    y   = W x + (alpha / r) * sum_e w_e B_e dropout(z_e)

What may surprise:
- No loop over experts. Scaling slice e of z by w_e and multiplying by all B side by side is the same sum, in
  one matmul. Its cost is that of LoRA of rank E*r.
- A weight may be negative: that expert is subtracted. Weights sum to E, not to 1 as in a plain mixture.
- Dropout acts on z, after A; most LoRA code drops x before A.
- LoRA, MoELoRA and HydraLoRA are this layer with little changed; E = 1 is plain LoRA in all of them. At rank
  E*r our LoRA has the scale alpha / r: PEFT computes the same with lora_alpha = E*alpha.

Letters: B batch, T time, E experts, r rank of one expert, L adapted layers. See `python teamlora.py`, too.
"""

from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

FORMAT = 1                                       # of adapter files; another is refused


class InputError(ValueError):
    """What the user gave cannot be used: one sentence that names the cause and the fix."""


@contextmanager
def naming(path, where=""):
    """Whatever goes wrong in this block becomes one InputError: which file, why, and how the file begins."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{path}{where}: {e}") from e
    except Exception as e:
        begins = f"; it begins with {Path(path).open('rb').read(40)}" if Path(path).is_file() else ""
        why = str(e).rpartition("Unpickler error: ")[2]      # before it PyTorch advises to run what is there
        raise InputError(f"{path}{where}: {type(e).__name__}: {why}{begins}") from e


def flag(default, help, least=0, below=2 ** 31, choices=()):
    """A field of a configuration, which train.py makes a flag. A number lies in [least, below)."""
    return field(default=default, metadata={"help": help, "least": least, "below": below, "choices": choices})


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter; InputError names one that cannot be. train.py's Config extends it."""
    method: str = flag("teamlora", "teamlora, lora, moelora, hydralora; train.py also full, none (bare base)")
    rank: int = flag(8, "rank r of one expert; the total rank is n_experts * rank", least=1)
    n_experts: int = flag(4, "number of experts E", least=1)
    alpha: float = flag(16.0, "the update is scaled by alpha / rank", least=1e-12)
    dropout: float = flag(0.0, "dropout on A x", below=1)
    targets: tuple = flag(("gate_proj", "up_proj", "down_proj"), "adapted projections, comma-separated")

    def __post_init__(self):
        for f in fields(self):
            value, least, below = getattr(self, f.name), f.metadata["least"], f.metadata["below"]
            if not isinstance(value, (float, int) if f.type is float else f.type):
                raise InputError(f"{f.name} must be of type {f.type.__name__}, not {value!r}")
            if type(value) in (int, float) and not least <= value < below:
                raise InputError(f"{f.name} must be at least {least} and below {below}, not {value}")
        self.check()

    def check(self):
        if self.method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, not '{self.method}'")


# ---- The layer and its baselines

class TeamLoRALinear(nn.Linear):
    """Linear layer (..., in) -> (..., out) with a frozen `weight` and trainable experts (arXiv 2408.09856):
    lora_A (E*r, in), lora_B (out, E*r), router R (E, in), interaction M (E, E). `weight` keeps its name, so a
    checkpoint of the plain layer loads as it is."""
    routed, competing, whole_A = True, True, False   # has R; has M; every expert sees all of one A of rank r
    changes = ()                                 # of its experts' weights, see changed_weights

    def __init__(self, in_features, out_features, bias=False, adapter=None):
        super().__init__(in_features, out_features, bias)
        self.requires_grad_(False)
        self.add_adapter(adapter or AdapterConfig())

    def add_adapter(self, adapter):
        """A fresh adapter in fp32: every B is zero, so the layer computes exactly its base layer."""
        E, r, n_in, bound = adapter.n_experts, adapter.rank, self.in_features, self.in_features ** -0.5
        self.adapter, kind = adapter, {"device": self.weight.device, "dtype": torch.float32}
        A = torch.empty(r if self.whole_A else E * r, n_in, **kind).uniform_(-bound, bound)
        R = torch.empty(E, n_in, **kind).uniform_(-bound, bound)
        M = torch.empty(E, E, **kind).uniform_(-0.1, 0.1).fill_diagonal_(0)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, E * r, **kind))
        self.router = nn.Parameter(R) if self.routed else None
        self.interaction = nn.Parameter(M) if self.competing else None

    def gate(self, logits):
        """The competition: R x (..., E) -> the experts' weights w (..., E), in fp32 or float64."""
        phi = torch.softmax(logits, -1)
        w = phi + phi @ self.interaction.to(phi.dtype)
        # subtle: the sum is 1 + phi (M 1) and nothing constrains M, so it can reach 0 or turn negative, which
        # would blow up the update or flip its sign. Below 0.1 it counts as 0.1: none grows more than tenfold.
        least = 0.1 / self.adapter.n_experts     # of the mean; threshold is clamp(min=..) in fewer kernels
        return w / F.threshold(w.mean(-1, keepdim=True), least, least)                # (..., E), of mean 1

    def per_expert(self, z):
        """What each expert sees of z: (..., E*r) -> (..., E, r); of one whole A, (..., r) -> (..., 1, r)."""
        return z.unflatten(-1, (-1, self.adapter.rank))

    def forward(self, x):
        """x (..., in) -> (..., out), in x's dtype; the equation stands in the comments."""
        if x.is_nested:                          # rows of any lengths, one after the other
            return torch.nested.nested_tensor_from_jagged(self.forward(x.values()), x.offsets(), x.lengths())
        shape, x = x.shape[:-1], x.reshape(-1, self.in_features)                     # (B*T, in)
        # z = A x, logits = R x: they read the same x, so they are one product
        down = torch.cat((self.lora_A, self.router)) if self.routed else self.lora_A
        z, logits = F.linear(x, down.to(x.dtype)).split((len(self.lora_A), len(down) - len(self.lora_A)), -1)
        # w = gate(R x), in fp32: bf16 loses the small weights
        logits = logits.to(torch.promote_types(x.dtype, torch.float32))
        w = self.gate(logits.view(*shape, logits.shape[-1]))                          # (..., E)
        for change in self.changes:
            w = change(w)
        # w_e dropout(z_e): alpha / r goes into the weights; z has x's dtype, unless autocast chose another
        z = F.dropout(z, self.adapter.dropout, self.training)
        w = (w * (self.adapter.alpha / self.adapter.rank)).to(z.dtype).reshape(-1, self.adapter.n_experts, 1)
        z = (self.per_expert(z) * w).flatten(-2)                                     # (B*T, E*r)
        # y = W x + [B_1 .. B_E] z: added inside the second product, a sum would pass over (B*T, out) again
        y = F.linear(x, self.weight, self.bias)
        return y.addmm_(z, self.lora_B.to(z.dtype).T).view(*shape, self.out_features)

    @torch.no_grad()
    def update(self):
        """What the adapter adds to `weight`, (out, in), in float64; InputError if it depends on the token."""
        # three unlike tokens: a gate that weighs them alike, of whatever method, makes the update one matrix
        logits = torch.arange(1.0, 1 + self.adapter.n_experts * self.routed, dtype=torch.float64)     # (E,)
        w = self.gate(torch.stack((logits, -logits, 0 * logits)).to(self.lora_B.device))              # (3, E)
        if not torch.allclose(w, w[:1].expand_as(w)):
            raise InputError(f"{self.adapter.method} with {self.adapter.n_experts} experts cannot be merged: "
                             "weights depend on the token; not so lora's, or a softmax's over n_experts=1")
        w = w[0] * (self.adapter.alpha / self.adapter.rank)                          # (E,)
        return self.lora_B.double() @ (self.per_expert(self.lora_A.double().T) * w[:, None]).flatten(-2).T


class LoRALinear(TeamLoRALinear):
    """LoRA of total rank E*r (Hu et al., arXiv 2106.09685): every weight is 1, so nothing routes."""
    routed, competing = False, False

    def gate(self, logits):                      # (..., 0)
        return logits.new_ones(*logits.shape[:-1], self.adapter.n_experts)


class MoELoRALinear(TeamLoRALinear):
    """MoELoRA as the paper's baseline (LoRAMoE's layer, arXiv 2312.09979): softmax weights, which sum to 1.
    Its experts' own A_e, stacked, are our lora_A: shared A and separate A_e are one function."""
    competing = False

    def gate(self, logits):
        return torch.softmax(logits, -1)


class HydraLoRALinear(MoELoRALinear):
    """HydraLoRA (Tian et al., arXiv 2404.19245): softmax weights; each expert sees all of one A of rank r."""
    whole_A = True


METHODS = {"teamlora": TeamLoRALinear, "lora": LoRALinear, "moelora": MoELoRALinear,
           "hydralora": HydraLoRALinear}


# ---- The experts' weights, collected or changed from outside, and the balance term

@contextmanager
def changed_weights(model, change):
    """Inside this block every adapted layer of the model weighs its experts by change(w), w (..., E)."""
    layers = [layer for _, layer in adapter_layers(model)]
    for layer in layers:
        layer.changes += (change,)
    try:
        with torch.compiler.set_stance("force_eager"):       # or --compile would compile for every block anew
            yield
    finally:
        for layer in layers:
            layer.changes = layer.changes[:-1]


@contextmanager
def collected_weights(model):
    """Yield a list that receives w (B, T, E) of every adapted layer that runs inside this block, in order.
    Gradients flow through them. Leave the block before backward: checkpointing runs layers again."""
    weights = []
    with changed_weights(model, lambda w: weights.append(w) or w):       # append returns None
        yield weights


def mean_usage(routing, mask):
    """Mean weight of each expert over the tokens that are not padding: (L, B, T, E), (B, T) -> (L, E)."""
    return (routing * mask[..., None]).sum((1, 2)) / mask.sum()


def balance_loss(usage):
    """The balance term of usage (L, E): mean over layers of mean_e (usage_e - its mean over e)^2. Where
    weights sum to E that mean is 1; the released code's 1/E is out of reach, with the same gradient."""
    return (usage - usage.mean(-1, keepdim=True)).square().mean()


# ---- Adapters in and out of models and files

def adapter_layers(model):
    """The adapted layers of a model, as (name, layer) pairs in the model's order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, TeamLoRALinear)]


def adapter_parameters(model):
    """name -> parameter of everything that adapters add; one that layers share is named once."""
    added = {p for _, layer in adapter_layers(model) for key, p in layer.named_parameters(recurse=False)
             if key in ("lora_A", "lora_B", "router", "interaction")}
    return {name: p for name, p in model.named_parameters() if p in added}


def idle_adapters(model):
    """Names of layers whose adapter the last backward pass did not reach: something reads past `forward`."""
    return [name for name, layer in adapter_layers(model) if layer.lora_B.grad is None]


def adapt(model, targets, adapter=None):
    """Turn every nn.Linear of any model whose name ends in a target ("q_proj", "text.*.mlp.*") into the
    method's layer, fresh, and freeze all else; return the names. A module stays itself, with its hooks.
    InputError, before anything has changed, if a target fits no nn.Linear, or one that is not plain."""
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    adapter, found = replace(adapter or AdapterConfig(), targets=targets), {}
    modules = dict(model.named_modules(remove_duplicate=False))
    linear = {name: m for name, m in modules.items() if hasattr(m, "in_features")}
    for target in targets or [""]:               # which fits none
        fits = {name: m for name, m in linear.items() if fnmatchcase(f".{name}", f"*.{target}")}
        if not fits:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise InputError(f"no nn.Linear's name ends in '{target}'; they end in {ends}. Other classes, "
                             "such as GPT-2's Conv1D, cannot be adapted")
        found |= fits
    for name, layer in found.items():
        # its own class of layer or weight: quantised; its own forward: wrapped; its bias moved: pruned
        if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or (
                "bias" not in layer._parameters or "forward" in vars(layer)):
            raise InputError(f"{name} is a {type(layer).__name__}, adapted, quantised, pruned or wrapped: "
                             "choose other targets, or take the model as it was before")
        if torch.backends.mha.get_fastpath_enabled() and isinstance(
                modules[name.rpartition(".")[0]], nn.TransformerEncoderLayer):
            raise InputError(f"PyTorch's fast path would read {name}.weight past its adapter: call "
                             "torch.backends.mha.set_fastpath_enabled(False) first")
    model.requires_grad_(False)
    for layer in dict.fromkeys(m for name, m in linear.items() if name in found):
        layer.__class__ = METHODS[adapter.method]
        layer.add_adapter(adapter)
    for p in adapter_parameters(model).values():     # also of adapters that were there
        p.requires_grad_()
    return [*found]


@torch.no_grad()
def merge(model):
    """Add every adapter's update to its frozen weight: the model computes the same as before, with B = 0.
    InputError, before anything has changed, if an update depends on the token, or a weight is tied."""
    tensors = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())]
    starts = [t.data_ptr() for t in tensors if t is not None]
    for name, layer in adapter_layers(model):
        layer.update()                           # may refuse
        if starts.count(layer.weight.data_ptr()) > 1:
            raise InputError(f"{name} cannot be merged: its weight is tied to another's, or in four bits")
    for _, layer in adapter_layers(model):       # anew, so that only one update at a time needs memory
        layer.weight.copy_(layer.weight.double() + layer.update())
        layer.lora_B.zero_()


def load_parameters(parameters, state):
    """Copy `state` (name -> tensor) into `parameters` (name -> parameter), all or nothing. Strict: with B = 0
    a wholly unmatched adapter would give exactly the base and no other symptom."""
    wrong = sorted(parameters.keys() ^ state.keys()) or [n for n, p in parameters.items() if (
        p.shape != state[n].shape or not state[n].isfinite().all())]
    if wrong or not parameters:
        raise InputError("the parameters do not fit the model; missing, unexpected, of another shape or not "
                         f"finite: {', '.join(wrong[:3]) or 'all'}")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state[name])


def save_adapter(model, path, **more):
    """Write settings and parameters of the model's adapters as one file; `more` adds or replaces keys."""
    settings = dict.fromkeys(layer.adapter for _, layer in adapter_layers(model))
    parameters = {name: p.detach().cpu() for name, p in adapter_parameters(model).items()}
    content = {"format": FORMAT, "adapters": [asdict(a) for a in settings], "parameters": parameters}
    torch.save(content | more, path)


def read_adapter(path):
    """What a file of save_adapter's holds. Code in it is refused, never run."""
    with naming(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise InputError(f"no adapter file of format {FORMAT}; use the version that wrote it")
        return saved


def load_adapter(model, path):
    """Load a file of save_adapter's into a plain model, which is adapted, or one that is adapted alike.
    InputError if a setting (but dropout), a name or a shape differs, or a number is inf or NaN."""
    saved = read_adapter(path)
    with naming(path):
        theirs = [AdapterConfig(**settings) for settings in saved["adapters"]]
        for adapter in [] if adapter_layers(model) else theirs:
            adapt(model, adapter.targets, adapter)
        own = [layer.adapter for _, layer in adapter_layers(model)]
        if {replace(a, dropout=0.0) for a in own} != {replace(a, dropout=0.0) for a in theirs}:
            raise InputError(f"made with {theirs}, but the model is adapted with {own[:1]}")
        load_parameters(adapter_parameters(model), saved["parameters"])


if __name__ == "__main__":
    # two tokens of width 3 through a layer of two experts of rank 1, with B and M as if trained
    torch.manual_seed(0)
    layer = TeamLoRALinear(3, 2, adapter=AdapterConfig(rank=1, n_experts=2, alpha=1.0))
    nn.init.normal_(layer.lora_B)
    layer.interaction.data = torch.tensor([[0.0, -0.6], [0.3, 0.0]])     # expert 1 lowers expert 2
    W, A, R, M, B = layer.weight, layer.lora_A, layer.router, layer.interaction, layer.lora_B
    for x in torch.randn(2, 3):
        z, phi, w = A @ x, torch.softmax(R @ x, -1), layer.gate(R @ x)
        parts = B * z * w                        # column e: w_e B_e z_e
        for name, value in {"x": x, "A x, one number per expert": z, "phi = softmax(R x)": phi,
                            "phi + phi M": phi + phi @ M, "w: that, scaled to sum 2": w, "W x": W @ x,
                            "w_1 B_1 z_1": parts[:, 0], "w_2 B_2 z_2": parts[:, 1],
                            "y = W x + their sum": W @ x + parts.sum(1), "layer(x)": layer(x)}.items():
            print(f"{name:28}{[round(v, 4) for v in value.tolist()]}")
