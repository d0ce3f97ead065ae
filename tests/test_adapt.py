"""Does the layer work in models that are not ours? Each is tiny and random, adapted in place, and compared
with what it was; without transformers most are skipped. Docstrings say which break a test catches."""

import copy
import pickle
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.export import Dim, export
from torch.nested import as_nested_tensor as nested
from torch.nn.utils import parametrizations, prune

import teamlora
from model import NF4
from teamlora import (METHODS, AdapterConfig, InputError, TeamLoRALinear, adapt, adapter_layers,
                      adapter_parameters, collected_weights, idle_adapters, load_adapter, merge, save_adapter)
from test_teamlora import TINY, close, copied, randomise, tiny

pytestmark = pytest.mark.filterwarnings("ignore")        # of what is about to go from PyTorch
# for every class of transformers', each of which takes what it knows
SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "d_ff": 48,
         "num_attention_heads": 4, "num_key_value_heads": 2, "num_layers": 2, "d_kv": 8, "ffn_dim": 48,
         "image_size": 12, "patch_size": 4, "eos_token_id": None, "decoder_start_token_id": 0}
# kind -> (transformers' class, targets, how many layers they are)
KINDS = {
    "plain": ("", ["layers.*"], 3),
    "Llama": ("LlamaForCausalLM", ["gate_proj", "up_proj", "down_proj", "lm_head"], 7),
    "OPT, as GPT-2": ("OPTForCausalLM", ["?_proj", "fc?"], 10),
    "T5": ("T5ForConditionalGeneration", ["block.*"], 32),
    "Mamba": ("MambaForCausalLM", ["in_proj", "x_proj", "out_proj"], 6),
    "ViT": ("ViTForImageClassification", ["vit.*"], 12),
    "Qwen2": ("Qwen2ForCausalLM", ["k_proj", "layers.1.*"], 8)}


class Plain(nn.Module):
    """A model of nobody's library."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(60, 32), nn.Linear(32, 60)
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias) for bias in (True, False, True))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x.tanh())
        return {"logits": self.head(x)}


def base_of(kind, dtype=torch.float32):
    """(a tiny random model, its input); no parameter is zero, biases neither."""
    torch.manual_seed(0)
    model, tokens = Plain(), torch.randint(3, 60, (2, 15))
    if kind != "plain":
        made = getattr(pytest.importorskip("transformers"), KINDS[kind][0])
        model = made(made.config_class(**SIZES))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    batches = {"T5": {"input_ids": tokens, "decoder_input_ids": F.pad(tokens[:, :2], (1, 0))},
               "ViT": {"pixel_values": torch.randn(2, 3, 12, 12, dtype=dtype)}}
    return model.to(dtype).eval(), batches.get(kind, {"input_ids": tokens})


def adapted(kind, method="teamlora", **more):
    """(an adapted model whose experts are no longer zero, its input)."""
    model, batch = base_of(kind)
    adapt(model, KINDS[kind][1], AdapterConfig(method, rank=3, **more))
    return randomise(model), batch


def logits_of(model, batch):
    return model(**batch)["logits"].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_adapted_model_is_its_base_bit_for_bit_and_adapters_alone_train(kind, dtype):
    """Catches a layer left out, a weight copied or cast, a lost bias, a base that moves, an idle adapter."""
    (model, batch), logits = base_of(kind, dtype), torch.no_grad()(logits_of)
    expected, before = logits(model, batch), dict(model.named_parameters())
    names = adapt(model, KINDS[kind][1], AdapterConfig(rank=3))
    assert {*names} == {name for name, _ in adapter_layers(model)} and len(names) == KINDS[kind][2], names
    assert torch.equal(logits(model, batch), expected)
    added, state = adapter_parameters(model), copied(model)
    assert before.items() == {n: p for n, p in model.named_parameters() if n not in added}.items()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in added.values())
    optimizer = torch.optim.AdamW(added.values(), lr=0.01)
    for _ in range(2):                           # in step 1, B = 0 stops A, R and M
        logits_of(model.train(), batch).square().mean().backward()
        assert idle_adapters(model) == [] and not any(p.requires_grad for p in before.values())
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p, state[name]) != (name in added), name


@pytest.mark.parametrize("kind", KINDS)
def test_saved_copied_and_merged(kind, tmp_path):
    """Catches a parameter that is not saved, dropout in evaluation, a copy without settings or one that moves
    its original; a merge that forgets a scale: its weights must be enough for a model never adapted."""
    (model, batch), (bare, _) = adapted(kind, "lora", dropout=0.5), base_of(kind)
    expected = logits_of(model, batch)
    assert not close(expected, logits_of(bare, batch), atol=1e-2)
    save_adapter(model, tmp_path / "adapter.pt")
    copies = [base_of(kind)[0], *(adapted(kind, "lora")[0] for _ in range(2)), copy.deepcopy(model)]
    for again in copies[:2]:
        load_adapter(again, tmp_path / "adapter.pt")
    copies[2].load_state_dict(model.state_dict())
    for again in (*copies, pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(again, batch), expected)
        randomise(again)
    assert torch.equal(logits_of(model, batch), expected)
    merge(model)
    bare.load_state_dict({name: p for name, p in model.state_dict().items() if "lora_" not in name})
    assert close(logits_of(bare, batch), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_checkpointing_leaves_gradients_and_routing_alone(kind):
    """Catches weights that are lost, doubled or without gradient where activations are computed again."""
    results = []
    for on in (False, True):
        model, batch = adapted(kind)
        if on:
            model.gradient_checkpointing_enable()
        with collected_weights(model.train()) as weights:
            loss = logits_of(model, batch).square().mean()
        assert len(weights) == KINDS[kind][2] and all(w.requires_grad for w in weights), "one of each layer"
        (loss + sum(w.square().mean() for w in weights)).backward()
        results.append([*weights, *(p.grad for p in adapter_parameters(model).values())])
    assert close(*results, 1e-4, 1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("plain", "ViT")])
def test_generate_says_what_the_logits_say(kind):
    """Catches a cache, or a mode of generate's, in which the adapter is not used."""
    model, batch = adapted(kind)
    grows = "decoder_input_ids" if kind == "T5" else "input_ids"
    tokens = model.generate(**batch, max_new_tokens=5, do_sample=False)
    said = logits_of(model, batch | {grows: tokens[:, :-1]}).argmax(-1)
    assert tokens.shape[1] == batch[grows].shape[1] + 5 and torch.equal(said[:, -5:], tokens[:, -5:])


