"""Does bad input end in one line that names it, and does nothing run or get written?

    pytest tests/test_bad_input.py              half a minute
    FUZZ=5000 pytest tests/test_bad_input.py    more random input, other every time; needs hypothesis

BAD is the list of what is refused: flags, rows, Llama folders, adapters and checkpoints. An entry is
what stands on the command line and what the error must say. Each docstring says which break the test catches.
"""

import gzip
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch

import data
import train
from experiments import bench, compare, make_base, shapley
from model import open_weights, read_json, read_safetensors, write_safetensors
from teamlora import InputError
from test_teamlora import tiny
from tests.conftest import Code, files_in, flags_of, load, use

# ---- What is refused

# flags: what is said; where nothing else is given, the name of the flag
FLAGS = {f: f.split("=")[0].strip("-") for f in f"""--no_such_flag=1 --step=5 --steps=many --steps=0 word
    --rank=0 --n_experts=0 --method=dora --targets= --mode=fly --resume=maybe --alpha=inf --learning_rate=-1
    --learning_rate=nan --dropout=1 --dropout=-0.1 --seed=-1 --seed={10 ** 30} --temperature=nan --out_dir=
    --max_tokens=8 --warmup=1 --val_share=1 --balance=-1 --top_k=-1 --stop_at=-1 --dtype=float16
    --device=tpu --base_steps=3 --export=x""".split()}
FLAGS |= {
    "--rank=0": "--rank must be at least 1 and below 2147483648, not 0",
    "--targets=q_proj,wq": "wq", "--method=none": "nothing to train", "--val_data=x.json": "needs --data",
    "--max_length=1022 --max_tokens=1022": "padding makes 1024", "--data=" + "x" * 5000: "too long",
    "--max_length=9 --max_tokens=99": "built-in texts", "--out_dir={bad}/half.json": "must be a folder",
    "--data={bad}/none.json": "No such file or directory: ", "--data={bad}/half.json,": "a name is missing",
    "--data={bad}/adapter_code": "no .json or .jsonl file", "--data={bad}/tables": "but: train.parquet",
    "--data={bad}/arrows": "arrows/state.json, row 1: a row has",
    "--mode=eval --val_share=0.2": "--val_share=0.2 contradicts",
    "--init_from={bad}/adapter_code/adapter.pt --out_dir={bad}/new": "it holds code, exec",
    "--init_from={bad}/none.pt --out_dir={bad}/new": "none.pt does not exist",
    "--init_from={bad}/adapter_other_base/adapter.pt --out_dir={bad}/new": "made for another base",
    "--init_from={bad}/adapter_other_base/adapter.pt --rank=3 --out_dir={bad}/new": "--rank=3 contradicts",
    "--init_from={bad}/half.json": "it is no folder; a model of the Hugging Face Hub is fetched with",
    "--init_from=meta-llama/Llama-2-7b-hf": "fetched with: hf download NAME --local-dir FOLDER",
    "--init_from={bad}/gguf/llama.gguf": "llama.cpp's GGUF; take the Hugging Face folder",
    "--init_from=~/no_such": str(Path.home() / "no_such"), "--init_from=~no_one/x": "~no_one/x",
    "--data={bad}/half.json --out_dir={bad}/new": "row 2", "--resume --steps=19": "has done 20 already",
    "--init_from={bad}/nowhere": "nowhere: neither config.json",
    "--mode=eval --rank=3": "--rank=3 contradicts",
    "--mode=eval --out_dir={bad}/none": "adapter.pt does not exist",
    "--mode=sample --prompt=\n": "the prompt is blank",
    "--mode=sample --prompt=\udcff": "half of a surrogate pair",
    "--mode=sample --prompt=" + "Anna" * 2000: "tokens; give 1 to",
    "--mode=export": "depend on the token",
    "--template=lama3": "--template must be", "--template={{instruction.x}}": "--template must be",
    "--template={{instruction}}{{{{output}}}}": "--template must be"}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
