"""Is the layer the equation, is the model a Llama, does exactly the right part train?

    pytest test_teamlora.py     a dozen seconds on one core; no network, tiny random weights
    pytest                      and whatever else may break (tests/): weights, data, runs, bad input

The idea: everything is compared with the same thing written naively, one expert, head, position or row at a
time. A docstring says which break its test catches. Most tests run over METHODS: a new method is tested, too.

Letters: B batch, T time, C model width, D head width, E experts, r rank of one expert, L adapted layers.
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

import data
import train
from model import MAX_LOGITS, PROJECTIONS, Llama, LlamaConfig
from teamlora import (METHODS, AdapterConfig, InputError, adapt, adapter_layers, adapter_parameters,
                      changed_weights, collected_weights, load_adapter, load_parameters, merge, save_adapter)

torch.set_num_threads(1)                         # these models are small, and other programs run, too

# head_dim unlike width / heads, odd vocabulary
TINY = LlamaConfig(101, 48, 56, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
                   head_dim=10, rms_norm_eps=1e-4, rope_theta=500.0, eos_token_id=(2,))


def tiny(method="teamlora", config=TINY, dtype=torch.float32, **adapter):
    """A tiny random Llama whose experts are no longer zero; method None: a plain one."""
    torch.manual_seed(1)
    adapter = AdapterConfig(method, **{"rank": 3, "n_experts": 4, **adapter}) if method else None
    return randomise(Llama(config, adapter).init_weights()).to(dtype)


def layer_of(method, E, dtype=torch.float64, n_in=11, n_out=7, **more):
    torch.manual_seed(E)
    return randomise(METHODS[method](n_in, n_out, True, AdapterConfig(method, 3, E, **more)).to(dtype))


def randomise(module):
    """Move every adapter parameter away from its initial value, so that nothing is hidden by B = 0."""
    for p in adapter_parameters(module).values():
        p.data.add_(torch.randn_like(p), alpha=0.2)
    return module


def weights_of(model, x):
    """What each adapted layer uses as the weights of its experts, (L, B, T, E)."""
    with collected_weights(model) as weights:
        model(x)
    return torch.stack(weights)


def copied(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def close(ours, theirs, rtol=1e-5, atol=1e-6):
    return all(torch.allclose(a, b, rtol, atol) for a, b in zip(ours, theirs, strict=True))


def kept_by(module, *inputs):
    """Bytes that autograd keeps for the backward pass, without inputs and parameters."""
    kept, known = {}, {p.data_ptr() for p in (*inputs, *module.parameters())}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(*inputs)
    return sum(size for start, size in kept.items() if start not in known)


def peak_of(function):
    """(the most bytes that tensors made by function() take at once, what it returns)."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        result = function()
    log = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events()
                 if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in log)), result


# ---- Is the layer the equation?

def softmaxed(logits, M=None):
    return logits.exp() / logits.exp().sum()


def competed(logits, M):
    phi, E = softmaxed(logits), len(logits)
    w = torch.stack([phi[e] + sum(phi[i] * M[i, e] for i in range(E)) for e in range(E)])
    return E * w / max(w.sum(), 0.1)


# method -> the weights (E,) of one token, from R x and M; a method that is not here is asked for its own
GATES = {"teamlora": competed, "lora": lambda logits, M: torch.ones_like(logits),
         "moelora": softmaxed, "hydralora": softmaxed}


def loop_over_experts(layer, x):
    """y = W x + b + (alpha / r) sum_e w_e B_e dropout(z_e) of every token, one expert after the other."""
    E, r, rows = layer.adapter.n_experts, layer.adapter.rank, []
    gate = GATES.get(layer.adapter.method, lambda logits, M: layer.gate(logits))
    kept = F.dropout(x.new_ones(x[..., 0].numel(), len(layer.lora_A)), layer.adapter.dropout)
    for token, kept_z in zip(x.flatten(0, -2), kept):
        z, y = layer.lora_A @ token * kept_z, layer.weight @ token + layer.bias
        w = gate(token.new_zeros(E) if layer.router is None else layer.router @ token, layer.interaction)
        for e in range(E):
            own = slice(e * r, e * r + r)
            z_e = z[own] if len(z) == E * r else z       # HydraLoRA has one A of rank r, which all see
            y = y + layer.adapter.alpha / r * w[e] * (layer.lora_B[:, own] @ z_e)
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("method, E, dtype, tolerance", [
    *((method, E, torch.float64, 1e-10) for method in METHODS for E in (1, 4)),
    ("teamlora", 4, torch.float32, 1e-4)])
