"""TeamLoRA, one adapted linear layer, and the methods it is compared with.

The idea: a frozen linear map W gets a down-projection A, which all experts share, and E up-projections B_e,
one per expert. A router weighs the experts for every token, and a small trained matrix M lets them raise or
lower each other's weight.
Paper: Lin et al., "TeamLoRA", ACL 2025, arXiv 2408.09856; the equations here follow its authors' layer.

    z   = A x                    expert e owns slice z_e of it, r numbers, which is A_e x
    phi = softmax(R x)           what the paper calls Shapley values
    w   = phi + phi M            M's diagonal starts at 0; then w is scaled: a token's weights sum to E
    y   = W x + (alpha / r) * sum_e w_e B_e dropout(z_e)

    adapt(model, ["q_proj"])     gives any model of yours such layers
    python teamlora.py           two tokens through a layer of two experts, every number printed

What may surprise:
- No loop over experts. Scaling slice e of z by w_e and multiplying by all B side by side is the same sum,
  in one matmul whose cost does not depend on E.
- A weight may be negative: an expert can be held against. Weights sum to E, not to 1 as in a plain mixture.
- Dropout acts on z, after A; most LoRA code drops x before A.
- The paper writes w_i = sum_j M_ij phi_j, diagonal 1; the released code, and we, phi + phi M, diagonal 0 at
  first. No Shapley value is computed.
- To share A is no restriction: A_e of an expert of its own would be the slice of A that it reads here.
- LoRA, MoELoRA and HydraLoRA are this layer with little changed; E = 1 is plain LoRA in all of them.

Letters: B batch, T time, C model width, H heads, D head width, V vocabulary, E experts, r rank of one expert,
L adapted layers.
"""

import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase

import torch
import torch.nn as nn
import torch.nn.functional as F


class InputError(ValueError):
    """What the user gave cannot be used: one sentence that names it and the way out. train.py prints it."""


