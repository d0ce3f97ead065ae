"""Do weights load, whoever wrote them, or fail loudly? Are the logits those of transformers?

Every folder here is written from a description of its layout, not by the code that reads it, and must give
the logits of the model it was written from, bit for bit. Each docstring says which break the test catches.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import model as code
from model import (SCALING, Llama, LlamaConfig, fingerprint, load_llama, open_weights, read_safetensors,
                   save_llama, write_safetensors)
from teamlora import AdapterConfig, InputError, adapter_parameters, load_parameters, parameter_state
from test_teamlora import TINY, tiny
from tests.conftest import Code

# ---- What we write

def test_saved_llama_loads_to_the_same_logits(tmp_path):
    """Catches a lost or permuted key, a norm that is not read, a config that does not come back."""
    for tied in (False, True):
        config = replace(TINY, tie_word_embeddings=tied, eos_token_id=(2, 7), rms_norm_eps=1e-4)
        model, folder = tiny("none", config), tmp_path / str(tied)
        model.model.norm.weight.data.normal_()
        save_llama(model, folder)
        again, tokens = load_llama(folder), torch.randint(0, 101, (2, 33))
        assert again.config == model.config and torch.equal(again(tokens), model(tokens))
        assert ("lm_head.weight" in open_weights(folder)) != tied
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_adapters_beside_a_base_in_bf16_are_fp32_and_fresh(tmp_path):
    """Catches adapters left on the meta device or in the base's dtype, a fingerprint that depends on them."""
    model = tiny("none")
    save_llama(model, tmp_path)
    loaded = load_llama(tmp_path, AdapterConfig(rank=2), dtype=torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(loaded).values()} == {torch.float32}
    assert {p.dtype for p in loaded.base_parameters().values()} == {torch.bfloat16}
    assert not any(p.is_meta for p in loaded.parameters())
    tokens = torch.randint(0, 101, (2, 9))
    assert torch.equal(loaded(tokens), load_llama(tmp_path, dtype=torch.bfloat16)(tokens))
    other = tiny("none", replace(TINY, head_dim=12))
    assert fingerprint(loaded) == fingerprint(model) != fingerprint(other)


def test_safetensors_round_trip_keeps_every_bit(tmp_path):
    """Catches a wrong dtype, shape or offset."""
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).to(torch.bfloat16),
               "c": torch.randn(2, 1, 3).half(), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    write_safetensors(tensors, tmp_path / "x")
    again = read_safetensors(tmp_path / "x")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in tensors.items())


def test_adapter_loads_strictly():
    """Catches an adapter that does not match and leaves B = 0: the base model, without a symptom; and one of
    which a part is taken before the rest is refused."""
    state = parameter_state(adapter_parameters(tiny()))
    model = Llama(TINY, AdapterConfig(rank=3))
    load_parameters(adapter_parameters(model), state)
    assert all(torch.equal(p, state[n]) for n, p in adapter_parameters(model).items())
    for wrong in (tiny(rank=2), tiny("moelora"), tiny(targets=("q_proj",)), tiny("none")):
        before = parameter_state(adapter_parameters(wrong))
        with pytest.raises(InputError, match="does not fit"):
            load_parameters(adapter_parameters(wrong), state)
        assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(wrong).items())


# ---- What others write

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


def assert_same_logits(folder, model, dtype=torch.float32):
    """The folder's model computes what `model` does, over enough positions to show a wrong layout."""
    tokens = torch.randint(0, model.config.vocab_size, (2, 65))
    with torch.no_grad():
        assert torch.equal(load_llama(folder, dtype=dtype)(tokens), model.to(dtype)(tokens))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("n_shards, index", [(1, False), (1, True), (3, True), (3, False)])
def test_every_hugging_face_layout_gives_the_same_logits(tmp_path, suffix, n_shards, index):
    """Catches a shard that is not read, an index that is trusted in vain, an inv_freq entry that disturbs."""
    for tied, dtype in ((False, torch.float32), (True, torch.bfloat16), (False, torch.float16)):
        model, folder = tiny("none", replace(TINY, tie_word_embeddings=tied), dtype), tmp_path / str(dtype)
        write_hub(model, folder, suffix, n_shards, index)
        assert_same_logits(folder, model, dtype)


