"""Is the layer the equation, is the model a Llama, does exactly the right part train?

    pytest test_teamlora.py     half a minute on two cores; no network, tiny random weights
    pytest                      and what else a doubter asks: weights, data, runs, bad input (tests/)

The idea: everything is compared with the same thing written naively, one expert, head and position at a time.
Each docstring says which break its test catches; a failure names the method, the number of experts E and the
place to look. Most tests run over METHODS, so a new method is tested as soon as it stands there.

Letters: B batch, T time, C model width, D head width, V vocabulary, E experts, r rank of one expert,
L adapted layers, N supervised positions.
"""

import itertools
import json
import math
import random
import runpy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import data
import teamlora
import train
from model import MAX_LOGITS, MLP, PROJECTIONS, Llama, LlamaConfig, load_llama, save_llama
from teamlora import (METHODS, AdapterConfig, InputError, MoELoRALinear, TeamLoRALinear, adapter_layers,
                      adapter_parameters, balance_loss, changed_weights, collected_weights, load_parameters,
                      mean_usage, merge, parameter_state)

# head_dim unlike width / heads, odd vocabulary
TINY = LlamaConfig(vocab_size=101, hidden_size=48, intermediate_size=56, num_hidden_layers=3,
                   num_attention_heads=6, num_key_value_heads=2, head_dim=10, rms_norm_eps=1e-5,
                   rope_theta=500.0)


def tiny(method="teamlora", config=TINY, dtype=torch.float32, **adapter):
    """A tiny random Llama whose experts are no longer zero."""
    torch.manual_seed(1)
    model = Llama(config, AdapterConfig(method, **{"rank": 3, "n_experts": 4, **adapter})).init_weights()
    return randomise(model).to(dtype)


def randomise(module):
    """Move every adapter parameter away from its initial value, so that nothing is hidden by B = 0."""
    with torch.no_grad():
        for p in adapter_parameters(module).values():
            p.add_(torch.randn_like(p), alpha=0.2)
    return module


def layer_of(method, E, dtype=torch.float64, n_in=11, n_out=7, rank=3, **more):
    torch.manual_seed(E)
    adapter = AdapterConfig(method, rank=rank, n_experts=E, **more)
    return randomise(METHODS[method](n_in, n_out, adapter=adapter).to(dtype))


def weights_of(layer, x):
    """What the layer's forward uses as the weights of its experts."""
    with collected_weights(layer) as weights:
        layer(x)
    return weights[0]


def difference(ours, theirs):
    """The largest difference, in units of what is compared where that is above 1."""
    return float((ours - theirs).detach().abs().max() / max(1, theirs.detach().abs().max()))


# ---- Is the layer the equation?

