"""Is a base in four bits what QLoRA says, and small while it trains? A docstring says what a test catches."""

import math
from dataclasses import replace

import pytest
import torch

import train
from experiments.bench import stored_bytes
from model import NF4, NF4_LEVELS, PROJECTIONS, LlamaConfig, dequantize, fingerprint, load_llama, save_llama
from teamlora import METHODS, AdapterConfig, adapter_parameters
from test_teamlora import TINY, peak_of, randomise, tiny
from tests.conftest import flags_of, use


@pytest.fixture
def folder(tmp_path):
    """A tiny random Llama on the disk, in bf16; no side of its matrices need be a multiple of 64."""
    save_llama(tiny(None, replace(TINY, intermediate_size=50), torch.bfloat16), tmp_path)
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
    made, expected = NF4.of(w, dtype), []
    for block in w.flatten().split(64):
        levels = [level * float(block.abs().max()) for level in NF4_LEVELS]
        expected += [min(levels, key=lambda level: abs(level - x)) for x in block.tolist()]
    expected = torch.tensor(expected, dtype=torch.float64).view(shape)
    assert torch.allclose(made.matrix().double(), expected, atol=1e-6, rtol=torch.finfo(dtype).eps)
    assert made.dtype == dtype and stored_bytes([made]) == 34 * math.ceil(w.numel() / 64)    # 4.25 bits each
    assert torch.equal(made.T.contiguous(), made.matrix().T) and torch.equal(made + 0, made.matrix())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_bitsandbytes(dtype):
    """Catches a table, a block or a rounding that differs from what everyone else calls NF4."""
    they = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)  # --no-deps is enough
    w = (0.02 * torch.randn(192, 576, generator=torch.Generator().manual_seed(0))).bfloat16().to(dtype)
    theirs = they.dequantize_4bit(*they.quantize_4bit(w, quant_type="nf4", blocksize=64))
    assert theirs.dtype == dtype and torch.equal(NF4.of(w, dtype).matrix(), theirs)


def test_loaded_projections_are_small_and_all_else_is_as_it_was(folder):
    """Catches a head in four bits, a projection that is not, bits that depend on the dtype, a lost change."""
    model, plain = (load_llama(folder, AdapterConfig(), nf4=nf4) for nf4 in (True, False))
    for (name, p), (_, whole) in zip(model.base_parameters().items(), plain.base_parameters().items()):
        small = name.split(".")[-2] in PROJECTIONS
        assert isinstance(p, NF4) == small and p.dtype == torch.bfloat16 and not p.requires_grad
        p, whole = (p.matrix(), NF4.of(whole, p.dtype).matrix()) if small else (p, whole)
        assert torch.equal(p, whole), name
    other = load_llama(folder, dtype=torch.float32, nf4=True)
    assert fingerprint(model) == fingerprint(other) != fingerprint(plain)
    with torch.no_grad(), pytest.raises(RuntimeError, match="dequantize the model first"):
        model.model.layers[0].mlp.up_proj.weight.mul_(2)         # of a matrix made for the occasion


def test_four_bits_are_made_matrix_by_matrix(tmp_path):
    """Catches a model that stands whole in memory before its four bits are made."""
    save_llama(tiny(None, LlamaConfig(1000, 256, 1024, 8, 4, 4, 64)), tmp_path)  # 36 MB; a matrix has 1 MB
    peak, model = peak_of(lambda: load_llama(tmp_path, nf4=True))
    size = stored_bytes(model.parameters())
    assert size < 7e6 and peak < size + 4e6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_training_equals_that_on_the_matrices_and_keeps_none(folder, method, checkpointing):
    """Catches a gradient of other weights than the forward's, and matrices kept between the two."""
    small, whole = (load_llama(folder, AdapterConfig(method, rank=2), nf4=True) for _ in range(2))
    dequantize(whole)
    whole.load_state_dict(adapter_parameters(randomise(small)), strict=False)
    tokens, targets = torch.arange(54).view(2, 3, 9)
    sizes, results = {p.numel() for p in small.base_parameters().values() if isinstance(p, NF4)}, []
    for model in (small, whole):
        model.checkpointing, kept = checkpointing, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = model(tokens, targets)[0].sum()
        kept = [t.untyped_storage().nbytes() // t.itemsize for t in kept if type(t) is not NF4]
        assert checkpointing or bool(sizes.intersection(kept)) == (model is whole)       # does find matrices
        loss.backward()
        results.append([loss, *(p.grad for p in train.trainable_parameters(model).values())])
    assert len(results[0]) > 8 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_run_in_four_bits_is_used_and_exported(base, tmp_path):
    """Catches a mode that forgets the four bits, an adapter on another base, an export of other weights."""
    summary = train.main(flags_of(base, tmp_path, "--dtype=nf4", "--method=lora"))
    results = use("eval", base, tmp_path)                                # dtype comes from the file
    assert train.overall(results)[1] == summary["val_loss"] != summary["base_val_loss"]
    with pytest.raises(SystemExit, match="error: the adapter .*--dtype=float32"):
        use("eval", base, tmp_path, "--dtype=float32")
    use("export", base, tmp_path)
    exported, quantised = load_llama(tmp_path / "export"), load_llama(base, nf4=True)
    for name, p in quantised.base_parameters().items():
        p, adapted = p.matrix() if isinstance(p, NF4) else p, name.split(".")[-2] in AdapterConfig().targets
        assert torch.equal(exported.get_parameter(name), p) != adapted, name
