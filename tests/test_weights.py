"""Do weights load, whoever wrote them, or fail loudly? Are the logits those of transformers?

Folders are written as others write them, by the package safetensors where it is installed, and must give the
model that they were written from, bit for bit. Each docstring says which break the test catches.
"""

import json
import re
from dataclasses import replace

import pytest
import torch

from model import (LlamaConfig, fingerprint, load_llama, open_weights, read_json, read_safetensors,
                   save_llama, write_safetensors)
from teamlora import AdapterConfig, InputError, adapter_parameters, merge
from test_teamlora import TINY, peak_of, randomise, tiny
from tests.conftest import same

try:
    from safetensors.torch import load_file, save_file
except ImportError:
    load_file, save_file = read_safetensors, write_safetensors

SAFE, BIN, LAYER = "model.safetensors", "pytorch_model.bin", "model.layers.0.self_attn"
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
TOKENS = torch.arange(200).view(2, 100) * 37 % TINY.vocab_size
LINEAR = {"rope_type": "linear", "factor": 4.0}
NO_LENGTH = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = NO_LENGTH | {"original_max_position_embeddings": 32}


def llama(config=TINY, dtype=torch.float32):
    """A tiny random Llama whose norms, and whose rotary settings, the logits show."""
    model = tiny(None, config)
    for p in model.parameters():
        p.data = 1 + 0.2 * torch.randn_like(p) if p.dim() == 1 else 3 * p.data
    return model.to(dtype)


def write(model, folder, files=None, **changes):
    """A folder as others write it. files: name -> function of the weights that makes what the file holds, or
    the file itself as bytes; None: as we write them. changes: to config.json, None: a key is missing."""
    save_llama(model, folder)
    changed = {k: v for k, v in (read_json(folder / "config.json") | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(changed))
    if files is not None:
        (folder / SAFE).unlink()
    for name, change in (files or {}).items():
        if isinstance(change, bytes):
            (folder / name).write_bytes(change)
        else:
            save = save_file if name.endswith("safetensors") else torch.save
            save(change(model.base_parameters()), folder / name)


def content(model):
    return model.config, {name: (p.dtype, p) for name, p in model.named_parameters()}


# ---- What we write, and the layouts of others

def test_tensors_of_every_dtype_go_both_ways(tmp_path):
    """Catches a wrong dtype (F16 and BF16 exchanged), shape or offset."""
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 1, 3).half(),
               "d": torch.randn(4, 4).double(), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    for save, read in ((save_file, read_safetensors), (write_safetensors, load_file)):
        save(tensors, tmp_path / "x")
        again = read(tmp_path / "x")
        assert again.keys() == tensors.keys()
        assert all(again[k].dtype == t.dtype and torch.equal(again[k], t) for k, t in tensors.items())


LAYOUTS = {
    "ours": None, "old": {SAFE: lambda w: w | {f"{LAYER}.rotary_emb.inv_freq": torch.ones(5)}},
    "shards": {f"model-0000{i + 1}-of-00003.safetensors": (
        lambda weights, i=i: dict([*weights.items()][i::3])) for i in range(3)},
    "bin": {BIN: dict},
    "bin shards": {f"pytorch_model-0000{i + 1}-of-00002.bin": (
        lambda weights, i=i: dict([*weights.items()][i::2])) for i in range(2)}}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_gives_the_same_bits(tmp_path, kind):
    """Catches a lost or permuted key, a shard not read, another dtype or config, a tied head that is two."""
    for dtype, tied in ((torch.float32, False), (torch.bfloat16, True), (torch.float16, False)):
        model = llama(replace(TINY, tie_word_embeddings=tied, eos_token_id=(2, 7)), dtype)
        write(model, tmp_path / str(dtype), LAYOUTS[kind], hidden_act="swish")
        assert same(content(loaded := load_llama(tmp_path / str(dtype))), content(model))
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_adapters_are_fp32_and_fresh_and_a_fingerprint_is_of_the_base_alone(tmp_path):
    """Catches adapters on the meta device or in the base's dtype; bases that no fingerprint tells apart."""
    save_llama(model := llama(), tmp_path)
    loaded = load_llama(tmp_path, AdapterConfig(rank=2), dtype=torch.bfloat16)
    assert {(p.dtype, str(p.device)) for p in adapter_parameters(loaded).values()} == {(torch.float32, "cpu")}
    assert {p.dtype for p in loaded.base_parameters().values()} == {torch.bfloat16}
    assert torch.equal(loaded(TOKENS), load_llama(tmp_path, dtype=torch.bfloat16)(TOKENS))
    assert (prints := [fingerprint(model)]) == [fingerprint(randomise(loaded))]
    for p in model.base_parameters().values():
        for data in (p.data.roll(1, 0), p.data[None]):           # other values, another shape
            p.data = data
            prints.append(fingerprint(model))
    assert len({*prints}) == len(prints)