def test_layer_and_gradients_equal_the_loop_over_experts(method, E, dtype, tolerance):
    """Catches any slip in slicing, scale, gate or dropout, a forward whose autograd is not its derivative,
    weights that are clamped, though a negative one subtracts, and that may sum to 0 or less."""
    layer = layer_of(method, E, dtype, alpha=5.0, dropout=0.3)
    x, direction = torch.randn(2, 8, 11, dtype=dtype, requires_grad=True), torch.randn(2, 8, 7, dtype=dtype)
    if method == "teamlora" and E > 1:           # expert 0 speaks against the others, here and there too much
        layer.interaction.data[0, 1:] -= 0.6
    inputs, results = {"x": x, **adapter_parameters(layer)}, []
    for function in (layer, lambda x: loop_over_experts(layer, x)):
        torch.manual_seed(0)
        y = function(x)
        results.append([y, *torch.autograd.grad((y * direction).sum(), [*inputs.values()])])
    for name, ours, theirs in zip(["y", *inputs], *results):
        assert torch.allclose(ours, theirs, tolerance, tolerance), (
            f"{method}, {E} experts: {name} or its gradient is not the sum over experts; see forward, gate")
    assert layer(x[:0]).shape == (0, 8, 7), f"{method}: no token in, no token out"


@pytest.mark.parametrize("method", METHODS)
def test_fresh_layer_has_its_size_and_is_its_base_bit_for_bit(method):
    """Catches an unfair baseline, of another size than the README says; a B that does not start at zero, a
    base path that is not the plain linear map, a lost dtype, a gate in bf16, a wrong start of A, R or M."""
    E, r, n_in, n_out = 4, 8, 400, 24
    layer = METHODS[method](n_in, n_out, True, AdapterConfig(method, r, E))
    sizes = {"lora": E * r * (n_in + n_out), "moelora": E * r * (n_in + n_out) + E * n_in,
             "teamlora": E * r * (n_in + n_out) + E * n_in + E * E,
             "hydralora": r * n_in + E * r * n_out + E * n_in}
    size = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert size == sizes.get(method, size) and not (layer.weight.requires_grad or layer.bias.requires_grad)
    bounds = {"lora_A": n_in ** -0.5, "router": n_in ** -0.5, "interaction": 0.1, "lora_B": 0.0}
    for name, p in adapter_parameters(layer).items():
        assert bounds[name] / 2 <= p.abs().max() <= bounds[name], f"{method}: {name}"
    assert layer.interaction is None or layer.interaction.diagonal().eq(0).all()
    for dtype in (torch.float32, torch.bfloat16):    # of the base; adapters stay in fp32
        layer.weight.data, layer.bias.data = layer.weight.to(dtype), layer.bias.to(dtype)
        y = layer(x := torch.randn(3, 5, n_in, dtype=dtype))
        assert y.dtype == dtype and torch.equal(y, F.linear(x, layer.weight, layer.bias)), method
    logits = torch.empty(9, 0) if layer.router is None else 16 * layer.router.bfloat16().T[:9].float()
    w = weights_of(layer, 16 * torch.eye(n_in, dtype=dtype)[:9])[0]
    assert w.dtype == torch.float32 and torch.allclose(w, layer.gate(logits), rtol=1e-5), method