def flag(default, help, least=0, below=math.inf, choices=()):
    """A field of a configuration, which train.py makes a flag. A number lies in [least, below)."""
    return field(default=default, metadata={"help": help, "least": least, "below": below, "choices": choices})


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter. A new one is a line here and the line of the layer that uses it.

    InputError names a value that cannot be; train.py's configuration extends this one and its check.
    """
    method: str = flag("teamlora", "teamlora, lora, moelora, hydralora, or another of METHODS; full (train "
                                   "every weight) or none (bare base)")
    rank: int = flag(8, "rank r of one expert; the total rank is n_experts * rank", least=1)
    n_experts: int = flag(4, "number of experts E", least=1)
    alpha: float = flag(16.0, "the update is scaled by alpha / rank", least=1e-12)
    dropout: float = flag(0.0, "dropout on A x", below=1)
    targets: tuple = flag(("gate_proj", "up_proj", "down_proj"), "adapted projections, comma-separated")

    def __post_init__(self):
        for f in fields(self):
            value, least, below, choices = getattr(self, f.name), *(
                f.metadata[key] for key in ("least", "below", "choices"))
            if choices and value not in choices:
                raise InputError(f"--{f.name} must be one of {', '.join(choices)}, not '{value}'")
            below = min(below, 2 ** 31) if type(value) is int else below
            if type(value) in (int, float) and not least <= value < below:
                raise InputError(f"--{f.name} must be at least {least} and below {below}, not {value}")
        self.check()

    def check(self):
        """What no range of a single field says."""
        if self.method not in (known := (*METHODS, "full", "none")):
            raise InputError(f"--method must be one of {', '.join(known)}, not '{self.method}'")


# ---- The layer and its rivals

class TeamLoRALinear(nn.Linear):
    """Linear layer (..., in) -> (..., out) with a frozen `weight` and trainable experts (arXiv 2408.09856).

    Parameters: lora_A (E*r, in), lora_B (out, E*r), router R (E, in), interaction M (E, E). `weight` keeps
    its name, so a checkpoint of the plain layer loads as it is.
    """

    def __init__(self, in_features, out_features, bias=False, adapter=None):
        super().__init__(in_features, out_features, bias)
        self.requires_grad_(False)
        self.adapter = adapter or AdapterConfig()
        E, r = self.adapter.n_experts, self.adapter.rank
        self.lora_A = nn.Parameter(torch.empty(E * r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, E * r))
        self.router = nn.Parameter(torch.empty(E, in_features))
        self.interaction = nn.Parameter(torch.empty(E, E))
        self.reset_adapter()

    def reset_adapter(self):
        """Fresh adapter: every B is zero, so the layer computes exactly its base layer."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.router is not None:
            nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        if self.interaction is not None:
            nn.init.uniform_(self.interaction, -0.1, 0.1)
            with torch.no_grad():
                self.interaction.fill_diagonal_(0)

    def gate(self, logits):
        """The competition: R x (..., E) -> the experts' weights w (..., E), in fp32 or float64."""
        phi = torch.softmax(logits, -1)
        w = phi + phi @ self.interaction.to(phi.dtype)
        # subtle: the sum is 1 + phi (M 1) and nothing constrains M, so it can reach 0 or turn negative, which
        # would blow up the update or flip its sign. Below 0.1 it counts as 0.1: none grows more than tenfold.
        least = 0.1 / self.adapter.n_experts     # of the mean; threshold is clamp(min=..) in fewer kernels
        return w / F.threshold(w.mean(-1, keepdim=True), least, least)                # (..., E), of mean 1

    def seen(self, z):
        """What each expert sees of z: (..., E*r) -> (..., E, r), its own slice."""
        return z.unflatten(-1, (self.adapter.n_experts, self.adapter.rank))

    def forward(self, x):
        """x (..., in) -> (..., out), in x's dtype; the equation stands in the comments.

        z = A x;  w = gate(R x);  y = W x + (alpha / r) * sum_e w_e B_e dropout(z_e)
        """
        shape, x = x.shape[:-1], x.reshape(-1, self.in_features)                     # (B*T, in)
        # z = A x, logits = R x: they read the same x, so they are one product
        down = self.lora_A if self.router is None else torch.cat((self.lora_A, self.router))
        z, logits = F.linear(x, down.to(x.dtype)).split((len(self.lora_A), len(down) - len(self.lora_A)), -1)
        # w = gate(R x), in fp32: bf16 loses the small weights
        logits = logits.to(torch.promote_types(x.dtype, torch.float32))
        w = self.gate(logits.view(*shape, logits.shape[-1]))                          # (..., E)
        # w_e dropout(z_e): alpha / r goes into the weights, which are E numbers a token instead of out; z has
        # the dtype of x, unless autocast chose another
        z = F.dropout(z, self.adapter.dropout, self.training)
        w = (w * (self.adapter.alpha / self.adapter.rank)).to(z.dtype).view(len(x), self.adapter.n_experts, 1)
        z = (self.seen(z) * w).flatten(-2)                                           # (B*T, E*r)
        # y = W x + [B_1 .. B_E] z: added inside the second product, a sum would pass over (B*T, out) again
        y = F.linear(x, self.weight, self.bias)
        return y.addmm_(z, self.lora_B.to(z.dtype).T).view(*shape, self.out_features)

    def update(self):
        """What the adapter adds to `weight`, (out, in), in float64; InputError if it depends on the token."""
        A, B = self.lora_A.detach().double(), self.lora_B.detach().double()
        # the gate itself is asked, so that this holds for a method that is not written yet
        n_logits, generator = 0 if self.router is None else len(self.router), torch.Generator().manual_seed(0)
        w = self.gate(4 * torch.randn(64, n_logits, generator=generator, dtype=A.dtype).to(A.device))
        if not torch.allclose(w, w[:1].expand_as(w)):
            raise InputError(f"{self.adapter.method} with {self.adapter.n_experts} experts cannot be merged "
                             "into its base: their weights depend on the token; lora's never do, nor do "
                             "those of a softmax over one expert (n_experts=1)")
        w = w[0] * (self.adapter.alpha / self.adapter.rank)                          # (E,)
        return B @ (self.seen(A.T) * w[:, None]).flatten(-2).T

    def extra_repr(self):
        return f"{super().extra_repr()}, {self.adapter}"


class LoRALinear(TeamLoRALinear):
    """LoRA of total rank E*r (Hu et al., arXiv 2106.09685): every weight is 1, so nothing routes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.router = self.interaction = None

    def gate(self, logits):
        """Ones; the logits are (..., 0)."""
        return logits.new_ones(*logits.shape[:-1], self.adapter.n_experts)


class MoELoRALinear(TeamLoRALinear):
    """MoELoRA as the paper's baseline (LoRAMoE's layer, arXiv 2312.09979): softmax weights, which sum to 1.

    Every expert has its own A_e; stacked, they are our lora_A, so shared A and separate A_e are one function.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.interaction = None

    def gate(self, logits):
        return torch.softmax(logits, -1)


