"""Is a base in four bits what QLoRA says, does it stay small while it trains, and do runs keep to it?

    pytest tests/test_nf4.py        with pip install --no-deps bitsandbytes, also its numbers beside ours

Each docstring says which break the test catches.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import train
from model import NF4, NF4_LEVELS, PROJECTIONS, Llama, dequantise, fingerprint, load_llama, save_llama
from teamlora import METHODS, AdapterConfig, adapter_parameters
from test_teamlora import TINY, randomise
from tests.conftest import files_in, flags_of, load, same, use


@pytest.fixture
def folder(tmp_path):
    """A tiny random Llama on the disk, in bf16; no side of its matrices need be a multiple of 64."""
    torch.manual_seed(0)
    save_llama(Llama(replace(TINY, intermediate_size=50)).init_weights().to(torch.bfloat16), tmp_path)
    return tmp_path


def test_levels_are_those_of_the_definition():
    """Catches a digit lost: quantiles of a normal in equal steps, eight above 0 and seven below, and 0."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2        # halfway between those of 15 and of 16 levels
    above, below = (torch.special.ndtri(torch.linspace(outermost, 0.5, n, dtype=torch.float64))[:-1]
                    for n in (9, 8))
    levels = torch.cat((-below, torch.zeros(1), above.flip(0))) / above[0]
    assert torch.allclose(levels, torch.tensor(NF4_LEVELS, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (3, 50), (48, 7), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_becomes_the_nearest_level_times_the_largest_of_its_block(shape, dtype):
    """Catches halves of a byte swapped, blocks along columns, NaN for zeros, and numbers lost at the end."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(dtype)
    w[0, :64] = 0
    flat, expected = w.flatten().tolist(), []
    for start in range(0, len(flat), 64):
        block = flat[start:start + 64]
        largest = max(map(abs, block))
        expected += [largest * min(NF4_LEVELS, key=lambda level: abs(level * largest - x)) for x in block]
    made = NF4.of(w, dtype)
    assert made.shape == w.shape and made.dtype == dtype
    expected = torch.tensor(expected, dtype=torch.float64).view(shape)
    assert torch.allclose(made.matrix().double(), expected, atol=1e-6, rtol=torch.finfo(dtype).eps)
    assert made.nbytes == 34 * math.ceil(w.numel() / 64)                 # 4.25 bits a number
    assert torch.equal(made.T.contiguous(), made.matrix().T) and torch.equal(made + 0, made.matrix())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_bitsandbytes(dtype):
    """Catches a table, a block or a rounding that differs from what everyone else calls NF4."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="pip install --no-deps bitsandbytes",
                                     exc_type=ImportError)
    w = 0.02 * torch.randn(192, 576, generator=torch.Generator().manual_seed(0))
    w = w.to(torch.bfloat16).to(dtype)
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(w, quant_type="nf4", blocksize=64))
    ours = NF4.of(w, dtype).matrix()
    assert theirs.dtype == ours.dtype and torch.equal(ours, theirs)


def test_error_is_that_of_four_bits():
    """Catches a quantiser that loses more than sixteen levels must: 9 % of normal weights, and of a sum."""
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(n, 576, generator=generator) for n in (512, 200))
    exact = F.linear(x, w)
    error = [(given - wanted).norm() / wanted.norm() for given, wanted in (
        (NF4.of(w, w.dtype).matrix(), w), (F.linear(x, NF4.of(w, w.dtype)), exact))]
    assert all(0.085 < e < 0.1 for e in error), error