def test_backward_keeps_nothing_wide_but_the_input():
    """Catches an update (..., out), a scaled z per expert of width out, or x again, that autograd keeps."""
    layer = layer_of("teamlora", 4, torch.float32, n_in=640, n_out=512)
    narrow = 200 * (4 * 3 + 4) * 4               # bytes of A x and R x
    assert kept_by(layer, torch.randn(2, 100, 640, requires_grad=True)) < 3 * narrow + 2 * layer.lora_A.nbytes


def test_the_file_run_by_itself_shows_the_equation(capsys):
    """Catches a worked example whose sum is no longer what the layer computes."""
    runpy.run_module("teamlora", run_name="__main__")
    by_hand, layer = (json.loads(line[28:]) for line in capsys.readouterr().out.splitlines()[-2:])
    assert len(layer) == 2 and by_hand == pytest.approx(layer, abs=2e-4)


# ---- Weights changed from outside, merging

@pytest.mark.parametrize("method", METHODS)
def test_changed_weights_nest_and_come_back(method):
    """Catches a change that misses a layer, that the block inside undoes, or that outlives an error."""
    model = tiny(method, dtype=torch.float64, targets=("down_proj", "q_proj"))
    whole = model(tokens := torch.randint(0, 101, (2, 9)))
    with changed_weights(model, torch.zeros_like):
        bare = model(tokens)
    with pytest.raises(KeyError), changed_weights(model, lambda w: 2 * w), collected_weights(model) as outer:
        doubled = model(tokens)
        with changed_weights(model, lambda w: w / 2), collected_weights(model) as inner:
            assert torch.allclose(model(tokens), whole, 1e-12)
        assert torch.equal(model(tokens), doubled) and not torch.allclose(doubled, whole)
        assert len(inner) == 4 and len(outer) == 12 and torch.equal(outer[0], 2 * inner[0])
        raise KeyError
    assert torch.equal(model(tokens), whole)
    for _, layer in adapter_layers(model):
        layer.lora_B.data.zero_()
    assert torch.equal(model(tokens), bare), f"{method}: weights of 0 are not the bare base"


@pytest.mark.parametrize("method, E", [*itertools.product(GATES, (1, 4)), ("unwritten", 1)])
def test_merged_model_computes_the_same_or_is_refused(monkeypatch, method, E):
    """Catches a wrong scale or transposed product, a router that is dropped, a refused model half merged, and
    every layer's update at once: 36 GB beyond a 7B in float64."""
    monkeypatch.setitem(METHODS, "unwritten", METHODS["moelora"])
    model = tiny(method, n_experts=E, alpha=5.0, targets=("q_proj", "down_proj"))
    layers = [layer for _, layer in adapter_layers(model)]
    if method == "teamlora" and E == 1:
        layers[1].interaction.data.fill_(-0.95)  # 1 + M is below the guard: the constant weight is not 1
    if method == "unwritten":
        layers[1].gate = torch.sigmoid           # depends on the token even with one expert
    layers[0].gate = lambda logits: logits.new_ones(*logits.shape[:-1], E)       # it alone could be merged
    before, expected = copied(model), model(tokens := torch.randint(0, 101, (2, 65)))
    if method != "lora" and E > 1 or method == "unwritten":
        with pytest.raises(InputError, match=f"{E} experts cannot be merged"):
            merge(model)
        assert close(model.parameters(), before.values(), 0, 0), "a refused merge has changed something"
        return
    peak, _ = peak_of(lambda: merge(model))
    assert peak < 4 * 8 * layers[0].weight.numel(), "weight, update and sum of one layer, in float64"
    assert torch.allclose(model(tokens), expected, 1e-4, 1e-4), f"{method} with {E} experts: look at update"
    assert not any(layer.lora_B.any() for layer in layers), "after a merge every B is zero"


def test_a_tied_weight_is_not_merged():
    """Catches a merge into a storage that two Parameters share, as after load_state_dict(assign=True)."""
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(9, 8), "head": torch.nn.Linear(8, 9)})
    model.head.weight = model.embedding.weight
    model.load_state_dict(model.state_dict(), assign=True)
    adapt(model, "head", AdapterConfig("lora"))
    with pytest.raises(InputError, match="head cannot be merged: its weight is tied"):
        merge(model)


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


