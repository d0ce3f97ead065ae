"""Does the layer work in a model that is not ours: language, vision and both, of transformers and of nobody?

    pytest tests/test_adapt.py     tiny random models, no network; without transformers most of it is skipped

A model is adapted in place and compared with what it was before. Each docstring says which break the test
catches.
"""

import functools
import json
import os
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import data
import teamlora
import train
from experiments import llava
from model import load_llama, save_llama
from teamlora import (METHODS, AdapterConfig, InputError, adapt, adapter_layers, adapter_parameters,
                      balance_loss, collected_weights, load_parameters, mean_usage, merge, parameter_state)
from test_teamlora import TINY, difference, randomise, tiny
from tests.conftest import load

TEXT = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}
SIGHT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 12, "patch_size": 4}
IMAGE = 59
# kind -> (targets, how many layers they are)
KINDS = {"plain": (["layers.*"], 3), "Llama": (["gate_proj", "up_proj", "down_proj"], 6),
         "Qwen2": (["q_proj", "k_proj", "up_proj"], 6), "Mistral": (["o_proj", "down_proj", "lm_head"], 5),
         "LLaVA": (["language_model.*.mlp.*_proj"], 6),
         "LLaVA and projector": (["language_model.*_proj", "multi_modal_projector.linear_?"], 16),
         "ViT": (["vit.*"], 12)}
AS_OF_TRANSFORMERS_4 = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
SPEAKING = [kind for kind in KINDS if kind not in ("plain", "ViT")]


class Plain(nn.Module):
    """A model of nobody's library."""

    def __init__(self):
        super().__init__()
        self.embed, self.head, self.checkpointing = nn.Embedding(60, 32), nn.Linear(32, 60), False
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias) for bias in (True, False, True))

    def gradient_checkpointing_enable(self):
        self.checkpointing = True

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            run = functools.partial(checkpoint, layer, use_reentrant=False) if self.checkpointing else layer
            x = x + run(x.tanh())
        return {"logits": self.head(x)}


def base_of(kind, dtype=torch.float32):
    """(a tiny random model, its input); no parameter is zero, biases neither."""
    torch.manual_seed(0)
    if kind == "plain":
        model = Plain()
    else:
        hub, name = pytest.importorskip("transformers"), kind.split()[0]
        if name == "ViT":
            model = hub.ViTForImageClassification(hub.ViTConfig(**SIGHT, num_labels=5))
        elif name == "LLaVA":
            model = hub.LlavaForConditionalGeneration(hub.LlavaConfig(
                vision_config=hub.CLIPVisionConfig(**SIGHT), text_config=hub.LlamaConfig(**TEXT),
                image_token_index=IMAGE))
        else:
            model = getattr(hub, f"{name}ForCausalLM")(getattr(hub, f"{name}Config")(**TEXT))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    tokens, pixels = torch.randint(0, IMAGE, (2, 15)), torch.randn(2, 3, 12, 12, dtype=dtype)
    batch = {"pixel_values": pixels} if kind == "ViT" else {"input_ids": tokens}
    if "LLaVA" in kind:
        tokens[:, 2:11] = IMAGE                  # 9 patches
        batch["pixel_values"] = pixels
    return model.to(dtype).eval(), batch


def adapted(kind, method="teamlora"):
    """(an adapted model whose experts are no longer zero, its input)."""
    model, batch = base_of(kind)
    adapt(model, KINDS[kind][0], AdapterConfig(method, rank=3))
    return randomise(model), batch