class HydraLoRALinear(MoELoRALinear):
    """HydraLoRA (Tian et al., arXiv 2404.19245): softmax weights; each expert sees all of one A of rank r."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_A = nn.Parameter(self.lora_A[:self.adapter.rank].detach().clone())    # (r, in)

    def seen(self, z):
        """All of z for every expert: (..., r) -> (..., 1, r)."""
        return z.unsqueeze(-2)


METHODS = {"teamlora": TeamLoRALinear, "lora": LoRALinear, "moelora": MoELoRALinear,
           "hydralora": HydraLoRALinear}


# ---- The experts' weights, seen or changed from outside, and the balance term

@contextmanager
def changed_weights(model, change):
    """Inside this block every adapted layer of the model weighs its experts by change(w), w (..., E)."""
    layers = [layer for _, layer in adapter_layers(model)]
    before = [layer.__dict__.get("gate") for layer in layers]    # of a block around this one

    def changed(gate):
        return lambda logits: change(gate(logits))
    for layer in layers:
        layer.gate = changed(layer.gate)
    try:
        with torch.compiler.set_stance("force_eager"):       # or --compile would compile for every block anew
            yield
    finally:
        for layer, gate in zip(layers, before):
            del layer.gate
            if gate:
                layer.gate = gate


@contextmanager
def collected_weights(model):
    """Yield a list that receives w (B, T, E) of every adapted layer that runs inside this block, in order.

    The model may be any, or a part of one, down to a single layer. Gradients flow through the weights, under
    activation checkpointing too, but for the reentrant kind: leave the block before backward, which runs
    layers again.
    """
    weights = []

    def keep(w):
        weights.append(w)
        return w
    with changed_weights(model, keep):
        yield weights


def mean_usage(routing, mask):
    """Mean weight of each expert over the tokens that are not padding: (L, B, T, E), (B, T) -> (L, E)."""
    m = mask.to(routing.dtype)[..., None]                                            # (B, T, 1)
    return (routing * m).sum((1, 2)) / m.sum()


def balance_loss(usage):
    """The balance term of usage (L, E): mean over layers of mean_e (usage_e - its mean over e)^2.

    Where weights sum to E that mean is 1. The released code aims at 1/E there, which cannot be reached; the
    gradient is the same. The paper says that it trains without this term: its weight is 0 unless asked for.
    """
    return (usage - usage.mean(-1, keepdim=True)).square().mean()


# ---- Adapters in and out of a model

def adapter_layers(model):
    """The adapted layers of a model, as (name, layer) pairs in the model's order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, TeamLoRALinear)]


def adapter_parameters(model):
    """name -> parameter of everything that adapters add; one that layers share is named once."""
    added = {p for _, layer in adapter_layers(model) for key, p in layer.named_parameters(recurse=False)
             if key not in ("weight", "bias")}
    return {name: p for name, p in model.named_parameters() if p in added}


def targeted(model, targets):
    """name -> every nn.Linear of a model whose name ends in a target: "q_proj", "language_model.*.mlp.*".

    InputError if a target fits none, or one that is quantised, adapted or otherwise no plain nn.Linear.
    """
    linear = {n: m for n, m in model.named_modules(remove_duplicate=False) if n and hasattr(m, "in_features")}
    fits = {t: [n for n in linear if fnmatchcase(f".{n}", f"*.{t}")] for t in targets or [""]}
    for target, names in fits.items():
        if not names:
            raise InputError(f"no linear layer's name ends in '{target}'; they end in "
                             f"{', '.join(sorted({n.rpartition('.')[2] for n in linear}))}")
    found = {n: m for n, m in linear.items() if any(n in names for names in fits.values())}
    for name, layer in found.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        # what is quantised has a class of layer or of weight of its own, what is wrapped a forward of its own
        if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or "forward" in vars(layer):
            raise InputError(f"{name} is a {type(layer).__name__}, adapted, quantised or wrapped: choose "
                             "other targets, or take the model as it was before")
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise InputError(f"PyTorch's fast path would read {name}.weight past its adapter: call "
                             "torch.backends.mha.set_fastpath_enabled(False) first")
    return found


def adapt(model, targets, adapter=None):
    """Put the method's layer, fresh, in fp32, in the place of every `targeted` nn.Linear of any model, on the
    same weight; freeze all else; return the names. InputError, as of `targeted`, before anything has changed.
    """
    adapter = replace(adapter or AdapterConfig(), targets=tuple(targets))
    if adapter.method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, not '{adapter.method}'")
    found = targeted(model, adapter.targets)
    with torch.device("meta"):                   # without memory, for the weight is there
        new = {m: METHODS[adapter.method](m.in_features, m.out_features, m.bias is not None, adapter)
               for m in found.values()}
    for old, layer in new.items():
        layer.weight, layer.bias = old.weight, old.bias
        for key, p in adapter_parameters(layer).items():
            setattr(layer, key, nn.Parameter(torch.empty_like(p, device=old.weight.device).float()))
        layer.train(old.training).reset_adapter()
    for name, old in list(model.named_modules(remove_duplicate=False)):
        if old in new:                           # wherever it is: a layer in two places stays one
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, new[old])
    model.requires_grad_(False)
    for p in adapter_parameters(model).values():
        p.requires_grad_()
    return list(found)