@torch.no_grad()
def test_model_equals_a_llama_written_naively():
    """Catches interleaved rotary pairs, mixed-up key/value groups, a wrong norm, gate and up exchanged."""
    model, tokens = tiny(None, dtype=torch.float64), torch.randint(0, 101, (15,))
    for name, p in model.named_parameters():
        p.normal_(1, 0.2) if "norm" in name else p.mul_(3)       # or attention would be nearly even
    # rotary tables are in fp32
    assert torch.allclose(model(tokens[None])[0], naive_llama(model, tokens), 1e-5, 1e-5)


def generated(model, prompt, *args, **more):
    return torch.stack([*model.generate(prompt, *args, **more)], 1)


def without_cache(model, tokens, n, temperature, generator):
    """The next n tokens (B, n), by whole forward passes."""
    for _ in range(n):
        logits = model(tokens)[:, -1]
        new = logits.argmax(-1, keepdim=True)
        if temperature > 0.1:
            new = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        tokens = torch.cat((tokens, new), 1)
    return tokens[:, -n:]


@pytest.mark.parametrize("temperature", [0.0, 1e-44, 0.5, 3.0])
@torch.no_grad()
def test_generation_equals_that_without_a_cache(temperature):
    """Catches rotary positions that restart at 0, keys that the cache loses, a temperature without effect."""
    model, prompt = tiny(config=replace(TINY, eos_token_id=())), torch.randint(0, 101, (3, 5))
    for p in model.base_parameters().values():
        p.mul_(3)                                # or attention would be nearly even
    found = [function(model, prompt, 12, temperature, torch.Generator().manual_seed(3))
             for function in (generated, without_cache)]
    assert torch.equal(*found) and len(found[0].unique()) > 9


def test_generation_stops_at_any_end_and_yields_as_it_goes():
    """Catches text after an end, one row's end that ends the other, tokens made before they are asked for."""
    model, prompt, found, calls = tiny(None), torch.randint(0, 101, (2, 5)), [], []
    model.config = replace(TINY, eos_token_id=())
    free = generated(model, prompt, 12).tolist()
    model.config = replace(TINY, eos_token_id=(free[0][2], free[1][5]))
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    for new in model.generate(prompt, 12):
        found.append(new)
        assert len(calls) == len(found), "one forward pass for one token"
    assert torch.stack(found, 1).tolist() == [free[0][:3] + free[0][2:3] * 3, free[1][:6]]


def test_losses_are_those_by_hand_and_logits_never_exist_whole(monkeypatch):
    """Catches a mean in place of a loss each, a wrong hit, losses in bf16; (N, V) logits kept for the
    backward pass, and chunks that change a loss or a gradient."""
    model, peaks = tiny(config=replace(TINY, vocab_size=5000)), []
    hidden, targets = torch.randn(4, 64, 48), torch.randint(0, 5000, (4, 64))
    targets[0] = model.lm_head(hidden[0]).argmax(-1)
    targets[:, ::4] = -1                         # 192 are supervised

    def losses_by_hand(hidden, targets):
        logits, labels = model.lm_head(hidden)[targets >= 0], targets[targets >= 0]
        return -logits.log_softmax(-1)[range(192), labels], logits.argmax(-1) == labels

    def run(function):
        losses, correct = function(h := hidden.clone().requires_grad_(), targets)
        losses.square().sum().backward()         # unlike a sum, it gives every token a gradient of its own
        return losses, correct, h.grad
    for limit in (10 ** 9, 25 * 5000):
        monkeypatch.setattr("model.MAX_LOGITS", limit)
        peak, found = peak_of(lambda: run(model.token_losses))
        peaks.append(peak)
        assert close(found, run(losses_by_hand))
    # 8 bytes of fp32 per limit * 8 below: at the real limit no more than 1 GB
    assert peaks[0] > 192 * 5000 * 4 * 2 and peaks[1] < 25 * 5000 * 4 * 8 and MAX_LOGITS * 4 * 8 <= 2 ** 30
    assert model.bfloat16().token_losses(hidden.bfloat16(), targets)[0].dtype == torch.float32


