"""What the tests of this folder share: a tiny random base, a finished run on it, and how to compare two runs.

    pytest tests            no network, no GPU, no trained weights; SLOW=1 adds what takes minutes
"""

import json
import shutil

import pytest
import torch

import data
import train
from model import Llama, LlamaConfig, save_llama

QUICK = ["--device=cpu", "--batch_size=11", "--val_examples=3", "--rank=2", "--log_every=1", "--warmup=0.2",
         "--save_every=4", "--steps=20"]


class Code:
    """An object that runs code, here exit("ran"), when it is unpickled without care."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.fixture(scope="session")
def tokenizer():
    """The built-in base's."""
    return data.Tokenizer(train.BUILT_IN_BASE / "tokenizer.model")


@pytest.fixture(scope="session")
def base(tokenizer, tmp_path_factory):
    """The folder of a random Llama of 2 layers and width 64 with the built-in base's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(tokenizer.size, 64, 160, 2, 2, 2, 32, rope_theta=100.0, tie_word_embeddings=True)
    torch.manual_seed(0)
    save_llama(Llama(config).init_weights(), folder)
    shutil.copy(tokenizer.path, folder)
    return folder


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory):
    """A finished run of 20 steps: (folder, summary)."""
    out = tmp_path_factory.mktemp("finished")
    return out, train.main(flags_of(base, out))


def flags_of(base, out, *more):
    """The flags of the finished run, in another folder."""
    return [*QUICK, f"--init_from={base}", f"--out_dir={out}", *more]


def use(mode, base, out, *more):
    """train.main in a mode that uses the adapter in `out`."""
    return train.main([f"--mode={mode}", f"--init_from={base}", f"--out_dir={out}", "--device=cpu", *more])


def prepared(base, out, **more):
    """(model, tokenizer, fingerprint) as the modes find them in the folder of a run."""
    given = {"mode": "eval", "init_from": str(base), "out_dir": str(out), "device": "cpu", **more}
    return train.prepare(*train.compose(given))


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two nested structures hold the same bits; what depends on wall-clock times apart."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[k], b[k]) for k in a if k not in ("seconds", "tokens_per_second", "log_bytes"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(whole, out):
    """The run in `out` ended like the one in `whole`, bit for bit."""
    assert (out / "adapter.pt").read_bytes() == (whole / "adapter.pt").read_bytes()
    assert same(*(load(o / "checkpoint.pt") for o in (whole, out)))
    assert same(*(read_log(o) for o in (whole, out)))


def files_in(*folders):
    """Path -> time and size of everything below; without a run's lock, which is touched where it is tried."""
    return {p: p.is_file() and (p.stat().st_mtime_ns, p.stat().st_size)
            for folder in folders for p in folder.rglob("*") if p.name != "lock"}