GOOD, NESTED = '{"instruction": "x", "output": "y"}', "[" * 10 ** 5
LONG = json.dumps([{"instruction": str(i), "output": "y " * 2000} for i in range(50)])
DATA = {  # file of rows: what is said, what it holds
    "half.json": ("half.json, row 2: a row has instruction, input or both, and output, but this has: "
                  "instruction;", f'[{GOOD}, {{"instruction": "x"}}]'),
    "mute.json": ("row 1: a row has", '[{"output": "y"}]'), "nul.json": ("not JSON", "\0" * 99),
    "null.json": ("with a question and an answer", '[{"instruction": "x", "output": null}]'),
    "void.json": ("no rows", ""), "rowless.json": ("no rows", "[]"), "blank.jsonl": ("no rows", "\n"),
    "wide.json": ("digits", "9" * 5000), "word.json": ("row 1: expected an object", '"rows"'),
    "number.json": ("row 1: 'output' is not text", '[{"instruction": "x", "output": 0}]'),
    "list.json": ("row 1: 'instruction'", '[{"instruction": ["x"], "output": "y"}]'),
    "spaced.jsonl": ("row 3: 'output'", f'\n{GOOD}\n{{"instruction": "x", "output": []}}'),
    "nested.json": ("row 1: expected an object", f"[[{GOOD}]]"), "cut.jsonl": ("from line 2 on", "{}\n{"),
    "comma.json": ("line 2 column 1", f"[{GOOD},\n]"), "single.json": ("line 1 column 2", "{'output': 'y'}"),
    "data.json": ("but this has: version, data;", f'{{"version": 1, "data": [{GOOD}]}}'),
    "columns.json": ("'instruction' is not text", '{"instruction": {"0": "x"}, "output": {"0": "y"}}'),
    "latin.jsonl": ("can't decode byte 0xe9 in position 12", b'{"output": "\xe9"}'),
    "deep.json": ("recursion", NESTED), "deep.jsonl": ("from line 2 on", "\n" + NESTED),
    "alone.json": ("holding out", f"[{GOOD}]"),
    "pair.json": ("half of a surrogate pair", f'[{GOOD[:-2]}\\ud83d"}}]'),
    "task.json": ("row 1: 'task' is not one printable line", f'[{GOOD[:-1]}, "task": "a\\nb"}}]'),
    "long.json": ("every answer is longer", LONG),
    "share.json": ("but this has: conversations;", '[{"conversations": [{"from": "human", "value": "x"}]}]'),
    "chat.jsonl": ("but this has: messages;", '{"messages": [{"role": "user", "content": "x"}]}'),
    "prompt.jsonl": ("but this has: prompt, completion;", '{"prompt": "x", "completion": "y"}'),
    "qa.jsonl": ("but this has: question, answer;", '{"question": "x", "answer": "y"}'),
    "dolly.jsonl": ("but this has: instruction, context, response;",
                    '{"instruction": "x", "context": "", "response": "y"}'),
    "text.jsonl": ("but this has: text;", '{"text": "x"}'),
    "rows.csv": ("not JSON", "instruction,output\nx,y\n"),
    "rows.json.gz": ("compressed", b"\x1f\x8b\x08\0"), "rows.parquet": ("a Parquet or Arrow", b"PAR1\x15\0"),
    "lfs.json": ("a Git LFS pointer", LFS),
    "page.json": ("a server's answer", "<!DOCTYPE html><html>"),
    "utf16.json": ("UTF-16", f"[{GOOD}]".encode("utf-16")),
    "arrows/data-00000-of-00001.arrow": ("", b"ARROW1\0\0"), "arrows/state.json": ("", '{"_split": null}'),
    "tables/train.parquet": ("", b"PAR1")}
