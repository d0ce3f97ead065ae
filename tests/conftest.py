"""What these tests share; `pytest tests` needs no network, no GPU; SLOW=1 adds what takes minutes."""

import json
import multiprocessing
import shutil
import signal
import sys
import tempfile

import pytest
import torch

import data
import train
from model import Llama, LlamaConfig, save_llama

torch.set_num_threads(1)                         # these models are small, and other programs run, too
signal.signal(signal.SIGINT, signal.default_int_handler)         # ignored where pytest runs in the background
QUICK = ["--device=cpu", "--steps=8", "--batch_size=4", "--rank=2", "--warmup=0.2", "--log_every=1",
         "--save_every=4", "--val_share=0.3", "--val_examples=5", "--learning_rate=0.01"]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder: random Llama of 2 layers and width 64, the built-in base's tokenizer, rows.json."""
    folder, vocabulary = tmp_path_factory.mktemp("base"), len(data.Tokenizer(train.ASSETS / "base").names)
    torch.manual_seed(0)
    save_llama(Llama(LlamaConfig(vocabulary, 64, 160, 2, 2, 2, 32, rope_theta=100.0)).init_weights(), folder)
    shutil.copy(train.ASSETS / "base" / "tokenizer.model", folder)
    (folder / "rows.json").write_text(json.dumps([
        {"task": ("sizes", "colours")[i % 2], "instruction": f"What is number {i}?" + " Think." * (i % 7),
         "input": f"It was {i}." * (i % 3), "output": ("blue", "it is red")[i % 5 < 2]} for i in range(60)]))
    return folder


@pytest.fixture(scope="session")
def rows(base):
    """The file of 60 rows: two tasks, different lengths."""
    return base / "rows.json"


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory):
    """A finished run of 8 steps: (folder, summary)."""
    out = tmp_path_factory.mktemp("finished")
    return out, train.main(flags_of(base, out))


def flags_of(base, out, *more):
    """The flags of the finished run, in another folder."""
    return [*QUICK, f"--init_from={base}", f"--data={base}/rows.json", f"--out_dir={out}", *more]


def use(mode, base, out, *more):
    """train.main in a mode that uses the adapter in `out`."""
    return train.main([f"--mode={mode}", f"--init_from={base}", f"--out_dir={out}", "--device=cpu", *more])


def prepared(base, out, **more):
    """(model, encode, fingerprint) as the modes find them in the folder of a run."""
    given = {"mode": "eval", "init_from": str(base), "out_dir": str(out), "device": "cpu"}
    return train.prepare(*train.compose(given | more))


def stopped_at(monkeypatch, step):
    """From here on a run receives SIGINT in its step number `step`: it says "stopped after {step} of"."""
    real = train.schedule
    monkeypatch.setattr(train, "schedule", lambda at, *more: (
        at + 1 == step and signal.raise_signal(signal.SIGINT)) or real(at, *more))


def forked(*functions):
    """Each function() in a child process of its own: (exit code, or minus the signal; what they printed)."""
    def child(function):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)     # ignored under nohup
        signal.alarm(60)                         # whatever hangs, ends
        sys.stdout = sys.stderr = printed
        function()
    printed = tempfile.TemporaryFile("w+", buffering=1)
    children = [multiprocessing.get_context("fork").Process(target=child, args=[f]) for f in functions]
    for process in children:
        process.start()
    for process in children:
        process.join()
    printed.seek(0)
    return *(process.exitcode for process in children), printed.read()


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two nested structures hold the same bits, whatever the clock said."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("seconds", "log"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def files_in(*folders):
    """Path -> time and size of all below."""
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for folder in folders for p in folder.rglob("*")}