# ---- Does exactly the right part train?

def examples_of(n, seed=0):
    """n random Examples of the tiny vocabulary, each with an answer of its own."""
    rng = random.Random(seed)
    rows = [[rng.randrange(3, 101) for _ in range(rng.randint(3, 40))] for _ in range(n)]
    return [data.Example("t", [1, *row, 2], rng.randint(1, len(row))) for row in rows]


def batches_of(examples, max_tokens=10 ** 6):
    """The step's micro-batches, as few as the budget allows."""
    return [data.collate(b) for b in data.micro_batches(examples, max_tokens, math.inf)]


def gradients_of(model, batches, balance=0.0, clip=math.inf):
    """(what training_step returns, name -> gradient of the whole step); the model stays as it is."""
    parameters, gradients = train.trainable_parameters(model), {}
    optimizer = torch.optim.SGD(parameters.values())
    optimizer.step = lambda: gradients.update({n: p.grad.clone() for n, p in parameters.items()})
    return train.training_step(model, batches, optimizer, clip, balance), gradients


def trained(model, cfg, step_batches, **more):
    """train.fit -> (totals, the records of its log, the optimizer)."""
    optimizer, log = train.make_optimizer(model, cfg), []
    return train.fit(model, step_batches, optimizer, cfg, log=log.append, **more), log, optimizer


@pytest.mark.parametrize("method", METHODS)
def test_targets_are_adapted_and_everything_trains_after_two_steps(method):
    """Catches a frozen adapter, a trainable base, a target left out. In step 1, B = 0 stops A, R and M."""
    targets = PROJECTIONS[::3]
    model = Llama(TINY, AdapterConfig(method, targets=targets)).init_weights()
    assert [n.rpartition(".")[2] for n, _ in adapter_layers(model)] == [*targets] * TINY.num_hidden_layers
    assert train.trainable_parameters(model).keys() == adapter_parameters(model).keys()
    before = copied(model)
    trained(model, train.Config(method=method, steps=2), lambda step: batches_of(examples_of(4)))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, f"{method}: {name} after two steps"


def test_full_trains_everything_and_none_nothing():
    """Catches a reference that trains too little."""
    for method in ("full", "none"):
        model, _, _ = train.prepare(train.Config(method=method, mode="eval", device="cpu"))
        assert {p.requires_grad for p in model.parameters()} == {method == "full"}


def test_checkpointed_and_compiled_blocks_compute_the_same():
    """Catches reentrant checkpointing, which trains the last layer only, or none; compiled layers that
    differ, a graph break, a compilation per length or wherever weights are collected."""
    from torch._dynamo.testing import CompileCounterWithBackend      # takes seconds to import
    torch._dynamo.reset()
    model, compiled, counter = tiny(), tiny(), CompileCounterWithBackend("eager")
    compiled.compile_blocks(counter)
    for n, length, on in ((2, 8, False), (3, 24, True)):
        tokens, found, kept = torch.randint(0, 101, (n, length + 1)), [], []
        batch, mask = (tokens[:, :-1], tokens[:, 1:]), torch.ones(n, length, dtype=torch.bool)
        for one, one.checkpointing in ((model, False), (model, True), (compiled, on)):
            metrics, gradients = gradients_of(one, [(*batch, mask)])
            found.append([metrics["loss"], *gradients.values()])
            kept.append(kept_by(one, *batch))
        assert close(found[0], found[1]) and kept[1] < kept[0] / 3, "look at checkpoint in model.py"
        assert close(found[0], found[2], 1e-4, 1e-4), "look at compile_blocks in model.py"
    assert torch.equal(*(generated(one, tokens[:, :3], 4) for one in (model, compiled)))
    assert len(weights_of(compiled, tokens)) == 6
    assert counter.frame_count == 2, "the first block, whose input needs no gradient, and the rest"