def test_loading_holds_the_model_once(tmp_path):
    """Catches tensors copied aside, a model built before it is filled, files read before they are used."""
    model = tiny(None, LlamaConfig(2000, 256, 512, 2, 4, 4, 64), torch.bfloat16)
    for kind, dtypes in (("bin", ()), ("shards", (None, torch.float32))):
        write(model, folder := tmp_path / kind, LAYOUTS[kind])
        for dtype in dtypes:                     # of .bin, the profiler would count memory that is mapped
            peak, loaded = peak_of(lambda: load_llama(folder, dtype=dtype))
            size = sum(p.nbytes for p in loaded.parameters())
            assert size <= peak < 1.001 * size
        weights = open_weights(folder)
        for path in folder.glob("*model*"):
            path.write_bytes(bytes(path.stat().st_size))
        assert not any(t.any() for t in weights.values()), "they were read before they were used"


# ---- What transformers computes

def transformers_llama(folder, dtype=torch.float32):
    return pytest.importorskip("transformers").LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("config", [
    TINY, replace(TINY, rope_scaling=LINEAR), replace(TINY, num_key_value_heads=1, rms_norm_eps=1e-6),
    replace(TINY, rope_scaling=LLAMA3, tie_word_embeddings=True)], ids=["plain", "linear", "K = 1", "llama3"])
