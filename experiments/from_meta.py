"""A folder of Meta's (params.json, consolidated.*, tokenizer.model) becomes a Hugging Face folder.

    python -m experiments.from_meta FOLDER OUT      Llama 1, 2 and 3, in one shard or several

The idea: three things differ: names; shards, each of which has a part of every matrix; and the order of q's
and k's rows, since rotary pairs are neighbours there. One memory-mapped tensor after the other is written.

What may surprise:
- Llama 3's tokenizer.model is a list of lines that train.py cannot read: add its tokenizer.json.
- Llama 1's and 2's often lies in the folder above: it is taken from there.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from model import load_llama, read_json, read_safetensors, write_safetensors
from teamlora import InputError, naming

KEYS = """dim n_layers n_heads n_kv_heads head_dim hidden_dim vocab_size multiple_of ffn_dim_multiplier
    norm_eps rope_theta use_scaled_rope max_seq_len max_batch_size""".split()      # of Llama 1 to 3
NAMES = {"tok_embeddings": "embed_tokens", "output": "lm_head", "attention_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj",
         "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
         **{f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"}}             # Meta's -> Hugging Face's
BY_COLUMNS = ("o_proj.weight", "down_proj.weight")       # cut so, and Llama 1's and 2's embedding


def config_of(raw, shards):
    """What config.json says: from params.json, which leaves out or hides (-1) what shapes of tensors tell."""
    if unknown := [key for key in raw if key not in KEYS and raw[key]]:
        raise InputError(f"{', '.join(unknown)} is not of Llama 1 to 3, which alone are supported")
    embedding, q, k, gate = (shards[0][f"{name}.weight"] for name in (
        "tok_embeddings", "layers.0.attention.wq", "layers.0.attention.wk", "layers.0.feed_forward.w1"))
    C, H, D = raw["dim"], raw["n_heads"], raw.get("head_dim") or raw["dim"] // raw["n_heads"]
    if (n := H * D // len(q)) != len(shards):
        raise InputError(f"the model was cut into {n} shards, but there are {len(shards)}")
    V, scaled = len(embedding) * (n if embedding.shape[1] == C else 1), raw.get("use_scaled_rope")
    bos, ends, longest = (128000, [128001, 128008, 128009], 8192) if V == 128256 else (1, 2, 4096)
    # Llama 3.2 (1B and 3B, narrower than all others) stretches by 32; its file does not say so
    scaling = {"rope_type": "llama3", "factor": 32.0 if C < 4096 else 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {
        "model_type": "llama", "dtype": str(q.dtype)[6:], "vocab_size": V, "hidden_size": C, "head_dim": D,
        "intermediate_size": n * len(gate), "num_hidden_layers": raw["n_layers"], "num_attention_heads": H,
        "num_key_value_heads": raw.get("n_kv_heads") or n * len(k) // D, "rms_norm_eps": raw["norm_eps"],
        "rope_theta": raw.get("rope_theta") or 10000.0, "rope_scaling": scaling if scaled else None,
        "max_position_embeddings": 131072 if scaled else longest, "bos_token_id": bos, "eos_token_id": ends,
        "tie_word_embeddings": shards[0].get("output.weight", embedding).data_ptr() == embedding.data_ptr()}


def converted(shards, config, device):
    """Yield (Hugging Face's name, tensor), one after the other; on the meta device without its numbers."""
    for name in dict.fromkeys(name for shard in shards for name in shard if name != "rope.freqs"):
        parts = [shard[name].to(device) for shard in shards if name in shard]
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        by_columns = name.endswith(BY_COLUMNS) or parts[0].shape[-1] < config["hidden_size"]
        t = parts[0] if parts[0].dim() == 1 else torch.cat(parts, 1 if by_columns else 0)  # norms are whole
        if name.endswith(("q_proj.weight", "k_proj.weight")):    # neighbours there, half a head apart here
            t = t.unflatten(0, (-1, config["head_dim"] // 2, 2)).transpose(1, 2).flatten(0, 2)
        yield name if name.startswith("lm_head") else f"model.{name}", t


def convert(folder, out):
    """Write the Hugging Face folder `out`. InputError names what is missing, wrong or in the way."""
    files = sorted(folder.glob("consolidated*.pth")) or sorted(folder.glob("consolidated*.safetensors"))
    tokenizer = [*folder.glob("tokenizer.*")] or [*folder.absolute().parent.glob("tokenizer.*")]
    raw, shards, unfinished = read_json(folder / "params.json"), [], Path(f"{out}.tmp")
    raw = next((v for v in raw.values() if isinstance(v, dict) and "dim" in v), raw)   # some are nested
    for name, found in ("params.json", raw), ("consolidated.00.pth", files), ("tokenizer.model", tokenizer):
        if not found:
            raise InputError(f"{folder}: {name} is missing; this is no folder of Meta's, or not all of it")
    if out.exists():
        raise InputError(f"{out} exists already; move or delete it")
    for path in files:
        with naming(path):
            shards.append(read_safetensors(path) if path.suffix == ".safetensors" else torch.load(
                path, map_location="cpu", weights_only=True, mmap=True))     # what would run code is refused
    with naming(folder):
        config = config_of(raw, shards)
        shutil.rmtree(unfinished, ignore_errors=True)    # of a conversion that was interrupted
        unfinished.mkdir(parents=True)
        for path in tokenizer:
            shutil.copy(path, unfinished)
        (unfinished / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        tensors, again = (converted(shards, config, device) for device in ("meta", "cpu"))
        write_safetensors(SimpleNamespace(items=lambda: tensors, values=lambda: (t for _, t in again)),
                          unfinished / "model.safetensors")      # for the header, then for the body
        load_llama(unfinished, device="meta")            # refuses what is missing, misshapen, not finite
    unfinished.rename(out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("FOLDER", type=Path)
    parser.add_argument("OUT", type=Path)
    try:
        convert(*vars(parser.parse_args(argv)).values())
    except InputError as e:
        sys.exit("error: " + " ".join(str(e).split())[:1000])


if __name__ == "__main__":
    main()
