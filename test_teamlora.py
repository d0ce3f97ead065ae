"""The questions that a doubter would ask, in the order in which he would ask them.

    pytest                  all of it, under two minutes on two cores, no network, tiny random weights

Is the layer the paper's equation? Are the rivals fair? Is the model a Llama? Do weights load, or fail loudly?
Is the benchmark honest? Do batches leave the mathematics alone? Does a run train what it says, and can it be
resumed? Each docstring says which break the test catches.
"""

import gc
import io
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
import weakref
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import data
import train
from model import (SCALING, AdapterConfig, Llama, LlamaConfig, fingerprint, load_llama, open_weights,
                   read_json, read_safetensors, rotary_tables, rotate, save_llama, write_safetensors)
from teamlora import (METHODS, InputError, TeamLoRALinear, adapter_layers, adapter_parameters, balance_loss,
                      distribution, entropy, load_parameters, mean_usage, merge, mutual_information, only,
                      parameter_state, published_loop, restricted, shapley_interactions, shapley_values, top)

# head_dim unlike width / heads, odd vocabulary
TINY = LlamaConfig(vocab_size=101, hidden_size=48, intermediate_size=56, num_hidden_layers=3,
                   num_attention_heads=6, num_key_value_heads=2, head_dim=10, rope_theta=500.0)


def tiny(method="teamlora", config=TINY, dtype=torch.float32, **adapter):
    """A tiny random Llama whose experts are no longer zero."""
    torch.manual_seed(1)
    adapter = AdapterConfig(method=method, **{"rank": 3, "n_experts": 4, **adapter})
    model = Llama(config, adapter).init_weights()
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


def weights_of(layer, x):
    """What the layer reports as the weights of its experts."""
    routing = []
    layer(x, routing)
    return routing[0]


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
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [False, True])
def test_fresh_layer_is_its_base_bit_for_bit(method, bias):
    """Catches a B that does not start at zero, and a base path that is not the plain linear map."""
    layer = METHODS[method](32, 24, bias)
    x = torch.randn(3, 5, 32)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not layer.weight.requires_grad and (layer.bias is None or not layer.bias.requires_grad)


def test_initial_values():
    """Catches a wrong init: A and R Kaiming-uniform of bound 1/sqrt(in), B zero, M uniform of diagonal 0."""
    layer = TeamLoRALinear(400, 10, rank=8, n_experts=4)
    for p in (layer.lora_A, layer.router):
        assert 0.045 < p.abs().max() <= 0.05
    off_diagonal = layer.interaction[~torch.eye(4, dtype=torch.bool)]
    assert layer.interaction.diagonal().eq(0).all()
    assert off_diagonal.ne(0).all() and off_diagonal.abs().max() <= 0.1
    assert layer.interaction.requires_grad and layer.lora_B.eq(0).all()
    assert (layer.lora_A.shape, layer.lora_B.shape, layer.router.shape) == ((32, 400), (10, 32), (4, 400))


def test_weights_sum_to_E_may_be_negative_and_are_fp32():
    """Catches clamped weights, a sum of 1, and routing in the base's bf16."""
    layer = layer_of("teamlora", 4, torch.float32)
    w = weights_of(layer, torch.randn(50, 11))
    assert torch.allclose(w.sum(-1), torch.full((50,), 4.0), atol=1e-5)
    with torch.no_grad():
        layer.interaction.zero_()[0, 1] = -0.9   # expert 0 speaks against expert 1
        layer.router.zero_()[0] = 1.0
    assert weights_of(layer, torch.full((1, 11), 0.3))[0, 1] < 0
    assert layer.route(torch.randn(2, 11, dtype=torch.bfloat16)).dtype == torch.float32
    assert torch.allclose(layer.route(x := torch.randn(5, 11)), weights_of(layer, x))
    assert weights_of(layer.double(), torch.randn(2, 11, dtype=torch.float64)).dtype == torch.float64


def test_normaliser_is_guarded():
    """Catches an unguarded 1 + phi (M 1): at 0 the update would be infinite, below 0 its sign would flip."""
    layer = layer_of("teamlora", 4, torch.float32)
    for row_sum in (-1.0, -1.5):
        with torch.no_grad():
            layer.interaction.zero_()[:, 0] = row_sum
        x = torch.randn(20, 11, requires_grad=True)
        w, phi = weights_of(layer, x), torch.softmax(x @ layer.router.T, -1)
        assert w.isfinite().all() and w.abs().max() <= 10 * 4 * 2
        assert (w[:, 1:].sign() == phi[:, 1:].sign()).all()
        layer(x).sum().backward()
        assert x.grad.isfinite().all()


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
    """Catches dropout on x: with A = identity on one input, dropping z zeroes whole rank rows, mixes none."""
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
    """Catches an unfair baseline: sizes and sums of weights are those of the README's table of methods."""
    E, r, n_in, n_out = 4, 3, 11, 7
    x = torch.randn(6, n_in)
    sizes = {}
    for method, cls in METHODS.items():
        layer = layer_of(method, E, torch.float32)
        sizes[method] = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        total = {"teamlora": E, "lora": E}.get(method, 1)
        assert torch.allclose(weights_of(layer, x).sum(-1), torch.full((6,), float(total)), atol=1e-5), cls
    both = E * r * (n_in + n_out)
    assert sizes == {"teamlora": both + E * n_in + E * E, "lora": both, "moelora": both + E * n_in,
                     "hydralora": r * n_in + E * r * n_out + E * n_in}


def test_lora_is_one_matmul_of_the_total_rank_with_scale_alpha_over_r():
    """Catches LoRA scaled by alpha / (E r), which would make it a weaker rival at equal flags."""
    layer = layer_of("lora", 4)
    x = torch.randn(6, 11, dtype=torch.float64)
    update = layer.alpha / 3 * (x @ layer.lora_A.T @ layer.lora_B.T)
    assert torch.allclose(layer(x), x @ layer.weight.T + update)


def test_one_expert_is_plain_lora():
    """Catches a router that changes the scale at E = 1."""
    team, lora = layer_of("teamlora", 1), layer_of("lora", 1)
    with torch.no_grad():
        for key in ("weight", "lora_A", "lora_B"):
            lora.get_parameter(key).copy_(team.get_parameter(key))
    x = torch.randn(6, 11, dtype=torch.float64)
    assert torch.allclose(team(x), lora(x))


def test_balance_and_usage_leave_padding_out():
    """Catches padding in the mean, a target of 1/E, a term that is not zero when experts are used evenly."""
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
                scores = torch.stack([rotated(q[t, mine], t) @ rotated(k[s, shared], s)
                                      for s in range(t + 1)])
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
        difference = model(tokens[None])[0] - naive_llama(model, tokens)
        assert difference.abs().max() < 1e-6     # rotary tables are fp32


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
    seeded = [model.generate(prompt, 9, temperature=0.8, top_k=5, use_cache=c,
                             generator=torch.Generator().manual_seed(3)) for c in (True, False)]
    assert torch.equal(*seeded)


@pytest.mark.parametrize("cached, n", [(True, 64), (False, 8)])
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
    """Catches a frozen adapter, a trainable base, a target left out: at step 0 B = 0 stops A, R and M."""
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
    """Catches reentrant checkpointing, which trains only a frozen base's last layer; doubled routing."""
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


def test_compiled_blocks_compute_the_same_and_compile_twice():
    """Catches compiled layers that differ, checkpointed or not, a graph break, a compilation per length."""
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    model, compiled, counter = tiny(), tiny(), CompileCounterWithBackend("eager")
    compiled.compile_blocks(counter)
    for rows, length, on in ((2, 8, False), (3, 24, True), (5, 16, False), (4, 40, True)):
        tokens, results = torch.randint(0, 101, (rows, length + 1)), []
        for m in (model, compiled):
            m.checkpointing = on
            m.zero_grad()
            loss, _ = m(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in adapter_parameters(m).values())])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*results))
    assert counter.frame_count == 2  # the first block, whose input needs no gradient, and all others
    assert torch.equal(model.generate(tokens[:, :3], 4), compiled.generate(tokens[:, :3], 4))
    assert adapter_parameters(model).keys() == adapter_parameters(compiled).keys()
    assert counter.frame_count == 2


def test_no_way_of_calling_a_compiled_block_falls_back_to_eager():
    """Catches PyTorch's limit of eight graphs: evaluation and wanted routing weights come beside training."""
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    model, counter = tiny(), CompileCounterWithBackend("eager")
    model.compile_blocks(counter)
    for rows in (4, 1):
        for routing in (False, True):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    model.train(grad).hidden(torch.randint(0, 101, (rows, 16)), want_routing=routing)
    assert counter.frame_count > 8


def test_logits_never_exist_whole(monkeypatch):
    """Catches (N, V) logits kept for the backward pass, and chunks that change a loss or a gradient."""
    model = tiny(config=train.replace(TINY, vocab_size=5000))
    hidden, targets = torch.randn(4, 64, 48), torch.randint(0, 5000, (4, 64))
    targets[:, ::4] = -1
    results, peaks = [], []
    for limit in (10 ** 9, 25 * 5000):
        monkeypatch.setattr("model.MAX_LOGITS", limit)
        h = hidden.clone().requires_grad_()

        def run():
            losses, hits = model.token_losses(h, targets)
            losses.square().sum().backward()     # unlike a sum, it gives every token a gradient of its own
            results.append((losses, hits, h.grad))
        peaks.append(train.allocated_peak(run, "cpu"))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results))
    # 8 bytes of fp32 per limit * 8 below: at the real limit of 2^25 logits no more than 1 GB
    assert peaks[0] > 192 * 5000 * 4 * 2 and peaks[1] < 25 * 5000 * 4 * 8
    assert train.MAX_LOGITS * 4 * 8 <= 2 ** 30


# ---- Do weights load, or fail loudly?

def test_saved_llama_loads_to_the_same_logits(tmp_path):
    """Catches a lost or permuted key, a norm that is not read, a config that does not come back."""
    for i, tied in enumerate((False, True)):
        config = train.replace(TINY, tie_word_embeddings=tied, eos_token_id=(2, 7), rms_norm_eps=1e-6)
        model = tiny("none", config)
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
    other = tiny("none", train.replace(TINY, head_dim=12))
    assert fingerprint(loaded) == fingerprint(model) != fingerprint(other)


def test_safetensors_round_trip_keeps_every_bit(tmp_path):
    """Catches a wrong dtype, shape or offset."""
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).to(torch.bfloat16),
               "c": torch.randn(2, 1, 3).half(), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    write_safetensors(tensors, tmp_path / "x")
    again = read_safetensors(tmp_path / "x")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in tensors.items())


class Code:
    """Pickled, this runs code in whoever reads it without weights_only."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def write_hub(model, folder, suffix, n_shards, index):
    """A Hugging Face folder as others write it: .safetensors or .bin, whole or in shards, maybe an index."""
    save_llama(model, folder)
    (folder / "model.safetensors").unlink()
    weights = {k: v.detach() for k, v in model.base_parameters().items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}.{suffix}"] if n_shards == 1 else [
        f"{stem}-{i + 1:05d}-of-{n_shards:05d}.{suffix}" for i in range(n_shards)]
    for i, name in enumerate(names):
        (write_safetensors if suffix == "safetensors" else torch.save)(
            {k: v for j, (k, v) in enumerate(weights.items()) if j % n_shards == i}, folder / name)
    if index:
        weight_map = {k: names[j % n_shards] for j, k in enumerate(weights)}
        path = folder / f"{stem}.{suffix}.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_meta(model, folder, n_shards, embedding_axis, params):
    """A Meta folder, written from the published description of its layout, row by row."""
    c, D = model.config, model.config.head_dim
    shards = [{"rope.freqs": torch.ones(5)} for _ in range(n_shards)]
    names = {"self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
             "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
             "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.down_proj": ("feed_forward.w2", 1),
             "mlp.up_proj": ("feed_forward.w3", 0), "input_layernorm": ("attention_norm", None),
             "post_attention_layernorm": ("ffn_norm", None), "norm": ("norm", None),
             "embed_tokens": ("tok_embeddings", embedding_axis), "lm_head": ("output", 0)}
    for name, p in model.base_parameters().items():
        layer, key = ("", name) if "layers" not in name else (name[6:].split(".")[1], name.split(".", 3)[3])
        meta, axis = names[key.removeprefix("model.").removesuffix(".weight")]
        p = p.detach().clone()
        if meta in ("attention.wq", "attention.wk"):
            halves = p.clone()
            for head in range(len(p) // D):
                for i in range(D // 2):  # a pair stands side by side here, half a head apart at Hugging Face
                    p[head * D + 2 * i] = halves[head * D + i]
                    p[head * D + 2 * i + 1] = halves[head * D + D // 2 + i]
        for i, shard in enumerate(shards):
            part = p if axis is None else p.chunk(n_shards, axis)[i].clone()
            shard[f"{f'layers.{layer}.' if layer else ''}{meta}.weight"] = part
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps(
        {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "head_dim": D,
         "n_heads": c.num_attention_heads, "norm_eps": c.rms_norm_eps, "multiple_of": 256} | params))


def same_logits(folder, model, dtype=torch.float32):
    """Whether the folder's model computes what `model` does, over enough positions to show a wrong layout."""
    tokens = torch.randint(0, model.config.vocab_size, (2, 65))
    with torch.no_grad():
        return torch.equal(load_llama(folder, dtype=dtype)(tokens), model.to(dtype)(tokens))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("n_shards, index", [(1, False), (1, True), (3, True), (3, False)])