def logits_of(model, batch):
    return model(**batch)["logits"].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_adapted_model_is_its_base_and_adapters_alone_train(kind, dtype):
    """Catches a layer left out, a copied or cast weight, a lost bias, a base that moves, an
    adapter that does not."""
    model, batch = base_of(kind, dtype)
    expected, before = logits_of(model, batch), dict(model.named_parameters())
    names = adapt(model, KINDS[kind][0], AdapterConfig(rank=3))
    assert names == [name for name, _ in adapter_layers(model)] and len(names) == KINDS[kind][1], names
    # what the projector reads is not contiguous: there, PyTorch rounds a plain layer before it adds the bias
    limit = 2e-2 if kind == "LLaVA and projector" and dtype == torch.bfloat16 else 0
    assert difference(logits_of(model, batch), expected) <= limit
    added = adapter_parameters(model)
    kept = {name: p for name, p in model.named_parameters() if name not in added}
    assert kept.keys() == before.keys() and all(p is before[name] for name, p in kept.items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added.keys()
    assert {p.dtype for p in added.values()} == {torch.float32}
    state = parameter_state(dict(model.named_parameters()))
    optimizer = torch.optim.AdamW(added.values(), lr=0.01)
    for _ in range(2):                           # in step 1, B = 0 stops A, R and M
        logits_of(model.train(), batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p, state[name]) != (name in added), name


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_saved_and_loaded_gives_the_same_logits(kind, tmp_path):
    """Catches a parameter that is not named, and so not saved; dropout in a model that is in eval mode."""
    model, batch = adapted(kind)
    torch.save(parameter_state(adapter_parameters(model)), tmp_path / "adapter.pt")
    again, _ = base_of(kind)
    bare = logits_of(again, batch)
    adapt(again, KINDS[kind][0], AdapterConfig(rank=3, dropout=0.5))
    load_parameters(adapter_parameters(again), load(tmp_path / "adapter.pt"))
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))
    assert difference(logits_of(model, batch), bare) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_those_of_a_plain_model(kind):
    """Catches a merge that forgets a scale: its weights must be enough for a model that was never adapted."""
    (model, batch), (bare, _) = adapted(kind, "lora"), base_of(kind)
    expected = logits_of(model, batch)
    merge(model)
    bare.load_state_dict({name: p for name, p in model.state_dict().items() if "lora_" not in name})
    assert difference(logits_of(bare, batch), expected) < 1e-4


@AS_OF_TRANSFORMERS_4
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_leaves_gradients_and_routing_alone(kind):
    """Catches weights that are lost, doubled or without gradient where activations are computed again."""
    results = []
    for on in (False, True):
        model, batch = adapted(kind)
        if on:
            model.gradient_checkpointing_enable()
        with collected_weights(model.train()) as weights:
            loss = logits_of(model, batch).square().mean()
        assert len(weights) == KINDS[kind][1] and all(w.requires_grad for w in weights), "one of each layer"
        usage = torch.cat([mean_usage(w[None], torch.ones(w.shape[:2])) for w in weights])           # (L, E)
        (loss + balance_loss(usage)).backward()
        results.append([usage, *(p.grad for p in adapter_parameters(model).values())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*results, strict=True))
    with collected_weights(layer := adapter_layers(model)[0][1]) as own:
        logits_of(model, batch)
    assert len(own) == 1 and "gate" not in vars(layer), "of one layer alone, and nothing stays"


@pytest.mark.parametrize("kind", SPEAKING)
def test_generate_says_what_the_logits_say(kind):
    """Catches a cache, or a mode of generate's, in which the adapter is not used."""
    model, batch = adapted(kind)
    tokens = model.generate(**batch, max_new_tokens=5, do_sample=False)[:, -5:]
    for i in range(5):
        new = logits_of(model, batch)[:, -1:].argmax(-1)
        assert torch.equal(new, tokens[:, i:i + 1]), f"token {i}"
        batch["input_ids"] = torch.cat((batch["input_ids"], new), 1)


@pytest.mark.parametrize("method", METHODS)
def test_adapting_our_llama_is_building_it(method, tmp_path):
    """Catches a second idea of an adapted layer: names, bits, flags and settings are those of load_llama."""
    save_llama(tiny("none"), tmp_path)
    adapter = AdapterConfig(method, rank=3, targets=("q_proj", "down_proj"))
    torch.manual_seed(5)
    built, plain = load_llama(tmp_path, adapter), load_llama(tmp_path)
    torch.manual_seed(5)
    assert len(adapt(plain, adapter.targets, adapter)) == 2 * TINY.num_hidden_layers
    ours, theirs = ([(name, type(layer), layer.adapter) for name, layer in adapter_layers(m)]
                    for m in (plain, built))
    assert ours == theirs
    ours, theirs = ({name: (p.requires_grad, p.dtype, p.tolist()) for name, p in m.named_parameters()}
                    for m in (plain, built))
    assert ours == theirs
    load_parameters(adapter_parameters(plain), parameter_state(adapter_parameters(randomise(built))))
    tokens = torch.randint(0, 101, (2, 9))
    assert torch.equal(plain(tokens), built(tokens))


