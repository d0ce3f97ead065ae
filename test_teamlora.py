"""The questions that a doubter would ask, in the order in which he would ask them.

    pytest                  all of it, under two minutes on two cores, no network, tiny random weights

Is the layer the paper's equation? Are the rivals fair? Is the model a Llama? Do weights load, or fail loudly? Is the
benchmark honest? Do batches leave the mathematics alone? Does a run train what it says, and can it be resumed?
Each docstring says which break the test catches.
"""

import json
import math
import os
import pickle
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import train
from model import (AdapterConfig, Llama, LlamaConfig, fingerprint, load_llama, open_weights, read_safetensors,
                   save_llama, write_safetensors)
from teamlora import (METHODS, HydraLoRALinear, InputError, LoRALinear, TeamLoRALinear,
                      adapter_layers, adapter_parameters, balance_loss, load_parameters, mean_usage, parameter_state)

TINY = LlamaConfig(vocab_size=101, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=6,
                   num_key_value_heads=2, head_dim=10, rope_theta=500.0)     # head_dim unlike width / heads, odd vocabulary


def tiny(method="teamlora", config=TINY, dtype=torch.float32, **adapter):
    """A tiny random Llama whose experts are no longer zero."""
    torch.manual_seed(1)
    model = Llama(config, AdapterConfig(method=method, **{"rank": 3, "n_experts": 4, **adapter})).init_weights()
    randomise(model)
    return model.to(dtype)


def randomise(module):
    """Put every adapter parameter away from its initial value, so that nothing is hidden by B = 0."""
    with torch.no_grad():
        for _, layer in adapter_layers(module):
            for p in (layer.lora_B, layer.interaction):
                if p is not None:
                    p.normal_(0, 0.2)
    return module


def layer_of(method, E, dtype=torch.float64, n_in=11, n_out=7, rank=3, **more):
    torch.manual_seed(E)
    return randomise(METHODS[method](n_in, n_out, rank=rank, n_experts=E, **more).to(dtype))


def published_loop(layer, x):
    """The equations of method.md, expert by expert: the slow reference for every method."""
    E, r = layer.n_experts, layer.rank
    z = x @ layer.lora_A.T
    if isinstance(layer, LoRALinear):
        w = torch.ones(*x.shape[:-1], E, dtype=x.dtype)
    else:
        w = torch.softmax(x @ layer.router.T, -1)
    if type(layer) is TeamLoRALinear:
        w = w + torch.stack([sum(w[..., i] * layer.interaction[i, j] for i in range(E)) for j in range(E)], -1)
        w = E * w / w.sum(-1, keepdim=True)
    y = x @ layer.weight.T
    for e in range(E):
        z_e = z if isinstance(layer, HydraLoRALinear) else z[..., e * r:(e + 1) * r]
        y = y + layer.alpha / r * w[..., e:e + 1] * (z_e @ layer.lora_B[:, e * r:(e + 1) * r].T)
    return y


# ---- Is the layer the paper's equation?

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("E", [1, 2, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_layer_and_gradients_equal_the_loop_over_experts(method, E, dtype, tolerance):
    """Catches any slip in slicing, scaling or routing: one matmul must be the published sum over experts."""
    layer = layer_of(method, E, dtype)
    x = torch.randn(2, 5, 11, dtype=dtype, requires_grad=True)
    inputs = [x] + [p for p in layer.parameters() if p.requires_grad]
    direction = torch.randn(2, 5, 7, dtype=dtype)
    results = []
    for function in (layer, lambda x: published_loop(layer, x)):
        y = function(x)
        results.append([y, *torch.autograd.grad((y * direction).sum(), inputs)])
    assert len(inputs) == {"lora": 3, "teamlora": 5}.get(method, 4)
    for ours, theirs in zip(*results):
        assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method):
    """Catches a forward whose autograd is not its derivative (a detach, an in-place slip)."""
    layer = layer_of(method, 3, n_in=5, n_out=4, rank=2)
    names = [n for n, p in layer.named_parameters() if p.requires_grad]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))
    values = [layer.get_parameter(n).detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(run, (torch.randn(2, 5, dtype=torch.float64, requires_grad=True), *values))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [False, True])
def test_fresh_layer_is_its_base_bit_for_bit(method, bias):
    """Catches a B that does not start at zero, and a base path that is not the plain linear map."""
    layer = METHODS[method](32, 24, bias)
    x = torch.randn(3, 5, 32)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not layer.weight.requires_grad and (layer.bias is None or not layer.bias.requires_grad)


def test_initial_values():
    """Catches a wrong init: A and R Kaiming-uniform with bound 1/sqrt(in), B zero, M uniform with diagonal zero."""
    layer = TeamLoRALinear(400, 10, rank=8, n_experts=4)
    for p in (layer.lora_A, layer.router):
        assert 0.045 < p.abs().max() <= 0.05
    off_diagonal = layer.interaction[~torch.eye(4, dtype=torch.bool)]
    assert layer.interaction.diagonal().eq(0).all() and off_diagonal.ne(0).all() and off_diagonal.abs().max() <= 0.1
    assert layer.interaction.requires_grad and layer.lora_B.eq(0).all()
    assert (layer.lora_A.shape, layer.lora_B.shape, layer.router.shape) == ((32, 400), (10, 32), (4, 400))


def test_weights_sum_to_E_may_be_negative_and_are_fp32():
    """Catches clamped weights, a sum of 1, and routing in the base's bf16."""
    layer = layer_of("teamlora", 4, torch.float32)
    w = layer.route(torch.randn(50, 11))
    assert torch.allclose(w.sum(-1), torch.full((50,), 4.0), atol=1e-5)
    with torch.no_grad():
        layer.interaction.zero_()[0, 1] = -0.9   # expert 0 speaks against expert 1
        layer.router.zero_()[0] = 1.0
    assert layer.route(torch.full((1, 11), 0.3))[0, 1] < 0
    assert layer.route(torch.randn(2, 11, dtype=torch.bfloat16)).dtype == torch.float32
    assert layer.double().route(torch.randn(2, 11, dtype=torch.float64)).dtype == torch.float64


def test_normaliser_is_guarded():
    """Catches an unguarded 1 + phi (M 1): at 0 the update would be infinite, below 0 it would flip its sign."""
    layer = layer_of("teamlora", 4, torch.float32)
    for row_sum in (-1.0, -1.5):
        with torch.no_grad():
            layer.interaction.zero_()[:, 0] = row_sum
        x = torch.randn(20, 11, requires_grad=True)
        w, phi = layer.route(x), layer.softmax_weights(x)
        assert w.isfinite().all() and w.abs().max() <= 10 * 4 * 2
        assert (w[:, 1:].sign() == phi[:, 1:].sign()).all()
        layer(x).sum().backward()
        assert x.grad.isfinite().all()