def by_the_equation(layer, x):
    """y = W x + (alpha / r) sum_e w_e B_e z_e of every token, one expert after the other."""
    E, r, rows = layer.adapter.n_experts, layer.adapter.rank, []
    for token in x.flatten(0, -2):
        z, y = layer.lora_A @ token, layer.weight @ token
        w = layer.gate(token[:0] if layer.router is None else layer.router @ token)                  # (E,)
        for e in range(E):
            own = slice(e * r, e * r + r)
            z_e = z[own] if len(z) == E * r else z       # HydraLoRA has one A of rank r, which all see
            y = y + layer.adapter.alpha / r * w[e] * (layer.lora_B[:, own] @ z_e)
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("E", [1, 2, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_layer_and_gradients_equal_the_loop_over_experts(method, E, dtype, tolerance):
    """Catches any slip in slicing or scaling: two matmuls must be the sum over experts, and its gradients."""
    layer = layer_of(method, E, dtype)
    x = torch.randn(2, 5, 11, dtype=dtype, requires_grad=True)
    inputs = {"x": x, **adapter_parameters(layer)}
    direction, results = torch.randn(2, 5, 7, dtype=dtype), []
    for function in (layer, lambda x: by_the_equation(layer, x)):
        y = function(x)
        results.append([y, *torch.autograd.grad((y * direction).sum(), list(inputs.values()))])
    for name, ours, theirs in zip(["y", *inputs], *results):
        what = "its output" if name == "y" else f"its gradient of {name}"
        assert difference(ours, theirs) <= tolerance, (
            f"{method} with {E} experts: {what} differs from the sum over experts by "
            f"{difference(ours, theirs):.1g}; look at {type(layer).__name__}.forward, seen and gate")
    assert layer(x[:0]).shape == (0, 5, 7), f"{method}: no token in, no token out"


def softmaxed(logits):
    total = sum(math.exp(v) for v in logits)
    return [math.exp(v) / total for v in logits]


def competed(logits, M):
    phi, E = softmaxed(logits), len(logits)
    w = [phi[e] + sum(phi[i] * M[i][e] for i in range(E)) for e in range(E)]
    return [E * v / max(sum(w), 0.1) for v in w]


# method -> its gate, from the R x of one token and M; one that is not here is tested by all other tests
GATES = {"teamlora": competed, "lora": lambda logits, M: [1.0] * len(logits),
         "moelora": lambda logits, M: softmaxed(logits), "hydralora": lambda logits, M: softmaxed(logits)}


@pytest.mark.parametrize("E", [1, 2, 4, 8])
@pytest.mark.parametrize("method", GATES)
def test_gate_is_its_formula(method, E):
    """Catches phi M^T in place of phi M, a sum of 1 in place of E."""
    layer, logits = layer_of(method, E), 2 * torch.randn(6, E, dtype=torch.float64)
    M = None if layer.interaction is None else layer.interaction.tolist()
    given = logits[:, :0] if layer.router is None else logits
    expected = torch.tensor([GATES[method](row, M) for row in logits.tolist()], dtype=torch.float64)
    assert difference(layer.gate(given), expected) < 1e-12, (
        f"{method} with {E} experts: {type(layer).__name__}.gate({logits[0].tolist()}) is "
        f"{layer.gate(given)[0].tolist()}, its formula says {expected[0].tolist()}")


@pytest.mark.parametrize("method", METHODS)
def test_gate_is_in_fp32(method):
    """Catches weights that are computed, or collected for the balance term, in the base's bf16."""
    layer, x = layer_of(method, 4, torch.bfloat16), torch.randn(5, 11).bfloat16()
    logits = torch.empty(5, 0) if layer.router is None else F.linear(x, layer.router).float()
    w = weights_of(layer, x)
    assert w.dtype == torch.float32 and torch.allclose(w, layer.gate(logits), rtol=1e-5), method


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method):
    """Catches a forward whose autograd is not its derivative (a detach, an in-place slip)."""
    layer = layer_of(method, 3, n_in=5, n_out=4, rank=2)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    inputs = x, *adapter_parameters(layer).values()      # gradcheck changes them in place
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs), f"{method} with 3 experts"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_fresh_layer_is_its_base_bit_for_bit(method, bias):
    """Catches a B that does not start at zero, a base path that is not the plain linear map, a lost dtype."""
    layer = METHODS[method](32, 24, bias, AdapterConfig(method))
    assert not layer.weight.requires_grad and (layer.bias is None or not layer.bias.requires_grad)
    assert all(p.requires_grad for p in adapter_parameters(layer).values())
    for dtype in (torch.float32, torch.bfloat16):   # of the base; adapters stay in fp32
        for p in (layer.weight, *([layer.bias] if bias else [])):
            p.data = p.data.to(dtype)
        x = torch.randn(3, 5, 32, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype and torch.equal(y, F.linear(x, layer.weight, layer.bias)), method


def test_initial_values():
    """Catches a wrong init: A and R Kaiming-uniform of bound 1/sqrt(in), B zero, M uniform of diagonal 0."""
    layer = TeamLoRALinear(400, 10, adapter=AdapterConfig(rank=8, n_experts=4))
    for p in (layer.lora_A, layer.router):
        assert 0.045 < p.abs().max() <= 0.05
    off_diagonal = layer.interaction[~torch.eye(4, dtype=torch.bool)]
    assert off_diagonal.ne(0).all() and off_diagonal.abs().max() <= 0.1
    assert layer.interaction.diagonal().eq(0).all() and layer.lora_B.eq(0).all()
    assert (layer.lora_A.shape, layer.lora_B.shape, layer.router.shape) == ((32, 400), (10, 32), (4, 400))


def test_weights_may_be_negative_but_their_sum_is_guarded():
    """Catches weights that are clamped, for an expert may be held against; an unguarded 1 + phi (M 1): where
    it is 0 the update would be infinite, below 0 its sign would flip."""
    layer, x = layer_of("teamlora", 4, torch.float32), torch.randn(20, 11, requires_grad=True)
    M = layer.interaction.data
    M.zero_()[0, 1] = -0.9                       # expert 0 speaks against expert 1
    assert layer.gate(torch.tensor([3.0, 0, 0, 0]))[1] < 0
    for row_sum in (-1.0, -1.5):
        M.zero_()[:, 0] = row_sum
        w = weights_of(layer, x)
        assert w.isfinite().all() and w.abs().max() <= 10 * 4 * 2 and (w[:, 1:] > 0).all()
        gradient, = torch.autograd.grad(layer(x).sum(), x)
        assert gradient.isfinite().all()


def test_backward_keeps_nothing_wide_but_the_input():
    """Catches an update (..., out), a scaled z per expert of width out, or x again, that autograd keeps."""
    layer, kept = layer_of("teamlora", 4, torch.float32, n_in=640, n_out=512), {}
    x = torch.randn(2, 100, 640, requires_grad=True)

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    for p in (x, *layer.parameters()):
        kept.pop(p.data_ptr(), None)
    narrow = 200 * (4 * 3 + 4) * 4               # bytes of A x and R x
    assert sum(kept.values()) < 3 * narrow + 2 * layer.lora_A.nbytes


def test_dropout_acts_on_z():
    """Catches dropout on x: with B the identity, dropping a number of z zeroes one output, mixes none."""
    layer = layer_of("lora", 1, torch.float32, n_in=4, n_out=4, rank=4, alpha=4.0, dropout=0.5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.fill_(1.0)
        layer.lora_B.copy_(torch.eye(4))
    x = torch.ones(1000, 4)
    y = layer.train()(x)                         # every z is 4; kept ones count double
    assert set(y.unique().tolist()) == {0.0, 8.0} and 0.45 < y.eq(0).float().mean() < 0.55
    assert layer.eval()(x).unique().tolist() == [4.0]


def test_the_file_run_by_itself_shows_the_equation(capsys):
    """Catches a worked example whose sum is no longer what the layer computes."""
    runpy.run_path(teamlora.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()[-2:]
    by_hand, layer = (json.loads(line[line.rindex("["):]) for line in lines)
    assert len(layer) == 2 and by_hand == pytest.approx(layer, abs=2e-4)


# ---- Are the rivals fair?

def test_rivals_differ_only_in_what_they_should():
    """Catches an unfair baseline: sizes and sums of weights are those of the README's table of methods."""
    E, r, n_in, n_out = 4, 3, 11, 7
    both, router = E * r * (n_in + n_out), E * n_in
    for method, size, total in (("teamlora", both + router + E * E, 4.0), ("lora", both, 4.0),
                                ("moelora", both + router, 1.0),
                                ("hydralora", r * n_in + E * r * n_out + router, 1.0)):
        layer = layer_of(method, E, torch.float32)
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == size, method
        assert torch.allclose(weights_of(layer, torch.randn(6, n_in)).sum(-1), torch.tensor(total)), method


@pytest.mark.parametrize("method", ["teamlora", "moelora", "hydralora"])
def test_one_expert_is_plain_lora(method):
    """Catches a router that changes the scale at E = 1."""
    layer, lora = layer_of(method, 1), layer_of("lora", 1)
    lora.load_state_dict({k: v for k, v in layer.state_dict().items() if k in lora.state_dict()})
    x = torch.randn(6, 11, dtype=torch.float64)
    assert difference(layer(x), lora(x)) < 1e-12, f"{method} with 1 expert; look at its gate"


def test_balance_and_usage_leave_padding_out():
    """Catches padding in the mean, a target of 1/E, a term that is not zero when experts are used evenly."""
    w = torch.rand(2, 3, 5, 4)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    by_hand = (w[:, 0, :2].sum(1) + w[:, 1, :4].sum(1)) / 6
    assert torch.allclose(mean_usage(w[:, :2], mask), by_hand)
    assert balance_loss(torch.ones(3, 4)) == 0 and balance_loss(torch.tensor([[4.0, 0, 0, 0]])) == 3


@pytest.mark.parametrize("bad", [{"rank": 0}, {"n_experts": 0}, {"dropout": 1.0}, {"dropout": -0.1},
                                 {"alpha": 0.0}, {"method": "nonsense"}, {"targets": ("gate_proj", "w1")}])
def test_adapter_refuses_nonsense(bad):
    """Catches a layer that is built although it cannot work, a misspelt target that stays without adapter."""
    with pytest.raises(InputError, match=f"{next(iter(bad))} must be"):
        Llama(TINY, AdapterConfig(**bad))


@pytest.mark.parametrize("method", METHODS)
def test_changed_weights_nest_and_come_back(method):
    """Catches a change that misses a layer, that the block inside undoes, or that outlives an error."""
    model, bare = (tiny(m, dtype=torch.float64, targets=("down_proj", "q_proj")) for m in (method, "none"))
    load_parameters(bare.base_parameters(), parameter_state(model.base_parameters()))
    whole = model(tokens := torch.randint(0, 101, (2, 9)))
    with changed_weights(model, torch.zeros_like):
        assert torch.equal(model(tokens), bare(tokens)), f"{method}: weights of 0 are not the bare base"
    with pytest.raises(KeyError), changed_weights(model, lambda w: 2 * w), collected_weights(model) as outer:
        doubled = model(tokens)
        with changed_weights(model, lambda w: w / 2), collected_weights(model) as inner:
            assert difference(model(tokens), whole) < 1e-12
        assert torch.equal(model(tokens), doubled) and not torch.allclose(doubled, whole)
        assert len(inner) == 6 and len(outer) == 18 and torch.equal(outer[0], 2 * inner[0])
        raise KeyError
    assert torch.equal(model(tokens), whole)


class SigmoidLinear(MoELoRALinear):
    """A method nobody has written yet: its weights depend on the token even with one expert."""

    def gate(self, logits):
        return torch.sigmoid(logits.double()).to(torch.promote_types(logits.dtype, torch.float32))


@pytest.mark.parametrize("method, E", [*((m, E) for m in METHODS for E in (1, 4)), ("unwritten", 1)])
def test_merged_model_computes_the_same_or_is_refused(monkeypatch, method, E):
    """Catches a wrong scale or transposed product, a router that is dropped, a refused model half merged."""
    monkeypatch.setitem(METHODS, "unwritten", SigmoidLinear)
    model, bare = (tiny(m, n_experts=E, alpha=5.0, targets=("q_proj", "down_proj")) for m in (method, "none"))
    if method == "teamlora" and E == 1:
        for _, layer in adapter_layers(model):
            layer.interaction.data.fill_(-0.95)  # 1 + M is below the guard: the constant weight is not 1
    # the first layer alone could be merged, whatever the method
    adapter_layers(model)[0][1].gate = lambda logits: logits.new_ones(*logits.shape[:-1], E)
    before, tokens = parameter_state(dict(model.named_parameters())), torch.randint(0, 101, (2, 65))
    expected, refused = model(tokens), ""
    try:
        merge(model)
    except InputError as e:
        refused = str(e)
    load_parameters(bare.base_parameters(), parameter_state(model.base_parameters()))
    if refused:
        assert f"{E} experts cannot be merged" in refused and "depend on the token" in refused
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    else:
        assert difference(model(tokens), expected) < 1e-4, f"{method} with {E} experts: look at update"
        assert torch.equal(bare(tokens), model(tokens)), "after a merge every B is zero"
    if method in GATES or method == "sigmoid":
        assert bool(refused) == (method == "sigmoid" or method != "lora" and E > 1), f"{method}, {E} experts"


# ---- Is the model a Llama?

def naive_llama(model, tokens):
    """Llama written from its papers with complex rotary numbers, one head and one position at a time."""
    c, w = model.config, dict(model.named_parameters())
    D, group = c.head_dim, c.num_attention_heads // c.num_key_value_heads

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def rotated(v, position):                    # element i and i + D/2 are the parts of one complex number
        angle = position * c.rope_theta ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
        z = torch.complex(v[:D // 2], v[D // 2:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag))

    def attention(q, k, v, t, head):
        mine, shared = slice(head * D, head * D + D), slice(head // group * D, head // group * D + D)
        scores = torch.stack([rotated(q[t, mine], t) @ rotated(k[s, shared], s) for s in range(t + 1)])
        return torch.softmax(scores / math.sqrt(D), 0) @ v[:t + 1, shared]
    x = w["model.embed_tokens.weight"][tokens]                                       # (T, C)
    for i in range(c.num_hidden_layers):
        layer = {k.removeprefix(f"model.layers.{i}."): v for k, v in w.items() if f"layers.{i}." in k}
        h = norm(x, layer["input_layernorm.weight"])
        q, k, v = (h @ layer[f"self_attn.{p}_proj.weight"].T for p in "qkv")
        rows = [torch.cat([attention(q, k, v, t, head) for head in range(c.num_attention_heads)])
                for t in range(len(tokens))]
        x = x + torch.stack(rows) @ layer["self_attn.o_proj.weight"].T
        h = norm(x, layer["post_attention_layernorm.weight"])
        gate, up = (h @ layer[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ layer["mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def test_model_equals_a_llama_written_naively():
    """Catches interleaved rotary pairs, mixed-up key/value groups, a wrong norm, gate and up exchanged."""
    model, tokens = tiny("none", dtype=torch.float64), torch.randint(0, 101, (20,))
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.normal_(1, 0.2)
    assert difference(model(tokens[None])[0], naive_llama(model, tokens)) < 1e-6     # rotary tables are fp32


def test_padding_on_the_right_changes_nothing():
    """Catches attention that looks at padding: the logits of a short row do not depend on its neighbours."""
    model, tokens = tiny(), torch.randint(0, 101, (2, 17))
    assert difference(model(tokens)[0, :9], model(tokens[:1, :9])[0]) < 1e-5


def test_losses_are_those_of_supervised_positions():
    """Catches a shifted target, a mean in place of a loss each, and unsupervised positions that count."""
    model = tiny()
    tokens, targets = torch.randint(0, 101, (2, 9)), torch.full((2, 9), -1)
    targets[0, 3:6], targets[1, 8] = torch.tensor([5, 6, 7]), 11
    targets[0, 4] = model(tokens)[0, 4].argmax()
    losses, hits = model(tokens, targets)
    log_p = model(tokens).log_softmax(-1)
    by_hand = -torch.stack([log_p[0, 3, 5], log_p[0, 4, targets[0, 4]], log_p[0, 5, 7], log_p[1, 8, 11]])
    assert torch.allclose(losses, by_hand, rtol=1e-5) and losses.dtype == torch.float32
    assert hits.tolist() == [False, True, False, False]


@pytest.mark.parametrize("method", ["none", "teamlora"])
def test_cached_generation_equals_uncached(method):
    """Catches rotary positions that restart at 0 and keys that the cache loses."""
    model, prompt = tiny(method), torch.randint(0, 101, (2, 5))
    runs = [model.generate(prompt, 20, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*runs) and runs[0].shape[1] > 3
    seeded = [model.generate(prompt, 9, temperature=0.8, top_k=5, use_cache=c,
                             generator=torch.Generator().manual_seed(3)) for c in (True, False)]
    assert torch.equal(*seeded)


@pytest.mark.parametrize("cached, n", [(True, 32), (False, 8)])
def test_prompts_of_mixed_lengths_are_answered_at_once_as_one_by_one(cached, n):
    """Catches new tokens that see padding or count it in their position, a first token read off padding."""
    model, rng = tiny(dtype=torch.float64), random.Random(0)
    prompts = [torch.randint(0, 101, (rng.randint(1, 40),)) for _ in range(n)]
    together = model.generate(torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=7), 12,
                              lengths=torch.tensor([len(p) for p in prompts]), use_cache=cached).tolist()
    for prompt, row in zip(prompts, together):
        alone = model.generate(prompt[None], 12)[0].tolist()
        assert row[:len(alone)] == alone and set(row[len(alone):]) <= {2}
    assert len(set(map(tuple, together))) > n - 4


def test_generation_stops_at_end_of_sequence():
    """Catches text after the end, and one row's end that ends the other."""
    model, prompt = tiny("none"), torch.randint(0, 101, (2, 5))
    free = model.generate(prompt, 12)
    end = int(free[0, 2])
    model.config = replace(model.config, eos_token_id=(end,))
    for row, expected in zip(model.generate(prompt, 12).tolist(), free.tolist()):
        n = expected.index(end) + 1 if end in expected else len(row)
        assert row[:n] == expected[:n] and set(row[n:]) <= {end}


def test_top_k_chooses_among_the_k_likeliest():
    """Catches a top-k that keeps others, or one too few."""
    model, prompt = tiny("none"), torch.randint(0, 101, (1, 4))
    assert torch.equal(model.generate(prompt, 8), model.generate(prompt, 8, temperature=5.0, top_k=1))
    drawn = model.generate(prompt.expand(300, -1), 1, temperature=5.0, top_k=3)
    assert set(drawn.flatten().tolist()) == set(model(prompt)[0, -1].topk(3).indices.tolist())


def test_logits_never_exist_whole(monkeypatch):
    """Catches (N, V) logits kept for the backward pass, and chunks that change a loss or a gradient."""
    model = tiny(config=replace(TINY, vocab_size=5000))
    hidden, targets = torch.randn(4, 64, 48), torch.randint(0, 5000, (4, 64))
    targets[:, ::4] = -1
    results, peaks, activities = [], [], [torch.profiler.ProfilerActivity.CPU]
    for limit in (10 ** 9, 25 * 5000):
        monkeypatch.setattr("model.MAX_LOGITS", limit)
        h = hidden.clone().requires_grad_()
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            losses, hits = model.token_losses(h, targets)
            losses.square().sum().backward()     # unlike a sum, it gives every token a gradient of its own
        results.append((losses, hits, h.grad))
        log = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events()
                     if e.name() == "[memory]")
        peaks.append(max(itertools.accumulate(n for _, n in log)))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results))
    # 8 bytes of fp32 per limit * 8 below: at the real limit of 2^25 logits no more than 1 GB
    assert peaks[0] > 192 * 5000 * 4 * 2 and peaks[1] < 25 * 5000 * 4 * 8
    assert MAX_LOGITS * 4 * 8 <= 2 ** 30


# ---- Does exactly the right part train?

def examples_of(n, seed=0):
    """n random Examples of the tiny vocabulary, each with an answer of its own."""
    rng = random.Random(seed)
    rows = [[rng.randrange(3, 101) for _ in range(rng.randint(3, 40))] for _ in range(n)]
    return [data.Example("t", [1, *row, 2], rng.randint(1, len(row))) for row in rows]


def batches_of(examples, max_tokens=10 ** 6):
    """The step's micro-batches, as few as the budget allows."""
    return [data.collate(b) for b in data.cut(examples, max_tokens, overhead=max_tokens)]


class Noted:
    """An optimizer for training_step that changes nothing and notes the gradients it is given."""

    def __init__(self, model):
        self.model, self.zero_grad = model, model.zero_grad
        self.param_groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def step(self):
        self.gradients = {n: p.grad.clone() for n, p in train.trained(self.model).items()}


def gradients_of(model, batches, balance=0.0, clip=math.inf):
    """(what training_step returns, name -> gradient of the whole step)."""
    optimizer = Noted(model)
    return train.training_step(model, batches, optimizer, clip, balance), optimizer.gradients


@pytest.mark.parametrize("method", METHODS)
def test_targets_are_adapted_and_everything_trains_after_two_steps(method):
    """Catches a frozen adapter, a trainable base, a target left out. In step 1, B = 0 stops A, R and M."""
    torch.manual_seed(0)
    targets, cfg = PROJECTIONS[::3], train.Config(method=method)
    model = Llama(TINY, AdapterConfig(method, targets=targets)).init_weights()
    assert [n.rpartition(".")[2] for n, _ in adapter_layers(model)] == list(targets) * TINY.num_hidden_layers
    assert train.trained(model).keys() == adapter_parameters(model).keys()
    before = parameter_state(dict(model.named_parameters()))
    train.fit(model, lambda step: batches_of(examples_of(4)), train.make_optimizer(model, cfg), cfg, 2)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, (
            f"{method}: two steps {'left' if p.requires_grad else 'changed'} {name}")


def test_full_trains_everything_and_none_nothing():
    """Catches a reference that trains too little."""
    assert all(p.requires_grad for p in tiny("full").parameters())
    assert not any(p.requires_grad for p in tiny("none").parameters())


class SharingMLP(MLP):
    """gate_proj and up_proj read the same x; here they share one A as well."""

    def __init__(self, config, adapter):
        super().__init__(config, adapter)
        self.up_proj.lora_A = self.gate_proj.lora_A


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_layers_share_stay_shared_and_train(monkeypatch, tmp_path, method):
    """Catches a loader that quietly gives each layer a parameter of its own, and counts that count twice."""
    save_llama(tiny("none"), tmp_path)
    monkeypatch.setattr("model.MLP", SharingMLP)
    built, model = tiny(method), load_llama(tmp_path, AdapterConfig(method, rank=3))
    ours, theirs = ({n: p.shape for n, p in adapter_parameters(m).items()} for m in (model, built))
    assert ours == theirs and not any("up_proj.lora_A" in n for n in ours), f"{method}: look at materialise"
    before, cfg = parameter_state(adapter_parameters(model)), train.Config(method=method)
    train.fit(model, lambda step: batches_of(examples_of(4)), train.make_optimizer(model, cfg), cfg, 2)
    assert all(b.mlp.up_proj.lora_A is b.mlp.gate_proj.lora_A for b in model.model.layers), method
    for name, p in adapter_parameters(model).items():
        assert not p.is_meta and not torch.equal(p, before[name]), f"{method}: {name} did not train"
    for parts in (adapter_parameters, Llama.base_parameters):
        load_parameters(parts(built), parameter_state(parts(model)))
    tokens = torch.randint(0, 101, (2, 9))
    assert torch.equal(built(tokens), model(tokens))


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_leaves_gradients_and_weights_alone(method):
    """Catches reentrant checkpointing, which trains the last layer only; weights lost or twice."""
    model, results = tiny(method), []
    tokens, targets, _ = batches_of(examples_of(3))[0]
    for model.checkpointing in (False, True):
        model.zero_grad()
        with collected_weights(model) as weights:
            losses, _ = model(tokens, targets)
        routing = torch.stack(weights)
        assert routing.shape == (9, *tokens.shape, 4), f"{method}: weights (L, B, T, E)"
        (losses.sum() + routing.square().sum()).backward()
        results.append([routing.detach(), *(p.grad.clone() for p in adapter_parameters(model).values())])
    assert len(weights) == 9 and all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results))


def test_compiled_blocks_compute_the_same_and_compile_twice():
    """Catches compiled layers that differ, checkpointed or not, a graph break, a compilation per length or
    wherever weights are collected, and PyTorch's limit of eight graphs, beyond which it silently stops."""
    torch._dynamo.reset()
    models, counter = (tiny(), tiny()), CompileCounterWithBackend("eager")
    models[1].compile_blocks(counter)
    for n, length, on in ((2, 8, False), (3, 24, True), (5, 16, False), (4, 40, True)):
        tokens, found = torch.randint(0, 101, (n, length + 1)), []
        batch = tokens[:, :-1], tokens[:, 1:], torch.ones(n, length, dtype=torch.bool)
        for model in models:
            model.checkpointing = on
            numbers, gradients = gradients_of(model, [batch])
            found.append([numbers["loss"], *gradients.values()])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*found, strict=True))
    assert counter.frame_count == 2, "the first block, whose input needs no gradient, and the rest"
    assert torch.equal(*(model.generate(tokens[:, :3], 4) for model in models))
    for _ in range(3):
        with collected_weights(models[1]) as weights:
            models[1](*batch[:2])
    assert len(weights) == 9 and counter.frame_count == 2, "generation and collected weights run eagerly"
    for B, T, grad in ((4, 16, False), (1, 16, True), (1, 16, False), (1, 1, True), (1, 1, False)):
        with torch.set_grad_enabled(grad):
            models[1].train(grad).hidden(torch.randint(0, 101, (B, T)))
    assert counter.frame_count > 8, "evaluation, single rows and single tokens each need a graph of their own"


@pytest.mark.parametrize("balance", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_any_cut_gives_the_same_gradient(method, balance):
    """Catches the mean of means over micro-batches, in the loss and in the balance term."""
    model, examples = tiny(method, dtype=torch.float64), examples_of(22)
    cuts = [batches_of(examples, budget) for budget in (10 ** 6, 300, 48)]
    assert len(cuts[0]) == 1 and len(cuts[2]) > 10
    (whole, expected), *others = (gradients_of(model, batches, balance) for batches in cuts)
    assert whole["tokens"] == sum(len(e.ids) - 1 for e in examples)
    assert whole["supervised"] == sum(len(e.ids) - e.n_prompt for e in examples)
    for batches, (numbers, gradients) in zip(cuts[1:], others):
        for ours, theirs in ((numbers, whole), (gradients, expected)):
            for name in ours:
                assert torch.allclose(ours[name], theirs[name], rtol=1e-8, atol=1e-12), (
                    f"{method}: {name} of {len(batches)} micro-batches; look at train.training_step")


@pytest.mark.parametrize("method", METHODS)
def test_balance_gradient_equals_autograd_of_the_term(method):
    """Catches a wrong slope of the two-pass balance term, other dropout in each pass, a loss without it."""
    model = tiny(method, dtype=torch.float64, dropout=0.3).train()
    batch, = batches_of(examples_of(11))
    runs = []
    for weight in (0.7, 0.0):                    # their difference is the term alone, whatever the loss
        torch.manual_seed(0)
        runs.append(gradients_of(model, [batch], weight))
    (numbers, gradients), (without, base) = runs
    torch.manual_seed(0)
    with collected_weights(model) as weights:
        model.hidden(batch[0])
    term = 0.7 * balance_loss(mean_usage(torch.stack(weights), batch[2]))
    names, parameters = zip(*adapter_parameters(model).items())
    expected = torch.autograd.grad(term, parameters, allow_unused=True, materialize_grads=True) if (
        term.requires_grad) else map(torch.zeros_like, parameters)
    assert torch.isclose(numbers["loss"] - without["loss"], term.detach(), rtol=1e-8, atol=1e-12)
    for name, g in zip(names, expected):
        assert torch.allclose(gradients[name] - base[name], g, rtol=1e-8, atol=1e-12), (
            f"{method}, gradient of {name}; look at train.balance_term")


def test_gradient_is_clipped_to_its_largest_norm():
    """Catches a step that forgets to clip, or that reports the norm afterwards."""
    model, batches = tiny(dtype=torch.float64), batches_of(examples_of(4))
    _, gradients = gradients_of(model, batches)
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    numbers, clipped = gradients_of(model, batches, clip=float(norm) / 4)
    assert torch.isclose(numbers["norm"], norm)
    assert all(torch.allclose(4 * clipped[n], g, rtol=1e-4) for n, g in gradients.items())


def test_step_with_infinite_gradient_is_skipped_and_counted():
    """Catches one bad step that turns every parameter, or a moment of the optimizer, into NaN."""
    model, batches = tiny(), batches_of(examples_of(4))
    before = parameter_state(adapter_parameters(model))

    def step_batches(step):
        with torch.no_grad():
            model.model.norm.weight.fill_(math.inf if step == 0 else 1.0)
        if step == 1:
            assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(model).items())
        return batches
    optimizer = train.make_optimizer(model, cfg := train.Config(learning_rate=1e-2))
    totals = train.fit(model, step_batches, optimizer, cfg, 2)
    assert all(state.get("step", 1) == 1 for state in optimizer.state.values()), (
        "a skipped step must leave the optimizer's state as it was")
    assert totals["skipped"] == 1 and all(p.isfinite().all() for p in adapter_parameters(model).values())
    assert not any(torch.equal(p, before[n]) for n, p in adapter_parameters(model).items())


def test_loop_reads_nothing_from_the_device_between_log_lines():
    """Catches a loop that waits for the GPU: on the meta device the first reading of anything is an error."""
    model, asked = tiny().to("meta"), []

    def step_batches(step):
        asked.append(step)
        return batches_of(examples_of(2, seed=step), 48)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    optimizer.step = lambda: None                # meta has no fused AdamW
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        train.fit(model, step_batches, optimizer, train.Config(balance=0.1, log_every=5), 100)
    assert asked == [0, 1, 2, 3, 4]


def test_exact_match_is_what_greedy_decoding_produces():
    """Catches an accuracy that teacher forcing flatters: it must equal generation, its end included."""
    model, examples = tiny("full"), examples_of(16)
    optimizer = train.make_optimizer(model, train.Config(method="full", learning_rate=3e-3))
    for _ in range(60):                          # learn half of them by heart
        train.training_step(model, batches_of(examples[:8]), optimizer)
    greedy = [model.generate(torch.tensor([e.ids[:e.n_prompt]]), len(e.ids) - e.n_prompt)[0].tolist()
              == e.ids[e.n_prompt:] for e in examples]
    result = train.evaluate(model, {"t": examples}, 48)["t"]
    tokens, targets, _ = batches_of(examples)[0]
    assert result["accuracy"] == sum(greedy) / 16 and 0 < sum(greedy) < 16
    assert result["loss"] == pytest.approx(model(tokens, targets)[0].mean().item(), rel=1e-5)