def test_lines_of_the_readme_do_what_it_says(tmp_path, monkeypatch):
    """Catches README lines that do not run, and a file from them that cannot be loaded."""
    monkeypatch.chdir(tmp_path)
    lines = (Path(teamlora.__file__).parent / "README.md").read_text().split("## In your own model\n\n")[1]
    model, again = tiny("none"), tiny("none")
    exec(textwrap.dedent(lines.split("\n\n")[0]), {"model": model, "teamlora": teamlora, "torch": torch})
    assert len(adapter_layers(model)) == 5 * TINY.num_hidden_layers
    adapt(again, ["q_proj", "v_proj", "mlp.*"])
    load_parameters(adapter_parameters(again), load(tmp_path / "adapter.pt"))


# ---- What else a model may be like

def test_on_the_meta_device_nothing_is_made():
    """Catches memory for a model that has none yet."""
    with torch.device("meta"):
        model = Plain()
    assert len(adapt(model, ["layers.*"])) == 3 and all(p.is_meta for p in model.parameters())


def test_a_layer_in_two_places_stays_one():
    """Catches one place of a shared layer that stays plain, and a merge that counts it as two."""
    model = Plain()
    model.head = model.layers[2] = model.layers[0]
    assert adapt(model, ["layers.0"], AdapterConfig("lora")) == ["layers.0"]
    assert [name for name, _ in adapter_layers(model)] == ["head"], "its first name"
    assert model.head is model.layers[2] is model.layers[0]
    merge(randomise(model))


def test_a_tied_weight_stays_tied_and_is_not_merged():
    """Catches a weight that is untied, and a merge into the head that changes the embedding as well."""
    model = Plain()
    model.head.weight = model.embed.weight
    adapt(model, ["head", "layers.0"], AdapterConfig("lora"))
    before = parameter_state(dict(randomise(model).named_parameters()))
    assert model.head.weight is model.embed.weight
    with pytest.raises(InputError, match="head cannot be merged"):
        merge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_another_adapter_beside_the_first():
    """Catches a second call that freezes what the first one added, or changes its settings."""
    model = Plain()
    adapt(model, ["layers.0"], AdapterConfig(rank=2))
    adapt(model, ["layers.1", "head"], AdapterConfig("lora", rank=5))
    assert {n: layer.adapter.rank for n, layer in adapter_layers(model)} == {"head": 5, "layers.0": 2,
                                                                             "layers.1": 5}
    assert all(p.requires_grad for p in adapter_parameters(model).values())


@pytest.mark.parametrize("method", METHODS)
def test_under_autocast(method):
    """Catches products of two dtypes, where PyTorch chooses them."""
    model, batch = adapted("plain", method)
    exact = logits_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits_of(model, batch)
    rounded.square().mean().backward()
    assert 0 < difference(rounded, exact) < 0.05
    assert all(p.grad.isfinite().all() for p in adapter_parameters(model).values())


class Linear4bit(nn.Linear):
    """As of bitsandbytes and of many others: a class of its own."""


class Packed(torch.Tensor):
    """As of torchao: the layer is a plain nn.Linear, its weight something else."""


def packed(model):
    model.layers[1].weight = nn.Parameter(torch.zeros(32, 32).as_subclass(Packed))


def wrapped(model):
    model.layers[1].forward = model.layers[1].forward            # as accelerate and compressed-tensors do


def inserted(module):
    return lambda model: model.layers.insert(1, module)