def test_lines_of_the_readme_do_what_it_says(tmp_path, monkeypatch):
    """Catches README lines that do not run, and a file from them that cannot be loaded."""
    monkeypatch.chdir(tmp_path)
    text = (Path(teamlora.__file__).parent / "README.md").read_text().split("## In your own model\n\n")[1]
    names = {"model": tiny(None), "teamlora": teamlora, "torch": torch}
    exec(textwrap.dedent(text.split("\n\n")[0]), names)
    assert len(adapter_layers(names["model"])) == 5 * TINY.num_hidden_layers
    assert names["optimizer"].param_groups[0]["params"] == [*adapter_parameters(names["model"]).values()]
    load_adapter(plain := tiny(None), "adapter.pt")
    assert all(map(torch.equal, plain.parameters(), names["model"].parameters()))


# ---- What hangs on a module, and who reads it

HANGING = {                                      # q -> a function that uses it
    "a hook before": lambda q: q.register_forward_pre_hook(lambda q, x: 2 * x[0]) and q,
    "a hook for gradients": lambda q: q.register_full_backward_hook(lambda q, dx, dy: (3 * dx[0],)) and (
        lambda x: torch.autograd.grad(q(x.requires_grad_()).square().sum(), x)[0]),
    "a buffer": lambda q: q.register_buffer("more", torch.ones(32)) or (lambda x: q(x) + q.more),
    "a parameter": lambda q: setattr(q, "more", nn.Parameter(torch.ones(32))) or (lambda x: q(x) + q.more),
    "an attribute": lambda q: setattr(q, "more", 7) or (lambda x: q(x) + q.more),
    "a list": lambda q: (lambda x, places=[q]: places[0](x)),
    "a bound name": lambda q: q.__call__,
    "a function around it": lambda q: lambda x: torch.utils.checkpoint.checkpoint(q, x, use_reentrant=False)}


@pytest.mark.parametrize("hanging", HANGING)
def test_what_hangs_on_a_module_stays(hanging):
    """Catches an adapt that puts a new module in the old one's place."""
    model, x = Plain(), torch.randn(2, 5, 32)
    use = HANGING[hanging](model.layers[2])
    expected = use(x)
    adapt(model, "layers.2")
    assert torch.equal(use(x), expected)
    randomise(model)
    assert not close(use(x), expected, atol=1e-2), "the adapter is not seen"