def test_dropout_acts_on_z():
    """Catches dropout on x: with A = identity on one input, dropping z zeroes whole rank rows, never mixes them."""
    torch.manual_seed(0)
    layer = layer_of("teamlora", 1, torch.float32, n_in=4, n_out=4, rank=4, alpha=4.0, dropout=0.5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.fill_(1.0)
        layer.lora_B.copy_(torch.eye(4))
    x = torch.ones(1000, 4)
    y = layer.train()(x)                         # every z is 4; kept ones count double
    assert set(y.unique().tolist()) == {0.0, 8.0} and 0.45 < y.eq(0).float().mean() < 0.55
    assert layer.eval()(x).unique().tolist() == [4.0]


# ---- Are the rivals fair?

def test_rivals_differ_only_in_what_they_should():
    """Catches an unfair baseline: size, weight sums and scale as in method.md section 3."""
    E, r, n_in, n_out = 4, 3, 11, 7
    x = torch.randn(6, n_in)
    sizes = {}
    for method, cls in METHODS.items():
        layer = layer_of(method, E, torch.float32)
        sizes[method] = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        total = {"teamlora": E, "lora": E}.get(method, 1)
        assert torch.allclose(layer.route(x).sum(-1), torch.full((6,), float(total)), atol=1e-5), cls
    both = E * r * (n_in + n_out)
    assert sizes == {"teamlora": both + E * n_in + E * E, "lora": both, "moelora": both + E * n_in,
                     "hydralora": r * n_in + E * r * n_out + E * n_in}


def test_lora_is_one_matmul_of_the_total_rank_with_scale_alpha_over_r():
    """Catches LoRA scaled by alpha / (E r), which would make it a weaker rival at equal flags."""
    layer = layer_of("lora", 4)
    x = torch.randn(6, 11, dtype=torch.float64)
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.alpha / 3 * (x @ layer.lora_A.T @ layer.lora_B.T))


def test_one_expert_is_plain_lora():
    """Catches a router that changes the scale at E = 1."""
    team, lora = layer_of("teamlora", 1), layer_of("lora", 1)
    with torch.no_grad():
        for key in ("weight", "lora_A", "lora_B"):
            lora.get_parameter(key).copy_(team.get_parameter(key))
    x = torch.randn(6, 11, dtype=torch.float64)
    assert torch.allclose(team(x), lora(x))


def test_balance_and_usage_leave_padding_out():
    """Catches padding in the mean, a target of 1/E, and a term that is not zero when experts are used evenly."""
    w = torch.rand(2, 3, 5, 4)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    by_hand = (w[:, 0, :2].sum(1) + w[:, 1, :4].sum(1)) / 6
    assert torch.allclose(mean_usage(w[:, :2], mask), by_hand)
    assert balance_loss(torch.ones(3, 4)) == 0
    uneven = torch.tensor([[4.0, 0, 0, 0]])
    assert torch.isclose(balance_loss(uneven), ((uneven - 1) ** 2).mean())


@pytest.mark.parametrize("bad", [{"rank": 0}, {"n_experts": 0}, {"dropout": 1.0}])
def test_layer_refuses_nonsense(bad):
    """Catches a layer that is built although it cannot work."""
    with pytest.raises(InputError, match=next(iter(bad))):
        TeamLoRALinear(4, 4, **bad)


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
    x = w["model.embed_tokens.weight"][tokens]                                       # (T, C)
    for i in range(c.num_hidden_layers):
        layer = {k.removeprefix(f"model.layers.{i}."): v for k, v in w.items() if f"layers.{i}." in k}
        h = norm(x, layer["input_layernorm.weight"])
        q, k, v = (h @ layer[f"self_attn.{p}_proj.weight"].T for p in "qkv")
        rows = []
        for t in range(len(tokens)):
            heads = []
            for head in range(c.num_attention_heads):
                mine, shared = slice(head * D, head * D + D), slice(head // group * D, head // group * D + D)
                scores = torch.stack([rotated(q[t, mine], t) @ rotated(k[s, shared], s) for s in range(t + 1)])
                heads.append(torch.softmax(scores / math.sqrt(D), 0) @ v[:t + 1, shared])
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ layer["self_attn.o_proj.weight"].T
        h = norm(x, layer["post_attention_layernorm.weight"])
        gate, up = (h @ layer[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ layer["mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def test_model_equals_a_llama_written_naively():
    """Catches interleaved rotary pairs, mixed-up key/value groups, a wrong norm, gate and up exchanged."""
    model = tiny("none", dtype=torch.float64)
    tokens = torch.randint(0, 101, (20,))
    with torch.no_grad():
        assert (model(tokens[None])[0] - naive_llama(model, tokens)).abs().max() < 1e-6   # rotary tables are fp32


def test_padding_on_the_right_changes_nothing():
    """Catches attention that looks at padding: the logits of a short row do not depend on its neighbours."""
    model = tiny()
    tokens = torch.randint(0, 101, (2, 17))
    with torch.no_grad():
        assert torch.allclose(model(tokens)[0, :9], model(tokens[:1, :9])[0], atol=1e-5)


def test_loss_is_a_sum_over_supervised_positions():
    """Catches a shifted target, a mean in place of a sum, and a head that counts unsupervised positions."""
    model = tiny()
    tokens, targets = torch.randint(0, 101, (2, 9)), torch.full((2, 9), -1)
    targets[0, 3:6], targets[1, 8] = torch.tensor([5, 6, 7]), 11
    loss, count = model(tokens, targets)
    log_p = model(tokens).log_softmax(-1)
    by_hand = -(log_p[0, 3, 5] + log_p[0, 4, 6] + log_p[0, 5, 7] + log_p[1, 8, 11])
    assert count == 4 and torch.isclose(loss, by_hand, rtol=1e-5)


@pytest.mark.parametrize("method", ["none", "teamlora"])
def test_cached_generation_equals_uncached(method):
    """Catches rotary positions that restart at 0 and keys that the cache loses."""
    model = tiny(method)
    prompt = torch.randint(0, 101, (2, 5))
    runs = [model.generate(prompt, 20, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*runs) and runs[0].shape[1] > 3
    seeded = [model.generate(prompt, 9, temperature=0.8, top_k=5, generator=torch.Generator().manual_seed(3), use_cache=c)
              for c in (True, False)]
    assert torch.equal(*seeded)


def test_generation_stops_at_end_of_sequence():
    """Catches text after the end, and one row's end that ends the other."""
    model = tiny("none")
    prompt = torch.randint(0, 101, (2, 5))
    free = model.generate(prompt, 12)
    end = int(free[0, 2])
    model.config = train.replace(model.config, eos_token_id=(end,))
    stopped = model.generate(prompt, 12)
    for row, expected in zip(stopped.tolist(), free.tolist()):
        n = expected.index(end) + 1 if end in expected else len(row)
        assert row[:n] == expected[:n] and set(row[n:]) <= {end}


def test_top_k_of_one_is_greedy():
    """Catches a top-k that keeps others."""
    model = tiny("none")
    prompt = torch.randint(0, 101, (1, 4))
    assert torch.equal(model.generate(prompt, 8), model.generate(prompt, 8, temperature=5.0, top_k=1))


# ---- Does exactly the adapter train?

@pytest.mark.parametrize("method", METHODS)
def test_targets_are_adapted_and_everything_trains_after_two_steps(method):
    """Catches a frozen adapter, a trainable base, and a target that is left out: at step 0 B = 0 stops A, R and M."""
    torch.manual_seed(0)
    model = Llama(TINY, AdapterConfig(method=method, targets=("q_proj", "down_proj"))).init_weights()
    names = {n.rpartition(".")[2] for n, _ in adapter_layers(model)}
    assert names == {"q_proj", "down_proj"} and len(adapter_layers(model)) == 2 * TINY.num_hidden_layers
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == adapter_parameters(model).keys()
    before = parameter_state(model.base_parameters())
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    tokens = torch.randint(0, 101, (4, 12))
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:])[0].backward()
        optimizer.step()
    for name, p in trainable.items():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    assert all(torch.equal(p, before[n]) for n, p in model.base_parameters().items())


def test_full_trains_everything_and_none_nothing():
    """Catches a reference that trains too little."""
    assert all(p.requires_grad for p in tiny("full").parameters())
    assert not any(p.requires_grad for p in tiny("none").parameters())


def test_checkpointing_leaves_gradients_and_routing_alone():
    """Catches reentrant checkpointing, which trains only the last layer of a frozen base, and doubled routing lists."""
    model, results = tiny(), []
    tokens = torch.randint(0, 101, (3, 12))
    for on in (False, True):
        model.checkpointing = on
        model.zero_grad()
        hidden, routing = model.hidden(tokens[:, :-1], want_routing=True)
        assert routing.shape == (9, 3, 11, 4)
        (model.token_losses(hidden, tokens[:, 1:])[0].sum() + routing.square().sum()).backward()
        results.append([p.grad.clone() for p in adapter_parameters(model).values()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results))


# ---- Do weights load, or fail loudly?

def test_saved_llama_loads_to_the_same_logits(tmp_path):
    """Catches a lost or permuted key, a norm that is not read, a config that does not come back."""
    for i, tied in enumerate((False, True)):
        model = tiny("none", train.replace(TINY, tie_word_embeddings=tied, eos_token_id=(2, 7), rms_norm_eps=1e-6))
        with torch.no_grad():
            model.model.norm.weight.normal_()
        save_llama(model, tmp_path / str(i))
        again = load_llama(tmp_path / str(i))
        tokens = torch.randint(0, 101, (2, 33))
        assert again.config == model.config and torch.equal(again(tokens), model(tokens))
        assert ("lm_head.weight" in open_weights(tmp_path / str(i))) != tied
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_pytorch_bin_and_adapters_load_beside_the_base(tmp_path):
    """Catches adapters left on the meta device or in the base's dtype, and .bin folders that differ."""
    model = tiny("none")
    save_llama(model, tmp_path)
    torch.save(model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)},
               tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    loaded = load_llama(tmp_path, AdapterConfig("teamlora", rank=2), dtype=torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(loaded).values()} == {torch.float32}
    assert {p.dtype for p in loaded.base_parameters().values()} == {torch.bfloat16}
    tokens = torch.randint(0, 101, (2, 9))
    assert torch.equal(loaded(tokens), load_llama(tmp_path, dtype=torch.bfloat16)(tokens))
    assert fingerprint(loaded) == fingerprint(model) != fingerprint(tiny("none", train.replace(TINY, head_dim=12)))


def test_safetensors_round_trip_keeps_every_bit(tmp_path):
    """Catches a wrong dtype, shape or offset."""
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).to(torch.bfloat16), "c": torch.randn(2, 1, 3).half(),
               "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    write_safetensors(tensors, tmp_path / "x")
    again = read_safetensors(tmp_path / "x")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in tensors.items())