@pytest.mark.parametrize("balance", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_step_equals_one_row_at_a_time_however_it_is_split(method, balance):
    """Catches the mean of means over micro-batches, a shifted target, padding that is seen or counts, balance
    terms not weighted by their tokens or not mean_e (usage_e - its mean)^2, a gradient not clipped."""
    model, examples = tiny(method, dtype=torch.float64), examples_of(12)
    supervised, tokens = sum(len(e.ids) - e.n_prompt for e in examples), sum(len(e.ids) - 1 for e in examples)
    loss, parameters = 0.0, adapter_parameters(model)
    for e in examples:
        log_p = model(torch.tensor([e.ids[:-1]]))[0].log_softmax(-1)
        loss = loss - sum(log_p[t - 1, e.ids[t]] for t in range(e.n_prompt, len(e.ids))) / supervised
    for budget, at_least in ((10 ** 6, 1), (300, 2), (48, 5)):
        batches, term = batches_of(examples, budget), 0.0
        for x, _, mask in batches if balance else ():
            usage = weights_of(model, x)[:, mask].mean(1)                            # (L, E)
            term = term + (usage - usage.mean(1)[:, None]).square().mean() * mask.sum() / tokens
        expected = torch.autograd.grad(loss + balance * term, [*parameters.values()], retain_graph=True)
        metrics, found = gradients_of(model, batches, balance)
        assert torch.isclose(metrics["loss"], loss + balance * term, rtol=1e-8)
        assert (metrics["supervised_tokens"], metrics["tokens"]) == (supervised, tokens)
        assert len(batches) >= at_least and close(found.values(), expected, 1e-8, 1e-12), (
            f"{method}: the gradient of {len(batches)} micro-batches; look at train.training_step")
    norm = torch.cat([g.flatten() for g in expected]).norm()
    metrics, clipped = gradients_of(model, batches, balance, float(norm) / 4)
    assert torch.isclose(metrics["gradient_norm"], norm), "the norm is that before it is clipped"
    assert close(clipped.values(), [g / 4 for g in expected], 1e-4)


def test_steps_that_are_not_finite_change_nothing_and_twenty_in_a_row_stop_the_run():
    """Catches one bad step that turns a parameter, or a moment of the optimizer, into NaN; a run that goes on
    for nothing where no line is logged; a count in a row that good steps do not reset."""
    model, batches, bad, asked = tiny(), batches_of(examples_of(2)), range(99), []
    adapters, before = adapter_parameters(model), copied(model)
    cfg = train.Config(steps=45, log_every=1000, save_every=1000, learning_rate=1e-2)

    def step_batches(step):
        model.model.norm.weight.data.fill_(math.inf if step in bad else 1.0)
        return asked.append(step) or batches
    with pytest.raises(InputError, match="20 steps"):
        trained(model, cfg, step_batches)
    assert len(asked) == 20 and all(torch.equal(p, before[name]) for name, p in adapters.items())
    bad = {*range(19), *range(20, 39)}
    totals, _, optimizer = trained(model, cfg, step_batches)
    assert totals["skipped"] == 38 and {int(s["step"]) for s in optimizer.state.values()} == {45 - 38}
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in adapters.items())


def test_dropout_is_another_at_every_step_and_follows_from_seed_and_step():
    """Catches the same dropout at every step, one that a resumed run draws anew, dropout in evaluation."""
    examples, losses, cfg = examples_of(5), [], train.Config(steps=4, log_every=1, learning_rate=1e-12)
    at_two = {"step": 2, "seconds": 1.0, "tokens": 0, "skipped": 0}
    for cfg, totals in ((cfg, None), (cfg, at_two), (replace(cfg, seed=1), None)):
        model = tiny(dropout=0.5)
        _, log, _ = trained(model, cfg, lambda step: batches_of(examples), totals=totals)
        losses.append([record["loss"] for record in log])
    assert len({*losses[0], *losses[2]}) == 8 and losses[1] == losses[0][2:]
    found, expected = (train.evaluate(m, {"t": examples}, 48)["t"] for m in (model, tiny()))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    tokens, _, mask = batches_of(examples)[0]
    usage = weights_of(tiny(), tokens)[:, mask].mean((0, 1))     # over layers and tokens
    assert found["usage"] == pytest.approx(usage.tolist(), rel=1e-4)


