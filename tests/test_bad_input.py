"""Does bad input end in one line that names it, with nothing run and nothing written?

BAD has every kind of flag, row, Llama folder, adapter and checkpoint that is refused.
"""

import io
import json
import math
import random

import pytest
import torch

import data
import train
from model import load_llama, open_weights
from teamlora import AdapterConfig, InputError, adapt, adapter_parameters, load_adapter, save_adapter
from tests.conftest import files_in, flags_of, forked, load, same

ROW = '{"instruction": "What is it?", "output": "It is blue."}'
CONFIG, SAFE, BIN, NORM = "config.json", "model.safetensors", "pytorch_model.bin", "model.norm.weight"
PIECES, WORDS = "tokenizer.model", "tokenizer.json"


class Code:
    def __reduce__(self):                        # what no file may run
        return exec, ("raise SystemExit('code has run')",)


def pickled(content):
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


def header(**entry):
    """A safetensors file of one tensor of 16 bytes."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


# flags: what is said
FLAGS = {
    "--rank=0": "--rank must be at least 1 and below 2147483648, not 0", "--alpha=nan": "--alpha must be",
    "--method=dora": "--method must be one of teamlora,", "--targets=wq": "targets must be some of q_proj,",
    "--template=lama2": "--template must be paper,", "--template={{input}}": "--template must be paper,",
    "--template={{instruction}}{{input}}{{input}}": "--template must be paper,",
    "--max_length=1018 --max_tokens=1018": "--max_tokens=1018", "--dtype=nf4 --compile": "not with --compile",
    "--out_dir={bad}/half.json": "half.json: FileExistsError",
    "--init_from=some/Llama": "some/Llama: no config.json; get one with hf download"}
# flags that meet files, in a folder with a finished run if no other is named
MODES = {
    "--mode=eval --out_dir={bad}/no": "there is no {bad}/no/adapter.pt: train first",
    "--resume --out_dir={bad}/no": "there is no {bad}/no/checkpoint.pt: train first",
    "--mode=eval --rank=3": "made with --rank=2", "--mode=eval --val_share=0.5": "made with --val_share=0.3",
    "--mode=export": "depend on the token",
    "--mode=eval --init_from={built_in}": "not for the base --init_from={built_in}",
    "--out_dir={bad}/others": "others holds a run that was stopped: --resume, or",
    "--data={bad}/no.json": "no.json: FileNotFoundError",
    "--data={bad}/one.json,": "no .json or .jsonl file in ''", "--data={bad}/format": "no .json or .jsonl",
    "--data={bad}/one.json --val_share=0.99": "no training row is left: see --data, --val_share"}
# file of rows: what is said, what it holds
ROWS = {
    "half.json": ("half.json, row 2: not texts under", f'[{ROW}, {{"instruction": "x"}}]'),
    "surrogate.json": ("row 1: not texts under", f'[{ROW[:-2]}\\ud83d"}}]'), "one.json": ("", ROW),
    "cut.jsonl": ("row 2: JSON", f"{ROW}\n\n{ROW[:9]}"), "latin.json": ("byte 0xe9 in position", b'["\xe9"]'),
    "deep.json": ("RecursionError", "[" * 10 ** 5), "a.csv": ("it begins with b'a,b'", "a,b"),
    "null.json": ("no row with a question and an answer", ROW.replace('"It is blue."', "null")),
    "long.json": ("no training row is left: see", ROW.replace("blue", "blue " * 2000))}
# Llama folder: what is said, {file: what it holds; None: it is missing; a dict: what differs in it}
FOLDERS = {
    "mistral": ("model_type is 'mistral'; only 'llama'", {CONFIG: {"model_type": "mistral"}}),
    "key": ("config.json: KeyError: 'hidden_size'", {CONFIG: {"hidden_size": None}}),
    "text": ("config.json: ValueError: could not convert", {CONFIG: {"rms_norm_eps": "small"}}),
    "yarn": ("rope_type is 'yarn'", {CONFIG: {"rope_scaling": {"type": "yarn"}}}),
    "scaled": ("KeyError: 'low_freq_factor'", {CONFIG: {"rope_scaling": {"rope_type": "llama3"}}}),
    "meta": ("with python -m experiments.from_meta", {CONFIG: None, "params.json": "{}"}),
    "weightless": ("neither model*.safetensors nor pytorch_model*.bin", {SAFE: None}),
    "pointer": ("begins with b'version https://git-lfs", {SAFE: "version https://git-lfs.github.com/spec"}),
    "fp8": ("a is F8", {SAFE: header(dtype="F8")}), "beyond": (f"{SAFE}: ", {SAFE: header(shape=[8])}),
    "twice": ("in another file", {SAFE: header(), "model-1.safetensors": header()}),
    "code": (f"{BIN}: ", {BIN: {NORM: Code()}}), "missing": (f"{NORM} is missing", {BIN: {NORM: None}}),
    "more": ("model.norm.bias is (64,), expected nothing", {BIN: {"model.norm.bias": torch.ones(64)}}),
    "shape": (f"{NORM} is (9,), expected (64,)", {BIN: {NORM: torch.ones(9)}}),
    "nan": ("holds inf or NaN", {BIN: {NORM: torch.tensor([math.nan] + [1.0] * 63)}}),
    "ranks": ("neither tokenizer.json nor tokenizer.model of sentencepiece's", {PIECES: b"IQ== 0\n"}),
    "pieces": (f"{PIECES}: ", {PIECES: b"\n\x0e\n"}), "words": (f"{WORDS}: ", {PIECES: None, WORDS: "{}"})}
# adapter.pt of an evaluation, checkpoint.pt of a resumed run: what is said, what differs in it, or what it is
ADAPTERS = {
    "coded": ("coded/adapter.pt: ", {"more": Code()}), "cut": ("cut/adapter.pt: ", pickled([1] * 99)[:-9]),
    "format": ("no adapter file of format 1", {"format": 2}), "bare": ("adapter.pt", {"config": None}),
    "base": ("not for the base", {"fingerprint": "0"}), "new": ("adapter.pt", {"config": {"colour": 1}}),
    "type": ("rank must be of type int, not '2'", {"config": {"rank": "2"}}),
    "parameters": ("missing, unexpected", {"config": {"targets": ("up_proj",)}})}
CHECKPOINTS = {
    "short": ("short/checkpoint.pt: ", pickled([1] * 99)[:-9]), "others": ("rows are not", {"rows": "0"}),
    "adapter": ("checkpoint.pt", dict.fromkeys(["totals", "rows", "optimizer", "before", "log"]))}
BAD = [*FLAGS.items(), *MODES.items()]
for flags, kinds in {"--data=": ROWS, "--init_from=": FOLDERS, "--mode=eval --out_dir=": ADAPTERS,
                     "--resume --out_dir=": CHECKPOINTS}.items():
    BAD += [(f"{flags}{{bad}}/{name}", said) for name, (said, _) in kinds.items() if said]


def changed(original, changes):
    """A dict with some keys changed, also within a dict, or removed."""
    merged = {k: (original.get(k) or {}) | v if isinstance(v, dict) else v for k, v in changes.items()}
    return {k: v for k, v in (original | merged).items() if v is not None}


@pytest.fixture(scope="session")
def bad(finished, base, tmp_path_factory):
    """A folder of everything that BAD names."""
    folder, files = tmp_path_factory.mktemp("bad"), {name: content for name, (_, content) in ROWS.items()}
    good = {p.name: p.read_bytes() for p in base.iterdir()}
    originals = {CONFIG: json.loads(good[CONFIG]), BIN: {n: t.clone() for n, t in open_weights(base).items()}}
    for kind, (_, changes) in FOLDERS.items():
        for name, content in (good | {SAFE: None if BIN in changes else good[SAFE]} | changes).items():
            if isinstance(content, dict):
                content = (json.dumps if name == CONFIG else pickled)(changed(originals[name], content))
            files[f"{kind}/{name}"] = content
    for name, kinds in (("adapter.pt", ADAPTERS), ("checkpoint.pt", CHECKPOINTS)):
        for kind, (_, content) in kinds.items():
            if isinstance(content, dict):
                content = pickled(changed(load(finished[0] / name), content))
            files[f"{kind}/{name}"] = content
    for name, content in (files | {f"{kind}/log.jsonl": b"" for kind in CHECKPOINTS}).items():
        if content is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("flags, said", BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(finished, base, bad, monkeypatch, flags, said):
    """Catches a traceback where a sentence belongs, code that runs, and files that a refused run leaves."""
    places, before = {"bad": bad, "built_in": train.ASSETS / "base"}, files_in(finished[0], base, bad)
    monkeypatch.chdir(bad)                       # whose files no empty name may mean
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(base, finished[0], *flags.format(**places).split(" ")))
    text = str(stop.value)
    assert text.startswith("error: ") and said.format(**places) in text
    assert text.isprintable() and len(text) < 1010 and files_in(finished[0], base, bad) == before


def test_exit_codes(bad, capsys):
    """Catches an exit code of 0, more than one line, a run that ignores what it does not know."""
    code, printed = forked(lambda: train.main([f"--data={bad}/half.json", f"--out_dir={bad}/new"]))
    assert code == 1 and printed.startswith("error: ") and printed.count("\n") == 1
    for flag in ("--steps=many", "--mode=fly", "--no_such=1"):
        with pytest.raises(SystemExit, match="2"):
            train.main([flag])
        assert flag.split("=")[0] in capsys.readouterr().err.splitlines()[1]


def read_adapter(path):
    load_adapter(model := torch.nn.Sequential(torch.nn.Linear(6, 3)), path)
    return adapter_parameters(model)


@pytest.mark.parametrize("name, read, says", [
    ("rows.jsonl", lambda path: [(row.instruction, row.output) for row in data.read_rows([path])],
     lambda raw: [(row["instruction"], row["output"]) for row in map(json.loads, raw.splitlines())
                  if row.get("instruction")]),
    (SAFE, lambda path: load_llama(path.parent).base_parameters(),
     lambda raw: pytest.importorskip("safetensors.torch").load(raw)),
    ("adapter.pt", read_adapter, lambda raw: torch.load(io.BytesIO(raw), "cpu")["parameters"])])
def test_cuts_and_flips(base, tmp_path, name, read, says):
    """Catches damage that crashes, or changes more than the byte it is in; files refused for no reason."""
    torch.manual_seed(0)
    adapt(model := torch.nn.Sequential(torch.nn.Linear(6, 3)), "0", AdapterConfig(rank=2))
    save_adapter(model, adapter := io.BytesIO())
    raw = {"rows.jsonl": f"{ROW}\n".encode() * 20, SAFE: (base / SAFE).read_bytes(),
           "adapter.pt": adapter.getvalue()}[name]
    (tmp_path / CONFIG).write_bytes((base / CONFIG).read_bytes())
    path, rng, refused = tmp_path / name, random.Random(0), 0
    for _ in range(70):
        at = rng.randrange(rng.choice((len(raw), min(len(raw), 3000))))
        flipped = raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:]
        path.write_bytes(rng.choice((raw[:at], flipped, flipped)))
        try:
            found = read(path)
        except InputError:
            refused += 1
        else:
            assert same(found, says(path.read_bytes()))
    assert 5 < refused < 65