def test_loaded_projections_are_small_and_all_else_is_as_it_was(folder):
    """Catches a head or norm in four bits, a projection that is not, and values of another matrix."""
    model, plain = (load_llama(folder, AdapterConfig(), "cpu", torch.bfloat16, nf4) for nf4 in (True, False))
    for (name, p), (_, whole) in zip(model.base_parameters().items(), plain.base_parameters().items()):
        small = name.split(".")[-2] in PROJECTIONS
        assert isinstance(p, NF4) == small and p.dtype == torch.bfloat16 and not p.requires_grad
        p, whole = (p.matrix(), NF4.of(whole, p.dtype).matrix()) if small else (p, whole)
        assert torch.equal(p, whole), name
    assert dequantise(model) == 7 * TINY.num_hidden_layers and dequantise(model) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_training_equals_that_on_the_matrices_and_keeps_none(folder, method, checkpointing):
    """Catches a gradient of other weights than the forward's, and matrices kept between the two."""
    torch.manual_seed(0)
    small, whole = (load_llama(folder, AdapterConfig(method, rank=2), nf4=True) for _ in range(2))
    dequantise(whole)
    whole.load_state_dict(adapter_parameters(randomise(small)), strict=False)
    tokens, targets = torch.randint(0, TINY.vocab_size, (2, 3, 9))
    sizes = {p.numel() for p in small.base_parameters().values() if isinstance(p, NF4)}
    kept, results = [], []

    def keep(t):
        kept.append(t)
        return t
    for model in (small, whole):
        model.train().checkpointing = checkpointing
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(tokens, targets)[0].sum()
        big = [t for t in kept if type(t) is not NF4 and not t.requires_grad
               and t.untyped_storage().nbytes() // t.itemsize in sizes]
        assert checkpointing or bool(big) == (model is whole)            # the same look does find them
        loss.backward()
        results.append([loss, *(p.grad for p in train.trained(model).values())])
    assert len(results[0]) > 8 and all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_four_bits_are_the_same_whatever_computes(tmp_path, dtype):
    """Catches a base in bf16 on a GPU, where the CPU's is in fp32, whose adapters then do not fit."""
    torch.manual_seed(0)
    save_llama(Llama(TINY).init_weights().to(dtype), tmp_path)
    assert len({fingerprint(load_llama(tmp_path, dtype=dtype, nf4=True))
                for dtype in (torch.float32, torch.bfloat16)}) == 1


def test_a_change_in_place_is_refused(folder):
    """Catches an update that goes into a matrix made for the occasion and is lost without a word."""
    weight = load_llama(folder, nf4=True).model.layers[0].mlp.up_proj.weight
    with torch.no_grad(), pytest.raises(RuntimeError, match="dequantise the model first"):
        weight.mul_(2)


def test_a_run_in_four_bits_is_resumed_used_and_exported(base, tmp_path, capsys):
    """Catches a mode that forgets the four bits, and an export of other weights than were trained on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--dtype=nf4", "--method=lora", "--steps=6"]
    summary = train.main(flags_of(base, whole, *more))
    assert "its projections in nf4" in capsys.readouterr().out
    train.main(flags_of(base, parts, *more, "--stop_at=3"))
    train.main(flags_of(base, parts, *more, "--resume"))
    assert same(load(whole / "adapter.pt"), load(parts / "adapter.pt"))
    results = use("eval", base, whole, "--val_examples=3")               # dtype comes from the file
    assert train.val_loss(results) == summary["val_loss"]
    use("sample", base, whole, "--prompt=Is it good?")
    capsys.readouterr()
    use("export", base, whole)
    assert "14 projections are written as the matrices" in capsys.readouterr().out
    exported, quantised = load_llama(whole / "export"), load_llama(base, nf4=True)
    key = "model.layers.1.self_attn.q_proj.weight"                       # not adapted
    assert torch.equal(exported.get_parameter(key), quantised.get_parameter(key).matrix())
    before = files_in(whole)
    with pytest.raises(SystemExit, match="error: the adapter was made for another base .*--dtype=nf4.*"
                                         "--dtype=float32"):
        use("eval", base, whole, "--dtype=float32")
    assert files_in(whole) == before


@pytest.mark.parametrize("flag", ["--method=full", "--compile"])
def test_what_four_bits_cannot_do_is_refused(base, tmp_path, flag):
    """Catches a base trained in copies that are dropped, and a graph that breaks at every weight."""
    with pytest.raises(SystemExit, match=f"error: {flag} .*--dtype=nf4.*leave one of the two out"):
        train.main(flags_of(base, tmp_path / "new", "--dtype=nf4", flag))
    assert not (tmp_path / "new").exists()