def test_adapters_that_are_never_read_are_named():
    """Catches silence where something uses layer.weight itself, or a forward that it bound before."""
    model, x = Plain(), torch.randn(2, 32)
    bound = model.layers[0].forward
    adapt(model, ["layers.*"])
    (F.linear(bound(x), model.layers[1].weight) + model.layers[2](x)).square().sum().backward()
    assert idle_adapters(model) == ["layers.0", "layers.1"]


def test_a_layer_in_two_places_and_another_adapter_beside_the_first(tmp_path):
    """Catches one place of a shared layer that stays plain, or is merged twice; a second call that freezes
    or changes what the first one added; a file that holds the settings of one alone."""
    model, batch = base_of("plain")
    model.layers[2] = model.layers[0]
    again = copy.deepcopy(model)
    adapt(model, "layers.2", AdapterConfig("lora", rank=2))
    adapt(model, "layers.1", AdapterConfig("lora", rank=5))
    assert all(p.requires_grad for p in adapter_parameters(model).values())
    save_adapter(randomise(model), tmp_path / "adapter.pt")
    load_adapter(again, tmp_path / "adapter.pt")
    expected = logits_of(model, batch)
    assert torch.equal(logits_of(again, batch), expected)
    merge(model)
    assert close(logits_of(model, batch), expected, atol=1e-5)


# ---- What cannot be adapted

def with_own(name, value):
    """A linear layer with another attribute of that name, made of the old one."""
    layer = nn.Linear(32, 32)
    setattr(layer, name, value(getattr(layer, name)))
    return layer


@pytest.mark.parametrize("fourth, targets, message", [
    (lambda: parametrizations.orthogonal(nn.Linear(32, 32)), "layers.*", "layers.3 is a ParametrizedLinear"),
    (lambda: nn.utils.weight_norm(nn.Linear(32, 32)), "layers.*", "layers.3 is a Linear, .* wrapped"),
    (lambda: prune.l1_unstructured(nn.Linear(32, 32), "weight", 0.5), "layers.*", "layers.3 .* pruned"),
    (lambda: prune.l1_unstructured(nn.Linear(32, 32), "bias", 0.5), "layers.*", "layers.3 .* pruned"),
    (lambda: with_own("forward", lambda bound: bound), "layers.*", "layers.3 is a Linear, .* wrapped"),
    (lambda: with_own("weight", lambda w: nn.Parameter(NF4.of(w.data, w.dtype), False)), "3", "quantised"),
    (lambda: nn.MultiheadAttention(32, 2), "layers.*", "layers.3.out_proj is a NonDynamically"),
    (lambda: TeamLoRALinear(32, 32), "layers.*", "layers.3 is a TeamLoRALinear, adapted"),
    (lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(32, 32), "3",
     "name ends in '3'; they end in 0, 1, 2, head. Other classes, such as GPT-2's Conv1D, cannot be adapted"),
    (lambda: nn.TransformerEncoderLayer(32, 2, 48), "linear1", "linear1.weight past its adapter: call torch"),
    (nn.Identity, ["layers.*", "heads"], "'heads'"), (nn.Identity, "all-linear", "'all-linear'"),
    (nn.Identity, "ayers.*", "'ayers"), (nn.Identity, "embed", "'embed'"), (nn.Identity, [], "''")])
def test_what_cannot_be_adapted_is_refused_and_nothing_changes(fourth, targets, message):
    """Catches an adapter that is never read, or only in some layers, and a model that is adapted in part."""
    model = Plain()
    model.layers.append(fourth())
    before = repr(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError, match=message):
        adapt(model, targets)
    assert (repr(model), [p.requires_grad for p in model.parameters()]) == before


# ---- How else a layer may be run

WAYS = {                                         # (model, an input) -> a function of inputs of other sizes
    "traced": torch.jit.trace,
    "exported": lambda model, x: export(model, (x,), dynamic_shapes=({0: Dim("B"), 1: Dim("T")},)).module(),
    "nested": lambda model, _: lambda x: torch.stack(model(nested([*x], layout=torch.jagged)).unbind()),
    "under autocast": lambda model, _: torch.autocast("cpu", torch.bfloat16)(model)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_other_ways_to_run_it(method, way):
    """Catches a length that becomes a constant, rows that must be of one length, products of two dtypes."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)), torch.randn(3, 7, 6)
    adapt(model, ["0", "2"], AdapterConfig(method, rank=2))
    expected = randomise(model).eval()(x)
    found = WAYS[way](model, torch.randn(2, 5, 6))(x).float()
    assert close(found, expected, *((0.1, 0.1) if way == "under autocast" else (1e-5, 1e-5)))
    found.sum().backward()
    assert idle_adapters(model) == []
