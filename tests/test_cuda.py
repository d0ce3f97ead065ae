"""On a pretended GPU (pretend_cuda.py): does anything mix devices, and where does the host wait?

A GPU computes while the host queues what comes next, until the host asks for a number. So the loop may ask
where it logs and nowhere else, an evaluation once a task. Where there is a real GPU, a step runs on it too.
"""

import contextlib
from dataclasses import replace

import pytest
import torch

import data
import train
from experiments import compare, shapley
from model import Llama, load_llama, save_llama
from teamlora import METHODS, AdapterConfig, load_parameters
from test_teamlora import TINY, batches_of, examples_of, gradients_of
from tests.conftest import flags_of, use

try:
    from tests.pretend_cuda import pretended_gpu
    with pretended_gpu():
        assert torch.ones(2, device="cuda").sum().item() == 2
except Exception as e:                           # whatever a later torch has renamed or forbids
    pytest.skip(f"this torch cannot pretend a GPU: {e!r}", allow_module_level=True)


def ready(device, folder, cfg):
    """(the tiny Llama of the folder, where no expert is zero, and a step's micro-batches) on the device."""
    model = load_llama(folder, cfg.adapter, device, nf4=cfg.dtype == "nf4").train()
    model.checkpointing = cfg.checkpointing
    generator, trained = torch.Generator().manual_seed(0), train.trained(model)
    load_parameters(trained, {n: 0.1 * torch.randn(p.shape, generator=generator) for n, p in trained.items()})
    device = next(model.parameters()).device
    torch.manual_seed(0)                         # of dropout
    return model, [train.to_device(b, device) for b in batches_of(examples_of(5), 120)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    save_llama(Llama(TINY).init_weights(), path)
    return path


OPTIONS = [*({"method": method} for method in (*METHODS, "full")), {"balance": 0.1, "dropout": 0.1},
           {"checkpointing": True}, {"dtype": "nf4"}]


def assert_same(found, expected, tolerance):
    """Numbers and gradients of a step on a GPU are those of the CPU."""
    for part, there in zip(found, expected):
        for name, t in part.items():
            assert t.is_cuda, name
            t, t_cpu = t.cpu().double(), there[name].double()
            assert (t - t_cpu).norm() <= tolerance * t_cpu.norm(), name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_has_the_gradients_of_the_cpu_and_waits_for_nothing(folder, options):
    """Catches a tensor on the wrong device, one that moves twice, a number asked for within a step."""
    cfg = train.Config(**options)
    expected = gradients_of(*ready("cpu", folder, cfg), cfg.balance)
    with pretended_gpu() as gpu:
        step = ready("cuda", folder, cfg)
        gpu.waits.clear()
        found = gradients_of(*step, cfg.balance)
        assert gpu.waits == []
        assert_same(found, expected, 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no real GPU here")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_on_a_real_gpu(folder, options):
    """Catches what the pretended one cannot: a kernel with other gradients, a wait inside of PyTorch."""
    cfg = train.Config(**options | {"dropout": 0.0})     # a GPU draws other numbers
    expected = gradients_of(*ready("cpu", folder, cfg), cfg.balance)
    for mode in ("default", "error"):            # its libraries wait when they are first used
        step = ready("cuda", folder, cfg)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            found = gradients_of(*step, cfg.balance)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_same(found, expected, 0.02)           # products may be in TF32


def test_the_loop_waits_only_where_it_logs(folder):
    """Catches a loop that looks at every loss: the GPU stands still while the next batch is made."""
    cfg, seen, lines = train.Config(log_every=2, balance=0.1, save_every=0), [], []
    with pretended_gpu() as gpu:
        model, _ = ready("cuda", folder, cfg)

        def step_batches(step):
            seen.append(len(gpu.waits))
            return batches_of(examples_of(5, step), 120)
        train.fit(model, step_batches, train.make_optimizer(model, cfg), cfg, 4, log=lines.append)
    waits = [b - a for a, b in zip(seen, [*seen[1:], len(gpu.waits)])]
    # tokens, skipped steps, those in a row; loss, norm, supervised tokens: after the first all are there
    assert waits == [0, 6, 0, 6] and set(gpu.waits[seen[0]:]) == {"_local_scalar_dense"}
    assert len(lines) == 2


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation_waits_once_a_token(folder, temperature):
    """Catches a mask, a position or a generator on the wrong device, and a wait per layer of the cache."""
    found = []
    for context in (contextlib.nullcontext(), pretended_gpu()):
        with context as gpu:
            device = "cuda" if gpu else "cpu"
            model, _ = ready(device, folder, train.Config())
            tokens = (torch.arange(21).view(3, 7) + 3).to(device)
            generator = torch.Generator(device).manual_seed(0)
            lengths = torch.tensor([7, 3, 5]).to(device)
            if gpu:
                gpu.waits.clear()
            new = model.eval().generate(tokens, 6, lengths=lengths, temperature=temperature, top_k=9,
                                        generator=generator)
            found.append(new.tolist())
    assert found[0] == found[1]
    # the end's id, whether there is padding, what is new; per token whether all have ended, and the drawing's
    assert len(gpu.waits) == 3 + len(found[0][0]) * (2 if temperature else 1), gpu.waits


def test_a_run_on_a_gpu_is_the_run_on_the_cpu(finished, base, tmp_path):
    """Catches a checkpoint or an adapter that only its own device can read, an answer made on another one."""
    flags = flags_of(base, tmp_path, "--device=cuda", "--dtype=float32")
    with pretended_gpu():
        assert train.main([*flags, "--stop_at=4"]) is None
        summary = train.main([*flags, "--resume"])
        again = use("eval", base, tmp_path, "--device=cuda", "--dtype=float32")
        # in bf16
        use("sample", base, tmp_path, "--device=cuda", "--prompt=Name the town.", "--temperature=0.5")
    assert summary["device"] == "a pretended GPU"
    assert summary["val_loss"] == pytest.approx(finished[1]["val_loss"], rel=1e-3)
    for results in (again, use("eval", base, tmp_path)):
        assert train.val_loss(results) == pytest.approx(summary["val_loss"], rel=1e-5)


def test_export_on_a_gpu_writes_the_bytes_of_the_cpu(base, tmp_path):
    """Catches a merge that mixes devices, and tensors written from a GPU's memory."""
    written = []
    train.main(flags_of(base, tmp_path, "--method=lora", "--steps=2", "--val_examples=1"))
    for context, device in ((contextlib.nullcontext(), "cpu"), (pretended_gpu(), "cuda")):
        with context:
            use("export", base, tmp_path, f"--device={device}", "--dtype=float32")
        written.append((tmp_path / "export" / "model.safetensors").read_bytes())
        (tmp_path / "export").rename(tmp_path / device)
    assert written[0] == written[1]


def noted_waits(gpu, function, waits):
    """The function, which notes how many waits a call of it takes."""
    def noted(*args, **kwargs):
        before = len(gpu.waits)
        result = function(*args, **kwargs)
        waits.append(len(gpu.waits) - before)
        return result
    return noted


def test_a_comparison_waits_for_no_layer(base, tmp_path, monkeypatch):
    """Catches statistics of experts that fetch every layer's weights from the GPU by themselves."""
    flags = flags_of(base, tmp_path, "--device=cuda", "--methods=teamlora", "--seeds=0", "--steps=2",
                     "--learning_rates=0.01", "--val_examples=1")
    with pretended_gpu() as gpu:
        monkeypatch.setattr(train, "evaluate", noted_waits(gpu, train.evaluate, waits := []))
        train.main(flags, run=compare.compare, config=compare.CompareConfig)
    tasks = len(data.TASKS)                      # validation, test with statistics, top 1, 2 and all
    assert waits == [tasks, 4 * tasks, tasks, tasks, tasks]


def test_shapley_values_wait_for_no_layer(base, tmp_path, monkeypatch):
    """Catches a coalition made anew on the host for every layer and token."""
    train.main(flags_of(base, tmp_path, "--n_experts=2", "--steps=4", "--val_examples=1"))
    flags = [f"--init_from={base}", f"--out_dir={tmp_path}", "--dtype=float32"]
    expected = train.main([*flags, "--device=cpu"], shapley.shapley, shapley.ShapleyConfig)
    with pretended_gpu() as gpu:
        noted = noted_waits(gpu, shapley.evaluate_coalitions, waits := [])
        monkeypatch.setattr(shapley, "evaluate_coalitions", noted)
        found = train.main([*flags, "--device=cuda"], shapley.shapley, shapley.ShapleyConfig)
    assert torch.allclose(found["shapley"]["loss"], expected["shapley"]["loss"], atol=1e-5)
    # a coalition is sent once and asks once a task; at the end every task's mean weights
    assert waits == [4 * (1 + len(data.TASKS)) + len(data.TASKS)]


def test_one_micro_batch_more_costs_a_gpu_what_it_could_have_computed():
    """Catches a CPU's price on a GPU, which would start four small micro-batches in place of one."""
    rows = [data.Example("t", range(n), 4) for n in range(10, 60)]
    with torch.device("meta"):                   # no CPU: sizes are all that counts
        small, large = (Llama(replace(TINY, **size)) for size in (
            {}, {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}))
    assert train.micro_batches(Llama(TINY), rows, 4096) == data.cut(rows, 4096)
    assert len(train.micro_batches(small, rows, 4096)) == 1
    assert 1 < len(train.micro_batches(large, rows, 4096)) < len(data.cut(rows, 4096))


def kernels_of(method, E):
    with pretended_gpu() as gpu:
        with torch.device("cuda"):
            layer = METHODS[method](16, 24, adapter=AdapterConfig(method, rank=2, n_experts=E))
            x = torch.randn(2, 5, 16, requires_grad=True)
        gpu.kernels.clear()
        layer(x).sum().backward()
    return gpu.kernels


@pytest.mark.parametrize("method", METHODS)
def test_kernels_do_not_grow_with_the_experts(method):
    """Catches a loop over experts, which starts its kernels E times, forward or backward."""
    assert kernels_of(method, 8) == kernels_of(method, 2)


# ---- Does the pretence notice? x is on the GPU, c on the CPU

WAITING = {
    "a number": lambda x, c: x.sum().item(), "a condition": lambda x, c: bool(x[0] > 0),
    "a selection": lambda x, c: x[x > 0], "where": lambda x, c: torch.where(x > 0),
    "a list of indices": lambda x, c: x[[0, 1]], "indices on the CPU": lambda x, c: x[torch.tensor([0, 1])],
    "to the CPU": lambda x, c: x.cpu(), "numbers": lambda x, c: x.tolist(),
    "to the GPU": lambda x, c: c.to("cuda"),
    "a queued copy that cannot be": lambda x, c: c.to("cuda", non_blocking=True),
    "constants": lambda x, c: torch.tensor([1, 2], device="cuda"), "an assignment": lambda x, c: x.copy_(c),
    "a draw": lambda x, c: torch.multinomial(x, 1)}
REFUSED = {
    "a sum": lambda x, c: x + c, "a product": lambda x, c: x @ c, "in place": lambda x, c: c.add_(x),
    "a list": lambda x, c: torch.stack([x, c]), "a generator": lambda x, c: torch.multinomial(
        x, 1, generator=torch.Generator()), "numpy": lambda x, c: x.numpy()}
QUEUED = {
    "a pinned copy": lambda x, c: c.pin_memory().to("cuda", non_blocking=True),
    "a number in": lambda x, c: x * 2, "a 0-dim tensor in": lambda x, c: x + c[0],
    "indices there": lambda x, c: x[x.argsort()],
    "a mask": lambda x, c: x.masked_fill(x > 0, 0),
    "a new tensor": lambda x, c: torch.zeros(3, device="cuda")}


@pytest.mark.parametrize("planted", [*WAITING, *REFUSED, *QUEUED])
def test_the_pretended_gpu_notices(planted):
    """Catches a pretence that lets a mistake pass, or that finds one where none is."""
    with pretended_gpu() as gpu:
        x, c = torch.ones(3, device="cuda"), torch.ones(3)
        if planted in REFUSED:
            with pytest.raises((RuntimeError, TypeError), match="same device|numpy"):
                REFUSED[planted](x, c)
        else:
            (WAITING | QUEUED)[planted](x, c)
        assert bool(gpu.waits) == (planted in WAITING)