@pytest.mark.parametrize("spoil, targets, message", [
    (None, ["layers.*", "heads"], "no linear layer's name ends in 'heads'; they end in 0, 1, 2, head"),
    (None, ["ayers.*"], "'ayers"), (None, ["embed"], "'embed'"), (None, [], "''"), (None, "head", "in 'h'"),
    (lambda model: adapt(model, ["layers.1"]), ["layers.*"], "layers.1 is a TeamLoRALinear, adapted, quant"),
    (inserted(Linear4bit(32, 32)), ["layers.*"], "layers.1 is a Linear4bit"),
    (inserted(nn.MultiheadAttention(32, 2)), ["layers.*"], "layers.1.out_proj is a NonDynamically"),
    (packed, ["layers.*"], "layers.1 is a Linear,"), (wrapped, ["layers.*"], "layers.1 is a Linear,"),
    (inserted(nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)), ["linear1"],
     "layers.1.linear1.weight past its adapter: call torch.backends.mha"),
    (None, ["layers.*"], "method must be one of teamlora, lora, moelora, hydralora, not 'full'")])
def test_what_cannot_be_adapted_is_refused_and_nothing_changes(spoil, targets, message):
    """Catches an adapter that is never read, or only in some layers, and a model that is adapted in part."""
    model = Plain()
    if spoil:
        spoil(model)
    before, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError, match=message):
        adapt(model, targets, AdapterConfig("full" if "method" in message else "teamlora"))
    assert list(model.modules()) == before and [p.requires_grad for p in model.parameters()] == flags


def test_pytorchs_encoder_without_its_fast_path():
    """Catches a way out, named in the refusal, that leads nowhere: it must count without gradient, too."""
    layer, x = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True).eval(), torch.randn(2, 5, 32)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            bare = layer(x)
            adapt(layer, ["linear?"])
            assert difference(layer(x), bare) < 1e-6 and difference(randomise(layer)(x), bare) > 1e-2
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


# ---- experiments/llava.py

@pytest.fixture
def few_pictures(monkeypatch):
    """The built-in LLaVA with 300 pictures, made in no time."""
    for package in ("transformers", "PIL"):
        pytest.importorskip(package)
    monkeypatch.setattr(llava, "make_example", functools.partial(llava.make_example, n=300))


def look(*flags):
    """What `python -m experiments.llava FLAGS` does."""
    return train.main(["--device=cpu", *map(str, flags)], run=llava.llava, config=llava.LlavaConfig)


def test_llava_learns_the_colours_of_pictures_never_seen(few_pictures, tmp_path):
    """Catches a picture that the model does not see, or another's; a file that holds not what was trained."""
    from transformers import LlavaForConditionalGeneration
    # the tower has a q_proj as well, which is not adapted
    results = look(f"--out_dir={tmp_path}", "--steps=50", "--batch_size=32",
                   "--targets=q_proj,up_proj,down_proj")
    assert results["colour"]["accuracy"] > 0.75, "four colours"
    saved = load(tmp_path / "adapter.pt")
    assert all(".language_model." in name for name in saved["parameters"])
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    adapt(theirs.model.language_model, saved["config"]["targets"], AdapterConfig())
    load_parameters(adapter_parameters(theirs), saved["parameters"])
    assert all(layer.lora_B.any() for _, layer in adapter_layers(theirs))


@pytest.mark.skipif("SLOW" not in os.environ, reason="takes two minutes; SLOW=1")
def test_llava_learns_shapes_too(tmp_path):
    """Catches a default run that does not show what it is for."""
    results = look(f"--out_dir={tmp_path}", "--val_examples=0")
    assert results["shape"]["accuracy"] > 0.85 and results["colour"]["accuracy"] > 0.95


@pytest.fixture
def example(few_pictures, tmp_path):
    """(LlavaConfig of what is built in, its model with experts that are no longer zero, its tokenizer)."""
    llava.make_example(tmp_path)
    cfg = llava.LlavaConfig(init_from=str(tmp_path), data=f"{tmp_path}/rows.json", device="cpu")
    tokenizer = data.JsonTokenizer(tmp_path / "tokenizer.json", 2)
    tokenizer.use(cfg.template)
    return cfg, randomise(llava.Llava(cfg)), tokenizer


