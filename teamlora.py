"""TeamLoRA, one adapted linear layer, and the methods it is compared with.

The idea: a frozen linear map W gets one shared down-projection A and E expert up-projections B_e. A router
weighs the experts for every token, and a small matrix M lets the experts raise or lower each other's weight.
Paper: Lin et al., "TeamLoRA", ACL 2025, arXiv 2408.09856; the equations here follow its authors' layer.

    z   = A x                    shared by all experts; expert e owns slice e of it
    phi = softmax(R x)           what the paper calls Shapley values: a softmax, no Shapley value is computed
    w   = phi + phi M            M starts with diagonal 0; then w is scaled: a token's weights sum to E
    y   = W x + (alpha / r) * sum_e w_e B_e dropout(z_e)

What may surprise:
- No loop over experts. Scaling slice e of z by w_e and multiplying by all B side by side is the same sum,
  in one matmul whose cost does not depend on E.
- A weight may be negative: an expert can be held against. Weights sum to E, not to 1 as in a plain mixture.
- Dropout acts on z, after A; most LoRA code drops x before A.
- The paper writes w_i = sum_j M_ij phi_j, diagonal 1; the released code, and we, phi + phi M, diagonal 0.
- LoRA, MoELoRA and HydraLoRA are this layer with little changed; E = 1 is plain LoRA in all of them.

Letters: B batch, T time, C model width, H heads, D head width, V vocabulary, E experts, r rank of one expert,
L adapted layers.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

ADAPTER_KEYS = ("lora_A", "lora_B", "router", "interaction")


class InputError(ValueError):
    """What the user gave cannot be used: one sentence that names it and the way out. train.py prints it."""


def softmax(logits):
    """In fp32, for bf16 loses the small weights; the product R x accumulates in fp32 anyway."""
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


class TeamLoRALinear(nn.Linear):
    """Linear layer (..., in) -> (..., out) with a frozen `weight` and trainable experts (arXiv 2408.09856).

    rank: r of one expert, so the shared A has E*r rows; alpha: the update is scaled by alpha / r;
    dropout: applied to z = A x. Parameters: lora_A (E*r, in), lora_B (out, E*r), router (E, in),
    interaction (E, E). `weight` keeps its name, so a checkpoint of the plain layer loads as it is.
    Raises InputError if rank or n_experts is below 1 or dropout is outside [0, 1).
    """

    change_weights = None                        # set by `restricted` alone: w -> w, after the competition

    def __init__(self, in_features, out_features, bias=False, *,
                 rank=8, n_experts=4, alpha=16.0, dropout=0.0):
        super().__init__(in_features, out_features, bias)
        for name, value in (("rank", rank), ("n_experts", n_experts)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must lie in [0, 1), got {dropout}")
        self.rank, self.n_experts, self.alpha, self.dropout = rank, n_experts, alpha, dropout
        for p in self.parameters():
            p.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(n_experts * rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, n_experts * rank))
        self.router = nn.Parameter(torch.empty(n_experts, in_features))
        self.interaction = nn.Parameter(torch.empty(n_experts, n_experts))
        self.reset_adapter()

    def reset_adapter(self):
        """Fresh adapter: every B is zero, so the layer computes exactly its base layer."""
        for p in (self.lora_A, self.router):
            if p is not None:
                nn.init.kaiming_uniform_(p, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.interaction is not None:
            nn.init.uniform_(self.interaction, -0.1, 0.1)
            with torch.no_grad():
                self.interaction.fill_diagonal_(0)

    def route(self, x):
        """Weights of the experts (..., in) -> (..., E), in fp32 (float64 for float64)."""
        router = self.lora_A[:0] if self.router is None else self.router
        return self.compete(F.linear(x, router.to(x.dtype)))

    def compete(self, logits):
        """The competition: R x (..., E) -> the experts' weights (..., E), of sum E, in fp32 or float64."""
        phi = softmax(logits)
        w = phi + phi @ self.interaction.to(phi.dtype)
        # subtle: the sum is 1 + phi (M 1) and nothing constrains M, so it can reach 0 or turn negative, which
        # would blow up the update or flip its sign. Below 0.1 it counts as 0.1: none grows more than tenfold.
        return self.n_experts * w / w.sum(-1, keepdim=True).clamp(min=0.1)

    def weighted(self, z, w):
        """Slice e of z (..., E*r) times w_e (..., E) -> (..., E*r)."""
        return (z.unflatten(-1, (self.n_experts, self.rank)) * w.unsqueeze(-1)).flatten(-2)

    def forward(self, x, routing=None):
        """x (..., in) -> (..., out), in x's dtype. `routing`: a list that receives the weights (..., E)."""
        shape, x = x.shape[:-1], x.reshape(-1, self.in_features)                     # (B*T, in)
        # A and R read the same x: one product. Besides x, backward keeps nothing wider than its output
        narrow = self.lora_A if self.router is None else torch.cat((self.lora_A, self.router))
        z, logits = F.linear(x, narrow.to(x.dtype)).tensor_split((len(self.lora_A),), -1)
        w = self.compete(logits)                                                     # (B*T, E)
        if self.change_weights:
            w = self.change_weights(w)
        if routing is not None:
            routing.append(w.view(*shape, -1))
        z = F.dropout(z, self.dropout, self.training)
        # alpha / r goes into the weights: E numbers a token instead of out
        z = self.weighted(z, (w * (self.alpha / self.rank)).to(x.dtype))             # (B*T, E*r)
        y = F.linear(x, self.weight, self.bias)
        # added inside the second product: a sum of two products would pass over (B*T, out) once more
        return y.addmm_(z, self.lora_B.to(x.dtype).T).view(*shape, -1)               # (..., out)

    def update(self):
        """What the adapter adds to `weight`, (out, in), in float64; InputError if it depends on the token."""
        if self.router is not None and self.n_experts > 1:
            raise InputError(f"{type(self).__name__} with {self.n_experts} experts cannot be merged into its "
                             "base: their weights depend on the token; lora and every method with "
                             "n_experts=1 can")
        A, B = self.lora_A.detach().double(), self.lora_B.detach().double()
        w = self.route(A.new_zeros(self.in_features))        # (E,), the same for every token
        return B @ self.weighted(A.T, w * (self.alpha / self.rank)).T

    def extra_repr(self):
        return f"{super().extra_repr()}, rank={self.rank}, n_experts={self.n_experts}, alpha={self.alpha}"