def damaged(folder, how):
    """A Llama folder spoilt in one way."""
    config, weights = json.loads((folder / "config.json").read_text()), dict(open_weights(folder))
    if how in ("mistral", "gelu", "yarn", "biased"):
        config |= {"mistral": {"model_type": "mistral"}, "gelu": {"hidden_act": "gelu"}, "biased": {"attention_bias": True},
                   "yarn": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}[how]
    if how == "no heads":
        del config["num_attention_heads"]
    if how == "missing key":
        del weights["model.layers.1.mlp.up_proj.weight"]
    if how == "unexpected key":
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(60)
    if how == "wrong shape":
        weights["model.norm.weight"] = torch.ones(47)
    (folder / "config.json").write_text("{" if how == "no json" else json.dumps(config))
    write_safetensors({k: v.clone() for k, v in weights.items()}, folder / "model.safetensors")
    if how == "truncated":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-100])
    if how == "no weights":
        (folder / "model.safetensors").unlink()
    if how == "code inside":
        (folder / "model.safetensors").unlink()
        torch.save({"model.norm.weight": print}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("how, message", [
    ("mistral", "model_type is 'mistral'"), ("gelu", "hidden_act is 'gelu'"), ("yarn", "rotary scaling is 'yarn'"),
    ("biased", "attention_bias is True"), ("no heads", "'num_attention_heads' is missing"), ("no json", "cannot be read as JSON"),
    ("missing key", "missing .'model.layers.1.mlp.up_proj.weight'"), ("unexpected key", "unexpected .*q_proj.bias"),
    ("wrong shape", r"model.norm.weight has shape \(47,\)"), ("truncated", "outside the file"),
    ("no weights", "neither model.safetensors nor pytorch_model.bin"), ("code inside", "not a readable file of tensors")])
def test_damaged_folder_is_refused_by_name(tmp_path, how, message):
    """Catches a loader that loads half a model, or a foreign one, in silence."""
    save_llama(tiny("none"), tmp_path)
    damaged(tmp_path, how)
    with pytest.raises(InputError, match=message):
        load_llama(tmp_path)


def test_adapter_loads_strictly():
    """Catches an adapter that does not match and leaves B = 0, which would be the base model without a symptom."""
    state = parameter_state(adapter_parameters(tiny()))
    model = Llama(TINY, AdapterConfig(rank=3))
    load_parameters(adapter_parameters(model), state)
    assert all(torch.equal(p, state[n]) for n, p in adapter_parameters(model).items())
    for wrong in (tiny(rank=2), tiny("moelora"), tiny(targets=("q_proj",)), tiny("none")):
        with pytest.raises(InputError, match="does not fit"):
            load_parameters(adapter_parameters(wrong), state)


# ---- Is the benchmark honest?

@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    corpus = data.corpus(0)
    data.make_tokenizer(path, map(corpus, range(data.N_LESSONS, data.N_LESSONS + 2000)))
    return data.Tokenizer(path)


def test_minicme_has_eleven_tasks_and_never_trains_on_test_questions():
    """Catches leakage under any seed, and a split that depends on luck."""
    split = data.minicme_test(60)
    asked = {(task, row.input) for task, rows in split.items() for row in rows}
    assert len(split) == 11 and len(asked) == 11 * 60
    for seed in (0, 1):
        stream = data.minicme(seed)
        rows = [stream(i) for i in range(5000)]
        assert not asked & {(r.task, r.input) for r in rows}
        assert Counter(r.task for r in rows).keys() == split.keys()
    assert split == data.minicme_test(60) and data.minicme(3)(17) == data.minicme(3)(17) != data.minicme(4)(17)


def test_cheap_tricks_do_not_solve_minicme():
    """Catches a task that the majority answer, the last word, or a random one of its words nearly solves."""
    rng = random.Random(0)
    for task, rows in data.minicme_test(300).items():
        chance = data.CHANCE[task]
        majority = Counter(r.output for r in rows).most_common(1)[0][1] / len(rows)
        words = [[w.strip(".?,") for w in r.input.split()] for r in rows]
        last = sum(r.output == w[-1] for r, w in zip(rows, words)) / len(rows)
        drawn = sum(r.output == rng.choice(w) for r, w in zip(rows, words)) / len(rows)
        assert majority <= chance + 0.1 and last <= max(chance, 0.1) and drawn <= max(chance, 0.1), (task, majority, last)


def test_base_corpus_gives_no_instructions_but_knows_their_words(tokenizer):
    """Catches a base that was shown the tasks, and words of the tasks that it has never read."""
    corpus = data.corpus(0)
    texts = [corpus(i).output for i in range(data.N_LESSONS, data.N_LESSONS + 4000)]
    seen = Counter(t for text in texts for t in tokenizer.encode(text))
    instructions = {i for _, _, wordings in data.TASKS.values() for i in wordings.split("|")}
    assert not any(i in text for i in instructions for text in texts)
    stream = data.minicme(0)
    used = Counter(t for i in range(2000) for r in [stream(i)]
                   for t in tokenizer.encode(r.instruction + "\n" + r.input) + tokenizer.encode(r.output))
    unknown = {tokenizer.model.id_to_piece(t): n for t, n in used.items() if not seen[t]}
    assert sum(unknown.values()) < 0.01 * sum(used.values()), unknown


# ---- Do files, prompts and batches leave the data alone?

def test_prompt_answer_border(tokenizer):
    """Catches the end of sequence as text, a second bos, a supervised prompt, and prompt and answer tokenised as one."""
    e = data.encode(tokenizer, data.Row("t", "Answer the question.", "Where does Anna live?", "Tarn"))
    head = [1] + tokenizer.encode("Answer the question.\nWhere does Anna live?") + [2]
    assert e.ids == head + tokenizer.encode("Tarn") + [2] and e.n_prompt == len(head)
    x, y, m = data.collate([e])
    assert [t for t in y[0].tolist() if t >= 0] == tokenizer.encode("Tarn") + [2]
    first = y[0].ge(0).nonzero()[0, 0]
    assert x[0, first] == 2 and m.sum() == len(e.ids) - 1
    assert tokenizer.decode(tokenizer.encode("naïve 中文 🙂\nAnna")) == "naïve 中文 🙂\nAnna"


def test_padding_is_masked_by_length_not_by_id():
    """Catches a mask by token id: with pad = end-of-sequence the model would never learn to stop."""
    short, long = data.Example("t", [1, 5, 2, 7, 2], 3), data.Example("t", [1] + [6] * 20 + [2], 10)
    x, y, m = data.collate([short, long])
    assert x.shape == (2, 24) and m.sum(1).tolist() == [4, 21]
    assert y[0].tolist() == [-1, -1, 7, 2] + [-1] * 20


def test_files_and_folders_become_tasks(tmp_path):
    """Catches an ignored "input", a task named wrongly, and a byte order mark or Windows line ends that break a file."""
    rows = [{"instruction": "Say", "input": "a", "output": "b"}, {"instruction": "Say", "output": "c", "task": "other", "x": 1}]
    rows.append({"instruction": "", "input": "asked here", "output": "d", "task": "other"})
    (tmp_path / "one.json").write_text(json.dumps(rows))
    (tmp_path / "two.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(r).encode() for r in rows) + b"\r\n")
    rest = [("other", "Say", "", "c"), ("other", "", "asked here", "d")]
    expected = [("one", "Say", "a", "b"), *rest, ("two", "Say", "a", "b"), *rest]
    assert data.read_rows(str(tmp_path)) == expected
    assert data.read_rows(f"{tmp_path}/one.json,{tmp_path}/two.jsonl") == expected


@pytest.mark.parametrize("name, content, message", [
    ("a.json", '[{"instruction": "x", "output": "y"}, {"instruction": "x"}]', "a.json, row 2: 'output'"),
    ("a.json", '[{"output": "y"}]', "row 1: 'instruction'"), ("a.json", '[{"instruction": "x", "output": null}]', "row 1: 'output'"),
    ("a.json", '[3]', "row 1: expected an object"), ("a.json", '{"a": 1}', "expected a list"), ("a.json", "[]", "no rows"),
    ("a.json", '[{"instruction": "x",\n "output" 1}]', "line 2: not JSON"), ("a.jsonl", '{"instruction": "x"}\n', "row 1: 'output'"),
    ("a.jsonl", '\n{"instruction": "x", "output": " "}', "row 2: 'output'"), ("a.jsonl", '{}\n{', "line 2: not JSON"),
    ("a.json", b"\xff\xfe[", "not UTF-8"), ("a.txt", None, "cannot be read")])
def test_bad_rows_are_named(tmp_path, name, content, message):
    """Catches a row that is skipped in silence."""
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        data.read_rows(str(tmp_path / name))


def test_long_rows_lose_prompt_never_answer(tokenizer, capsys):
    """Catches right truncation, which drops the answer and its end, and drops that nobody hears of."""
    words = " ".join(["Anna has the ball."] * 40)
    rows = [data.Row("t", "Start here. " + words + " End there.", "", "the ball"), data.Row("t", "Say", "", words)]
    examples = data.encode_rows(tokenizer, rows, 60, "train")
    assert len(examples) == 1 and len(examples[0].ids) == 60
    assert examples[0].ids[examples[0].n_prompt:] == tokenizer.encode("the ball") + [2]
    text = tokenizer.decode(examples[0].ids)
    assert text.startswith("Start here.") and "End there." in text and examples[0].ids[examples[0].n_prompt - 1] == 2
    assert "1 prompts shortened and 1 rows dropped of 2" in capsys.readouterr().out
    with pytest.raises(InputError, match="no supervised token"):
        data.encode_rows(tokenizer, rows[1:], 60, "train")


def test_hold_out_keeps_equal_prompts_together_and_every_row():
    """Catches leakage of duplicates into validation, and rows lost in the split."""
    rows = [data.Row("t", f"question {i % 200}", "", f"answer {i}") for i in range(400)]
    train_rows, val_rows = data.hold_out(rows, 0.2)
    assert sorted(train_rows + val_rows) == sorted(rows) and 20 < len(val_rows) < 140
    assert not {r.instruction for r in train_rows} & {r.instruction for r in val_rows}


def test_stream_visits_every_example_once_per_epoch():
    """Catches sampling with replacement and an order that depends on history."""
    examples = [data.Example("t", [i], 1) for i in range(7)]
    stream = data.shuffled(examples, 0)
    epochs = [[stream(i).ids[0] for i in range(e * 7, e * 7 + 7)] for e in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1]
    assert data.shuffled(examples, 0)(9).ids == [epochs[1][2]]


def test_cut_keeps_every_example_within_the_budget():
    """Catches lost or doubled examples and micro-batches over max_tokens."""
    rng = random.Random(0)
    examples = [data.Example("t", [1] * rng.randint(2, 90), 1) for _ in range(50)]
    for budget in (96, 200, 10 ** 6):
        batches = data.cut(examples, budget)
        assert sorted(len(e.ids) for b in batches for e in b) == sorted(len(e.ids) for e in examples)
        assert all(data.collate(b)[0].numel() <= budget for b in batches)
    assert len(batches) == 1
    with pytest.raises(InputError, match="max_tokens=64"):
        data.cut(examples, 64)


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_any_cut_gives_the_same_gradient(tokenizer, balance):
    """Catches the mean of means over micro-batches, in the loss and in the balance term."""
    model = tiny(config=train.replace(TINY, vocab_size=tokenizer.size), dtype=torch.float64)
    stream = data.minicme(0)
    examples = [data.encode(tokenizer, stream(i)) for i in range(22)]
    results = []
    for budget in (10 ** 6, 300, 80):
        model.zero_grad()
        batches = [data.collate(b) for b in data.cut(examples, budget)]
        loss, n = train.accumulate_gradients(model, batches, balance)
        results.append((len(batches), float(loss), n, [p.grad.clone() for p in adapter_parameters(model).values()]))
    assert results[0][0] == 1 and results[2][0] > 10
    for _, loss, n, gradients in results[1:]:
        assert math.isclose(loss, results[0][1], rel_tol=1e-10) and n == results[0][2]
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(gradients, results[0][3]))


def test_balance_gradient_equals_autograd_of_the_term(tokenizer):
    """Catches a wrong slope in the two-pass balance term."""
    model = tiny(config=train.replace(TINY, vocab_size=tokenizer.size), dtype=torch.float64)
    stream = data.minicme(0)
    batch = data.collate([data.encode(tokenizer, stream(i)) for i in range(11)])
    train.accumulate_gradients(model, [batch], 0.7)
    ours = [p.grad.clone() for p in adapter_parameters(model).values()]
    model.zero_grad()
    hidden, routing = model.hidden(batch[0], want_routing=True)
    losses, _ = model.token_losses(hidden, batch[1])
    (losses.mean() + 0.7 * balance_loss(mean_usage(routing, batch[2]))).backward()
    assert all(torch.allclose(a, p.grad, rtol=1e-8, atol=1e-12) for a, p in zip(ours, adapter_parameters(model).values()))


# ---- Does a run do what it says?

BASE = ["--base_steps=3", "--base_width=64", "--base_layers=2", "--base_batch_size=4"]
SMALL = BASE + ["--device=cpu", "--batch_size=11", "--val_examples=3", "--rank=2", "--log_every=1", "--warmup=0.2", "--save_every=4"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of 20 steps: (folder, summary)."""
    out = tmp_path_factory.mktemp("finished")
    return out, train.main(SMALL + [f"--out_dir={out}", "--steps=20"])


def same(a, b):
    """Whether two nested structures hold the same bits; what depends on wall-clock times apart."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("seconds", "tokens_per_second", "log_bytes"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_summary_has_what_it_promises(finished):
    """Catches a missing key and numbers that do not belong together."""
    out, summary = finished
    written = json.loads((out / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    assert {"method", "seed", "steps", "seconds", "tokens_per_second", "trainable_parameters", "total_parameters", "accuracy",
            "chance", "base_accuracy", "mean_accuracy", "base_mean_accuracy", "val_loss", "expert_usage", "peak_memory_mb",
            "device"} <= written.keys()
    assert written["accuracy"].keys() == written["chance"].keys() == written["expert_usage"].keys() == data.TASKS.keys()
    assert all(math.isclose(sum(u), 4, rel_tol=1e-3) for u in written["expert_usage"].values())
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == list(range(1, 21)) and lines[-1]["loss"] < lines[0]["loss"]
    layers, C, F_, E, r = 2, 64, 160, 4, 2
    assert written["trainable_parameters"] == layers * (3 * (E * r * (C + F_) + E * E) + E * (2 * C + F_))


def test_training_leaves_the_base_alone(finished):
    """Catches a run that changes the weights it calls frozen."""
    out, _ = finished
    weights = {k: v.clone() for k, v in open_weights(out / "base").items()}
    model, *_ = train.prepare(*train.compose({"mode": "eval", "out_dir": str(out), "device": "cpu"}))
    assert all(torch.equal(p, weights[n]) for n, p in model.base_parameters().items())
    assert any(p.abs().max() > 0 for n, p in adapter_parameters(model).items() if n.endswith("lora_B"))


def test_eval_reproduces_the_numbers_exactly(finished, capsys):
    """Catches an adapter file that is not what was evaluated."""
    out, summary = finished
    results = train.main(["--mode=eval", f"--out_dir={out}", "--device=cpu"])
    assert {t: r["accuracy"] for t, r in results.items()} == summary["accuracy"]
    assert train.val_loss(results) == summary["val_loss"]
    assert {t: r["usage"] for t, r in results.items()} == summary["expert_usage"]


def test_sample_answers(finished, capsys):
    """Catches a sample mode that ignores its adapter or its length."""
    out, _ = finished
    capsys.readouterr()
    for more in ([], ["--method=none"]):
        train.main(["--mode=sample", "--prompt=Where does Anna live?", f"--out_dir={out}", "--max_new_tokens=5"] + more)
    assert "Anna" not in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dropout=0.2", "--balance=0.1"], ["--method=full"]])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(finished, tmp_path, more):
    """Catches state that a checkpoint forgets: moments, step, RNG, counters, log."""
    outs = [finished[0] if not more else tmp_path / "whole", tmp_path / "halves"]
    for out in outs[more == []:]:
        out.mkdir()
        (out / "base").symlink_to(finished[0] / "base")
    if more:
        train.main(SMALL + more + [f"--out_dir={outs[0]}", "--steps=20"])
    assert train.main(SMALL + more + [f"--out_dir={outs[1]}", "--steps=20", "--stop_after=10"]) is None
    train.main(SMALL + more + [f"--out_dir={outs[1]}", "--steps=20", "--resume"])
    whole, halves = (torch.load(out / "checkpoint.pt", weights_only=True) for out in outs)
    assert whole["totals"]["step"] == halves["totals"]["step"] == 20
    assert same(whole, halves)
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in outs]
    assert same(*logs) and len(logs[0]) == 20


def test_step_with_infinite_gradient_is_skipped_and_counted(tokenizer):
    """Catches one bad step that turns every parameter into NaN."""
    model = tiny(config=train.replace(TINY, vocab_size=tokenizer.size))
    stream = data.minicme(0)
    batch = data.collate([data.encode(tokenizer, stream(i)) for i in range(4)])
    before = parameter_state(adapter_parameters(model))

    def step_batches(step):
        with torch.no_grad():
            model.model.norm.weight.fill_(math.inf if step == 0 else 1.0)
        if step == 1:
            assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(model).items())
        return [batch]
    cfg = train.Config(learning_rate=1e-2)
    totals = train.fit(model, step_batches, train.make_optimizers(model, cfg), cfg, 2)
    assert totals["skipped"] == 1 and all(p.isfinite().all() for p in adapter_parameters(model).values())
    assert not all(torch.equal(p, before[n]) for n, p in adapter_parameters(model).items())


def test_exact_match_is_what_greedy_decoding_produces(finished):
    """Catches an accuracy that teacher forcing flatters: it must equal generation, end of sequence included."""
    out, _ = finished
    model, tokenizer, _ = train.prepare(*train.compose({"mode": "eval", "out_dir": str(out), "device": "cpu"}))
    stream = data.minicme(0)
    model = tiny("full", train.replace(model.config))
    examples = [data.encode(tokenizer, stream(i)) for i in range(16)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):                          # learn half of them by heart
        train.accumulate_gradients(model, [data.collate(examples[:8])])
        optimizer.step()
        optimizer.zero_grad()
    greedy = [model.generate(torch.tensor([e.ids[:e.n_prompt]]), len(e.ids) - e.n_prompt)[0].tolist() == e.ids[e.n_prompt:]
              for e in examples]
    results = train.evaluate(model, {"t": examples}, 10 ** 6)
    assert results["t"]["accuracy"] == sum(greedy) / 16 and 0 < sum(greedy) < 16


def test_real_folder_and_files_take_the_same_road(finished, tmp_path):
    """Catches a run with --init_from that differs from the built-in one, or that loses a task."""
    for task, n in (("colours", 40), ("sizes", 30)):
        rows = [{"instruction": f"{task}: which is number {i}?", "output": f"it is {i % 3} 🙂"} for i in range(n)]
        (tmp_path / f"{task}.json").write_text(json.dumps(rows))
    summary = train.main(SMALL + [f"--init_from={finished[0]}/base", f"--data={tmp_path}", f"--out_dir={tmp_path}/out", "--steps=4",
                                  "--val_share=0.2", "--method=lora"])
    assert summary["accuracy"].keys() == {"colours", "sizes"} and summary["val_loss"] < summary["base_val_loss"]
    assert not (tmp_path / "out" / "base").exists()


def files_in(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("flags, message", [
    (["--no_such_flag=1"], "no_such_flag"), (["--step=5"], "--step"), (["--steps=many"], "steps"), (["--steps=0"], "--steps"),
    (["--rank=0"], "--rank must be at least 1"), (["--n_experts=0"], "--n_experts must be at least 1"), (["--method=dora"], "method"),
    (["--targets=q_proj,wq"], "wq"), (["--targets="], "targets"), (["--mode=fly"], "--mode"), (["--resume=maybe"], "maybe"),
    (["--learning_rate=-1"], "--learning_rate"), (["--learning_rate=nan"], "--learning_rate"), (["--dropout=1"], "--dropout"),
    (["--method=none"], "nothing to train"), (["--mode=sample"], "needs --prompt"), (["--val_data=x.json"], "needs --data"),
    (["--init_from={tmp}/nowhere"], "nowhere"), (["--init_from={tmp}"], "config.json"), (["--data={tmp}/nothing.json"], "nothing.json"),
    (["--data={tmp}/bad.json"], "bad.json, row 1"), (["--mode=eval", "--out_dir={tmp}/none"], "adapter.pt does not exist"),
    (["--resume", "--steps=21"], "--steps=21 contradicts"), (["--mode=eval", "--rank=3"], "--rank=3 contradicts"),
    (["--mode=eval", "--init_from={other}"], "contradicts"), (["--max_tokens=8"], "--max_tokens=8 cannot hold"),
    (["--data={tmp}/bad.json", "--out_dir={tmp}/new"], "bad.json, row 1")])
def test_bad_input_is_one_line_and_writes_nothing(finished, tmp_path, capsys, flags, message):
    """Catches a traceback where a sentence belongs, and files that a refused run leaves behind."""
    (tmp_path / "bad.json").write_text('[{"instruction": "x"}]')
    before = files_in(finished[0]), files_in(tmp_path)
    flags = [f.format(tmp=tmp_path, other=finished[0] / "base") for f in flags]
    modes_with_files = any(f.startswith(("--mode=eval", "--resume")) for f in flags)
    with pytest.raises(SystemExit) as stop:
        train.main(([] if modes_with_files else SMALL) + [f"--out_dir={finished[0]}"] + flags)
    text = str(stop.value)
    assert text.startswith("error: ") and message in text and "\n" not in text
    assert (files_in(finished[0]), files_in(tmp_path)) == before


def test_adapter_for_another_base_is_refused(finished, tmp_path):
    """Catches an adapter that is put on weights it was not trained for."""
    (tmp_path / "adapter.pt").write_bytes((finished[0] / "adapter.pt").read_bytes())
    other = load_llama(finished[0] / "base")
    with torch.no_grad():
        other.model.norm.weight.add_(0.5)
    save_llama(other, tmp_path / "base")
    for name in ("made_from.json", "tokenizer.model"):
        (tmp_path / "base" / name).write_bytes((finished[0] / "base" / name).read_bytes())
    with pytest.raises(SystemExit, match="another base"):
        train.main(["--mode=eval", f"--out_dir={tmp_path}", "--device=cpu"])


# ---- Does a run survive whatever happens to it?

def run_like(finished, out, *more):
    """The flags of the finished run, in a folder of its own with the same base."""
    out.mkdir(exist_ok=True)
    if not (out / "base").exists():
        (out / "base").symlink_to(finished[0] / "base")
    return SMALL + [f"--out_dir={out}", "--steps=20", *more]


def assert_same_run(finished, out):
    """The run in `out` ended like the finished one, bit for bit."""
    assert (out / "adapter.pt").read_bytes() == (finished[0] / "adapter.pt").read_bytes()
    assert same(*(torch.load(o / "checkpoint.pt", weights_only=True) for o in (finished[0], out)))
    assert same(*(read_log(o) for o in (finished[0], out)))


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("steps, at", [(3, 1), (20, 6), (20, 19)], ids=["base", "middle", "last step"])
def test_a_signal_finishes_the_step_and_tells_how_to_continue(finished, tmp_path, monkeypatch, capsys, number, steps, at):
    """Catches a signal that tears a step, is forgotten, or leaves a command that does not continue; in making the base too."""
    schedule = train.schedule
    monkeypatch.setattr(train, "schedule", lambda step, n, warmup: (
        signal.raise_signal(number) if (step, n) == (at, steps) else None) or schedule(step, n, warmup))
    handler = signal.getsignal(number)
    out = tmp_path / "a folder"
    flags = [f for f in run_like(finished, out) if steps == 20 or out.joinpath("base").unlink(True) is None]
    assert train.main(flags) is None and signal.getsignal(number) == handler
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"stopped after {at + 1} of {steps} steps; continue with: python train.py ")
    monkeypatch.undo()
    train.main(shlex.split(told.partition("python train.py ")[2]))
    if steps == 3:
        assert (out / "base" / "model.safetensors").read_bytes() == (finished[0] / "base" / "model.safetensors").read_bytes()
        assert not (out / "base.tmp").exists() and not (out / "base" / "checkpoint.pt").exists()
    else:
        assert_same_run(finished, out)


def test_a_signal_while_the_tokenizer_is_made(tmp_path, monkeypatch, capsys):
    """Catches sentencepiece's own error where the command to continue belongs."""
    make = data.make_tokenizer
    monkeypatch.setattr(data, "make_tokenizer", lambda path, rows: make(
        path, (r for i, r in enumerate(rows) if i or signal.raise_signal(signal.SIGINT) is None)))
    assert train.main(SMALL + [f"--out_dir={tmp_path}"]) is None
    assert capsys.readouterr().out.splitlines()[-1].startswith("stopped; continue with: python train.py ")


def test_second_signal_ends_at_once():
    """Catches a run that cannot be stopped while a step or a save hangs."""
    code = ("import signal, train\nwith train.held_signals() as noted:\n    signal.raise_signal(signal.SIGINT)\n"
            "    print(noted, flush=True)\n    signal.raise_signal(signal.SIGTERM)\n    print('still here')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and "SIGINT" in done.stderr and "[2]" in done.stdout and "still here" not in done.stdout


def truncated(raw):
    return raw[:len(raw) // 2]


def zeroed(raw):
    return bytes(len(raw))


def flipped(raw):
    return raw[:len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1:]


@pytest.mark.parametrize("damage", [truncated, zeroed, flipped, lambda raw: b"", None], ids=lambda d: getattr(d, "__name__", "gone"))
def test_damaged_checkpoint_falls_back_on_the_one_before(finished, tmp_path, capsys, damage):
    """Catches damage that is loaded or that ends the run; None is a kill between the two renames of a save."""
    assert train.main(run_like(finished, tmp_path, "--stop_after=10")) is None
    newest, before = tmp_path / "checkpoint.pt", tmp_path / "previous_checkpoint.pt"
    assert [torch.load(p, weights_only=True)["totals"]["step"] for p in (newest, before)] == [10, 8]
    newest.write_bytes(damage(newest.read_bytes())) if damage else newest.unlink()
    capsys.readouterr()
    train.main(run_like(finished, tmp_path, "--resume"))
    warned = f"warning: {newest}: not a readable checkpoint" in capsys.readouterr().out
    assert warned == (damage is not None)
    assert_same_run(finished, tmp_path)
    for path in (newest, before):
        path.write_bytes(zeroed(path.read_bytes()))
    with pytest.raises(SystemExit, match="previous_checkpoint.pt: not a readable checkpoint"):
        train.main(run_like(finished, tmp_path, "--resume"))


def test_every_flipped_bit_is_noticed_or_changes_nothing(finished, tmp_path):
    """Catches a checksum that leaves out part of the file."""
    raw, rng, refused = (finished[0] / "adapter.pt").read_bytes(), random.Random(0), 0
    expected = train.read_saved(finished[0] / "adapter.pt")
    for _ in range(300):
        bad = bytearray(raw)
        bad[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (tmp_path / "adapter.pt").write_bytes(bad)
        try:
            assert same(train.read_saved(tmp_path / "adapter.pt"), expected)
        except InputError:
            refused += 1
    assert refused > 100


class Bomb:
    """What a stranger's pickle may hold: loading it runs code, here one that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["adapter.pt", "checkpoint.pt", "base.tmp/checkpoint.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("dump", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))], ids=["zip", "pickle"])
def test_code_in_a_file_is_refused_and_does_not_run(finished, tmp_path, name, dump):
    """Catches a load without weights_only."""
    path, fruit = tmp_path / name, tmp_path / "ran"
    path.parent.mkdir(exist_ok=True)
    dump({"config": Bomb(fruit)}, path)
    (torch.load(path, weights_only=False) if dump is torch.save else pickle.loads(path.read_bytes()))
    assert fruit.exists()                        # it is live
    fruit.unlink()
    (tmp_path / "config.json").write_bytes((finished[0] / "base" / "config.json").read_bytes())
    flags = {"adapter.pt": ["--mode=eval"], "checkpoint.pt": ["--resume"], "base.tmp/checkpoint.pt": SMALL,
             "pytorch_model.bin": ["--mode=eval", "--method=none", f"--init_from={tmp_path}"]}[name]
    with pytest.raises(SystemExit, match=name):
        train.main([f"--out_dir={tmp_path}", *flags])
    assert not fruit.exists()


@pytest.mark.parametrize("change, message", [
    (lambda s: s["config"].update(rank=3), "lora_A is"), (lambda s: s["config"].update(method="moelora"), "interaction"),
    (lambda s: s["config"].update(targets=("q_proj",)), "missing"), (lambda s: s["config"].update(rank="2"), "setting rank=2"),
    (lambda s: s["config"].update(colour="red"), "setting colour=red"), (lambda s: s.pop("fingerprint"), "no fingerprint"),
    (lambda s: s["parameters"].clear(), "missing"), (lambda s: s.update(fingerprint="0"), "another base"),
    (lambda s: next(iter(s["parameters"].values())).view(-1)[3:4].fill_(math.nan), "lora_A has numbers that are not finite")])
def test_adapter_that_does_not_fit_is_refused(finished, tmp_path, change, message):
    """Catches an adapter of another rank, method, target set or base, put on the model half or not at all."""
    saved = torch.load(finished[0] / "adapter.pt", weights_only=True)
    change(saved)
    run_like(finished, tmp_path)
    torch.save(saved, tmp_path / "adapter.pt")
    with pytest.raises(SystemExit, match=message):
        train.main(["--mode=eval", f"--out_dir={tmp_path}", "--device=cpu"])


def test_adapter_that_does_nothing_is_reported(finished, tmp_path, capsys):
    """Catches an adapter whose B was never written: it gives exactly the base model, with no other symptom."""
    saved = torch.load(finished[0] / "adapter.pt", weights_only=True)
    for name, p in saved["parameters"].items():
        p.zero_() if name.endswith("lora_B") else None
    run_like(finished, tmp_path)
    torch.save(saved, tmp_path / "adapter.pt")
    for out, reported in ((tmp_path, True), (finished[0], False)):
        train.main(["--mode=sample", "--prompt=Where does Anna live?", f"--out_dir={out}", "--device=cpu"])
        assert ("every B of the adapter" in capsys.readouterr().out) == reported


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_leaves_the_last_good_checkpoint_and_training_goes_on(finished, tmp_path, monkeypatch, capsys):
    """Catches a failed save that ends the run, or that takes the checkpoint before it along."""
    seen, schedule = [], train.schedule

    def fill_disk(step, steps, warmup):
        if step == 4:
            (tmp_path / "checkpoint.pt.tmp").symlink_to("/dev/full")     # the save after step 8 meets it
        if step == 8:
            seen.append(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["totals"]["step"])
        return schedule(step, steps, warmup)
    monkeypatch.setattr(train, "schedule", fill_disk)
    train.main(run_like(finished, tmp_path))
    assert seen == [4] and capsys.readouterr().out.count("No space left on device") == 1
    monkeypatch.undo()
    assert_same_run(finished, tmp_path)
    # where there is no next time, the run must not end as if it had saved
    (tmp_path / "stop").mkdir()
    (tmp_path / "stop" / "checkpoint.pt.tmp").mkdir()
    with pytest.raises(SystemExit, match="error: .*checkpoint.pt.tmp"):
        train.main(run_like(finished, tmp_path / "stop", "--stop_after=3"))


def test_log_lines_wait_while_they_cannot_be_written(tmp_path, capsys):
    """Catches lost, doubled or torn lines, and NaN, which is no JSON."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    log = train.Log(path, len('{"step": 1}\n'))
    path.rename(tmp_path / "away")
    path.mkdir()                                 # cannot be opened
    assert not train.attempt(log, {"step": 2, "loss": math.nan})
    path.rmdir()
    (tmp_path / "away").rename(path)
    assert train.attempt(log, {"step": 3})
    assert read_log(tmp_path) == [{"step": 1}, {"step": 2, "loss": None}, {"step": 3}]
    assert log.size == path.stat().st_size and "training goes on" in capsys.readouterr().out


def test_out_of_memory_saves_and_names_the_flags(finished, tmp_path, monkeypatch):
    """Catches work lost to a batch that was too large, and a half step in what was saved."""
    real, calls = train.accumulate_gradients, []

    def too_large(model, batches, balance=0.0):
        calls.append(real(model, batches, balance))
        if len(calls) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return calls[-1]
    monkeypatch.setattr(train, "accumulate_gradients", too_large)
    with pytest.raises(SystemExit, match="lower --max_tokens or add --checkpointing"):
        train.main(run_like(finished, tmp_path))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["totals"]["step"] == 6
    monkeypatch.undo()
    train.main(run_like(finished, tmp_path, "--resume"))
    assert_same_run(finished, tmp_path)


def test_many_steps_that_are_not_finite_stop_the_run(finished, tmp_path, monkeypatch):
    """Catches nights of skipped steps, and an infinite loss whose gradient is finite."""
    real, calls = train.accumulate_gradients, []

    def infinite(model, batches, balance=0.0):
        loss, n = real(model, batches, balance)
        calls.append(n)
        return (loss if len(calls) <= 5 else loss * math.inf), n
    monkeypatch.setattr(train, "accumulate_gradients", infinite)
    with pytest.raises(SystemExit, match="20 steps in a row up to step 25 .* --learning_rate"):
        train.main(run_like(finished, tmp_path, "--steps=40"))
    monkeypatch.undo()
    saved = train.read_saved(tmp_path / "checkpoint.pt")
    assert saved["totals"]["step"] == 25 and saved["totals"]["skipped"] == 20
    assert [r["loss"] is None for r in read_log(tmp_path)] == [False] * 5 + [True] * 20
    assert train.main(run_like(finished, tmp_path / "five", "--steps=40", "--stop_after=5")) is None
    assert same(saved["parameters"], train.read_saved(tmp_path / "five" / "checkpoint.pt")["parameters"])


def test_folder_is_locked_by_a_run_and_freed_by_its_death(finished, tmp_path):
    """Catches two runs that write into one folder, and a killed run whose lock stays behind."""
    code = f"import train, sys\ntrain.lock(train.Path({str(tmp_path)!r}))\nprint('held', flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        run_like(finished, tmp_path)
        before = files_in(tmp_path)
        for more in ("--steps=1", "--resume"):
            with pytest.raises(SystemExit, match=f"in use by process {holder.pid};"):
                train.main(run_like(finished, tmp_path, more))
        assert files_in(tmp_path) == before
        holder.kill()
    assert (tmp_path / "lock").exists() and train.main(run_like(finished, tmp_path, "--steps=1"))["steps"] == 1


def test_unfinished_run_is_not_overwritten(finished, tmp_path):
    """Catches a forgotten --resume that throws a night's work away."""
    assert train.main(run_like(finished, tmp_path, "--stop_after=2")) is None
    before = files_in(tmp_path)
    with pytest.raises(SystemExit, match="at step 2 of 20 of a run that has not ended: continue it with --resume"):
        train.main(run_like(finished, tmp_path))
    assert files_in(tmp_path) == before


def test_resuming_on_other_rows_is_refused(finished, tmp_path):
    """Catches a data file that changed between two parts of a run."""
    rows = [{"instruction": f"number {i}?", "output": f"it is {i % 3}"} for i in range(60)]
    flags = SMALL + [f"--init_from={finished[0]}/base", f"--data={tmp_path}/rows.json", f"--out_dir={tmp_path}", "--steps=4"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert train.main(flags + ["--stop_after=2"]) is None
    (tmp_path / "rows.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(SystemExit, match="rows of --data are not those"):
        train.main(flags + ["--resume"])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert train.main(flags + ["--resume"])["steps"] == 4


def test_deterministic_flag_gives_the_same_bits_here(finished, tmp_path):
    """Catches a flag that breaks a run; what it is for needs a GPU."""
    train.main(run_like(finished, tmp_path, "--deterministic"))
    assert torch.are_deterministic_algorithms_enabled()
    assert same(*(train.read_saved(o / "adapter.pt")["parameters"] for o in (finished[0], tmp_path)))
    torch.use_deterministic_algorithms(False)


slow = pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes; SLOW=1 pytest runs it")
PROCESS = [sys.executable, str(Path(train.__file__)), "--device=cpu", "--base_steps=20", "--base_width=32", "--base_layers=1",
           "--base_batch_size=2", "--batch_size=4", "--val_examples=2", "--rank=2", "--dropout=0.1", "--log_every=1", "--resume"]


@slow
def test_thirty_kills_leave_no_trace(tmp_path):
    """SIGKILL at 30 random moments, every second one while a checkpoint is being written; the same command line each time.
    Catches any state that is lost, torn or done twice: base, adapters, optimizer and log must equal those of a run left alone."""
    command = [*PROCESS, "--steps=500", "--save_every=1"]

    def start(out):
        return subprocess.Popen([*command, f"--out_dir={out}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def saving(folder, since):
        """Whether a checkpoint is half written; what an earlier kill left behind does not count."""
        try:
            return (folder / "checkpoint.pt.tmp").stat().st_mtime > since
        except FileNotFoundError:
            return False

    whole, begun = tmp_path / "whole", time.perf_counter()
    process = start(whole)
    assert process.communicate() and process.returncode == 0
    seconds, rng, kills, n_runs = time.perf_counter() - begun, random.Random(0), Counter(), 0
    while sum(kills.values()) < 30 or not (out / "summary.json").exists():
        if not n_runs or (out / "summary.json").exists():
            n_runs += 1
            out = tmp_path / f"run {n_runs}"
        process, since = start(out), time.time()
        if (n := sum(kills.values())) < 30:      # the first ten early, so that they hit the making of the base
            folder, deadline = (out / "base.tmp", since + rng.uniform(0, seconds / 3)) if n < 10 else (
                out, since + rng.uniform(0, seconds / 2))
            while process.poll() is None and (time.time() < deadline or n % 2 and not saving(folder, since)):
                time.sleep(0.0005)
            process.kill()
        printed, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), printed
        if process.returncode:
            where = "training" if (out / "log.jsonl").exists() else "the base"
            where += ", during a save" * (saving(out, since) or saving(out / "base.tmp", since))
            kills[where] += 1
            print(f"kill {n + 1} in run {n_runs}: {where}", flush=True)
        if (out / "summary.json").exists():
            assert_same_run((whole,), out)
            assert [r["step"] for r in read_log(out)] == list(range(1, 501))
            assert (out / "base" / "model.safetensors").read_bytes() == (whole / "base" / "model.safetensors").read_bytes()
    print(f"\n{sum(kills.values())} kills survived in {n_runs} runs of {seconds:.0f} s: {dict(kills)}")
    assert sum(n for where, n in kills.items() if "save" in where) >= 5


@slow
def test_memory_stays_flat_over_twenty_thousand_steps(tmp_path):
    """Catches whatever piles up: resident memory after 2,000 steps and later, the size of log and checkpoint."""
    process = subprocess.Popen([*PROCESS, "--steps=20000", "--batch_size=1", "--save_every=500", f"--out_dir={tmp_path}"])
    resident = []
    while process.poll() is None:
        time.sleep(1)
        if (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "adapter.pt").exists():
            kb = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
            resident += [((tmp_path / "log.jsonl").read_bytes().count(b"\n"), int(kb[0].split()[1]))] if kb else []
    assert process.returncode == 0
    first = next(kb for step, kb in resident if step >= 2000)
    most = max(kb for step, kb in resident if step >= 2000)
    sizes = [(tmp_path / n).stat().st_size for n in ("previous_checkpoint.pt", "checkpoint.pt", "log.jsonl")]
    print(f"\nresident: {first:,} kB after 2,000 steps, at most {most:,} kB later (+{most / first - 1:.2%}); checkpoint "
          f"{sizes[1]:,} bytes, log {sizes[2]:,} bytes for {len(read_log(tmp_path)):,} steps")
    assert [r["step"] for r in read_log(tmp_path)] == list(range(1, 20001))
    assert most < 1.01 * first and abs(sizes[0] - sizes[1]) < 64


def test_every_flag_has_help(capsys):
    """Catches a flag that nobody explained."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for f in train.fields(train.Config):
        assert f"--{f.name}" in text and len(f.metadata["help"]) > 10