@AS_OF_TRANSFORMERS_4
@pytest.mark.parametrize("checkpointing", [False, True])
def test_llava_computes_what_transformers_does(example, checkpointing):
    """Catches padding that is seen, patches in a wrong place, pictures exchanged, a shifted answer."""
    from PIL import Image
    cfg, model, tokenizer = example
    if checkpointing:
        model = randomise(llava.Llava(replace(cfg, checkpointing=True)))
    rows = llava.read(cfg.data)[:6]
    rows[1] = rows[1][0]._replace(input="red ? red"), rows[1][1]         # longer than its neighbours
    x, y, _ = data.collate(llava.encode(tokenizer, cfg, rows, model))
    assert model.llava.model.language_model.is_gradient_checkpointing == checkpointing
    losses, _ = model.train()(x, y)
    losses.sum().backward()
    gradients = [p.grad.clone() for p in adapter_parameters(model).values()]
    model.zero_grad()
    for (row, picture), ours in zip(rows, losses.split((y >= 0).sum(1).tolist())):
        ids = tokenizer.encode(f"USER: {'<image>' * 16} {row.instruction} {row.input} ASSISTANT:")
        answer = tokenizer.encode(row.output) + [2]
        pixels = model.processor(Image.open(picture), return_tensors="pt")["pixel_values"]
        theirs = model.llava(input_ids=torch.tensor([ids + answer]), pixel_values=pixels,
                             labels=torch.tensor([[-100] * len(ids) + answer])).loss * len(answer)
        assert torch.isclose(theirs, ours.sum(), rtol=1e-4), row
        theirs.backward()
    for (name, p), gradient in zip(adapter_parameters(model).items(), gradients):
        assert difference(p.grad, gradient) < 1e-4, name


def test_rows_about_one_picture_are_never_parted(few_pictures, tmp_path, monkeypatch):
    """Catches an accuracy on pictures that were seen in training with another question."""
    parts, encode = [], llava.encode
    monkeypatch.setattr(llava, "encode", lambda tokenizer, cfg, rows, model: parts.append(
        {picture for _, picture in rows}) or encode(tokenizer, cfg, rows, model))
    look(f"--out_dir={tmp_path}", "--steps=1", "--batch_size=2", "--val_examples=2")
    assert len(parts[0]) + len(parts[1]) == 300 and not parts[0] & parts[1] and len(parts[1]) > 10


def test_llava_leaves_out_blank_answers(tmp_path):
    """Catches a picture that is trained to be answered with nothing."""
    (tmp_path / "a.png").write_bytes(b"")
    rows = [{"image": "a.png", "instruction": "What?", "output": answer} for answer in ("red", " ")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert [row.output for row, _ in llava.read(f"{tmp_path}/rows.json")] == ["red"]


@pytest.mark.parametrize("spoil, message", [
    (lambda rows, config: rows[3].pop("image"), "rows.json, row 4: 'image' is missing or no file"),
    (lambda rows, config: rows[3].update(image="x.png"), "row 4: 'image' is missing or no file, .*x.png"),
    (lambda rows, config: rows[3].pop("output"), "row 4: a row has instruction, input or both, and output"),
    (lambda rows, config: rows[3].update(instruction="<image> what?"), "1.png: <image> is 2 times"),
    (lambda rows, config: rows.insert(0, 7), "row 1: expected an object"),
    (lambda rows, config: config.update(model_type="llama"), "config.json: model_type is not 'llava'")])
def test_bad_llava_input_ends_in_one_line(example, tmp_path, spoil, message):
    """Catches a traceback where a sentence belongs, a folder of another model taken for a random LLaVA."""
    contents = {name: json.loads((tmp_path / name).read_text()) for name in ("rows.json", "config.json")}
    spoil(*contents.values())
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="^error: .*" + message):
        look(f"--init_from={tmp_path}", f"--data={tmp_path}/rows.json", f"--out_dir={tmp_path}/out")
    assert not (tmp_path / "out").exists()
