"""On a pretended GPU (pretend_cuda.py): does anything mix devices, and where does the host wait? While a GPU
computes, the host queues what comes next, until it asks for a number: so the loop may ask where it logs, an
evaluation once a task. Where there is a real GPU, a step runs on it, too."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import train
from model import attend
from teamlora import METHODS, AdapterConfig
from test_teamlora import batches_of, close, examples_of, gradients_of
from tests.conftest import flags_of, stopped_at, use

try:
    from tests.pretend_cuda import pretended_gpu
    with pretended_gpu():
        assert torch.ones(2, device="cuda").sum().item() == 2
except Exception as e:                           # whatever a later torch has renamed or forbids
    pytest.skip(f"this torch cannot pretend a GPU: {e!r}", allow_module_level=True)

OPTIONS = [*({"method": method} for method in METHODS), {"method": "full", "dtype": "auto"}, {"balance": 0.1},
           {"checkpointing": True}, {"dtype": "nf4"}]
KERNELS = {"teamlora": 38, "lora": 17, "moelora": 21, "hydralora": 22}   # of a layer, forward and backward


def ready(base, device, **options):
    """(model, configuration) as train.py prepares them, with the same random adapters on every device."""
    cfg = train.Config(**{"init_from": str(base), "device": device, "dtype": "float32"} | options)
    model, *_ = train.prepare(cfg)
    torch.manual_seed(0)
    for p in train.trainable_parameters(model).values():
        p.data.copy_(0.1 * torch.randn(p.shape))         # drawn on the CPU
    return model.train(), cfg


def step_of(model, cfg):
    """Loss, gradient norm and gradients of a step of several micro-batches."""
    metrics, gradients = gradients_of(model, batches_of(examples_of(5), 120), cfg.balance)
    return [metrics["loss"], metrics["gradient_norm"], *gradients.values()]


@pytest.mark.parametrize("real", [False, True] if torch.cuda.is_available() else [False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_has_the_gradients_of_the_cpu_and_waits_for_nothing(base, options, real):
    """Catches a tensor on the wrong device or moved twice, a wait within a step, full training in bf16."""
    limit = 0.1 if options.get("dtype") == "nf4" else 0.02 if real else 1e-5     # bf16; perhaps TF32
    expected = step_of(*ready(base, "cpu", **options))
    with contextlib.nullcontext() if real else pretended_gpu() as gpu:
        step_of(*ready(base, "cuda", **options)) if real else None   # libraries wait when first used
        model, cfg = ready(base, "cuda", **options)
        torch.cuda.set_sync_debug_mode("error") if real else gpu.waits.clear()
        found = step_of(model, cfg)
        torch.cuda.set_sync_debug_mode("default") if real else None
        assert real or gpu.waits == []
        for t, there in zip(found, expected, strict=True):
            assert t.is_cuda and t.dtype == torch.float32 and (t.cpu() - there).norm() <= limit * there.norm()


def test_the_loop_waits_only_where_it_logs_and_an_evaluation_once_a_task(base):
    """Catches a loop that looks at every loss: the GPU stands still while the next batch is made."""
    with pretended_gpu() as gpu:
        (model, cfg), seen = ready(base, "cuda", log_every=2, balance=0.1, steps=4), []

        def step_batches(step):
            seen.append(len(gpu.waits))
            return batches_of(examples_of(5, step), 120)
        train.fit(model, step_batches, train.make_optimizer(model, cfg), cfg, log=lambda record: None)
        seen.append(len(gpu.waits))
        train.evaluate(model, {"a": examples_of(5), "b": examples_of(9)}, 120)
    # where it logs: loss, gradient norm, skipped steps, those in a row; after the first all are there
    assert [b - a for a, b in zip(seen, [*seen[1:], len(gpu.waits)])] == [0, 4, 0, 4, 2], gpu.waits


@pytest.mark.parametrize("temperature, waits", [(0.0, 1 + 6), (0.7, 1 + 2 * 6)])
def test_generation_waits_once_a_token(base, temperature, waits):
    """Catches a position or a generator on the wrong device, and a wait per layer of the cache."""
    found = []
    for device in ("cpu", "cuda"):
        with pretended_gpu() as gpu:
            model, tokens = ready(base, device)[0].eval(), torch.arange(21).view(3, 7).to(device)
            generator = torch.Generator(device).manual_seed(0)
            gpu.waits.clear()
            new = torch.stack([*model.generate(tokens, 6, temperature, generator)])
            found.append((len(gpu.waits), new.tolist()))
    assert found == [(0, found[0][1]), (waits, found[0][1])]


def test_a_run_on_a_gpu_is_the_run_on_the_cpu(base, tmp_path, monkeypatch, capsys):
    """Catches a checkpoint, an adapter or an export of one device alone, a base in fp32 on a GPU."""
    flags, gpu = ["--method=lora", "--steps=4"], tmp_path / "gpu"
    expected = train.main(flags_of(base, tmp_path / "cpu", *flags))["val_loss"]
    stopped_at(monkeypatch, 2)
    with pretended_gpu():
        with pytest.raises(SystemExit, match="stopped after 2 of 4 steps"):
            train.main(flags_of(base, gpu, *flags, "--device=cuda"))
        found = train.main(flags_of(base, gpu, *flags, "--device=cuda", "--resume"))["val_loss"]
        use("export", base, gpu, "--device=cuda")
        use("sample", base, gpu, "--device=cuda", "--prompt=What?", "--temperature=0.5")
    assert found == pytest.approx(expected, rel=0.02) and "base in torch.bfloat16" in capsys.readouterr().out
    (gpu / "export").rename(tmp_path / "export")
    use("export", base, gpu)
    assert len({(f / "export" / "model.safetensors").read_bytes() for f in (gpu, tmp_path)}) == 1


def test_grouped_heads_are_repeated_in_fp32_alone():
    """Catches enable_gqa where a GPU has only the slow kernel for it, and heads in another order."""
    (q, k, v), name = torch.randn(3, 1, 4, 3, 8), "scaled_dot_product_attention"
    with mock.patch.object(F, name, wraps=getattr(F, name)) as called, pretended_gpu():
        found = [attend(*(t.to(device, dtype) for t in (q, k[:, :2], v[:, :2])), causal=True).cpu().float()
                 for device, dtype in (("cpu", q.dtype), ("cuda", q.dtype), ("cuda", torch.bfloat16))]
    assert [call.kwargs["enable_gqa"] for call in called.call_args_list] == [True, False, True]
    assert close(found, [found[0]] * 3, atol=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_kernels_are_few_and_do_not_grow_with_the_experts(method):
    """Catches a loop over experts, which starts its kernels E times, and a layer that has become slower."""
    counts = []
    for n_experts in (2, 8):
        with pretended_gpu() as gpu, torch.device("cuda"):
            layer = METHODS[method](16, 24, adapter=AdapterConfig(method, n_experts=n_experts))
            x = torch.ones(2, 5, 16, requires_grad=True)
            gpu.kernels.clear()
            layer(x).sum().backward()
            counts.append(gpu.kernels.total())
    assert counts[0] == counts[1] <= KERNELS.get(method, 60), gpu.kernels


# does the pretence notice? x is on the GPU, c on the CPU
WAITING = [lambda x, c: x.sum().item(), lambda x, c: bool(x[0] > 0), lambda x, c: x[x > 0],
           lambda x, c: x.tolist(), lambda x, c: torch.where(x > 0), lambda x, c: x[torch.tensor([0, 1])],
           lambda x, c: c.to("cuda", non_blocking=True), lambda x, c: x.copy_(c), lambda x, c: c.to("cuda")]
REFUSED = [lambda x, c: x + c, lambda x, c: x @ c, lambda x, c: c.add_(x), lambda x, c: torch.stack([x, c]),
           lambda x, c: torch.multinomial(x, 1, generator=torch.Generator()), lambda x, c: x.numpy()]
QUEUED = [lambda x, c: c.pin_memory().to("cuda", non_blocking=True), lambda x, c: x + c[0],
          lambda x, c: x[x.argsort()] * torch.zeros(3, device="cuda"), lambda x, c: x.masked_fill(x > 0, 0)]


@pytest.mark.parametrize("planted", [*WAITING, *REFUSED, *QUEUED])
def test_the_pretended_gpu_notices(planted):
    """Catches a pretence that lets a mistake pass, or that finds one where none is."""
    refused = pytest.raises((RuntimeError, TypeError), match="same device|numpy")
    with pretended_gpu() as gpu:
        with refused if planted in REFUSED else contextlib.nullcontext():
            planted(torch.ones(3, device="cuda"), torch.ones(3))
        assert bool(gpu.waits) == (planted in WAITING)