def test_every_hugging_face_layout_gives_the_same_logits(tmp_path, suffix, n_shards, index):
    """Catches a shard that is not read, an index that is trusted in vain, an inv_freq entry that disturbs."""
    dtypes = (False, torch.float32), (True, torch.bfloat16), (False, torch.float16)
    for i, (tied, dtype) in enumerate(dtypes):
        model = tiny("none", train.replace(TINY, tie_word_embeddings=tied), dtype)
        write_hub(model, tmp_path / str(i), suffix, n_shards, index)
        assert same_logits(tmp_path / str(i), model, dtype)


def test_tied_head_may_be_stored_twice(tmp_path):
    """Catches a head that is loaded beside the embedding it is tied to; parameters in place of tensors."""
    model = tiny("none", train.replace(TINY, tie_word_embeddings=True))
    save_llama(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({**dict(model.named_parameters(remove_duplicate=False))}, tmp_path / "pytorch_model.bin")
    assert "lm_head.weight" in open_weights(tmp_path) and same_logits(tmp_path, model)
    loaded = load_llama(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


EIGHT = train.replace(TINY, vocab_size=104, num_attention_heads=16, num_key_value_heads=8, head_dim=6)


@pytest.mark.parametrize("config, n_shards, axis, params", [
    (TINY, 1, 1, {"vocab_size": -1, "rope_theta": 500.0, "n_kv_heads": 2}),
    (train.replace(TINY, rope_theta=10000.0, num_key_value_heads=6), 1, 1, {"vocab_size": -1}),
    (train.replace(TINY, vocab_size=106), 2, 1, {"vocab_size": -1, "rope_theta": 500.0}),
    (train.replace(TINY, vocab_size=106, tie_word_embeddings=True), 2, 0, {"rope_theta": 500.0}),
    (EIGHT, 8, 1, {"vocab_size": 104, "rope_theta": 500.0, "n_kv_heads": 8}),
    (train.replace(EIGHT, rope_scaling={"rope_type": "llama3", **SCALING["llama3"], "factor": 32.0}), 8, 0,
     {"rope_theta": 500.0, "n_kv_heads": 8, "use_scaled_rope": True})])
@pytest.mark.parametrize("nested", [False, True])
def test_every_meta_layout_gives_the_same_logits(tmp_path, config, n_shards, axis, params, nested):
    """Catches q or k permuted with the wrong heads, or not at all; shards put together along a wrong axis."""
    model = tiny("none", config)
    write_meta(model, tmp_path, n_shards, axis, params)
    if nested:
        written = json.loads((tmp_path / "params.json").read_text())
        (tmp_path / "params.json").write_text(json.dumps({"model": written, "seed": 1}))
    assert load_llama(tmp_path).config.rope_scaling == config.rope_scaling
    assert same_logits(tmp_path, model)


@pytest.mark.parametrize("spoil, message", [
    (lambda f, w: (f / "consolidated.01.pth").unlink(), "consolidated.01.pth is missing"),
    (lambda f, w: (f / "consolidated.00.pth").unlink(), "consolidated.00.pth is missing"),
    (lambda f, w: (f / "params.json").write_text("{}"), "'dim' is missing"),
    (lambda f, w: (f / "params.json").write_text('{"dim": "48", "n_heads": 6}'), "wrong in params.json"),
    (lambda f, w: (f / "params.json").write_text(
        (f / "params.json").read_text().replace('rs": 3', 'rs": 1e9')),
     "params.json: num_hidden_layers is 1000000000.0, not a whole number"),
    (lambda f, w: torch.save(w | {"layers.0.attention.wq.bias": torch.ones(30)}, f / "consolidated.00.pth"),
     "unexpected .*q_proj.bias"),
    (lambda f, w: w.pop("norm.weight") is None or torch.save(w, f / "consolidated.01.pth"), None),
    (lambda f, w: torch.save(w | {"layers.2.feed_forward.w2.weight": torch.ones(48, 27)},
                             f / "consolidated.01.pth"),
     r"down_proj.weight has shape \(48, 28\) \+ \(48, 27\), its config says \(48, 56\)"),
    (lambda f, w: torch.save(w | {"code": Code()}, f / "consolidated.00.pth"), "it holds code, exec")])
def test_damaged_meta_folder_is_refused_by_name(tmp_path, spoil, message):
    """Catches a Meta folder that is loaded in part."""
    write_meta(tiny("none", train.replace(TINY, vocab_size=106)), tmp_path, 2, 1, {"rope_theta": 500.0})
    spoil(tmp_path, torch.load(tmp_path / "consolidated.00.pth"))
    if message is None:                          # a norm in one shard alone is enough: they are copies
        load_llama(tmp_path)
    else:
        with pytest.raises(InputError, match=message):
            load_llama(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("layout", ["safetensors", "Meta's shards"])
def test_loading_holds_the_model_once(tmp_path, layout):
    """Catches file pages kept beside their copies, shards joined aside, a model built before it is filled."""
    model = Llama(LlamaConfig(8000, 512, 2048, 6, 8, 8, 64))                         # 134 MB
    if layout == "safetensors":
        write_hub(model, tmp_path, "safetensors", 2, True)
    else:
        write_meta(model, tmp_path, 2, 1, {})
    script = """if True:
        import sys
        from model import load_llama
        def memory(key):
            return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024
        before = memory("VmRSS")
        model = load_llama(sys.argv[1])
        print(memory("VmHWM") - before, *(p.nbytes for p in model.parameters()))"""
    result = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True,
                            check=True, cwd=os.path.dirname(train.__file__))
    rise, *sizes = map(int, result.stdout.split())
    assert sum(sizes) < rise < 1.15 * sum(sizes) + max(sizes)


LONG = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("written, expected", [
    ({"rope_theta": 700.0}, None), ({"rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}}, None),
    ({"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 4.0}}, LINEAR),
    ({"rope_theta": 700.0, "rope_scaling": LINEAR}, LINEAR),
    ({"rope_parameters": {"rope_theta": 700.0, **LINEAR}}, LINEAR),
    ({"rope_theta": 700.0, "rope_scaling": LONG}, LONG),
    ({"rope_parameters": {"rope_theta": 700.0, **LONG}}, LONG), ({}, None)])
def test_rotary_settings_of_both_generations_of_config(tmp_path, written, expected):
    """Catches a reader that knows one form and silently takes 10000, or leaves scaling out."""
    save_llama(tiny("none"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"]
    (tmp_path / "config.json").write_text(json.dumps(config | written))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    loaded = load_llama(tmp_path).config
    assert loaded.rope_theta == (700.0 if written else 10000.0) and loaded.rope_scaling == expected
    assert loaded.eos_token_id == (2, 9)


VARIANTS = {"plain": TINY, "linear": train.replace(TINY, rope_scaling=LINEAR),
            "llama3": train.replace(TINY, rope_scaling=LONG, tie_word_embeddings=True),
            "one key/value head": train.replace(TINY, num_key_value_heads=1, rms_norm_eps=1e-6)}
# logits 0, 50 and 100 at positions 0, 31 and 99, of transformers' LlamaForCausalLM, fp32 (reference_logits)
GOLDEN = {
    "plain": [-0.8154, 0.7392, -0.5924, 0.5231, -0.2478, -0.0511, 1.5679, -2.5770, 3.3402],
    "linear": [-0.8154, 0.7392, -0.5924, 1.6939, -1.3760, 0.9269, 0.1827, -0.5991, 0.9584],
    "llama3": [0.5931, -0.5282, 0.4129, 1.1706, -1.1538, 1.0270, -0.0120, -0.1456, 0.2894],
    "one key/value head": [-0.0629, -0.0511, 0.1603, -0.0190, 0.1513, -0.2691, -0.2002, 0.0867, 0.0350]}


def by_formula(config):
    """A Llama whose weights follow from a formula, so that its logits can be written down."""
    model = Llama(config)
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.base_parameters().items()), 1):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (1.7 + 0.1 * i)).view(p.shape)
            p.copy_(1 + 0.2 * wave if p.dim() == 1 else 0.3 * wave)
    return model, (torch.arange(100) * 37 % config.vocab_size)[None]


def reference_logits(model, tokens, folder):
    """Logits of transformers' Llama on what save_llama writes: the source of GOLDEN."""
    transformers = pytest.importorskip("transformers")
    save_llama(model, folder)
    with torch.no_grad():
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval()(tokens).logits


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_that_transformers_computed(name):
    """Catches rotary scaling left out or wrong beyond the original length; any change of the mathematics."""
    model, tokens = by_formula(VARIANTS[name])
    with torch.no_grad():
        logits = model(tokens)[0]
    found = logits[[0, 31, 99]][:, [0, 50, 100]].flatten()
    assert torch.allclose(found, torch.tensor(GOLDEN[name]), atol=2e-4), found.tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers_live(tmp_path, name):
    """Catches a golden number that was copied wrong, and a written folder that others read differently."""
    model, tokens = by_formula(VARIANTS[name])
    expected = reference_logits(model, tokens, tmp_path)
    with torch.no_grad():
        assert (load_llama(tmp_path)(tokens) - expected).abs().max() < 2e-4


def test_adapter_loads_strictly():
    """Catches an adapter that does not match and leaves B = 0: the base model, without a symptom."""
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
    split = data.minicme_held_out("test", 60)
    asked = {(task, row.input) for task, rows in split.items() for row in rows}
    assert len(split) == 11 and len(asked) == 11 * 60
    for seed in (0, 1):
        stream = data.minicme(seed)
        rows = [stream(i) for i in range(5000)]
        assert not asked & {(r.task, r.input) for r in rows}
        assert Counter(r.task for r in rows).keys() == split.keys()
    corpus = data.corpus(1)  # nor does the base read them, whatever separates their sentences
    read = " ".join(" ".join(corpus(i).output.split()) for i in range(0, 2 * data.N_LESSONS, 4))
    assert not [q for _, q in asked if " ".join(q.split()) in read]
    assert split == data.minicme_held_out("test", 60)
    assert data.minicme(3)(17) == data.minicme(3)(17) != data.minicme(4)(17)


def test_cheap_tricks_do_not_solve_minicme():
    """Catches a task that the majority answer, the last word, or a random one of its words nearly solves."""
    rng = random.Random(0)
    for task, rows in data.minicme_held_out("test", 300).items():
        chance = data.CHANCE[task]
        majority = Counter(r.output for r in rows).most_common(1)[0][1] / len(rows)
        words = [[w.strip(".?,") for w in r.input.split()] for r in rows]
        last = sum(r.output == w[-1] for r, w in zip(rows, words)) / len(rows)
        drawn = sum(r.output == rng.choice(w) for r, w in zip(rows, words)) / len(rows)
        best = max(chance, 0.1)
        assert majority <= chance + 0.1 and last <= best and drawn <= best, (task, majority, last)


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


def test_heads_of_a_new_base_carry_over_earlier_tokens_each_into_its_own_directions():
    """Catches a head that starts by looking elsewhere, and distances that later layers cannot tell apart."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(500, 128, 64, 2, 4, 4, 32, rope_theta=100.0), AdapterConfig(method="full"))
    first = model.init_weights(positional=4).model.layers[0].self_attn
    x = F.rms_norm(model.model.embed_tokens(torch.randint(0, 500, (8, 40))), (128,))
    q, k = (rotate(p(x).unflatten(-1, (4, 32)).transpose(1, 2), rotary_tables(model.config, 0, 40, "cpu"))
            for p in (first.q_proj, first.k_proj))
    seen = (q @ k.mT / 32 ** 0.5 + torch.full((40, 40), -math.inf).triu(1)).softmax(-1).mean(0)  # (H, T, S)
    for head in range(4):
        at = [seen[head].diagonal(-back)[20:].mean().item() for back in range(8)]
        assert max(at) == at[head + 1] > 0.5
    v = first.v_proj.weight
    assert torch.allclose(v @ v.T, torch.eye(128), atol=1e-5)


# ---- Do files, prompts and batches leave the data alone?

def test_prompt_answer_border(tokenizer):
    """Catches an eos as text, a second bos, a supervised prompt, prompt and answer tokenised as one."""
    e = data.encode(tokenizer, data.Row("t", "Answer the question.", "Where does Anna live?", "Tarn"))
    head = [1] + tokenizer.encode("Answer the question.\nWhere does Anna live?") + [2]
    assert e.ids == head + tokenizer.encode("Tarn") + [2] and e.n_prompt == len(head)
    x, y, m = data.collate([e])
    assert [t for t in y[0].tolist() if t >= 0] == tokenizer.encode("Tarn") + [2]
    first = y[0].ge(0).nonzero()[0, 0]
    assert x[0, first] == 2 and m.sum() == len(e.ids) - 1
    assert tokenizer.decode(tokenizer.encode("naïve 中文 🙂\nAnna")) == "naïve 中文 🙂\nAnna"


def test_templates(tokenizer):
    """Catches a template whose parts get lost, an end that is text, and a newline beside an empty field."""
    tokenizer = data.Tokenizer(tokenizer.path)   # not the one that other tests share
    ids, row = tokenizer.encode, data.Row("t", "Who is it?", "Anna or Ben", "Anna")
    tokenizer.use("llama2")
    head = [1] + ids("[INST] Who is it?\nAnna or Ben [/INST]")
    assert data.encode(tokenizer, row) == data.Example("t", head + ids("Anna") + [2], len(head))
    without = data.encode(tokenizer, row._replace(input=""))
    assert without.ids[:-2] == [1] + ids("[INST] Who is it? [/INST]") + ids("Anna")[:-1]
    tokenizer.use("{input}{eos}{instruction}\\n{{A}}")
    head = [1] + ids("Anna or Ben") + [2] + ids("Who is it?\n{A}")
    assert data.encode(tokenizer, row) == data.Example("t", head + ids("Anna") + [2], len(head))
    plain = data.Row("t", "", "", "Anna was here")
    tokenizer.use("{instruction}{output}the")    # one id, though not the end of sequence
    assert data.encode(tokenizer, row).ids[-1:] == [tokenizer.end] == ids("the")
    assert data.encode(tokenizer, plain).ids == [1] + ids("Anna was here") + [2]
    for wrong in ("chatml", "{instruction}{output}the end of the answer"):
        with pytest.raises(InputError, match="must be a single control word"):
            tokenizer.use(wrong)
    for wrong in ("lama2", "{question}", "{instruction} {", "{instruction}{0}", "{input}",
                  "{instruction}{instruction}"):
        with pytest.raises(InputError, match="--template must be paper, llama2, llama3, chatml or a text"):
            tokenizer.use(wrong)


WORDS = "<s>", "</s>", "<|im_start|>", "<|im_end|>", "user", "assistant", "hi", "\n"


def write_words(folder, words=WORDS, bos=True):
    """A tokenizer.json of whole words, with control words and perhaps a bos that opens every text."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "hi"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("\n", "isolated")
    model.add_special_tokens([w for w in words if w.startswith("<")])
    if bos:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    model.save(str(folder / "tokenizer.json"))


def test_tokenizer_json_has_one_bos_and_its_control_words_are_ids(tmp_path):
    """Catches a second bos, an end that the file itself would add, and <|im_end|> as text."""
    for bos in (True, False):
        write_words(tmp_path, bos=bos)
        tokenizer = data.open_tokenizer(tmp_path, 1)
        tokenizer.use("chatml")
        assert tokenizer.prefix == [0] * bos and tokenizer.end == 3 and tokenizer.size == 8
        ids = data.encode(tokenizer, data.Row("t", "hi", "", "hi")).ids
        assert ids[:len(tokenizer.prefix) + 1] == [0] * bos + [2] and ids[-2:] == [6, 3]
        assert ids.count(3) == 2 and 1 not in ids


def test_which_tokenizer_is_used(tmp_path, tokenizer, capsys):
    """Catches a silent choice among several, and Llama 3's tokenizer.model read as sentencepiece."""
    with pytest.raises(InputError, match="neither tokenizer.model nor tokenizer.json"):
        data.open_tokenizer(tmp_path, 2)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(InputError, match="tokenizer.model is Llama 3's in tiktoken's format.*tokenizer.json"):
        data.open_tokenizer(tmp_path, 2)
    (tmp_path / "tokenizer.model").write_bytes(b"no such thing")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        data.open_tokenizer(tmp_path, 2)
    write_words(tmp_path)                        # from here on with the package tokenizers only
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    assert data.open_tokenizer(tmp_path, 1).path.name == "tokenizer.model"
    assert "tokenizer: tokenizer.model" in capsys.readouterr().out
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    assert data.open_tokenizer(tmp_path, 1).path.name == "tokenizer.json"
    assert "tokenizer: tokenizer.json" in capsys.readouterr().out


def test_padding_is_masked_by_length_not_by_id():
    """Catches a mask by token id: with pad = end-of-sequence the model would never learn to stop."""
    short, long = data.Example("t", [1, 5, 2, 7, 2], 3), data.Example("t", [1] + [6] * 20 + [2], 10)
    x, y, m = data.collate([short, long])
    assert x.shape == (2, 24) and m.sum(1).tolist() == [4, 21]
    assert y[0].tolist() == [-1, -1, 7, 2] + [-1] * 20


def test_files_and_folders_become_tasks(tmp_path):
    """Catches an ignored "input", a task named wrongly, a file that a BOM or Windows line ends break."""
    rows = [{"instruction": "Say", "input": "a", "output": "b"},
            {"instruction": "Say", "output": "c", "task": "other", "x": 1}]
    rows.append({"instruction": "", "input": "asked here", "output": "d", "task": "other"})
    (tmp_path / "one.json").write_text(json.dumps(rows))
    lines = b"\r\n\r\n".join(json.dumps(r).encode() for r in rows)
    (tmp_path / "two.jsonl").write_bytes(b"\xef\xbb\xbf" + lines + b"\r\n")
    rest = [("other", "Say", "", "c"), ("other", "", "asked here", "d")]
    expected = [("one", "Say", "a", "b"), *rest, ("two", "Say", "a", "b"), *rest]
    assert data.read_rows(str(tmp_path)) == expected
    assert data.read_rows(f"{tmp_path}/one.json,{tmp_path}/two.jsonl") == expected


def test_long_rows_lose_prompt_never_answer(tokenizer, capsys):
    """Catches right truncation, which drops the answer and its end, and drops that nobody hears of."""
    words = " ".join(["Anna has the ball."] * 40)
    rows = [data.Row("t", "Start here. " + words + " End there.", "", "the ball"),
            data.Row("t", "Say", "", words)]
    examples = data.encode_rows(tokenizer, rows, 60, "train")
    assert len(examples) == 1 and len(examples[0].ids) == 60
    assert examples[0].ids[examples[0].n_prompt:] == tokenizer.encode("the ball") + [2]
    text = tokenizer.decode(examples[0].ids)
    assert text.startswith("Start here.") and "End there." in text
    assert examples[0].ids[examples[0].n_prompt - 1] == 2
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


def test_cut_is_the_cheapest_of_all():
    """Catches padding that another cut would save, and micro-batches too small to be worth their start."""
    rng = random.Random(1)
    examples = [data.Example("t", [1] * rng.randint(2, 200), 1) for _ in range(9)]
    examples.sort(key=lambda e: len(e.ids))

    def cost(batches):
        return sum(data.collate(b)[0].numel() + 32 for b in batches)
    every = []
    for bits in range(2 ** 8):
        edges = [0, *(i for i in range(1, 9) if bits >> (i - 1) & 1), 9]
        batches = [examples[a:b] for a, b in zip(edges, edges[1:])]
        if all(data.collate(b)[0].numel() <= 600 for b in batches):
            every.append(cost(batches))
    assert cost(data.cut(examples, 600)) == min(every) < max(every)
    assert len(data.cut(examples, 10 ** 6, overhead=10 ** 6)) == 1


def test_cut_keeps_every_example_within_the_budget():
    """Catches lost or doubled examples and micro-batches over max_tokens."""
    rng = random.Random(0)
    examples = [data.Example("t", [1] * rng.randint(2, 90), 1) for _ in range(50)]
    for budget in (96, 200, 10 ** 6):
        batches = data.cut(examples, budget)
        assert sorted(len(e.ids) for b in batches for e in b) == sorted(len(e.ids) for e in examples)
        assert all(data.collate(b)[0].numel() <= budget for b in batches)
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
        batches = [data.collate(b) for b in data.cut(examples, budget, overhead=budget)]
        loss, n = train.accumulate_gradients(model, batches, balance)
        gradients = [p.grad.clone() for p in adapter_parameters(model).values()]
        results.append((len(batches), float(loss), n, gradients))
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
    assert all(torch.allclose(a, p.grad, rtol=1e-8, atol=1e-12)
               for a, p in zip(ours, adapter_parameters(model).values()))


# ---- Does a run do what it says?

BASE = ["--base_steps=3", "--base_width=64", "--base_layers=2", "--base_batch_size=4"]
REAL = ["--device=cpu", "--batch_size=11", "--val_examples=3", "--rank=2", "--log_every=1", "--warmup=0.2",
        "--save_every=4"]
SMALL = BASE + REAL


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of 20 steps: (folder, summary)."""
    out = tmp_path_factory.mktemp("finished")
    return out, train.main(SMALL + [f"--out_dir={out}", "--steps=20"])


def prepared(out, mode):
    """(model, tokenizer, fingerprint) as a mode finds them in the folder of a run."""
    return train.prepare(*train.compose({"mode": mode, "out_dir": str(out), "device": "cpu"}))


def same(a, b):
    """Whether two nested structures hold the same bits; what depends on wall-clock times apart."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[k], b[k]) for k in a if k not in ("seconds", "tokens_per_second", "log_bytes"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_summary_has_what_it_promises(finished):
    """Catches a missing key and numbers that do not belong together."""
    out, summary = finished
    written = json.loads((out / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    assert {"method", "seed", "steps", "seconds", "tokens_per_second", "trainable_parameters",
            "total_parameters", "accuracy", "chance", "base_accuracy", "mean_accuracy", "base_mean_accuracy",
            "val_loss", "expert_usage", "peak_memory_mb", "device"} <= written.keys()
    for key in ("accuracy", "chance", "expert_usage"):
        assert written[key].keys() == data.TASKS.keys()
    assert all(math.isclose(sum(u), 4, rel_tol=1e-3) for u in written["expert_usage"].values())
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == list(range(1, 21)) and lines[-1]["loss"] < lines[0]["loss"]
    layers, C, F_, E, r = 2, 64, 160, 4, 2
    assert written["trainable_parameters"] == layers * (3 * (E * r * (C + F_) + E * E) + E * (2 * C + F_))


def test_training_leaves_the_base_alone(finished):
    """Catches a run that changes the weights it calls frozen."""
    out, _ = finished
    weights = {k: v.clone() for k, v in open_weights(out / "base").items()}
    model, *_ = prepared(out, "eval")
    assert all(torch.equal(p, weights[n]) for n, p in model.base_parameters().items())
    assert any(p.abs().max() > 0 for n, p in adapter_parameters(model).items() if n.endswith("lora_B"))


def test_eval_reproduces_the_numbers_exactly(finished, capsys):
    """Catches an adapter file that is not what was evaluated."""
    out, summary = finished
    results = train.main(["--mode=eval", f"--out_dir={out}", "--device=cpu"])
    assert {t: r["accuracy"] for t, r in results.items()} == summary["accuracy"]
    assert train.val_loss(results) == summary["val_loss"]
    assert {t: r["usage"] for t, r in results.items()} == summary["expert_usage"]


def test_sample_of_the_bare_base_continues_the_text(finished, capsys):
    """Catches a bare base that is asked as an adapter is, and a length that is ignored."""
    flags = ["--mode=sample", "--method=none", f"--out_dir={finished[0]}", "--device=cpu"]
    cfg = train.Config(mode="sample", method="none", out_dir=str(finished[0]), device="cpu")
    model, tokenizer, _ = train.prepare(cfg, None)
    text = "Anna lives in"
    ids = tokenizer.prefix + tokenizer.encode(text)
    answers = [train.answers(model, tokenizer, [ids], cfg, n)[0] for n in (5, 9)]
    capsys.readouterr()
    for n, answer in zip((5, 9), answers):
        train.main([*flags, f"--prompt={text}", f"--max_new_tokens={n}"])
        assert capsys.readouterr().out == f"{answer}\n"
    assert len(answers[0]) < len(answers[1])


def test_without_a_prompt_every_line_is_answered_as_it_comes(finished, capsys, monkeypatch):
    """Catches a chat that drops a line, repeats what it printed, or answers otherwise than --prompt does."""
    out, _ = finished
    questions = ["Where does Anna live?", "Is it a hammer? 🙂"]
    flags = ["--mode=sample", f"--out_dir={out}", "--max_new_tokens=9"]
    model, tokenizer, _ = prepared(out, "sample")
    cfg = train.Config(seed=0)
    asked = [data.encode(tokenizer, data.Row("", q, "", "")).ids[:-1] for q in questions]
    expected = [train.answers(model, tokenizer, [ids], cfg, 9)[0] for ids in asked]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(questions) + "\n"))
    capsys.readouterr()
    train.main(flags)
    assert capsys.readouterr().out == "".join(f"{a}\n" for a in expected)
    train.main(flags + [f"--prompt={questions[1]}"])
    assert capsys.readouterr().out == f"{expected[1]}\n"


def test_generation_ends_where_the_template_ends_an_answer(finished):
    """Catches an answer that runs past <|eot_id|> because the base's files name another end."""
    cfg, _ = train.compose({"mode": "eval", "out_dir": str(finished[0]), "device": "cpu", "method": "none",
                            "template": "{instruction}{output}the"})
    model, tokenizer, _ = train.prepare(cfg, None)
    assert model.config.eos_token_id == (tokenizer.end, 2) == (tokenizer.encode("the")[0], 2)


def test_letters_of_several_tokens_are_printed_once_whole(tokenizer, capsys):
    """Catches half a letter on the terminal: an unknown character is spelt in bytes, one token each."""
    show, text = train.printer(tokenizer, (2,)), "Anna 🙂 naïve"
    for i, t in enumerate(tokenizer.encode(text) + [2]):
        show(torch.tensor([[t]]))
    out = capsys.readouterr().out
    assert out == text and "\ufffd" not in out


@pytest.mark.parametrize("method, n_experts", [
    ("lora", 4), ("teamlora", 1), ("moelora", 1), ("hydralora", 1)])
def test_merged_model_computes_the_same(method, n_experts):
    """Catches a wrong scale or a transposed product in the merge, at an alpha that is not the default."""
    model = tiny(method, n_experts=n_experts, alpha=5.0, targets=("q_proj", "up_proj", "down_proj"))
    with torch.no_grad():
        for _, layer in adapter_layers(model):
            if layer.interaction is not None:
                layer.interaction.fill_(-0.95)   # 1 + M is below the guard: the constant weight is not 1
        tokens = torch.randint(0, 101, (2, 65))
        expected, base = model(tokens), tiny("none")(tokens)
        merge(model)
        assert (model(tokens) - expected).abs().max() < 1e-4 < (base - expected).abs().max()
        plain = Llama(TINY)
        load_parameters(plain.base_parameters(), model.base_parameters())
        assert torch.equal(plain(tokens), model(tokens))


@pytest.mark.parametrize("method", ["teamlora", "moelora", "hydralora"])
def test_routed_methods_say_why_they_cannot_be_merged(method):
    """Catches a merge that drops the router, and one that changes the model before it refuses."""
    model = tiny(method)
    before = parameter_state(dict(model.named_parameters()))
    with pytest.raises(InputError, match="4 experts cannot be merged.*depend on the token"):
        merge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_export_writes_a_plain_llama(finished, tmp_path, capsys):
    """Catches an export without tokenizer or adapter, over another folder, or of a routed method."""
    (tmp_path / "base").symlink_to(finished[0] / "base")
    train.main(SMALL + [f"--out_dir={tmp_path}", "--steps=4", "--method=lora", "--template=llama2"])
    train.main([f"--out_dir={tmp_path}", f"--export={tmp_path}/merged", "--device=cpu"])
    model, tokenizer, _ = prepared(tmp_path, "eval")
    exported, tokens = load_llama(tmp_path / "merged"), torch.randint(0, tokenizer.size, (2, 65))
    with torch.no_grad():
        assert (exported(tokens) - model(tokens)).abs().max() < 1e-4
    assert not torch.equal(exported.model.layers[0].mlp.up_proj.weight,
                           model.model.layers[0].mlp.up_proj.weight)
    assert data.open_tokenizer(tmp_path / "merged", 2).size == tokenizer.size
    for out, name, message in ((tmp_path, "merged", "exists already"),
                               (finished[0], "other", "depend on the token")):
        with pytest.raises(SystemExit, match=message):
            train.main([f"--out_dir={out}", f"--export={tmp_path / name}", "--device=cpu"])
    assert not (tmp_path / "other").exists() and not (tmp_path / "other.tmp").exists()
    train.main([f"--out_dir={tmp_path}", f"--export={tmp_path}/copy", "--method=none", "--device=cpu"])
    assert fingerprint(load_llama(tmp_path / "copy")) == fingerprint(load_llama(tmp_path / "base"))


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
    optimizers = train.make_optimizers(model, cfg)
    totals = train.fit(model, step_batches, optimizers, cfg, 2)
    assert all(state["step"] == 1 for state in optimizers[0].state.values())
    assert totals["skipped"] == 1 and all(p.isfinite().all() for p in adapter_parameters(model).values())
    assert not all(torch.equal(p, before[n]) for n, p in adapter_parameters(model).items())


def test_loop_reads_nothing_from_the_device_between_log_lines(tokenizer):
    """Catches a loop that waits for the GPU: on the meta device the first reading of anything is an error."""
    model = tiny(config=train.replace(TINY, vocab_size=tokenizer.size)).to("meta")
    stream, asked = data.minicme(0), []

    def step_batches(step):
        asked.append(step)
        return [data.collate([data.encode(tokenizer, stream(i))]) for i in range(2)]
    cfg = train.Config(balance=0.1, log_every=5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    optimizer.defaults["fused"], optimizer.step = True, lambda: None     # meta has no fused AdamW
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        train.fit(model, step_batches, [optimizer], cfg, 100)
    assert asked == [0, 1, 2, 3, 4]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            train.__file__]


def test_two_processes_train_and_evaluate_as_one(finished, tmp_path):
    """Catches a mean of means of processes, adapters drifting apart, lost or double examples, two writers, a
    process without an example of some task."""
    flags = SMALL + ["--steps=4", "--save_every=2", "--learning_rate=1e-3", "--balance=0.3",
                     "--max_tokens=512", "--max_length=512", "--val_examples=1"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "base").symlink_to(finished[0] / "base")
    one = train.main(flags + [f"--out_dir={tmp_path}/one"])
    run = subprocess.run([*TORCHRUN, *flags, f"--out_dir={tmp_path}/two"], capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("mean accuracy") == 1
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    logs = [read_log(tmp_path / d) for d in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 4
    for a, b in zip(*logs):
        assert a["supervised_tokens"] == b["supervised_tokens"]
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5)
        assert math.isclose(a["gradient_norm"], b["gradient_norm"], rel_tol=1e-4)
    saved = [torch.load(tmp_path / d / "checkpoint.pt", weights_only=True) for d in ("one", "two")]
    assert saved[0]["totals"]["tokens"] == saved[1]["totals"]["tokens"]
    for name, p in saved[0]["parameters"].items():
        assert (p - saved[1]["parameters"][name]).norm() <= 1e-4 * p.norm(), name
    assert math.isclose(one["val_loss"], two["val_loss"], rel_tol=1e-5) and one["accuracy"] == two["accuracy"]
    for task, usage in one["expert_usage"].items():
        assert two["expert_usage"][task] == pytest.approx(usage, rel=1e-4)


def test_exact_match_is_what_greedy_decoding_produces(finished):
    """Catches an accuracy that teacher forcing flatters: it must equal generation, its end included."""
    out, _ = finished
    model, tokenizer, _ = prepared(out, "eval")
    stream = data.minicme(0)
    model = tiny("full", train.replace(model.config))
    examples = [data.encode(tokenizer, stream(i)) for i in range(16)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):                          # learn half of them by heart
        train.accumulate_gradients(model, [data.collate(examples[:8])])
        optimizer.step()
        optimizer.zero_grad()
    greedy = [model.generate(torch.tensor([e.ids[:e.n_prompt]]), len(e.ids) - e.n_prompt)[0].tolist()
              == e.ids[e.n_prompt:] for e in examples]
    results = train.evaluate(model, {"t": examples}, 10 ** 6)
    assert results["t"]["accuracy"] == sum(greedy) / 16 and 0 < sum(greedy) < 16


def test_real_folder_and_files_take_the_same_road(finished, tmp_path):
    """Catches a run with --init_from that differs from the built-in one, or that loses a task."""
    for task, n in (("colours", 40), ("sizes", 30)):
        rows = [{"instruction": f"{task}: which is number {i}?", "output": f"it is {i % 3} 🙂"}
                for i in range(n)]
        (tmp_path / f"{task}.json").write_text(json.dumps(rows))
    summary = train.main(REAL + [f"--init_from={finished[0]}/base", f"--data={tmp_path}", "--method=lora",
                                 f"--out_dir={tmp_path}/out", "--steps=4", "--val_share=0.2"])
    assert summary["accuracy"].keys() == {"colours", "sizes"}
    assert summary["val_loss"] < summary["base_val_loss"]
    assert not (tmp_path / "out" / "base").exists()


# ---- Is the speed measured fairly?

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computed_memory_is_the_measured_one(checkpointing, dtype):
    """Catches a formula that forgets a part: the README's table for a 7B comes from it."""
    torch.manual_seed(0)
    config = train.replace(TINY, vocab_size=2000, hidden_size=96, intermediate_size=256, num_hidden_layers=5)
    cfg = train.Config(checkpointing=checkpointing, max_length=128, max_tokens=512)
    arm = train.Arm("teamlora", 4, 8, 5)
    base = Llama(config).init_weights().to(dtype)
    batches = train.bench_batches(cfg, 2000, 1.0)
    step, _, held = train.bench_runs(train.bench_model(base, arm, cfg), arm, batches, cfg)
    parts = train.training_memory(config, cfg.adapter, 4, 128, dtype, checkpointing)
    assert 0.9 < sum(parts.values()) / (held + train.allocated_peak(step, "cpu")) < 1.15
    assert parts["weights"] == sum(p.nbytes for p in base.parameters())


def test_arms_share_the_base_and_looped_arms_compute_the_same():
    """Catches an arm with weights of its own, a looped arm that is none, a limit without a backward pass."""
    base, cfg = tiny("none"), train.Config(max_length=16, max_tokens=64)
    x = torch.randint(0, 101, (2, 9))
    for method in ("teamlora", "moelora", "hydralora"):
        fused, looped = (train.bench_model(base, train.Arm(method, 4, 3, 2, loop), cfg)
                         for loop in (False, True))
        randomise(fused)
        load_parameters(adapter_parameters(looped), parameter_state(adapter_parameters(fused)))
        assert len(fused.model.layers) == 2 and torch.allclose(fused(x), looped(x), atol=1e-4)
        calls = [sum(e.key == "aten::linear" and e.count for e in profile_of(lambda: m(x)))
                 for m in (fused, looped)]
        assert calls[1] > calls[0] + 6 * 4       # four experts in each of six layers
        for m in (fused, looped):
            assert all(p is dict(base.named_parameters())[n] for n, p in m.base_parameters().items())
    limit = train.bench_model(base, train.Arm("none", 4, 3, 2), cfg)
    loss, _ = limit(x, x)
    assert loss.requires_grad and not any(p.requires_grad for p in limit.parameters())


def profile_of(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return profile.key_averages()


def test_bench_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    """Catches a missing key, method or group, and rows of --data whose lengths are ignored."""
    monkeypatch.setitem(train.SIZES, "tiny", TINY)
    rows = [{"instruction": "say " * n, "output": "it"} for n in range(4, 24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    train.main(["--mode=bench", "--size=tiny", "--device=cpu", "--bench_layers=2", "--bench=2,spread,growth",
                "--max_length=20", "--max_tokens=80", "--bench_rounds=1", "--batch_size=9",
                f"--data={tmp_path}/rows.json", f"--out_dir={tmp_path}"])
    written = json.loads((tmp_path / "bench.json").read_text())
    assert all({"name", "method", "n_experts", "looped", "step_ms", "inference_ms", "over_limit",
                "tokens_per_second", "utilisation", "peak_memory_mb"} <= r.keys() for r in written)
    everything = {(r["method"], r["looped"]) for r in written if r["group"] == "2"} - {("peft", False)}
    assert everything == {("none", False), ("lora", False)} | {
        (m, loop) for m in ("teamlora", "moelora", "hydralora") for loop in (False, True)}
    spread = [(r["n_experts"], r["rank"]) for r in written if r["group"] == "spread"]
    assert spread[1:] == [(n, 32 // n) for n in (1, 2, 4, 8, 16)]
    assert all(r["over_limit"] == 1 for r in written if r["method"] == "none")
    assert all(r["step_ms"] > 0 for r in written)
    assert 9 * 8 < written[0]["tokens"] < 9 * 20 and written[0]["layers"] == 2
    assert "spread over E" in capsys.readouterr().out


def test_arm_without_enough_memory_is_left_out_and_freed(tmp_path, monkeypatch, capsys):
    """Catches a benchmark that one arm takes down with it, and a memory that this arm keeps."""
    layers = []

    def too_large(layer, *args):
        layers.append(weakref.ref(layer))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    monkeypatch.setitem(train.SIZES, "tiny", TINY)
    monkeypatch.setattr(train, "published_loop", too_large)
    flags = ["--mode=bench", "--size=tiny", "--device=cpu", "--bench=2", "--max_length=20", "--max_tokens=80",
             "--bench_rounds=1", f"--out_dir={tmp_path}"]
    gc.disable()                                 # it frees them sooner or later, on a GPU too late
    try:
        rows = train.main(flags)
        assert len(layers) == 3 and not any(layer() for layer in layers)
    finally:
        gc.enable()
    said = capsys.readouterr().out
    assert [r["name"] for r in rows][:5] == ["frozen base", "lora", "teamlora", "moelora", "hydralora"]
    assert not any(r["looped"] for r in rows) and said.count("does not fit into the GPU's memory") == 3
    monkeypatch.setattr(train, "bench_model", lambda base, arm, cfg: too_large(base))
    with pytest.raises(SystemExit, match="out of GPU memory"):   # without the limit there is nothing to say
        train.main(flags)


# ---- Does bad input end in one line?

# flags: what is said; where nothing else is given, the name of the flag
FLAGS = {f: f.split("=")[0].strip("-") for f in f"""--no_such_flag=1 --step=5 --steps=many --steps=0 word
    --rank=0 --n_experts=0 --method=dora --targets= --mode=fly --resume=maybe --alpha=inf --learning_rate=-1
    --learning_rate=nan --dropout=1 --seed=-1 --seed={10 ** 30} --temperature=nan --out_dir=
    --max_tokens=8""".split()}
FLAGS |= {
    "--targets=q_proj,wq": "wq", "--method=none": "nothing to train", "--val_data=x.json": "needs --data",
    "--max_length=1022 --max_tokens=1022": "padding makes 1024", "--data=" + "x" * 5000: "too long",
    "--max_length=9 --max_tokens=99": "built-in texts", "--out_dir={bad}/half.json": "must be a folder",
    "--data={bad}/none.json": "cannot be read", "--data={bad}/half.json,": "a name is missing",
    "--data={bad}/adapter_code": "no .json or .jsonl file",
    "--init_from={bad}/half.json": "neither config.json",
    "--data={bad}/half.json --out_dir={bad}/new": "row 2", "--resume --steps=21": "--steps=21 contradicts",
    "--init_from={bad}/nowhere": "nowhere: neither config.json",
    "--mode=eval --rank=3": "--rank=3 contradicts",
    "--mode=eval --out_dir={bad}/none": "adapter.pt does not exist",
    "--mode=sample --prompt=\n": "the prompt is missing, empty",
    "--mode=sample --prompt=\udcff": "half of a surrogate pair",
    "--mode=sample --prompt=" + "Anna" * 2000: "tokens; give 1 to",
    "--mode=bench --size=7b": "--size must be one of smollm2-135m",
    "--mode=bench --bench=x": "--bench takes numbers of experts", "--mode=export": "--export=FOLDER",
    "--mode=eval --export=x": "--export=FOLDER", "--seeds=1,1": "--seeds must be distinct",
    "--base_width=64 --init_from=x": "--base_width is about the built-in base",
    "--template=lama3": "--template must be", "--template={{instruction.x}}": "--template must be",
    "--template={{instruction}}{{{{output}}}}": "--template must be"}
GOOD, NESTED = '{"instruction": "x", "output": "y"}', "[" * 10 ** 5
LONG = json.dumps([{"instruction": str(i), "output": "y " * 2000} for i in range(50)])
DATA = {  # file of rows: what is said, what it holds
    "half.json": ("half.json, row 2: 'output' is missing, empty or not", f'[{GOOD}, {{"instruction": "x"}}]'),
    "mute.json": ("row 1: 'instruction'", '[{"output": "y"}]'), "nul.json": ("line 1: not JSON", "\0" * 99),
    "null.json": ("row 1: 'output'", '[{"instruction": "x", "output": null}]'), "void.json": ("not JSON", ""),
    "rowless.json": ("no rows", "[]"), "blank.jsonl": ("no rows", "\n"), "wide.json": ("digits", "9" * 5000),
    "number.json": ("row 1: 'output'", '[{"instruction": "x", "output": 4}]'),
    "list.json": ("row 1: 'instruction'", '[{"instruction": ["x"], "output": "y"}]'),
    "space.jsonl": ("row 2: 'output'", '\n{"instruction": "x", "output": " "}'),
    "nested.json": ("row 1: expected an object", f"[[{GOOD}]]"), "cut.jsonl": ("line 2: not JSON", "{}\n{"),
    "object.json": ("expected a list of rows", GOOD), "lines.json": ("line 2: not JSON", GOOD + "\n" + GOOD),
    "latin.jsonl": ("byte 12 is not UTF-8", b'{"output": "\xe9"}'), "deep.json": ("recursion", NESTED),
    "alone.json": ("holding out", f"[{GOOD}]"), "deep.jsonl": ("line 2: not JSON", "\n" + NESTED),
    "pair.json": ("half of a surrogate pair", f'[{GOOD[:-2]}\\ud83d"}}]'),
    "task.json": ("row 1: 'task' is not one printable line", f'[{GOOD[:-1]}, "task": "a\\nb"}}]'),
    "long.json": ("every answer is longer", LONG)}
CONFIG = [  # a key of config.json, its value; None: it is missing
    ("model_type", "mistral"), ("hidden_act", "gelu"), ("attention_bias", True), ("rope_theta", -1),
    ("num_attention_heads", None), ("rope_theta", 10 ** 400), ("num_attention_heads", 3), ("head_dim", 31),
    ("hidden_size", "64"), ("num_hidden_layers", 10 ** 9), ("vocab_size", -1), ("rms_norm_eps", "1e-5"),
    ("eos_token_id", [10 ** 6]), ("tie_word_embeddings", 1), ("partial_rotary_factor", 0.5),
    ("eos_token_id", [[1]]),
    ("quantization_config", {"load_in_4bit": True})]


def pickled(thing):
    torch.save(thing, buffer := io.BytesIO())
    return buffer.getvalue()


def header(text="", name="a", dtype="F32", shape=(), stop=4):
    """A safetensors file with this header, or with one entry, before 16 bytes."""
    text = (text or json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, stop]}})).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


def endless(_):
    """A sentencepiece model without an end of sequence."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"] * 50), model_writer=(buffer := io.BytesIO()), vocab_size=9, eos_id=-1,
        hard_vocab_limit=False, minloglevel=2)
    return buffer.getvalue()


SAFE, PICKLE, PIECES = "model.safetensors", "pytorch_model.bin", "tokenizer.model"
# Llama folder: what is said, {file: what it holds; None: it is missing; a function: of the good file; a dict:
# what differs in config.json or among the weights}
FOLDERS = {f"config{i}": (key, {"config.json": {key: value}}) for i, (key, value) in enumerate(CONFIG)} | {
    "yarn": ("rope_type is 'yarn'", {"config.json": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}),
    "half_scaled": ("'low_freq_factor' is missing", {
        "config.json": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}}),
    "scaled": ("not positive numbers", {"config.json": {"rope_scaling": {"type": "linear", "factor": "8"}}}),
    "rope": ("the rotary settings are [1]", {"config.json": {"rope_scaling": [1]}}),
    "no_heads": ("config.json: num_attention_heads is 0", {
        "config.json": {"num_attention_heads": 0, "head_dim": None}}),
    "no_config": ("neither config.json (Hugging Face) nor params.json", {"config.json": None}),
    "bin_empty": ("damaged", {PICKLE: b""}),
    "config_cut": ("config.json: cannot be read as JSON", {"config.json": "{"}),
    "config_deep": ("config.json: cannot be read as JSON", {"config.json": NESTED}),
    "no_weights": (f"neither {SAFE} nor {PICKLE}", {SAFE: None}),
    "cut": ("outside the file", {SAFE: lambda raw: raw[:-99]}),
    "ints": ("a is I32; only tensors of F32", {SAFE: header(dtype="I32")}),
    "empty": (f"{SAFE}: not a readable", {SAFE: b""}), "long": ("longer than the file", {SAFE: b"\xff" * 99}),
    "deep": (f"{SAFE}: not a readable", {SAFE: header(NESTED)}),
    "overflow": (f"{SAFE}: not a readable", {SAFE: header(shape=[0, 2 ** 70], stop=0)}),
    "negative": (f"{SAFE}: not a readable", {SAFE: header(shape=[-1, -1])}),
    "outside": ("a b lies outside the file", {SAFE: header(name="a\nb", shape=[5], stop=20)}),
    "missing": ("missing ['model.norm.weight']", {PICKLE: {"model.norm.weight": None}}),
    "unexpected": ("unexpected ['model.norm.bias']", {PICKLE: {"model.norm.bias": torch.ones(64)}}),
    "shape": ("model.norm.weight has shape (47,)", {PICKLE: {"model.norm.weight": torch.ones(47)}}),
    "generation": ("generation_config.json: cannot be read", {"generation_config.json": "{"}),
    "index": ("weight_map is missing", {SAFE: None, f"{SAFE}.index.json": '{"weight_map": 1}'}),
    "path": ("path: b is missing", {SAFE: None, f"{SAFE}.index.json": '{"weight_map": {"a": "../b"}}'}),
    "shard": ("model-00001-of-00002.safetensors is missing", {
        SAFE: None, "model-00002-of-00002.safetensors": b""}),
    "nested": ("model is dict; only tensors", {PICKLE: {"model": {}}}),
    "integers": ("model.norm.weight is torch.int64; only", {
        PICKLE: {"model.norm.weight": torch.ones(64).long()}}),
    "code": ("it holds code, exec", {PICKLE: {"model.norm.weight": Code()}}),
    "bin_cut": ("damaged", {PICKLE: pickled([1])[:-9]}), "endless": ("no end-of-sequence", {PIECES: endless}),
    "bin_list": ("its content is list; only tensors", {PICKLE: pickled([1])}),
    "no_pieces": ("not a sentencepiece model", {PIECES: b""}),
    "no_tokenizer": (f"neither {PIECES} nor tokenizer.json", {PIECES: None}),
    "tiktoken": ("Llama 3's in tiktoken's format", {PIECES: b"IQ== 0\n"}),
    "piece": ("not a sentencepiece model", {PIECES: lambda raw: raw.replace(b"<0xE6>", b"<0xE\xff>")}),
    "json": ("tokenizer.json", {PIECES: None, "tokenizer.json": "{}"}),
    "large": ("only 9 embeddings", {
        "config.json": {"vocab_size": 9}, PICKLE: {"model.embed_tokens.weight": torch.ones(9, 64)}})}
ADAPTERS = {  # adapter.pt: what is said, what differs in it or what it is
    "code": ("it holds code, exec", {"more": Code()}), "empty": ("damaged", b""),
    "cut": ("damaged", pickled([1])[:-9]), "list": ("not written by train.py", pickled([1])),
    "no_config": ("'config' is missing", pickled({})),
    "colour": ("colour is missing, unknown", {"config": {"colour": 1}}),
    "typed": ("rank is missing, unknown, of another type", {"config": {"rank": "8"}}),
    "number": ("a is missing, unknown, of another type", {"parameters": {"a": 1}}),
    "nan": ("a is missing, unknown, of another type or not finite", {
        "parameters": {"a": torch.tensor(math.nan)}}),
    "no_fingerprint": ("fingerprint is missing", {"fingerprint": None}),
    "no_parameters": ("missing", {"parameters": {}}), "experts": ("lora_A is", {"config": {"n_experts": 3}}),
    "targets": ("missing", {"config": {"targets": ("q_proj",)}}),
    "no_target": ("targets must be some of", {"config": {"targets": (1,)}}),
    "huge": ("--top_k must be below", {"config": {"top_k": 10 ** 30}}),
    "method": ("does not fit", {"config": {"method": "moelora"}}),
    "no_experts": ("--n_experts must be at least 1", {"config": {"n_experts": 0}}),
    "other_base": ("made for another base", {"fingerprint": "0"}),
    "path": ("--init_from=/stranger; say --init_from here too", {"config": {"init_from": "/stranger"}}),
    "rows": ("--data=/stranger; say --data here too", {"config": {"data": "/stranger"}})}
BAD = [*FLAGS.items(), *((f"--data={{bad}}/{name}", said) for name, (said, _) in DATA.items()),
       *((f"--init_from={{bad}}/{name}", said) for name, (said, _) in FOLDERS.items()),
       *((f"--mode=eval --out_dir={{bad}}/adapter_{name}", said) for name, (said, _) in ADAPTERS.items())]


@pytest.fixture(scope="session")
def bad(finished, tmp_path_factory):
    """A folder of everything that BAD names."""
    folder, base = tmp_path_factory.mktemp("bad"), finished[0] / "base"
    good = {p.name: p.read_bytes() for p in base.iterdir()}
    adapter, weights = torch.load(finished[0] / "adapter.pt", weights_only=True), open_weights(base)
    weights = {k: v.clone() for k, v in weights.items()}
    originals = {"config.json": read_json(base / "config.json"), PICKLE: weights}
    contents = {name: content for name, (_, content) in DATA.items()}
    for kind, (_, changes) in FOLDERS.items():
        for name, content in (good | ({SAFE: None} if PICKLE in changes else {}) | changes).items():
            if isinstance(content, dict):
                content = {k: v for k, v in (originals[name] | content).items() if v is not None}
                content = pickled(content) if name == PICKLE else json.dumps(content)
            contents[f"{kind}/{name}"] = content(good[name]) if callable(content) else content
    for kind, (_, changes) in ADAPTERS.items():
        if isinstance(changes, dict):
            changes = adapter | changes | {"config": adapter["config"] | changes.get("config", {})}
            changes = pickled({k: v for k, v in changes.items() if v is not None})
        contents[f"adapter_{kind}/adapter.pt"] = changes
        contents |= {f"adapter_{kind}/base/{name}": content for name, content in good.items()}
    for name, content in contents.items():
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def files_in(*folders):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for folder in folders for p in folder.rglob("*")}


@pytest.mark.parametrize("flags, said", BAD, ids=[ascii(flags)[:60] for flags, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(finished, bad, flags, said):
    """Catches a traceback where a sentence belongs, code that runs, and files that a refused run leaves."""
    before = files_in(finished[0], bad)
    with pytest.raises(SystemExit) as stop:
        train.main((REAL if "--init_from" in flags else SMALL) + [f"--out_dir={finished[0]}", "--steps=20",
                                                                  *flags.format(bad=bad).split(" ")])
    text = str(stop.value)
    assert text.startswith("error: ") and said in text and text.isprintable() and len(text) <= 1010
    assert files_in(finished[0], bad) == before


def test_bad_input_from_a_shell(finished, bad):
    """Catches an exit code of 0, and what only a real process prints after the sentence."""
    for flags in ("--mode=sample --prompt=\udcff", "--mode=sample",
                  "--mode=eval --out_dir={bad}/adapter_code"):
        command = [sys.executable, train.__file__, f"--out_dir={finished[0]}", *flags.format(bad=bad).split()]
        run = subprocess.run(command, capture_output=True, input=b"\xff\n",
                             env=os.environ | {"PYTHONIOENCODING": "utf-8"})
        assert run.returncode == 1 and b"Traceback" not in run.stderr
        assert run.stderr.splitlines()[-1].startswith(b"error: ")


def test_odd_rows_are_taken_or_named(tokenizer, tmp_path):
    """Catches NUL or null that spoil a right row, and a line of 100 MB that is tokenised for minutes."""
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"instruction": "a\\u0000b", "input": null, "output": "c\u2028d"}\r\n', newline="")
    row, = data.read_rows(str(odd))
    assert row == ("odd", "a\0b", "", "c\u2028d")
    assert tokenizer.decode(tokenizer.encode(row.instruction)) == "a\0b"
    odd.write_bytes(b'\n{"instruction": "a", "output": "' + b"b" * 10 ** 8 + b'"}')
    with pytest.raises(InputError, match="row 2: 'output' has 100,000,000 characters"):
        data.read_rows(str(odd))
    odd.unlink()


def test_shared_rows_and_empty_tasks_are_counted(tokenizer, tmp_path, capsys):
    """Catches leakage between --data and --val_data, and a task without examples, that nobody hears of."""
    for name, rows in (("a.json", ["t one 1", "u two 2", "long three " + 2000 * "3"]),
                       ("b.json", ["t one 4", "t four 4", "v five 5"])):
        rows = [dict(zip(("task", "instruction", "output"), row.split())) for row in rows]
        (tmp_path / name).write_text(json.dumps(rows))
    cfg = train.Config(data=str(tmp_path / "a.json"), val_data=str(tmp_path / "b.json"))
    _, split, _ = train.encode_data(cfg, tokenizer, train.read_data(cfg))
    said = capsys.readouterr().out
    assert split.keys() == {"t", "v"} and "1 of 3 validation rows ask what a training row asks" in said
    assert "no training row is left of: long, v" in said and "no validation row is left of: long, u" in said


def test_adapter_from_elsewhere_takes_its_base_where_it_lies_here(finished, bad):
    """Catches an adapter that cannot be used at all because no path inside it is followed."""
    results = train.main(["--mode=eval", f"--out_dir={bad}/adapter_path", f"--init_from={finished[0]}/base"])
    assert train.val_loss(results) == finished[1]["val_loss"]


# ---- Does anything else crash? With the optional package hypothesis; FUZZ=5000 draws more, others every time

@pytest.fixture
def fuzz():
    """(strategies, any JSON value, run): run(function, *strategies) calls the function with drawn values."""
    hypothesis = pytest.importorskip("hypothesis")
    st, n, checks = hypothesis.strategies, os.environ.get("FUZZ"), list(hypothesis.HealthCheck)
    settings = hypothesis.settings(max_examples=int(n or 100), derandomize=not n, deadline=None,
                                   database=None, suppress_health_check=checks)
    keys, scalars = st.sampled_from(data.Row._fields) | st.text(), st.integers() | st.floats() | st.text()
    scalars |= st.none() | st.booleans()
    values = st.recursive(scalars, lambda v: st.lists(v) | st.dictionaries(keys, v), max_leaves=6)
    return st, values, lambda function, *strategies: settings(hypothesis.given(*strategies)(function))()


def unless_refused(function, *args):
    """What the function returns, or None if it raises InputError: any other error is the test's to find."""
    try:
        return function(*args)
    except InputError:
        return None


def test_fuzz_safetensors_reader(fuzz, tmp_path):
    """Catches a damaged header or a flipped byte that crashes the reader, a tensor from outside the file."""
    st, values, run = fuzz
    tensors = {"a": torch.ones(3, 2), "b": torch.ones(5).half(), "c": torch.ones(0, 2)}
    write_safetensors(tensors, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    numbers = values | st.lists(st.integers(-2, 9) | st.sampled_from([2 ** 63, -2 ** 70]), max_size=3)
    dtype = values | st.sampled_from(["F32", "F16", "I8"])
    entry = st.fixed_dictionaries({"dtype": dtype, "shape": numbers, "data_offsets": numbers})

    def read(raw):
        (tmp_path / "x").write_bytes(raw)
        tensors = unless_refused(read_safetensors, tmp_path / "x") or {}
        assert all(t.numel() * t.element_size() <= len(raw) and t.sum() is not None for t in tensors.values())

    def read_header(header):
        head = json.dumps(header).encode()
        read(len(head).to_bytes(8, "little") + head + bytes(64))
    run(read_header, values | st.dictionaries(st.text(), entry))
    run(lambda place, new, end: read((good[:place] + new + good[place + len(new):])[:end]),
        st.integers(0, len(good)), st.binary(max_size=4), st.none() | st.integers(0, len(good)))


def test_fuzz_row_parser(fuzz, tmp_path):
    """Catches a file that crashes the parser, and a row that is lost, doubled or changed."""
    st, values, run = fuzz
    text, maybe = st.text(min_size=1), st.none() | st.just("t")
    rest = {"input": maybe | st.text(), "task": maybe, "x": values}
    row = st.fixed_dictionaries({"instruction": text, "output": text}, optional=rest)

    def parse(objects, name, between):
        text = between.join(map(json.dumps, objects)) if name == "x.jsonl" else json.dumps(objects)
        (tmp_path / name).write_text(text, newline="")
        rows = unless_refused(data.read_rows, str(tmp_path / name))
        fields = {"task": "x", "instruction": "", "input": "", "output": ""}
        assert rows is None or rows == [tuple(o.get(k) or v for k, v in fields.items()) for o in objects]

    def parse_bytes(raw, name):
        (tmp_path / name).write_bytes(raw)
        unless_refused(data.read_rows, str(tmp_path / name))
    names = st.sampled_from(["x.json", "x.jsonl"])
    run(parse, st.lists(row) | st.lists(values), names, st.sampled_from(["\n", "\r\n"]))
    run(parse_bytes, st.binary(), names)


def test_fuzz_flags(fuzz):
    """Catches a flag whose value crashes, and settings that pass although they are none."""
    st, _, run = fuzz
    texts = st.text() | (st.integers() | st.floats()).map(str) | st.sampled_from(["true", "q_proj", "lora"])
    names = st.sampled_from([f.name for f in train.fields(train.Config)])
    flags = st.builds("--{}={}".format, names, texts)

    def parse(argv):
        cfg = unless_refused(lambda: train.check(train.Config(**train.parse_flags(argv)))) or train.Config()
        assert all(type(v) is type(f.default) and v == v and v not in (math.inf, -math.inf)
                   for f in train.fields(cfg) for v in [getattr(cfg, f.name)])
    run(parse, st.lists(flags | texts.filter(lambda text: not text.startswith("-h")), max_size=4))


def test_fuzz_cut(fuzz):
    """Catches an example lost or doubled, a budget exceeded, and a loss that depends on the cut."""
    st, _, run = fuzz
    model = tiny(dtype=torch.float64)
    example = st.builds(lambda ids, n: data.Example("t", ids, min(n, len(ids) - 1)),
                        st.lists(st.integers(0, 100), min_size=2, max_size=40), st.integers(1, 39))

    def cut(examples, budget):
        batches = unless_refused(data.cut, examples, budget)
        assert (batches is not None) == (budget >= max(data.padded_length(e, 8) for e in examples))
        if batches:
            assert sorted(map(id, examples)) == sorted(id(e) for b in batches for e in b)
            tensors = [data.collate(b) for b in [*batches, examples]]
            assert all(x.numel() <= budget for x, *_ in tensors[:-1])
            *parts, (loss, n) = (model(x, y) for x, y, _ in tensors)
            assert sum(n for _, n in parts) == n
            assert torch.isclose(sum(loss for loss, _ in parts), loss, rtol=1e-9)
    run(cut, st.lists(example, min_size=1, max_size=12), st.integers(1, 300))


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
def test_a_signal_finishes_the_step_and_tells_how_to_continue(
        finished, tmp_path, monkeypatch, capsys, number, steps, at):
    """Catches a signal that tears a step or is forgotten, a told command that does not continue; base too."""
    schedule = train.schedule
    monkeypatch.setattr(train, "schedule", lambda step, n, warmup: (
        signal.raise_signal(number) if (step, n) == (at, steps) else None) or schedule(step, n, warmup))
    handler = signal.getsignal(number)
    out = tmp_path / "a folder"
    flags = [f for f in run_like(finished, out, "--seeds=0,1,2,3,4")
             if steps == 20 or out.joinpath("base").unlink(True) is None]
    assert train.main(flags) is None and signal.getsignal(number) == handler
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"stopped after {at + 1} of {steps} steps; continue with: python train.py ")
    monkeypatch.undo()
    train.main(shlex.split(told.partition("python train.py ")[2]))
    if steps == 3:
        made, whole = (f / "base" / "model.safetensors" for f in (out, finished[0]))
        assert made.read_bytes() == whole.read_bytes()
        assert not (out / "base.tmp").exists() and not (out / "base" / "checkpoint.pt").exists()
    else:
        assert_same_run(finished, out)


def test_a_signal_to_torchrun_saves_at_the_next_step(finished, tmp_path):
    """Catches processes that leave at different steps, or wait for a log line until torchrun kills them."""
    flags = run_like(finished, tmp_path, "--steps=100000", "--log_every=100000", "--save_every=0")
    with open(tmp_path / "printed", "w+") as printed:
        process = subprocess.Popen([*TORCHRUN, *flags], stdout=printed, stderr=subprocess.STDOUT,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        deadline = time.time() + 120
        while "train:" not in (tmp_path / "printed").read_text() and time.time() < deadline:
            time.sleep(0.1)
        process.terminate()
        process.wait(timeout=60)
    told = (tmp_path / "printed").read_text()
    for once in ("before:   0%|", "SIGTERM: finishing this step", "stopped after"):    # by process 0 alone
        assert told.count(once) == 1, told
    assert "continue with: torchrun --nproc_per_node=2 train.py --base_steps=3" in told
    step = train.read_checkpoint(tmp_path / "checkpoint.pt")["totals"]["step"]
    assert f"stopped after {step} of 100000 steps" in told and step > 0


def test_a_signal_while_the_tokenizer_is_made(tmp_path, monkeypatch, capsys):
    """Catches sentencepiece's own error where the command to continue belongs."""
    make = data.make_tokenizer
    monkeypatch.setattr(data, "make_tokenizer", lambda path, rows: make(
        path, (r for i, r in enumerate(rows) if i or signal.raise_signal(signal.SIGINT) is None)))
    assert train.main(SMALL + [f"--out_dir={tmp_path}"]) is None
    assert capsys.readouterr().out.splitlines()[-1].startswith("stopped; continue with: python train.py ")


def test_second_signal_ends_at_once():
    """Catches a run that cannot be stopped while a step or a save hangs."""
    code = ("import signal, train\nwith train.held_signals() as noted:\n"
            "    signal.raise_signal(signal.SIGINT)\n    print(noted, flush=True)\n"
            "    signal.raise_signal(signal.SIGTERM)\n    print('still here')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and "SIGINT" in done.stderr
    assert "[2]" in done.stdout and "still here" not in done.stdout


def truncated(raw):
    return raw[:len(raw) // 2]


def zeroed(raw):
    return bytes(len(raw))


def flipped(raw):
    return raw[:len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1:]


@pytest.mark.parametrize("damage", [truncated, zeroed, flipped, lambda raw: b"", None],
                         ids=lambda d: getattr(d, "__name__", "gone"))
def test_damaged_checkpoint_falls_back_on_the_one_before(finished, tmp_path, capsys, damage):
    """Catches damage that is loaded or ends the run; None is a kill between the two renames of a save."""
    assert train.main(run_like(finished, tmp_path, "--stop_after=10")) is None
    newest, before = tmp_path / "checkpoint.pt", tmp_path / "previous_checkpoint.pt"
    assert [torch.load(p, weights_only=True)["totals"]["step"] for p in (newest, before)] == [10, 8]
    newest.write_bytes(damage(newest.read_bytes())) if damage else newest.unlink()
    capsys.readouterr()
    train.main(run_like(finished, tmp_path, "--resume"))
    warned = f"warning: {newest}: not a readable file" in capsys.readouterr().out
    assert warned == (damage is not None)
    assert_same_run(finished, tmp_path)
    for path in (newest, before):
        path.write_bytes(zeroed(path.read_bytes()))
    with pytest.raises(SystemExit, match="previous_checkpoint.pt: not a readable file"):
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


@pytest.mark.parametrize("name", [
    "adapter.pt", "checkpoint.pt", "base.tmp/checkpoint.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("dump", [torch.save, lambda code, path: path.write_bytes(pickle.dumps(code))],
                         ids=["zip", "pickle"])
def test_code_in_a_file_is_refused_and_does_not_run(finished, tmp_path, name, dump):
    """Catches a load without weights_only."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    dump({"config": Code()}, path)
    with pytest.raises(SystemExit, match="ran"):                                     # so it is real code
        torch.load(path, weights_only=False) if dump is torch.save else pickle.loads(path.read_bytes())
    (tmp_path / "config.json").write_bytes((finished[0] / "base" / "config.json").read_bytes())
    flags = {"adapter.pt": ["--mode=eval"], "checkpoint.pt": ["--resume"], "base.tmp/checkpoint.pt": SMALL,
             "pytorch_model.bin": ["--mode=eval", "--method=none", f"--init_from={tmp_path}"]}[name]
    with pytest.raises(SystemExit, match=name):
        train.main([f"--out_dir={tmp_path}", *flags])


def test_adapter_that_does_nothing_is_reported(finished, tmp_path, capsys):
    """Catches an adapter whose B was never written: it is exactly the base model, with no other symptom."""
    saved = torch.load(finished[0] / "adapter.pt", weights_only=True)
    for name, p in saved["parameters"].items():
        p.zero_() if name.endswith("lora_B") else None
    run_like(finished, tmp_path)
    torch.save(saved, tmp_path / "adapter.pt")
    for out, reported in ((tmp_path, True), (finished[0], False)):
        train.main(["--mode=sample", "--prompt=Where does Anna live?", f"--out_dir={out}", "--device=cpu"])
        assert ("every B of the adapter" in capsys.readouterr().out) == reported


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_leaves_the_last_good_checkpoint_and_training_goes_on(
        finished, tmp_path, monkeypatch, capsys):
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
    code = (f"import train, sys\ntrain.lock(train.Path({str(tmp_path)!r}))\n"
            "print('held', flush=True)\nsys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        run_like(finished, tmp_path)
        before = files_in(tmp_path)
        for more in ("--steps=1", "--resume"):
            with pytest.raises(SystemExit, match=f"in use by process {holder.pid};"):
                train.main(run_like(finished, tmp_path, more))
        assert files_in(tmp_path) == before
        holder.kill()
    assert (tmp_path / "lock").exists()
    assert train.main(run_like(finished, tmp_path, "--steps=1"))["steps"] == 1


def test_unfinished_run_is_not_overwritten(finished, tmp_path):
    """Catches a forgotten --resume that throws a night's work away."""
    assert train.main(run_like(finished, tmp_path, "--stop_after=2")) is None
    before = files_in(tmp_path)
    with pytest.raises(SystemExit, match="at step 2 of 20 of a run that has not ended: "
                                         "continue it with --resume"):
        train.main(run_like(finished, tmp_path))
    assert files_in(tmp_path) == before


def test_resuming_on_other_rows_is_refused(finished, tmp_path):
    """Catches a data file that changed between parts of a run, a resumed run that wants its paths again."""
    rows = [{"instruction": f"number {i}?", "output": f"it is {i % 3}"} for i in range(60)]
    flags = REAL + [f"--init_from={finished[0]}/base", f"--data={tmp_path}/rows.json",
                    f"--out_dir={tmp_path}", "--steps=4"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert train.main(flags + ["--stop_after=2"]) is None
    (tmp_path / "rows.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(SystemExit, match="rows of --data are not those"):
        train.main(flags + ["--resume"])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert train.main([f"--out_dir={tmp_path}", "--device=cpu", "--resume"])["steps"] == 4


def test_deterministic_flag_gives_the_same_bits_here(finished, tmp_path):
    """Catches a flag that breaks a run; what it is for needs a GPU."""
    train.main(run_like(finished, tmp_path, "--deterministic"))
    assert torch.are_deterministic_algorithms_enabled()
    assert same(*(train.read_saved(o / "adapter.pt")["parameters"] for o in (finished[0], tmp_path)))
    torch.use_deterministic_algorithms(False)


slow = pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes; SLOW=1 pytest runs it")
PROCESS = [sys.executable, str(Path(train.__file__)), "--device=cpu", "--base_steps=20", "--base_width=32",
           "--base_layers=1", "--base_batch_size=2", "--batch_size=4", "--val_examples=2", "--rank=2",
           "--dropout=0.1", "--log_every=1", "--resume"]


@slow
def test_thirty_kills_leave_no_trace(tmp_path):
    """SIGKILL at 30 random moments, every second one while a checkpoint is being written; the same command
    line each time. Catches any state that is lost, torn or done twice: base, adapters, optimizer and log must
    equal those of a run left alone."""
    command = [*PROCESS, "--steps=500", "--save_every=1"]

    def start(out):
        return subprocess.Popen([*command, f"--out_dir={out}"], stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

    def saving(folder, since):
        """Whether a checkpoint is half written; what an earlier kill left behind does not count."""
        try:
            return (folder / "checkpoint.pt.tmp").stat().st_mtime > since
        except FileNotFoundError:
            return False

    whole, begun = tmp_path / "whole", time.perf_counter()
    process = start(whole)
    assert process.communicate() and process.returncode == 0
    seconds, rng, kills, n_runs, out = time.perf_counter() - begun, random.Random(0), Counter(), 0, whole
    while sum(kills.values()) < 30 or not (out / "summary.json").exists():
        if (out / "summary.json").exists():
            n_runs += 1
            out = tmp_path / f"run {n_runs}"
        process, since = start(out), time.time()
        if (n := sum(kills.values())) < 30:  # the first ten early, so that they hit the making of the base
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
            made, first = (f / "base" / "model.safetensors" for f in (out, whole))
            assert made.read_bytes() == first.read_bytes()
    print(f"\n{sum(kills.values())} kills survived in {n_runs} runs of {seconds:.0f} s: {dict(kills)}")
    assert sum(n for where, n in kills.items() if "save" in where) >= 5


@slow
def test_memory_stays_flat_over_twenty_thousand_steps(tmp_path):
    """Catches whatever piles up: resident memory after 2,000 steps and later, size of log and checkpoint."""
    process = subprocess.Popen([*PROCESS, "--steps=20000", "--batch_size=1", "--save_every=500",
                                f"--out_dir={tmp_path}"])
    resident = []
    while process.poll() is None:
        time.sleep(1)
        if (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "adapter.pt").exists():
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            kb = [line for line in status if line.startswith("VmRSS")]
            steps = (tmp_path / "log.jsonl").read_bytes().count(b"\n")
            resident += [(steps, int(kb[0].split()[1]))] if kb else []
    assert process.returncode == 0
    first = next(kb for step, kb in resident if step >= 2000)
    most = max(kb for step, kb in resident if step >= 2000)
    sizes = [(tmp_path / n).stat().st_size for n in ("previous_checkpoint.pt", "checkpoint.pt", "log.jsonl")]
    print(f"\nresident: {first:,} kB after 2,000 steps, at most {most:,} kB later "
          f"(+{most / first - 1:.2%}); checkpoint {sizes[1]:,} bytes, log {sizes[2]:,} bytes for "
          f"{len(read_log(tmp_path)):,} steps")
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


# ---- Are comparisons fair, and do the experts' values mean what they say?

def test_collaboration_is_moelora_with_its_A_matrices_stacked():
    """Catches a shared A that is more or less than one A per expert: MoELoRA of E separate adapters."""
    layer = layer_of("moelora", 4)
    x = torch.randn(6, 11, dtype=torch.float64)
    A, B = layer.lora_A.split(3), layer.lora_B.split(3, dim=1)
    g = torch.softmax(x @ layer.router.T, -1)
    separate = sum(g[:, e:e + 1] * (x @ A[e].T @ B[e].T) for e in range(4))
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.alpha / 3 * separate, atol=1e-12)


def test_shapley_values_of_known_games():
    """Catches wrong coalition weights: efficiency, symmetry, null player, additivity, games done by hand."""
    def game(E, v):
        return torch.tensor([float(v({e for e in range(E) if S >> e & 1})) for S in range(2 ** E)],
                            dtype=torch.float64)

    gloves = game(3, lambda S: 0 in S and bool(S & {1, 2}))                # one left glove, two right ones
    assert torch.allclose(shapley_values(gloves), torch.tensor([4, 1, 1], dtype=torch.float64) / 6)
    airport = game(3, lambda S: max([0, *(c for e, c in enumerate((1, 2, 3)) if e in S)]))
    assert torch.allclose(shapley_values(airport), torch.tensor([2, 5, 11], dtype=torch.float64) / 6)
    null = game(4, lambda S: len(S - {2}) ** 2)
    value = shapley_values(null)
    assert value[2] == 0 and torch.allclose(value[[0, 1, 3]], torch.full((3,), 3.0, dtype=torch.float64))
    random_game = torch.randn(32, 5, dtype=torch.float64)                  # five games at once
    value = shapley_values(random_game)
    assert value.shape == (5, 5) and torch.allclose(value.sum(0), random_game[-1] - random_game[0])
    assert torch.allclose(shapley_values(random_game * 2 + random_game.flip(1)), value * 2 + value.flip(1))


def test_shapley_interactions_of_known_games():
    """Catches a sign or weight in the index: pairs that need or replace each other, or do not meet."""
    together = torch.tensor([0., 0, 0, 1, 0, 0, 0, 1], dtype=torch.float64)  # 1 where experts 0 and 1 are in
    either = torch.tensor([0., 1, 1, 1, 0, 1, 1, 1], dtype=torch.float64)
    for value, sign in ((together, 1), (either, -1)):
        index = shapley_interactions(value)
        assert index[0, 1] == index[1, 0] == sign and index.abs().sum() == 2
    assert shapley_interactions(torch.arange(16.).double()).abs().max() == 0         # additive: 1, 2, 4, 8


def test_experts_switched_off_add_nothing_and_come_back():
    """Catches a mask that misses a layer, one that outlives its block, and a twin not worth the same."""
    model = tiny(dtype=torch.float64, targets=("down_proj", "q_proj"))
    x = torch.randint(0, 101, (2, 9))
    whole, bare = model(x), tiny("full", dtype=torch.float64)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if k in bare.state_dict()})
    with restricted(model, only([])):
        assert torch.equal(model(x), bare(x))
    with restricted(model, only(range(4))):
        assert torch.equal(model(x), whole)
    with pytest.raises(KeyError), restricted(model, only([1])):
        assert not torch.allclose(model(x), whole)
        raise KeyError
    assert torch.equal(model(x), whole)
    for _, layer in adapter_layers(model):
        with torch.no_grad():  # expert 3 dead, expert 1 a twin of expert 0, and M blind to which is which
            layer.lora_B[:, 9:] = 0
            for p in (layer.lora_A, layer.router):
                n = len(p) // 4
                p[n:2 * n] = p[:n]
            layer.lora_B[:, 3:6] = layer.lora_B[:, :3]
            layer.interaction.zero_()
    values = []
    for S in range(16):
        with restricted(model, only([e for e in range(4) if S >> e & 1])):
            values.append(-F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()))
    worth = shapley_values(torch.stack(values).detach())
    assert worth[3] == 0 and torch.isclose(worth[0], worth[1], rtol=1e-10)
    assert not torch.isclose(worth[0], worth[2])


def test_top_k_keeps_the_largest_weights_and_their_sum():
    """Catches a top-k over the wrong axis, one that rescales wrongly, one that lets a small weight pass."""
    w = torch.tensor([[0.5, 2.0, 1.6, -0.1], [1.0, 0.9, 1.1, 1.0]])
    assert torch.allclose(top(1)(w), torch.tensor([[0, 4.0, 0, 0], [0, 0, 4.0, 0]]))
    assert torch.allclose(top(2)(w)[0], torch.tensor([0, 2.0, 1.6, 0]) * 4 / 3.6)
    assert torch.allclose(top(4)(w), w)


def test_load_and_specialisation_statistics():
    """Catches entropy in nats, negative weights counted, and information where experts ignore the task."""
    assert torch.allclose(entropy(torch.tensor([[0.25] * 4, [0, 0, 1.0, 0]])), torch.tensor([2.0, 0]))
    assert torch.equal(distribution(torch.tensor([3.0, -2.0, 1.0])), torch.tensor([0.75, 0, 0.25]))
    groups = torch.tensor([0, 0, 1, 1])
    apart, alike = torch.eye(2)[groups][:, None], torch.full((4, 1, 2), 0.5)         # (N, L, E)
    assert mutual_information(apart, groups) == 1 and mutual_information(alike, groups) == 0


def test_variants_are_of_one_size_and_one_effective_scale():
    """Catches a comparison that gives a method more parameters, or another alpha / r, than its rivals."""
    cfg = train.Config(rank=8)
    model_config = LlamaConfig(vocab_size=1280, hidden_size=128, intermediate_size=336, num_hidden_layers=2,
                               num_attention_heads=4, num_key_value_heads=4, head_dim=32)
    variants, size = train.variants(cfg, model_config), {}
    for name, settings in variants.items():
        one = train.replace(cfg, **settings)
        model = Llama(model_config, one.adapter)
        size[name] = sum(p.numel() for p in train.trained(model).values())
        factor = {"moelora_sum_E": 4, "hydralora_sum_E": 4, "teamlora_sum_1": 0.25}.get(name, 1)
        assert one.alpha / one.rank == pytest.approx(factor * cfg.alpha / cfg.rank)
    for name in ("lora", "moelora", "hydralora", "moelora_sum_E", "hydralora_sum_E", "teamlora_sum_1"):
        assert abs(size[name] / size["teamlora"] - 1) < 0.02, name
    layers = [METHODS[variants[n]["method"]](6, 5, n_experts=4, rank=3, alpha=a) for n, a in
              (("moelora_sum_E", 64.0), ("moelora", 16.0))]
    layers[1].load_state_dict(randomise(torch.nn.Sequential(layers[0]))[0].state_dict())
    x = torch.randn(2, 6)                        # four times alpha is four times the weights
    updates = [layer(x) - F.linear(x, layer.weight) for layer in layers]
    assert torch.allclose(updates[0], 4 * updates[1], atol=1e-5)


def test_paper_settings_are_one_flag_that_others_override(tmp_path):
    """Catches a preset that other flags do not override, or that sets what is no setting."""
    cfg, _ = train.compose(train.parse_flags(["--paper", "--rank=16", f"--out_dir={tmp_path}"]))
    assert (cfg.rank, cfg.n_experts, cfg.alpha, cfg.dropout, cfg.learning_rate) == (16, 4, 32.0, 0.05, 2e-4)


def test_paired_interval_and_rank_correlation():
    """Catches a normal instead of Student's t, an unpaired deviation, and ranks that mishandle ties."""
    d, half = train.interval([0.01, 0.03, 0.02, 0.02, 0.02])
    assert d == pytest.approx(0.02) and half == pytest.approx(2.776 * 0.0070711 / 5 ** 0.5, rel=2e-3)
    assert train.interval([0.5]) == (0.5, None)
    a = torch.tensor([1.0, 2.0, 3.0, 9.0])
    assert train.rank_correlation(a, a ** 3) == pytest.approx(1)
    assert train.rank_correlation(a, -a) == pytest.approx(-1)
    assert train.rank_correlation(a, torch.tensor([1.0, 1.0, 2.0, 2.0])) == pytest.approx(0.8944, abs=1e-4)
    assert train.rank_correlation(a, torch.ones(4)) is None                # JSON has no nan


def test_compare_chooses_by_validation_and_resumes(finished, tmp_path, capsys):
    """Catches a rate chosen on test questions, a best rate at the edge left so, finished runs made again."""
    (tmp_path / "base").symlink_to(finished[0] / "base")
    flags = SMALL + ["--mode=compare", f"--out_dir={tmp_path}", "--steps=2", "--seeds=0,1"]
    table = train.main(flags + ["--methods=none,lora,teamlora", "--learning_rates=1e-3,1e-2"])
    bare = train.main(["--mode=eval", "--method=none", "--val_examples=3", f"--out_dir={finished[0]}",
                       "--device=cpu"])
    assert table.pop("none")[0]["test_loss"] == train.val_loss(bare)     # accuracies are all 0 this early
    rows = [json.loads(line) for line in (tmp_path / "compare.jsonl").read_text().splitlines()]
    for name, chosen in table.items():
        sweep = [r for r in rows if r["variant"] == name and r["seed"] == 0]
        best = max(r["val_accuracy"] for r in sweep)
        rates = sorted(r["learning_rate"] for r in sweep)
        assert len(chosen) == 2 and chosen[0]["val_accuracy"] == best and len(sweep) >= 3
        assert chosen[0]["learning_rate"] not in (rates[0], rates[-1]) or len(sweep) == 5 or sum(
            r["val_accuracy"] == best for r in sweep) > 1
        assert chosen[0]["accuracy"].keys() == data.TASKS.keys()
    assert "task_information" in table["teamlora"][0] and "task_information" not in table["lora"][0]
    assert "to lora (95%)" in capsys.readouterr().out
    before = (tmp_path / "compare.jsonl").read_text()
    again = train.main(flags + ["--methods=lora,teamlora", "--learning_rates=1e-3,1e-2",
                                "--reference=teamlora"])
    assert again == table and (tmp_path / "compare.jsonl").read_text() == before
    d, half = train.interval([l["mean_accuracy"] - t["mean_accuracy"] for l, t in zip(*again.values())])
    printed = capsys.readouterr().out
    assert "to teamlora (95%)" in printed and f"{d:+.3f} ±{half:.3f}" in printed
    for wrong in ("--methods=nonsense", "--reference=nonsense"):
        with pytest.raises(SystemExit, match="error: --methods, --reference: 'nonsense' is none of none, "):
            train.main(flags + [wrong])


def test_compare_on_other_rows_is_run_again(finished, tmp_path):
    """Catches results that were made with what a data file held before."""
    rows = [{"instruction": f"number {i}?", "output": f"it is {i % 3}"} for i in range(60)]
    flags = REAL + ["--mode=compare", "--methods=lora", "--seeds=0", "--learning_rates=1e-3", "--steps=1",
                    f"--init_from={finished[0]}/base", f"--data={tmp_path}/rows.json",
                    f"--out_dir={tmp_path}"]
    for n, lines in ((60, 1), (60, 1), (59, 2)):
        (tmp_path / "rows.json").write_text(json.dumps(rows[:n]))
        train.main(flags)
        assert (tmp_path / "compare.jsonl").read_text().count("\n") == lines


def test_shapley_mode_explains_the_whole_gain(finished, capsys):
    """Catches coalitions misnamed: the values must sum to v(all) - v(none) for every task."""
    out, _ = finished
    result = train.main(["--mode=shapley", f"--out_dir={out}", "--device=cpu"])
    full = train.main(["--mode=eval", f"--out_dir={out}", "--device=cpu"])
    bare = train.main(["--mode=eval", "--method=none", f"--out_dir={out}", "--device=cpu",
                       "--val_examples=3"])
    for key, sign in (("accuracy", 1), ("loss", -1)):
        gain = torch.tensor([sign * (full[t][key] - bare[t][key]) for t in data.TASKS], dtype=torch.float64)
        assert torch.allclose(result["shapley"][key].sum(1), gain, atol=1e-6)
    assert result["value"]["loss"].shape == (16, 11) and (out / "shapley.json").is_file()
    assert "mean weight of the router" in capsys.readouterr().out


def test_shapley_mode_of_lora_writes_json_that_others_read(finished, tmp_path):
    """Catches NaN in shapley.json: LoRA's weights are all 1, so they have no rank, and it has no M."""
    (tmp_path / "base").symlink_to(finished[0] / "base")
    train.main(SMALL + [f"--out_dir={tmp_path}", "--method=lora", "--steps=1"])
    train.main(["--mode=shapley", f"--out_dir={tmp_path}", "--device=cpu"])
    written = (tmp_path / "shapley.json").read_text()
    assert "NaN" not in written and json.loads(written)["rank_correlation"]["loss"] == [None] * 11