@torch.no_grad()
def merge(model):
    """Move every adapter's update into its frozen weight: the model computes the same as before, with B = 0.

    Raises InputError if a layer's update depends on the token, or its weight is another's too, as of a tied
    head; then nothing has changed.
    """
    for name, layer in adapter_layers(model):
        if sum(any(p is layer.weight for p in m.parameters(recurse=False)) for m in model.modules()) > 1:
            raise InputError(f"{name} cannot be merged: its weight is tied to another layer's")
    updates = [(layer, layer.update()) for _, layer in adapter_layers(model)]
    for layer, update in updates:
        layer.weight.copy_(layer.weight.double() + update)
        layer.lora_B.zero_()


def parameter_state(parameters):
    """name -> a copy of each parameter on the CPU, ready for torch.save."""
    return {name: p.detach().cpu().clone() for name, p in parameters.items()}


def load_parameters(parameters, state):
    """Copy `state` (name -> tensor) into `parameters`, all or nothing; InputError if a name or shape differs.

    Strict, because with B = 0 a wholly unmatched adapter would give exactly the base and no other symptom.
    """
    missing, unexpected = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
    if missing or unexpected or not parameters:
        raise InputError("the adapter does not fit the model: "
                         f"missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, p in parameters.items():
        if p.shape != state[name].shape:
            raise InputError(f"the adapter does not fit: {name} is {tuple(state[name].shape)}, "
                             f"not {tuple(p.shape)}")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state[name])


# ---- Files that are not what they should be, for model.py and data.py

FOREIGN = {  # how files begin that are often found in another's place: what they are, and the way out
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself; run git lfs pull in its folder",
    rb"\s*<[!?\w]|Entry not found|Access to model|Invalid username":
        "a server's answer, not the file itself; download it again, perhaps logged in",
    rb"\x1f\x8b|BZh|\xfd7zXZ|\(\xb5/\xfd": "compressed; unpack it",
    rb"PAR1|ARROW1": "a Parquet or Arrow table; write its rows as JSON lines",
    rb"GGUF": "llama.cpp's GGUF; take the Hugging Face folder that it was made from",
    rb"\xff\xfe|\xfe\xff": "text in UTF-16; save it as UTF-8"}


def foreign(path):
    """What a file that cannot be read really is, by its first bytes, with the way out; "" if unknown."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError:
        return ""
    return next((what for begins, what in FOREIGN.items() if re.match(begins, head)), "")


if __name__ == "__main__":
    # two tokens of width 3 through a layer of two experts of rank 1, with B and M as if trained
    def show(name, value):
        print(f"{name:34}{str(tuple(value.shape)):8}{[round(v, 4) for v in value.flatten().tolist()]}")
    torch.manual_seed(0)
    layer = TeamLoRALinear(3, 2, adapter=AdapterConfig(rank=1, n_experts=2, alpha=1.0))
    nn.init.normal_(layer.lora_B)
    layer.interaction.data = torch.tensor([[0.0, -0.6], [0.3, 0.0]])
    for name, value in (("W, frozen", layer.weight), ("A, shared", layer.lora_A),
                        ("R, the router", layer.router), ("M: expert 1 lowers expert 2", layer.interaction),
                        ("B, one column each", layer.lora_B)):
        show(name, value)
    for number, x in enumerate(torch.randn(2, 3), 1):
        z, phi, w = layer.lora_A @ x, torch.softmax(layer.router @ x, -1), layer.gate(layer.router @ x)
        parts = layer.lora_B * z * w             # column e: w_e B_e z_e
        print(f"\ntoken {number}")
        for name, value in (("x", x), ("z = A x, one number per expert", z), ("phi = softmax(R x)", phi),
                            ("phi + phi M", phi + phi @ layer.interaction), ("w: that, scaled to sum 2", w),
                            ("W x", layer.weight @ x), ("w_1 B_1 z_1", parts[:, 0]),
                            ("w_2 B_2 z_2", parts[:, 1]),
                            ("y = W x + their sum", layer.weight @ x + parts.sum(1)), ("layer(x)", layer(x))):
            show(name, value)