def test_tied_head_may_be_stored_twice(tmp_path):
    """Catches a head that is loaded beside the embedding it is tied to; parameters in place of tensors."""
    model = tiny("none", replace(TINY, tie_word_embeddings=True))
    save_llama(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({**dict(model.named_parameters(remove_duplicate=False))}, tmp_path / "pytorch_model.bin")
    assert "lm_head.weight" in open_weights(tmp_path)
    assert_same_logits(tmp_path, model)
    loaded = load_llama(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def named(change):
    """A folder's change that renames every weight."""
    return {BIN: lambda weights: {change(name): t for name, t in weights.items()}}


SAFE, BIN = "model.safetensors", "pytorch_model.bin"
BUFFERS = {"model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(4, 5),
           "position_ids": torch.arange(9)}
# folder that others write: {file: what differs in config.json, or how the weights become what the file holds}
DRESSED = {
    "DDP": named("module.{}".format), "compiled": named("_orig_mod.{}".format),
    "Lightning": named("model.{}".format), "multimodal": named("language_model.{}".format),
    "DDP of compiled": named("module._orig_mod.{}".format),
    "compiled DDP": named("_orig_mod.module.{}".format),
    "DDP, compiled inside": named(lambda name: "module." + name.replace("model.", "model._orig_mod.")),
    "FSDP": named(lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module._orig_mod.")),
    "model": {BIN: lambda weights: {"model": weights, "optimizer": {"a": torch.ones(1)}, "step": 3}},
    "state_dict": {BIN: lambda weights: {"state_dict": weights}},
    "DeepSpeed": {BIN: lambda weights: {"module": {f"module.{k}": t for k, t in weights.items()}}},
    "buffers": {BIN: lambda weights: weights | BUFFERS},
    "buffers, safe": {SAFE: lambda weights: weights | BUFFERS},
    "six digits": {f"model-00000{i}-of-000002.safetensors": (
        lambda weights, i=i: dict(list(weights.items())[i - 1::2])) for i in (1, 2)},
    "swish, null, huge": {"config.json": {"hidden_act": "swish", "rope_scaling": None, "attention_bias": None,
                                          "mlp_bias": None, "max_position_embeddings": 10 ** 18}},
    "repeated": {"config.json": {"rope_theta": 500.0, "rope_scaling": None,
                                 "rope_parameters": {"rope_theta": 500, "rope_type": "default"}}},
    "ids beyond": {"config.json": {"bos_token_id": -1, "eos_token_id": [2, 101, -1]}}}


def write_dressed(model, folder, changes):
    """A Hugging Face folder with `changes`, of DRESSED's form; weights replace model.safetensors."""
    save_llama(model, folder)
    weights = {k: t.detach() for k, t in model.base_parameters().items()}
    for name, change in changes.items():
        if name == "config.json":
            written = json.loads((folder / name).read_text()) | change
            kept = {k: v for k, v in written.items() if v != "missing"}
            (folder / name).write_text(json.dumps(kept))
        else:
            (folder / SAFE).unlink(missing_ok=True)
            write = torch.save if name == BIN else write_any_safetensors
            write(change(weights), folder / name)


def write_any_safetensors(tensors, path):
    """By the package itself, or ours that knows no integers."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        tensors, save_file = {k: t.float() for k, t in tensors.items()}, write_safetensors
    save_file(tensors, path)


@pytest.mark.parametrize("kind", DRESSED)
def test_every_dress_of_a_hugging_face_folder_gives_the_same_logits(tmp_path, kind):
    """Catches a wrapper, a buffer or a spelling that is refused, or that changes what is loaded."""
    write_dressed(model := tiny("none"), tmp_path, DRESSED[kind])
    config = tmp_path / "config.json"
    config.write_text(config.read_text(), "utf-8-sig")           # Windows' editors put a mark in front
    (tmp_path / "params.json").write_text("{}")                  # Meta's, without Meta's weights
    assert_same_logits(tmp_path, model)


def test_files_of_an_old_torch_load(tmp_path):
    """Catches the format before torch 1.6, which cannot be mapped, called damaged."""
    save_llama(model := tiny("none"), tmp_path)
    (tmp_path / SAFE).unlink()
    torch.save(model.state_dict(), tmp_path / BIN, _use_new_zipfile_serialization=False)
    assert_same_logits(tmp_path, model)


EIGHT = replace(TINY, vocab_size=104, num_attention_heads=16, num_key_value_heads=8, head_dim=6)


@pytest.mark.parametrize("config, n_shards, axis, params", [
    (TINY, 1, 1, {"vocab_size": -1, "rope_theta": 500.0, "n_kv_heads": 2}),
    (replace(TINY, rope_theta=10000.0, num_key_value_heads=6), 1, 1, {"vocab_size": -1}),
    (replace(TINY, vocab_size=106), 2, 1, {"vocab_size": -1, "rope_theta": 500.0}),
    (replace(TINY, vocab_size=106, tie_word_embeddings=True), 2, 0, {"rope_theta": 500.0}),
    (EIGHT, 8, 1, {"vocab_size": 104, "rope_theta": 500.0, "n_kv_heads": 8}),
    (replace(EIGHT, rope_scaling={"rope_type": "llama3", **SCALING["llama3"], "factor": 32.0}), 8, 0,
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
    assert_same_logits(tmp_path, model)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.pth", "consolidated.safetensors"])
def test_a_meta_folder_by_any_name_and_beside_a_config(tmp_path, name):
    """Catches the same files called otherwise, and a config.json whose weights nobody has."""
    write_meta(model := tiny("none"), tmp_path, 1, 1, {"rope_theta": 500.0})
    weights = torch.load(tmp_path / "consolidated.00.pth")
    (tmp_path / "consolidated.00.pth").unlink()
    (write_safetensors if name.endswith("safetensors") else torch.save)(weights, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert_same_logits(tmp_path, model)


@pytest.mark.parametrize("spoil, message", [
    (lambda f, w: (f / "consolidated.01.pth").unlink(), "2 shards, but there are 1: consolidated.00.pth"),
    (lambda f, w: (f / "consolidated.00.pth").unlink(), "2 shards, but there are 1: consolidated.01.pth"),
    (lambda f, w: [p.unlink() for p in f.glob("*.pth")], "consolidated.00.pth is missing"),
    (lambda f, w: (f / "params.json").write_text(
        '{"sliding_window": 9, "use_biases": false, "moe": {"a": 1}, ' + (f / "params.json").read_text()[1:]),
     "params.json: sliding_window, moe is not of Llama 1 to 3"),
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
    write_meta(tiny("none", replace(TINY, vocab_size=106)), tmp_path, 2, 1, {"rope_theta": 500.0})
    spoil(tmp_path, torch.load(tmp_path / "consolidated.00.pth"))
    if message is None:                          # a norm in one shard alone is enough: they are copies
        load_llama(tmp_path)
    else:
        with pytest.raises(InputError, match=message):
            load_llama(tmp_path)


def test_folder_of_another_size_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    """Catches gigabytes that are allocated for a folder whose weights are not those of its config."""
    save_llama(tiny("none"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    monkeypatch.setattr("model.materialise", lambda *_: pytest.fail("memory was given to it"))
    for change, message in (({"intermediate_size": 57}, r"gate_proj.weight has shape \(56, 48\), its config"),
                            ({"num_hidden_layers": 4}, "missing .*model.layers.3"),
                            ({"num_hidden_layers": 2}, "unexpected .*model.layers.2")):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            load_llama(tmp_path)


LOAD = """
import sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from model import load_llama

def own_memory():  # without pages of files, which the system takes back whenever it needs them
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024

class Peak(TorchDispatchMode):  # looks at the memory before and after everything that torch does
    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before, result, after = own_memory(), function(*args, **(kwargs or {})), own_memory()
        self.most = max(self.most, before, after)
        return result

with Peak() as peak:
    nf4 = sys.argv[3] == "nf4"
    load_llama(sys.argv[2], nf4=nf4)  # a small one, for what torch imports where it is needed first
    peak.most = before = own_memory()
    model = load_llama(sys.argv[1], nf4=nf4)
print(max(peak.most, own_memory()) - before, *(p.nbytes for p in model.parameters()))
"""


def rise_of_memory(folder, layout):
    """(bytes by which memory rises while a folder is loaded, the parameters' bytes), by a process of its own.
    What is freed goes back at once: else small matrices leave holes that large ones, as of a 7B, do not."""
    save_llama(tiny("none"), folder / "small")
    result = subprocess.run([sys.executable, "-c", LOAD, folder, folder / "small", layout], text=True,
                            capture_output=True, check=True, cwd=Path(code.__file__).parent,
                            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    rise, *sizes = map(int, result.stdout.split())
    return rise, sum(sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_four_bits_are_made_matrix_by_matrix(tmp_path):
    """Catches a model that stands whole in memory before its four bits are made."""
    model = Llama(LlamaConfig(1000, 512, 2048, 4, 8, 8, 64))         # 71 MB, 67 of them projections
    save_llama(model, tmp_path)
    rise, size = rise_of_memory(tmp_path, "nf4")
    assert size < 14e6 and size < rise < 0.5 * 71e6, f"{rise / 1e6:.0f} MB"     # a matrix has 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("layout", ["safetensors", "bin", "Meta's shards"])
def test_loading_holds_the_model_once(tmp_path, layout):
    """Catches files that are read whole, shards or single tensors copied aside, a model built before it is
    filled."""
    model = Llama(LlamaConfig(8000, 512, 2048, 2, 8, 8, 64))         # 67 MB, of which the embedding has 16
    if layout == "Meta's shards":
        write_meta(model, tmp_path, 2, 1, {})
    else:
        write_hub(model, tmp_path, layout, 2, True)
    rise, size = rise_of_memory(tmp_path, layout)
    assert 0.95 * size < rise < 1.05 * size, f"{rise / size:.2f} times the model"


# ---- Rotary settings, and the logits that transformers computes

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


VARIANTS = {"plain": TINY, "linear": replace(TINY, rope_scaling=LINEAR),
            "llama3": replace(TINY, rope_scaling=LONG, tie_word_embeddings=True),
            "one key/value head": replace(TINY, num_key_value_heads=1, rms_norm_eps=1e-6)}
# logits 0, 50 and 100 at positions 0, 31 and 99, of transformers' LlamaForCausalLM, fp32 (reference_logits)
GOLDEN = {
    "plain": [-0.8154, 0.7392, -0.5924, 0.5231, -0.2478, -0.0511, 1.5679, -2.5770, 3.3402],
    "linear": [-0.8154, 0.7392, -0.5924, 1.6939, -1.3760, 0.9269, 0.1827, -0.5991, 0.9584],
    "llama3": [0.5931, -0.5282, 0.4129, 1.1706, -1.1538, 1.0270, -0.0120, -0.1456, 0.2894],
    "one key/value head": [-0.0629, -0.0511, 0.1603, -0.0190, 0.1513, -0.2691, -0.2002, 0.0867, 0.0350]}


def by_formula(config):
    """A Llama whose weights follow from a formula, so that its logits can be written down; tokens (1, T)."""
    model = Llama(config)
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.base_parameters().items()), 1):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (1.7 + 0.1 * i)).view(p.shape)
            p.copy_(1 + 0.2 * wave if p.dim() == 1 else 0.3 * wave)
    return model, (torch.arange(100) * 37 % config.vocab_size)[None]


def transformers_logits(folder, tokens, dtype=torch.float32):
    """Logits of transformers' Llama in a folder."""
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.eval()(tokens).logits


def reference_logits(model, tokens, folder):
    """Those of what save_llama writes: the source of GOLDEN."""
    save_llama(model, folder)
    return transformers_logits(folder, tokens)


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


@pytest.mark.parametrize("name", VARIANTS)
def test_bf16_rounds_where_transformers_does(tmp_path, name):
    """Catches bf16 where transformers takes fp32: in a norm's statistics, in rotary angles."""
    model, tokens = by_formula(VARIANTS[name])
    save_llama(model, tmp_path)
    theirs = transformers_logits(tmp_path, tokens, torch.bfloat16)
    with torch.no_grad():
        exact = load_llama(tmp_path, dtype=torch.float64)(tokens)
        ours = load_llama(tmp_path, dtype=torch.bfloat16)(tokens)
    assert (ours - theirs).abs().mean() < 0.2 * (theirs - exact).abs().mean()


def with_head(weights, drop=()):
    """The weights with a head that is not the embedding."""
    weights = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].flip(0).contiguous()}
    return {k: t for k, t in weights.items() if k not in drop}


TIED = {"tie_word_embeddings": True}
AMBIGUOUS = {  # folder of which readers differ: (whether its head is tied here, its changes as in DRESSED)
    "no rms_norm_eps": (False, {"config.json": {"rms_norm_eps": "missing"}}),
    "tied, another head": (False, {"config.json": TIED, SAFE: with_head}),
    "tied, the same head": (True, {"config.json": TIED, SAFE: lambda w: w | {
        "lm_head.weight": w["model.embed_tokens.weight"].clone()}}),
    "tied, the head alone": (True, {"config.json": TIED, SAFE: lambda w: with_head(
        w, ["model.embed_tokens.weight"])}),
    "llama3 without its length": (False, {"config.json": {"max_position_embeddings": 16, "rope_scaling": {
        k: v for k, v in LONG.items() if k != "original_max_position_embeddings"}}}),
    "llama3 at the top": (False, {"config.json": {"original_max_position_embeddings": 16, "rope_scaling": {
        k: v for k, v in LONG.items() if k != "original_max_position_embeddings"}}}),
    "two places": (False, {"config.json": {
        "rope_theta": "missing", "rope_scaling": LINEAR | {"rope_theta": 70.0}, "rope_parameters": LINEAR}})}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_ambiguous_folders_mean_what_transformers_takes_them_for(tmp_path, capsys, kind):
    """Catches another default, a head that is dropped although it differs, a scaling that is read in part."""
    tied, changes = AMBIGUOUS[kind]
    model, tokens = by_formula(replace(TINY, rms_norm_eps=1e-4))
    model.model.embed_tokens.weight.data *= 1e-3           # so small that rms_norm_eps is seen
    write_dressed(model, tmp_path, changes)
    loaded = load_llama(tmp_path)
    with torch.no_grad():
        assert (loaded(tokens) - transformers_logits(tmp_path, tokens)).abs().max() < 2e-4
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.config.tie_word_embeddings == tied
    assert ("lm_head.weight is used" in capsys.readouterr().out) == (kind == "tied, another head")


@pytest.mark.parametrize("own, generation, ends, said", [
    (2, 2, (2,), ""), ([2, 9], [9, 3], (2, 9, 3), ""), (None, None, (), ""), (None, 3, (3,), ""),
    (-1, 3, (3,), "config.json: eos_token_id [-1] is not in the vocabulary"),
    (2, [101, 3], (2, 3), "generation_config.json: eos_token_id [101] is not in the vocabulary")])
def test_ends_come_from_both_files_if_they_can_be(tmp_path, capsys, own, generation, ends, said):
    """Catches an end that is invented, ignored without a word, or blamed on the other file."""
    save_llama(model := tiny("none"), tmp_path)
    write_dressed(model, tmp_path, {"config.json": {"eos_token_id": own}})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    loaded = load_llama(tmp_path)
    out = capsys.readouterr().out
    assert loaded.config.eos_token_id == ends and f"{tmp_path}/{said}" in out if said else not out
    assert loaded.generate(torch.tensor([[5, 6]]), 4).shape[1] <= 4          # no end: all four
    save_llama(loaded, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"]
    assert written == (ends[0] if len(ends) == 1 else list(ends) or None)
    assert load_llama(tmp_path / "again").config == loaded.config


def test_what_lies_beside_a_model_is_spoken_of(tmp_path, capsys):
    """Catches an adapter of PEFT, and code that a folder brings, ignored without a word."""
    write_dressed(tiny("none"), tmp_path, {"config.json": {"auto_map": {"AutoModelForCausalLM": "a.B"}}})
    (tmp_path / "adapter_config.json").write_text("{}")
    load_llama(tmp_path)
    out = capsys.readouterr().out
    assert "the PEFT adapter beside the model" in out and "auto_map), which is not run" in out
