"""Does a folder of Meta's become the same model? Each docstring says which break the test catches."""

import json
from dataclasses import replace

import pytest
import torch

from experiments.from_meta import main
from model import LlamaConfig, load_llama, write_safetensors
from tests.test_weights import LLAMA3, TINY, TOKENS, llama, peak_of

NAMES = {"model.": "", "self_attn": "attention", "mlp": "feed_forward", "gate_proj": "w1", "down_proj": "w2",
         "up_proj": "w3", "embed_tokens": "tok_embeddings", "lm_head": "output",
         "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
         **{f"{x}_proj": f"w{x}" for x in "qkvo"}}


def write_meta(model, folder, n=1, axis=1, save=torch.save, **params):
    """By the published layout, row by row: a folder of n shards; axis: along which the embedding is cut."""
    c, D, shards = model.config, model.config.head_dim, [{"rope.freqs": torch.ones(5)} for _ in range(n)]
    for name, p in model.base_parameters().items():
        cut = axis if "embed" in name else int(name.endswith(("o_proj.weight", "down_proj.weight")))
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # a pair is neighbours, there half a head apart
            p = torch.stack([p[i - i % D + i % D // 2 + i % 2 * D // 2] for i in range(len(p))])
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        for shard, part in zip(shards, [p] * n if p.dim() == 1 else p.chunk(n, cut), strict=True):
            shard[name] = part.clone()
    folder.mkdir()
    for i, shard in enumerate(shards):
        save(shard, folder / f"consolidated.{i:02}.{'pth' if save is torch.save else 'safetensors'}")
    raw = {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "n_heads": c.num_attention_heads,
           "head_dim": D, "norm_eps": c.rms_norm_eps, "vocab_size": -1, "rope_theta": c.rope_theta} | params
    (folder / "params.json").write_text(json.dumps({"model": raw, "seed": 1} if n == 3 else raw))
    ((folder if n == 1 else folder.parent) / "tokenizer.model").write_text("pieces")   # Llama 2's lies above


TWO = replace(TINY, vocab_size=102, max_position_embeddings=4096, tie_word_embeddings=True)
SMALL = LlamaConfig(128256, 16, 24, 1, 4, 2, 8, 1e-5, 5e5, LLAMA3 | {
    "factor": 32.0, "original_max_position_embeddings": 8192}, False, 131072, (128001, 128008, 128009))


@pytest.mark.parametrize("config, how", ids=["1", "2", "3", "3.2"], argvalues=[
    (replace(TWO, num_key_value_heads=6, rope_theta=1e4), {"rope_theta": None}), (TWO, {"n": 2}),
    (replace(TWO, num_key_value_heads=3, intermediate_size=57), {"n": 3, "axis": 0, "n_kv_heads": 3}),
    (SMALL, {"n": 2, "axis": 0, "save": write_safetensors, "use_scaled_rope": True})])
def test_every_layout_becomes_the_same_model_tensor_by_tensor(tmp_path, config, how):
    """Catches rows not permuted, a wrong axis, rope not stretched, ends lost, old files, all in memory."""
    write_meta(model := llama(config, torch.bfloat16), folder := tmp_path / "meta", **how)
    ((out := tmp_path / "out").with_suffix(".tmp") / "half").mkdir(parents=True)
    peak, _ = peak_of(lambda: main([str(folder), str(out)]))
    assert config is not SMALL or peak < 1.01 * model.lm_head.weight.nbytes  # mapped .pth files are counted
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.model"}
    assert (loaded := load_llama(out)).config == replace(config, rope_scaling=loaded.config.rope_scaling)
    assert torch.equal(loaded(TOKENS), model(TOKENS)) and loaded.lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(SystemExit, match="error: .*out exists already"):
        main([str(folder), str(out)])


@pytest.mark.parametrize("message, missing, params, tensors", [
    ("consolidated.00.pth is missing", "*.pth", {}, {}), ("params.json is missing", "params.json", {}, {}),
    ("2 shards, but there are 1", "*.00.pth", {}, {}), ("tokenizer.model is missing", "tok*", {}, {}),
    ("moe is not of Llama 1 to 3", "-", {"moe": 8}, {}), ("'norm_eps'", "-", {"norm_eps": None}, {}),
    ("is .48, 55., expected .48, 56.", "-", {}, {"layers.1.feed_forward.w2.weight": torch.ones(48, 27)}),
    ("00.pth: .*Unsupported global", "-", {}, {"code": print})])
def test_what_is_missing_or_wrong_is_named(tmp_path, message, missing, params, tensors):
    """Catches a folder that is converted in part, a traceback, code in a file that is run."""
    write_meta(llama(TWO), folder := tmp_path / "meta", 2, **params)
    torch.save(torch.load(first := folder / "consolidated.00.pth") | tensors, first)
    for path in tmp_path.rglob(missing):
        path.unlink()
    with pytest.raises(SystemExit, match=f"^error: .*{message}[^\n]*$"):
        main([str(folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