def test_loop_reads_nothing_from_the_device_between_log_lines():
    """Catches a loop that waits for the GPU: on the meta device the first reading of anything is an error."""
    model, asked = tiny().to("meta"), []
    optimizer = torch.optim.SGD(train.trainable_parameters(model).values())
    optimizer.step = lambda: None                # meta has no fused AdamW
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        train.fit(model, lambda step: asked.append(step) or batches_of(examples_of(2, step), 48),
                  optimizer, train.Config(balance=0.1, log_every=5))
    assert asked == [0, 1, 2, 3, 4]


def test_exact_match_is_what_greedy_decoding_produces():
    """Catches an accuracy that teacher forcing flatters: it must equal generation, its end included."""
    model, examples = tiny(None).requires_grad_(True), examples_of(12)
    trained(model, train.Config(learning_rate=3e-3, steps=60), lambda step: batches_of(examples[:6]))
    greedy = [generated(model, torch.tensor([e.ids[:e.n_prompt]]), len(e.ids) - e.n_prompt)[0].tolist()
              == e.ids[e.n_prompt:] for e in examples]
    result, (losses, _) = train.evaluate(model, {"t": examples}, 48)["t"], model(*batches_of(examples)[0][:2])
    assert result["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert result["accuracy"] == sum(greedy) / 12 and 0 < sum(greedy) < 12, "half of them are learnt by heart"


# ---- Adapters in and out of files

@pytest.mark.parametrize("method", METHODS)
def test_saved_adapter_loads_with_the_same_bits(tmp_path, method):
    """Catches a setting or a parameter that the file does not hold, or that loading does not use."""
    more, tokens = {"alpha": 5.0, "targets": ("q_proj", "down_proj")}, torch.randint(0, 101, (2, 9))
    save_adapter(model := tiny(method, **more), tmp_path / "adapter.pt")
    for other in (tiny(None), tiny(method, dropout=0.1, **more).eval()):     # dropout may differ
        load_parameters(other.base_parameters(), model.base_parameters())
        for p in adapter_parameters(other).values():
            p.data.fill_(7.0)
        load_adapter(other, tmp_path / "adapter.pt")
        assert torch.equal(other(tokens), model(tokens)), method


# what is changed in a file f: its settings s, its parameters p
DAMAGES = {
    "alpha": lambda s, p, f: s.update(alpha=32.0),
    "rank": lambda s, p, f: s.update(rank=8, n_experts=4),       # every shape is that of 8 experts of rank 4
    "method": lambda s, p, f: s.update(method="moelora"),
    "missing": lambda s, p, f: p.popitem(),
    "shape": lambda s, p, f: p.update({name: t[:, 1:] for name, t in p.items()}),
    "NaN": lambda s, p, f: [*p.values()][-1][0].fill_(math.nan),
    "format": lambda s, p, f: f.update(format=2),
    "code": lambda s, p, f: f.update(code=print)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_another_adapter_is_refused_and_changes_nothing(tmp_path, damage):
    """Catches an adapter that is computed in another way than it was trained, or loaded in part."""
    model, path = tiny("lora", rank=4, n_experts=8, targets=("up_proj", "q_proj")), tmp_path / "adapter.pt"
    save_adapter(model, path)
    content, before = torch.load(path), copied(model)
    for p in content["parameters"].values():
        p.add_(1)
    DAMAGES[damage](content["adapters"][0], content["parameters"], content)
    torch.save(content, path)
    with pytest.raises(InputError, match="was made with|do not fit|adapter.pt: "):
        load_adapter(model, path)
    assert close(model.parameters(), before.values(), 0, 0)