def test_logits_are_those_of_transformers(tmp_path, config):
    """Catches wrong mathematics; rotary scaling lost in a file; norms or angles in bf16, not fp32."""
    save_llama(model := llama(config), tmp_path)
    theirs = transformers_llama(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        for ours in (model, load_llama(tmp_path / "again")):
            assert (ours(TOKENS) - expected).abs().max() < 1e-5 * expected.abs().max()
        exact = load_llama(tmp_path, dtype=torch.float64)(TOKENS)
        theirs = transformers_llama(tmp_path, torch.bfloat16)(TOKENS).logits
        ours = load_llama(tmp_path, dtype=torch.bfloat16)(TOKENS)
    assert (ours - theirs).abs().mean() < 0.2 * (theirs - exact).abs().mean()


ROPES = {"new": {"rope_parameters": {"rope_theta": 70.0, "rope_type": "default"}}, "none": {},
         "old": {"rope_theta": 70.0}, "new linear": {"rope_parameters": {"rope_theta": 70.0, **LINEAR}},
         "oldest": {"rope_theta": 70.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
         "two places": {"rope_scaling": LINEAR | {"rope_theta": 70.0}, "rope_parameters": LLAMA3},
         "no length": {"max_position_embeddings": 16, "rope_scaling": NO_LENGTH},
         "length apart": {"original_max_position_embeddings": 16, "rope_scaling": NO_LENGTH}}
TIED = {"tie_word_embeddings": True}
AMBIGUOUS = {  # folder of which readers differ: (is its head tied here, its files, changes of config.json)
    "no eps": (False, None, {"rms_norm_eps": None}), "tied, another head": (False, None, TIED),
    "tied, the same head": (True, {SAFE: lambda w: w | {HEAD: w[EMBEDDING].clone()}}, TIED),
    "tied, the head alone": (True, {SAFE: lambda w: {k: w[k] for k in w if k != EMBEDDING}}, TIED),
    **{name: (False, None, {"rope_theta": None, "rope_scaling": None} | ROPES[name]) for name in ROPES}}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_ambiguous_folders_mean_what_transformers_takes_them_for(tmp_path, capsys, kind):
    """Catches another default, a head that is dropped although it differs, a scaling that is read in part."""
    tied, files, changes = AMBIGUOUS[kind]
    model = llama()
    model.model.embed_tokens.weight.data *= 1e-3         # so small that rms_norm_eps is seen
    write(model, tmp_path, files, **changes)
    loaded = load_llama(tmp_path)
    with torch.no_grad():
        expected = transformers_llama(tmp_path)(TOKENS).logits
        assert (loaded(TOKENS) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert ("lm_head.weight is used" in capsys.readouterr().out) == (kind == "tied, another head")


# ---- What is refused

REFUSED = {  # what the error says: (files, changes of config.json)
    "python -m experiments.from_meta": ({"config.json": b"{}"}, {}),
    "model_type is 'mistral'; only 'llama'": (None, {"model_type": "mistral"}),
    "attention_bias is True; only False": (None, {"attention_bias": True}),
    "mlp_bias is True": (None, {"mlp_bias": True}), "hidden_act is 'gelu'": (None, {"hidden_act": "gelu"}),
    "rope_type is 'yarn'": (None, {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "partial_rotary_factor is 0.5": (None, {"partial_rotary_factor": 0.5}),
    "quantization_config is {'bits': 4}": (None, {"quantization_config": {"bits": 4}}),
    "extra is I8; only F32": ({SAFE: lambda w: w | {"extra": torch.ones(3).char()}}, {}),
    "extra is torch.int8": ({BIN: lambda w: w | {"extra": torch.ones(3).char()}}, {}),
    f"{HEAD} holds inf or NaN": ({SAFE: lambda w: w | {HEAD: w[HEAD] / (w[HEAD] != w[HEAD].max())}}, {}),
    f"{NORM} holds inf or NaN": ({BIN: lambda w: w | {NORM: w[NORM] * torch.nan}}, {}),
    f"{NORM} is missing, expected (48,)": ({SAFE: lambda w: {k: w[k] for k in w if k != NORM}}, {}),
    f"{NORM} is (1, 48), expected (48,)": ({SAFE: lambda w: w | {NORM: w[NORM][None]}}, {}),
    f"{LAYER}.bias is (60,), expected": ({SAFE: lambda w: w | {f"{LAYER}.bias": torch.ones(60)}}, {}),
    "in another file, too": ({SAFE: dict, "model-00001-of-00001.safetensors": dict}, {}),
    "neither model*.safetensors nor pytorch_model*.bin": ({}, {}),
    "it begins with b'version https://git-lfs": ({SAFE: b"version https://git-lfs.github.com/spec/v1"}, {}),
    "Unsupported global": ({BIN: lambda w: w | {"code": print}}, {})}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_loaded_truthfully_is_refused_by_name(tmp_path, message):
    """Catches a folder that is loaded in part, or as something that it is not; code in a file that is run."""
    if "I8" in message:                          # which our own writer cannot write
        pytest.importorskip("safetensors")
    files, changes = REFUSED[message]
    write(llama(), tmp_path, files, **changes)
    with pytest.raises(InputError, match=f"(?s)^{tmp_path}.*{re.escape(message)}"):
        load_llama(tmp_path)


@pytest.mark.parametrize("own, generation, ends", [
    (2, 2, (2,)), ([2, 9], [9, 3], (2, 9, 3)), (None, None, ()), (None, 3, (3,)), (-1, 3, (3,)),
    (2, [TINY.vocab_size, 3], (2, 3))])
def test_ends_come_from_both_files_if_they_can_be(tmp_path, own, generation, ends):
    """Catches an end that is invented or ignored, and files that are written with fewer."""
    write(llama(), tmp_path, eos_token_id=own)
    (tmp_path / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": generation, "top_k": 5}), "utf-8-sig")          # as Windows' editors write it
    loaded = load_llama(tmp_path)
    save_llama(loaded, tmp_path / "again", like=tmp_path)
    assert same(content(load_llama(tmp_path / "again")), content(loaded))
    raw, more = (read_json(tmp_path / "again" / name) for name in ("config.json", "generation_config.json"))
    assert loaded.config.eos_token_id == ends and more == {"eos_token_id": [*ends], "top_k": 5}
    assert raw.get("eos_token_id") == (ends[0] if len(ends) == 1 else [*ends] or None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_merged_model_is_written_like_its_base(tmp_path, dtype):
    """Catches a dtype that grows, matrices without adapter that are rounded, what else the base's files say
    that is lost, and its weights or another's that are copied along."""
    write(llama(dtype=dtype), tmp_path, pad_token_id=5, torch_dtype="float32")
    copied = {"tokenizer.model", "tokenizer_config.json", "chat_template.jinja"}
    for name in (*copied, "pytorch_model.bin"):
        (tmp_path / name).write_text(name)
    merge(model := randomise(load_llama(tmp_path, AdapterConfig("lora", targets=("q_proj",)))))
    save_llama(model, out := tmp_path / "out", like=tmp_path)
    assert {p.name for p in out.iterdir()} == copied | {"config.json", SAFE}
    assert all((out / name).read_text() == name for name in copied)
    said = {"pad_token_id": 5, "dtype": str(dtype)[6:], "torch_dtype": str(dtype)[6:]}
    assert said.items() <= read_json(out / "config.json").items()
    before, after = (read_safetensors(folder / SAFE) for folder in (tmp_path, out))
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {dtype}
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(TINY.num_hidden_layers)}