CONFIG = [  # a key of config.json, its value; None: it is missing
    ("model_type", "mistral"), ("hidden_act", "gelu"), ("attention_bias", True), ("rope_theta", -1),
    ("num_attention_heads", None), ("rope_theta", 10 ** 400), ("num_attention_heads", 3), ("head_dim", 31),
    ("hidden_size", "64"), ("num_hidden_layers", 10 ** 9), ("vocab_size", -1), ("rms_norm_eps", "1e-5"),
    ("bos_token_id", "<s>"), ("tie_word_embeddings", 1), ("partial_rotary_factor", 0.5),
    ("eos_token_id", [[1]]), ("eos_token_id", True), ("max_position_embeddings", 0), ("head_dim", 0),
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
NOTHING = {"config.json": None, SAFE: None, PIECES: None}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
# Llama folder: what is said, {file: what it holds; None: it is missing; a function: of the good file; a dict:
# what differs in config.json or among the weights}
FOLDERS = {f"config{i}": (key, {"config.json": {key: value}}) for i, (key, value) in enumerate(CONFIG)} | {
    "yarn": ("rope_type is 'yarn'", {"config.json": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}),
    "half_scaled": ("'low_freq_factor' is missing", {
        "config.json": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}}),
    "scaled": ("not positive numbers", {"config.json": {"rope_scaling": {"type": "linear", "factor": "8"}}}),
    "rope": ("rope_scaling is [1], not an object", {"config.json": {"rope_scaling": [1]}}),
    "theta_twice": ("rope_theta is 100.0 and, in rope_parameters, 5;", {
        "config.json": {"rope_parameters": {"rope_theta": 5}}}),
    "scaled_twice": ("rope_type is 'linear' and, in rope_parameters, 'default';", {"config.json": {
        "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}}),
    "type_twice": ("rope_type is 'linear' and, in rope_scaling, 'llama3';", {
        "config.json": {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}}),
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
    "ends": ("generation_config.json: eos_token_id is ['x'], not ids", {
        "generation_config.json": '{"eos_token_id": ["x"]}'}),
    "lfs": (f"{SAFE}: a Git LFS pointer", {SAFE: LFS}), "lfs_bin": ("a Git LFS pointer", {PICKLE: LFS}),
    "lfs_json": ("config.json: a Git LFS pointer", {"config.json": LFS}),
    "lfs_index": (f"{SAFE}.index.json: a Git LFS pointer", {SAFE: None, f"{SAFE}.index.json": LFS}),
    "gzip": (f"{SAFE}: compressed; unpack it", {SAFE: gzip.compress(b"x")}),
    "page": (f"{SAFE}: a server's answer", {SAFE: "<!doctype html>\n"}),
    "gated": ("config.json: a server's answer", {"config.json": "Access to model x/y is restricted."}),
    "utf16": ("config.json: text in UTF-16", {"config.json": "{}".encode("utf-16")}),
    "peft": ("it is a PEFT adapter: merge it with PEFT into its base, x/y,", NOTHING | {
        "adapter_config.json": '{"base_model_name_or_path": "x/y"}', "adapter_model.safetensors": ""}),
    "peft_half": ("it is a PEFT adapter", {SAFE: None, "adapter_config.json": "{}"}),
    "hub": ("hub/snapshots/1 is meant", NOTHING | {"snapshots/1/config.json": "{}"}),
    "trainer": ("trainer/checkpoint-5 is meant", NOTHING | {"checkpoint-5/config.json": "{}"}),
    "original": ("original/original is meant", NOTHING | {"original/params.json": "{}"}),
    "gguf": ("it holds: llama.gguf", NOTHING | {"llama.gguf": "GGUF"}),
    "hub_gguf": (f"it holds: config.json, llama.gguf, {PIECES}", {SAFE: None, "llama.gguf": "GGUF"}),
    "twice": ("model.norm.weight is there twice", {PICKLE: {"module.model.norm.weight": torch.ones(64)}}),
    "two_saves": ("a is there twice", {SAFE: None, "model-00001-of-00001.safetensors": header(),
                                       "model-00001-of-000001.safetensors": header()}),
    "unmerged": ("unexpected ['model.layers.0.mlp.up_proj.lora_A.default.weight']", {
        PICKLE: {"model.layers.0.mlp.up_proj.lora_A.default.weight": torch.ones(2, 64)}}),
    "zero3": ("model.norm.weight has shape (0,)", {PICKLE: {"model.norm.weight": torch.ones(0)}}),
    "no_head": ("missing ['lm_head.weight']", {"config.json": {"tie_word_embeddings": False}}),
    "fp8": ("a is F8_E4M3; only", {SAFE: header(dtype="F8_E4M3")}),
    "nan": ("model.norm.weight holds inf or NaN", {
        PICKLE: {"model.norm.weight": torch.full((64,), math.nan)}}),
    "inf": ("layers.1.input_layernorm.weight holds inf", {
        PICKLE: {"model.layers.1.input_layernorm.weight": torch.tensor(63 * [1] + [-math.inf])}}),
    "index": ("weight_map is missing", {SAFE: None, f"{SAFE}.index.json": '{"weight_map": 1}'}),
    "path": ("path: b is missing", {SAFE: None, f"{SAFE}.index.json": '{"weight_map": {"a": "../b"}}'}),
    "shard": ("model-00001-of-00002.safetensors is missing", {
        SAFE: None, "model-00002-of-00002.safetensors": b""}),
    "nested": ("missing ['model.embed_tokens", {PICKLE: {"model": {}}}),
    "nested_more": ("opt is dict; only tensors", {PICKLE: {"opt": {}}}),
    "integers": ("model.norm.weight is torch.int64; only", {
        PICKLE: {"model.norm.weight": torch.ones(64).long()}}),
    "code": ("it holds code, exec", {PICKLE: {"model.norm.weight": Code()}}),
    "bin_cut": ("damaged", {PICKLE: pickled([1])[:-9]}), "endless": ("no end of sequence is named", {
        PIECES: endless, "config.json": {"eos_token_id": None}}),
    "bin_list": ("its content is list; only tensors", {PICKLE: pickled([1])}),
    "no_pieces": ("not a sentencepiece model", {PIECES: b""}),
    "no_tokenizer": (f"neither {PIECES} nor tokenizer.json", {PIECES: None}),
    "tiktoken": ("Llama 3's in tiktoken's format", {PIECES: b"IQ== 0\n"}),
    "vocab": ("AutoTokenizer.from_pretrained", {PIECES: None, "vocab.json": "{}", "merges.txt": ""}),
    "lfs_pieces": ("tokenizer.model: a Git LFS pointer", {PIECES: LFS}),
    "lfs_config": ("tokenizer_config.json: a Git LFS pointer", {"tokenizer_config.json": LFS}),
    "config_list": ("tokenizer_config.json: expected a JSON object", {"tokenizer_config.json": "[]"}),
    "added": ("added tokens that cannot be read", {"added_tokens.json": '{"<x>": "y"}'}),
    "added_list": ("added tokens that cannot be read", {"tokenizer.json": '{"added_tokens": [1]}'}),
    "spare": ("'<pad>', in --template or a row, is id 1280", {
        "added_tokens.json": '{"<pad>": 1280}', "tokenizer_config.json": '{"eos_token": "<pad>"}'}),
    "piece": ("not a sentencepiece model", {PIECES: lambda raw: raw.replace(b"<0xE6>", b"<0xE\xff>")}),
    "json": ("tokenizer.json", {PIECES: None, "tokenizer.json": "{}"}),
    "large": ("but the base has 9 embeddings", {
        "config.json": {"vocab_size": 9}, PICKLE: {"model.embed_tokens.weight": torch.ones(9, 64)}})}
if importlib.util.find_spec("tokenizers"):       # without it, that is what is said
    FOLDERS |= {
        "lfs_words": ("tokenizer.json: a Git LFS pointer", {PIECES: None, "tokenizer.json": LFS}),
        "newer": ("is the package older than it?", {PIECES: None, "tokenizer.json": '{"version": "2.0"}'})}
ADAPTERS = {  # adapter.pt: what is said, what differs in it or what it is
    "code": ("it holds code, exec", {"more": Code()}), "empty": ("damaged", b""),
    "cut": ("damaged", pickled([1])[:-9]), "list": ("not written by this train.py", pickled([1])),
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
    "huge": ("--top_k must be at least 0 and below", {"config": {"top_k": 10 ** 30}}),
    "method": ("does not fit", {"config": {"method": "moelora"}}),
    "no_experts": ("--n_experts must be at least 1", {"config": {"n_experts": 0}}),
    "other_base": ("made for another base", {"fingerprint": "0"}),
    "rows": ("--data=/stranger; say --data here too", {"config": {"data": "/stranger"}}),
    "old": ("not written by this train.py (an earlier one?): base_steps", {"config": {"base_steps": 3}})}
CHECKPOINTS = {  # checkpoint.pt: likewise
    "code": ("it holds code, exec", {"more": Code()}), "cut": ("damaged", pickled([1])[:-9]),
    "list": ("not written by this train.py", pickled([1])),
    "old": ("not written by this train.py (an earlier one?): optimizer", {
        "optimizer": None, "optimizers": []}),
    "older": ("not written by this train.py (an earlier one?): base_steps", {"config": {"base_steps": 3}}),
    "no_totals": ("totals is missing", {"totals": None}), "no_rows": ("rows is missing", {"rows": None}),
    "other_base": ("made for another base", {"fingerprint": "0"}),
    "parameters": ("missing", {"parameters": {}}), "no_step": ("totals is missing", {"totals": {"step": 20}}),
    **{f"{key}{i}": (f"{key} is missing, unknown, of another type", {key: value}) for key, values in {
        "totals": (1, {"step": "20", "seconds": 1.0, "tokens": 1, "skipped": 0}), "rows": (1,),
        "before": (1, {"sentiment": 1}, {"sentiment": {"accuracy": "1", "loss": 1.0, "tokens": 1}}),
        "log_bytes": ("1",), "optimizer": (1, {"state": {0: 1}, "param_groups": []}, {"state": {}}),
        "fingerprint": (1,)}.items() for i, value in enumerate(values)},
    **{f"moments{i}": ("holds another optimizer", {"optimizer": {"state": {}, "param_groups": groups}})
       for i, groups in enumerate(([], [1], [{"lr": 0.1}], [{"params": 1}], [{"params": [0]}]))}}
BAD = [*FLAGS.items(),
       *((f"--data={{bad}}/{name}", said) for name, (said, _) in DATA.items() if said),
       *((f"--init_from={{bad}}/{name}", said) for name, (said, _) in FOLDERS.items()),
       *((f"--mode=eval --out_dir={{bad}}/adapter_{name}", said) for name, (said, _) in ADAPTERS.items()),
       *((f"--resume --out_dir={{bad}}/checkpoint_{name}", said) for name, (said, _) in CHECKPOINTS.items())]


@pytest.fixture(scope="session")
def bad(finished, base, tmp_path_factory):
    """A folder of everything that BAD names."""
    folder = tmp_path_factory.mktemp("bad")
    good = {p.name: p.read_bytes() for p in base.iterdir()}
    weights = {k: v.clone() for k, v in open_weights(base).items()}
    originals = {"config.json": read_json(base / "config.json"), PICKLE: weights}
    contents = {name: content for name, (_, content) in DATA.items()}
    for kind, (_, changes) in FOLDERS.items():
        for name, content in (good | ({SAFE: None} if PICKLE in changes else {}) | changes).items():
            if isinstance(content, dict):
                content = {k: v for k, v in (originals[name] | content).items() if v is not None}
                content = pickled(content) if name == PICKLE else json.dumps(content)
            contents[f"{kind}/{name}"] = content(good[name]) if callable(content) else content
    for stem, kinds in (("adapter", ADAPTERS), ("checkpoint", CHECKPOINTS)):
        saved = load(finished[0] / f"{stem}.pt")
        for kind, (_, changes) in kinds.items():
            if isinstance(changes, dict):
                changes = saved | changes | {"config": saved["config"] | changes.get("config", {})}
                changes = pickled({k: v for k, v in changes.items() if v is not None})
            contents[f"{stem}_{kind}/{stem}.pt"] = changes
    for name, content in contents.items():
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("flags, said", BAD, ids=[ascii(flags)[:60] for flags, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(finished, base, bad, flags, said):
    """Catches a traceback where a sentence belongs, code that runs, and files that a refused run leaves."""
    before = files_in(finished[0], base, bad)
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(base, finished[0], *flags.format(bad=bad).split(" ")))
    text = str(stop.value)
    assert text.startswith("error: ") and said in text and text.isprintable() and len(text) <= 1010
    assert files_in(finished[0], base, bad) == before


def test_a_hub_folder_copied_without_its_blobs_says_so(base, tmp_path):
    """Catches links into the void that are called missing, as if nothing stood there."""
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    (tmp_path / SAFE).symlink_to("../../blobs/0")
    with pytest.raises(SystemExit, match=r"it holds: config.json, model.safetensors \(a broken link\)"):
        train.main([f"--init_from={tmp_path}", "--device=cpu"])


def test_bad_input_from_a_shell(finished, base):
    """Catches an exit code of 0, and what only a real process prints after the sentence."""
    run = subprocess.run([sys.executable, train.__file__, "--mode=sample", f"--out_dir={finished[0]}",
                          f"--init_from={base}"], capture_output=True, input=b"\xff\n",
                         env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert run.returncode == 1 and b"Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith(b"error: ")


def test_a_checkpoint_of_an_earlier_program_is_not_replaced(base, bad):
    """Catches a run without --resume that deletes what it cannot read, or that tells no way out."""
    with pytest.raises(SystemExit, match="not written by this train.py .an earlier one.*delete it, or choose"):
        train.main(flags_of(base, bad / "checkpoint_old"))
    assert (bad / "checkpoint_old" / "checkpoint.pt").exists()


def test_no_path_in_an_adapter_is_followed_but_taken_from_the_flag(finished, base):
    """Catches a stranger's adapter that opens what it names here, and one that cannot be used at all."""
    out, summary = finished
    with pytest.raises(SystemExit, match=f"made with --init_from={base}; say --init_from here too"):
        train.main(["--mode=eval", f"--out_dir={out}", "--device=cpu"])
    assert train.val_loss(use("eval", base, out)) == summary["val_loss"]


def test_odd_rows_are_taken_or_named(tokenizer, tmp_path):
    """Catches NUL or null that spoil a right row, and a line of 100 MB that is tokenised for minutes."""
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"instruction": "a\\u0000b", "input": null, "output": "c\u2028d"}\r\n', newline="")
    (row,), = data.read_rows(str(odd))
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

    def parse(objects, listed, between):
        text = json.dumps(objects) if listed else between.join(map(json.dumps, objects))
        (tmp_path / "x.json").write_text(text, newline="")
        parts = unless_refused(data.read_rows, str(tmp_path / "x.json"))
        objects = objects[0] if not listed and len(objects) == 1 and type(objects[0]) is list else objects
        fields = {"task": "x", "instruction": "", "input": "", "output": ""}
        rows = [tuple(o.get(k) or v for k, v in fields.items()) for o in objects] if parts else []
        assert not parts or parts == [[r for r in rows if (r[1] + r[2]).strip() and r[3].strip()]]

    def parse_bytes(raw):
        (tmp_path / "x.json").write_bytes(raw)
        unless_refused(data.read_rows, str(tmp_path / "x.json"))
    run(parse, st.lists(row) | st.lists(values), st.booleans(), st.sampled_from(["\n", "\r\n", " ", ""]))
    run(parse_bytes, st.binary())


@pytest.mark.parametrize("config", [train.Config, bench.BenchConfig, compare.CompareConfig,
                                    make_base.BaseConfig, shapley.ShapleyConfig])
def test_fuzz_flags(fuzz, config):
    """Catches a flag whose value crashes, and settings that pass although they are none."""
    st, _, run = fuzz
    texts = st.text() | (st.integers() | st.floats()).map(str) | st.sampled_from(["true", "q_proj", "lora"])
    names = st.sampled_from([f.name for f in train.fields(config)])
    flags = st.builds("--{}={}".format, names, texts)

    def parse(argv):
        cfg = unless_refused(lambda: config(**train.parse_flags(argv, config))) or config()
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
            *parts, whole = (model(x, y)[0] for x, y, _ in tensors)
            assert sum(map(len, parts)) == len(whole)
            assert torch.isclose(sum(losses.sum() for losses in parts), whole.sum(), rtol=1e-9)
    run(cut, st.lists(example, min_size=1, max_size=12), st.integers(1, 300))