class LoRALinear(TeamLoRALinear):
    """LoRA of total rank E*r (Hu et al., arXiv 2106.09685): every weight is 1, so nothing routes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.router = self.interaction = None

    def compete(self, logits):
        one = logits.new_ones((), dtype=torch.promote_types(logits.dtype, torch.float32))
        return one.expand(*logits.shape[:-1], self.n_experts)


class MoELoRALinear(TeamLoRALinear):
    """MoELoRA as the paper's baseline (LoRAMoE's layer, arXiv 2312.09979): softmax weights, which sum to 1.

    Every expert has its own A_e; stacked, they are our lora_A, so shared A and separate A_e are one function.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.interaction = None

    def compete(self, logits):
        return softmax(logits)


class HydraLoRALinear(MoELoRALinear):
    """HydraLoRA (Tian et al., arXiv 2404.19245): softmax weights; each expert sees all of one A of rank r."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_A = nn.Parameter(self.lora_A[:self.rank].detach().clone())         # (r, in)

    def weighted(self, z, w):
        """One copy of z (..., r) per expert, each times its w_e (..., E) -> (..., E*r)."""
        return (z.unsqueeze(-2) * w.unsqueeze(-1)).flatten(-2)


def published_loop(layer, x, routing=None):
    """The forward of any of these layers as published, a loop over experts: timed, and the tests' reference.

    MoELoRA and HydraLoRA evaluate A once per expert, TeamLoRA once; each expert then adds its (..., out).
    """
    E, r, A = layer.n_experts, layer.rank, layer.lora_A.to(x.dtype)
    w = (x.new_ones(*x.shape[:-1], E) if layer.router is None else
         F.linear(x, layer.router.to(x.dtype)).softmax(-1))
    if layer.interaction is not None:
        w = w + torch.einsum("...i,ij->...j", w, layer.interaction.to(x.dtype))
        w = E * w / w.sum(-1, keepdim=True)
    if isinstance(layer, MoELoRALinear):
        zs = [F.linear(x, A_e) for A_e in (A.split(r) if len(A) > r else [A] * E)]
    else:
        zs = F.linear(x, A).split(r, -1)
    y = F.linear(x, layer.weight, layer.bias)
    for e, B_e in enumerate(layer.lora_B.to(x.dtype).split(r, 1)):
        z = F.dropout(zs[e], layer.dropout, layer.training)
        y += w[..., e:e + 1] * F.linear(z, B_e) * (layer.alpha / r)
    return y


METHODS = {"teamlora": TeamLoRALinear, "lora": LoRALinear, "moelora": MoELoRALinear,
           "hydralora": HydraLoRALinear}


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


def adapter_layers(model):
    """The adapted layers of a model, as (name, layer) pairs in the model's order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, TeamLoRALinear)]


@torch.no_grad()
def merge(model):
    """Move every adapter's update into its frozen weight: the model computes the same as before, with B = 0.

    Raises InputError if a method's update depends on the token; then nothing has changed.
    """
    for _, layer in adapter_layers(model):       # all of one method, so the first raises if any does
        layer.weight.copy_(layer.weight.double() + layer.update())
        layer.lora_B.zero_()


def adapter_parameters(model):
    """name -> parameter of everything an adapter adds: lora_A, lora_B, router, interaction."""
    return {f"{name}.{key}": p for name, layer in adapter_layers(model)
            for key, p in layer.named_parameters(recurse=False) if key in ADAPTER_KEYS}


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


# ---- What one can ask of the experts of a trained model

@contextmanager
def restricted(model, change):
    """Inside this block the weights w (..., E) of every adapted layer are change(w): see `only` and `top`."""
    layers = [layer for _, layer in adapter_layers(model)]
    for layer in layers:
        layer.change_weights = change
    try:
        yield
    finally:
        for layer in layers:
            layer.change_weights = None


def only(experts):
    """Switch all experts off but these: their weights stay as they are, the others become 0."""
    def change(w):
        kept = torch.zeros_like(w)
        kept[..., list(experts)] = w[..., list(experts)]
        return kept
    return change


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


def distribution(usage):
    """Weights (..., E) as shares of the experts: negative ones count as 0, and the shares sum to 1."""
    p = usage.clamp(min=0)
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
