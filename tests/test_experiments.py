"""Are the experiments honest: the base, the benchmark, the comparison, the experts' values?

    pytest tests/test_experiments.py             half a minute
    SLOW=1 pytest -s tests/test_experiments.py   also ten kills while a base is made

Tiny settings throughout: what is tested is the procedure, never a result. Each docstring says which break the
test catches.
"""

import gc
import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import train
from experiments import bench, compare, llava, make_base, shapley
from experiments.compare import distribution, entropy, interval, mutual_information
from experiments.shapley import only, rank_correlation, shapley_interactions, shapley_values, top
from model import Llama, LlamaConfig, load_llama, rotary_tables, rotate
from teamlora import (METHODS, adapter_layers, adapter_parameters, changed_weights, load_parameters,
                      parameter_state)
from test_teamlora import TINY, layer_of, randomise, tiny
from tests.conftest import Code, files_in, flags_of, same, use

CONFIGS = {make_base.make_bases: make_base.BaseConfig, bench.bench: bench.BenchConfig,
           compare.compare: compare.CompareConfig, shapley.shapley: shapley.ShapleyConfig,
           llava.llava: llava.LlavaConfig}


@pytest.fixture(autouse=True)
def same_threads():
    """make_base sets their number for all of its process; other tests compare bits."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def start(run, flags):
    """What `python -m experiments.NAME FLAGS` does."""
    return train.main([*map(str, flags)], run=run, config=CONFIGS[run])


# ---- What all experiments share with a run

# flags: what is said; where nothing else is given, the name of the flag
BAD = {
    make_base.make_bases: {"--width=33": "", "--layers=0": "", "--threads=0": "", "--seeds=1,x": "",
                           "--method=lora": "", "--data=rows.json": "", "--init_from=base": "",
                           "--probe_steps=-1": "", "--mode=train": ""},
    bench.bench: {"--groups=x": "", "--groups=0": "", "--groups=1025": "", "--layers=-1": "",
                  "--size=7b": "one of smollm2-135m", "--rounds=0": "", "--method=full": "",
                  "--init_from={base} --layers=3": "has only 2 layers"},
    compare.compare: {"--methods=nonsense": "'nonsense' is none of none, lora",
                      "--methods=lora,lora": "distinct",
                      "--reference=nonsense": "'nonsense' is none of none, lora", "--seeds=1,1": "distinct",
                      "--seeds=-1": "--seed must", "--seeds=one": "", "--learning_rates=0": "--learning_rate",
                      "--methods=all --rank=300000000": "--rank must be"},
    shapley.shapley: {"--out_dir={out}/nowhere": "adapter.pt does not exist",
                      "--method=none": "need an adapter",
                      "--out_dir={out} --rank=3 --init_from={base}": "--rank=3 contradicts",
                      "--out_dir={out}": "say --init_from here too", "--mode=eval": ""},
    llava.llava: {"--method=full": "", "--compile": "", "--data=rows.json": "--data with --init_from",
                  "--init_from={base}": "--data with --init_from", "--resume": ""}}
REFUSED = [(run, flags, said) for run, rows in BAD.items() for flags, said in rows.items()]


@pytest.mark.parametrize("run, flags, said", REFUSED, ids=[f"{run.__name__} {f}" for run, f, _ in REFUSED])
def test_bad_flags_end_in_one_line_and_write_nothing(finished, base, tmp_path, run, flags, said):
    """Catches a traceback where a sentence belongs, and a refusal after an hour instead of at once."""
    given = flags.format(base=base, out=finished[0]).split()
    before = files_in(finished[0], base)
    with pytest.raises(SystemExit) as stop:
        start(run, [f"--out_dir={tmp_path}/new", "--device=cpu", *given])
    text = str(stop.value)
    assert text.startswith("error: ") and text.isprintable()
    assert (said or flags.split("=")[0].strip("-")) in text
    assert files_in(finished[0], base) == before and not files_in(tmp_path)


@pytest.mark.parametrize("run", CONFIGS)
def test_every_flag_of_an_experiment_has_help(run, capsys):
    """Catches a flag that nobody explained, and the help of another program."""
    with pytest.raises(SystemExit) as stop:
        start(run, ["--help"])
    text, about = capsys.readouterr().out, sys.modules[run.__module__].__doc__
    assert stop.value.code == 0 and about.splitlines()[0] in text and "--mode STR" not in text
    for f in train.fields(CONFIGS[run]):
        skipped = f.name in ("mode", "resume", "stop_at")
        assert skipped or f"--{f.name}" in text and len(f.metadata["help"]) > 5, f.name


def test_an_experiment_from_a_shell():
    """Catches an import that works in tests only, and a second copy of train.py with errors of its own."""
    done = subprocess.run([sys.executable, "-m", "experiments.compare", "--methods=x"], capture_output=True,
                          text=True, cwd=Path(train.__file__).parent)
    assert done.returncode == 1 and done.stderr.startswith("error: --methods, --reference: 'x' is none of")


@pytest.mark.parametrize("run", [compare.compare, shapley.shapley])
def test_plot_without_matplotlib_is_refused_before_hours_of_runs(monkeypatch, finished, base, run):
    """Catches a picture that fails when all is done."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *more: None if name == "matplotlib" else find(name, *more))
    with pytest.raises(SystemExit, match="--plot needs matplotlib"):
        start(run, [f"--out_dir={finished[0]}", f"--init_from={base}", "--plot"])


# ---- The base: does its corpus teach without giving away, is it the same however it was interrupted?

def test_base_corpus_gives_no_instructions_but_knows_their_words(tokenizer):
    """Catches a base that was shown the tasks, and words of the tasks that it has never read."""
    corpus = make_base.corpus(1)
    texts = [corpus(i).output for i in range(make_base.N_LESSONS, make_base.N_LESSONS + 4000)]
    seen = {t for text in texts for t in tokenizer.encode(text)}
    instructions = {i for _, _, wordings in data.TASKS.values() for i in wordings.split("|")}
    assert not any(i in text for i in instructions for text in texts)
    used = {task: Counter() for task in data.TASKS}
    for row in map(data.minicme(0), range(2000)):
        for text in (f"{row.instruction}\n{row.input}", row.output):
            used[row.task].update(tokenizer.encode(text))
    for task, pieces in used.items():
        unknown = {tokenizer.model.id_to_piece(t): n for t, n in pieces.most_common() if t not in seen}
        assert sum(unknown.values()) < 0.05 * pieces.total(), (
            f"{task}: the base has never read {unknown}; use words of experiments/make_base.py")


def test_heads_of_a_new_base_carry_over_earlier_tokens_each_into_its_own_directions():
    """Catches a head that starts by looking elsewhere, and distances that later layers cannot tell apart."""
    torch.manual_seed(0)
    model = make_base.new_llama(500, layers=2, width=128)
    first = model.model.layers[0].self_attn
    x = F.rms_norm(model.model.embed_tokens(torch.randint(0, 500, (8, 40))), (128,))
    q, k = (rotate(p(x).unflatten(-1, (4, 32)).transpose(1, 2), rotary_tables(model.config, torch.arange(40)))
            for p in (first.q_proj, first.k_proj))
    seen = (q @ k.mT / 32 ** 0.5 + torch.full((40, 40), -math.inf).triu(1)).softmax(-1).mean(0)  # (H, T, S)
    for head in range(4):
        at = [seen[head].diagonal(-back)[20:].mean().item() for back in range(8)]
        assert max(at) == at[head + 1] > 0.5, f"head {head}"
    v = first.v_proj.weight
    assert torch.allclose(v @ v.T, torch.eye(128), atol=1e-5)


BASE = ["--steps=6", "--layers=2", "--width=64", "--batch_size=2", "--save_every=2", "--device=cpu"]


@pytest.fixture
def few_words(monkeypatch):
    """A tokenizer from 300 texts, made in no time."""
    real = make_base.make_tokenizer
    monkeypatch.setattr(make_base, "make_tokenizer",
                        lambda path, rows: real(path, itertools.islice(rows, 300), vocab_size=500))


@pytest.fixture
def made(few_words, tmp_path):
    """The folder of a base made in one go, without a probe."""
    start(make_base.make_bases, [*BASE, "--probe_steps=0", f"--out_dir={tmp_path}/whole"])
    return tmp_path / "whole"


def assert_same_base(whole, out):
    names = ["README.md", "config.json", "lock", "model.safetensors", "tokenizer.model"]
    assert sorted(p.name for p in out.iterdir()) == names == sorted(p.name for p in whole.iterdir())
    for name in names[1:2] + names[3:]:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("at", [1, 4, 5], ids=["before a checkpoint", "middle", "last step"])
def test_a_base_that_was_interrupted_is_the_same_bit_for_bit(made, tmp_path, monkeypatch, at):
    """Catches a signal that tears a step, and a part of Muon, AdamW or the corpus that making.pt forgets."""
    schedule = train.schedule
    monkeypatch.setattr(train, "schedule", lambda step, *args: (
        signal.raise_signal(signal.SIGTERM) if step == at else None) or schedule(step, *args))
    flags = [*BASE, "--probe_steps=0", f"--out_dir={tmp_path}/halves"]
    with pytest.raises(SystemExit, match="error: interrupted; the same command begins or goes on again"):
        start(make_base.make_bases, flags)
    assert torch.load(tmp_path / "halves" / "making.pt", weights_only=True)["totals"]["step"] == at + 1
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    monkeypatch.setattr(train, "schedule", schedule)
    with pytest.raises(SystemExit, match="making.pt is of another recipe"):
        start(make_base.make_bases, [*flags, "--steps=7"])
    start(make_base.make_bases, flags)
    assert_same_base(made, tmp_path / "halves")


def test_a_signal_while_the_tokenizer_is_made(monkeypatch, tmp_path):
    """Catches sentencepiece's own error, a traceback, where one line belongs."""
    make = make_base.make_tokenizer
    monkeypatch.setattr(make_base, "make_tokenizer", lambda path, rows: make(path, (
        r for i, r in enumerate(itertools.islice(rows, 300))
        if i or signal.raise_signal(signal.SIGINT) is None)))
    with pytest.raises(SystemExit, match="error: interrupted; the same command"):
        start(make_base.make_bases, [*BASE, f"--out_dir={tmp_path}"])


def test_made_base_says_what_it_is_and_is_not_made_again(few_words, tmp_path, capsys):
    """Catches seeds that share a base, a README without numbers, and hours spent on what is there already."""
    flags = [*BASE, "--probe_steps=1", "--val_examples=1", "--seeds=1,2", f"--out_dir={tmp_path}"]
    start(make_base.make_bases, flags)
    raw = [(tmp_path / seed / "model.safetensors").read_bytes() for seed in "12"]
    assert raw[0] != raw[1] and load_llama(tmp_path / "1").config.hidden_size == 64
    readme = (tmp_path / "1" / "README.md").read_text()
    assert '"steps": 6' in readme and hashlib.sha256(raw[0]).hexdigest() in readme
    assert all(f"    {task} " in readme for task in [*data.TASKS, "mean"])
    before = files_in(tmp_path)
    capsys.readouterr()
    start(make_base.make_bases, flags)
    assert files_in(tmp_path) == before and capsys.readouterr().out.count("made before") == 2
    with pytest.raises(SystemExit, match="holds a base of another recipe"):
        start(make_base.make_bases, [*flags, "--steps=7"])


def test_code_in_a_checkpoint_of_a_base_is_refused(few_words, tmp_path):
    """Catches a load without weights_only."""
    torch.save({"recipe": Code()}, tmp_path / "making.pt")
    with pytest.raises(SystemExit, match="error: .*making.pt: .*it holds code"):
        start(make_base.make_bases, [*BASE, f"--out_dir={tmp_path}"])


@pytest.mark.skipif(not (train.BUILT_IN_BASE / "README.md").is_file(), reason="there is no README")
def test_built_in_base_is_the_one_that_this_code_makes():
    """Catches a corpus or a default that changed after the base was made, and weights of another base."""
    readme = (train.BUILT_IN_BASE / "README.md").read_text()
    weights = (train.BUILT_IN_BASE / "model.safetensors").read_bytes()
    assert make_base.recipe_of(make_base.BaseConfig()) in readme
    assert hashlib.sha256(weights).hexdigest() in readme


@pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes; SLOW=1 pytest runs it")
def test_ten_kills_leave_no_trace_in_a_base(tmp_path):
    """SIGKILL at ten random moments of the making of bases; the same command each time. Catches any state
    that is lost, torn or done twice: the base must equal one that was left alone."""
    def process(out):
        return subprocess.Popen([sys.executable, "-m", "experiments.make_base", *BASE, "--steps=200",
                                 "--save_every=1", "--probe_steps=0", f"--out_dir={out}"],
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                cwd=Path(train.__file__).parent)
    whole, begun = tmp_path / "whole", time.perf_counter()
    first = process(whole)
    assert first.communicate() and first.returncode == 0
    seconds, rng, kills, n, out = time.perf_counter() - begun, random.Random(0), 0, 0, whole
    while kills < 10 or not (out / "README.md").exists():
        if (out / "README.md").exists():
            n += 1
            out = tmp_path / f"base {n}"
        running = process(out)
        if kills < 10:
            try:
                running.wait(timeout=rng.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                running.kill()
                kills += 1
        printed, _ = running.communicate()
        assert running.returncode in (0, -signal.SIGKILL), printed
        if (out / "README.md").exists():
            assert_same_base(whole, out)
    print(f"\n{kills} kills survived in {n} bases of {seconds:.0f} s")


# ---- The benchmark: is the speed measured fairly?

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "nf4"])
def test_computed_memory_is_the_measured_one(checkpointing, dtype, monkeypatch):
    """Catches a formula that forgets a part: the table for a 7B comes from it."""
    torch.manual_seed(0)
    config = replace(TINY, vocab_size=2000, hidden_size=96, intermediate_size=256, num_hidden_layers=5)
    cfg = bench.BenchConfig(checkpointing=checkpointing, max_length=128, max_tokens=512, dtype=dtype,
                            size="tinyllama-1.1b")
    monkeypatch.setitem(bench.SIZES, cfg.size, config)
    arm, nf4 = bench.Arm("teamlora", 4, 8, 5), dtype == "nf4"
    dtype = torch.bfloat16 if nf4 else getattr(torch, dtype)
    base = bench.bench_base(cfg, "cpu", dtype)
    batches = bench.bench_batches(cfg, 2000, 1.0)
    step, _, held = bench.bench_runs(bench.bench_model(base, arm, cfg), arm, batches, cfg)
    parts = bench.training_memory(config, cfg.adapter, 4, 128, dtype, checkpointing, nf4=nf4)
    assert 0.9 < sum(parts.values()) / (held + bench.allocated_peak(step, "cpu")) < 1.15
    assert parts["weights"] == sum(p.nbytes for p in base.parameters())


def test_memory_of_real_llamas_is_printed_without_making_one(tmp_path, capsys, monkeypatch):
    """Catches a table that lacks a size, and one that allocates 13 GB for a line of text."""
    monkeypatch.setattr(bench, "SIZES", {name: bench.SIZES[name] for name in ("smollm2-135m", "llama3-8b")})
    monkeypatch.setattr(bench, "CARDS", tuple(range(2, 70)))
    n = len(bench.CARDS)
    start(bench.bench, ["--memory", f"--out_dir={tmp_path}/new", "--device=cpu"])
    lines = capsys.readouterr().out.splitlines()[-2 * len(bench.SIZES):]
    assert [line.split()[0] for line in lines] == [name for name in bench.SIZES for _ in range(2)]
    for line, checkpointed in zip(lines[::2], lines[1::2]):
        gb, less = ([float(x) for x in text.split()[-n - 4:-n]] for text in (line, checkpointed))
        assert gb == sorted(gb) and all(a >= b > 0 for a, b in zip(gb, less))
        tokens, more = ([int(x.replace("-", "0")) for x in text.split()[-n:]]
                        for text in (line, checkpointed))
        assert tokens == sorted(tokens) and all(a <= b for a, b in zip(tokens, more))
        for gb_of, most in ((gb, tokens), (less, more)):         # what fits is what the first columns say
            assert all((needed + 1 <= card) == (rows * 1024 <= fit) for card, fit in zip(bench.CARDS, most)
                       for rows, needed in zip((1, 2, 4, 8), gb_of) if abs(needed + 1 - card) > 0.1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("E", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_published_loop_computes_what_the_layer_does(method, E):
    """Catches a loop that is timed although it does less, or more, than the layer beside it."""
    layer = layer_of(method, E)
    x = torch.randn(2, 5, 11, dtype=torch.float64)
    assert torch.allclose(bench.published_loop(layer, x), layer(x), atol=1e-10)
    dropped = layer_of(method, E, dropout=0.999999)
    assert torch.allclose(bench.published_loop(dropped, x), F.linear(x, dropped.weight), atol=1e-10)


def calls_of_linear(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(e.count for e in profile.key_averages() if e.key == "aten::linear")


def test_arms_share_the_base_and_looped_arms_compute_the_same():
    """Catches an arm with weights of its own, a looped arm that is none, a limit without a backward pass."""
    base, cfg = tiny("none"), bench.BenchConfig(max_length=16, max_tokens=512)
    x = torch.randint(0, 101, (2, 9))
    for method in ("teamlora", "moelora", "hydralora"):
        fused, looped = (bench.bench_model(base, bench.Arm(method, 4, 3, 2, loop), cfg)
                         for loop in (False, True))
        randomise(fused)
        load_parameters(adapter_parameters(looped), parameter_state(adapter_parameters(fused)))
        assert len(fused.model.layers) == 2 and torch.allclose(fused(x), looped(x), atol=1e-4)
        calls = [calls_of_linear(lambda: m(x)) for m in (fused, looped)]
        assert calls[1] > calls[0] + 6 * 4       # four experts in each of six layers
        for m in (fused, looped):
            assert all(p is dict(base.named_parameters())[n] for n, p in m.base_parameters().items())
    limit = bench.bench_model(base, bench.Arm("none", 4, 3, 2), cfg)
    losses, _ = limit(x, x)
    assert losses.requires_grad and not any(p.requires_grad for p in limit.parameters())


TIMED = ["--size=tiny", "--device=cpu", "--max_length=20", "--rounds=1"]


@pytest.fixture
def light():
    """The benchmark calls gc.collect for every arm: without what was imported before that is quick."""
    for name in ("peft", "transformers") if bench.HAVE_PEFT else ():
        importlib.import_module(name)
    gc.freeze()
    yield
    gc.unfreeze()


def test_bench_writes_what_it_promises(light, tmp_path, monkeypatch, capsys):
    """Catches a missing key, method or group, and rows of --data whose lengths are ignored."""
    monkeypatch.setitem(bench.SIZES, "tiny", TINY)
    rows = [{"instruction": "say " * n, "output": "it"} for n in range(4, 24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    start(bench.bench, [*TIMED, "--layers=2", "--groups=2,spread,growth", "--max_tokens=80", "--batch_size=9",
                        f"--data={tmp_path}/rows.json", f"--out_dir={tmp_path}"])
    written = json.loads((tmp_path / "bench.json").read_text())
    assert all({"name", "method", "n_experts", "looped", "step_ms", "inference_ms", "over_limit",
                "tokens_per_second", "utilisation", "peak_memory_mb"} <= r.keys() for r in written)
    everything = {(r["method"], r["looped"]) for r in written if r["group"] == "2"} - {("peft", False)}
    assert everything == {("none", False), ("lora", False)} | {
        (m, loop) for m in ("teamlora", "moelora", "hydralora") for loop in (False, True)}
    assert bench.HAVE_PEFT == any(r["method"] == "peft" for r in written)
    spread = [(r["n_experts"], r["rank"]) for r in written if r["group"] == "spread"]
    assert spread[1:] == [(n, 32 // n) for n in (1, 2, 4, 8, 16)]
    assert all(r["over_limit"] == 1 for r in written if r["method"] == "none")
    assert all(r["step_ms"] > 0 for r in written)
    assert 9 * 8 < written[0]["tokens"] < 9 * 20 and written[0]["layers"] == 2
    assert "spread over E" in capsys.readouterr().out


def test_arm_without_enough_memory_is_left_out_and_freed(light, tmp_path, monkeypatch, capsys):
    """Catches a benchmark that one arm takes down with it, a memory that this arm keeps, and a flag named in
    an error that no experiment has."""
    layers = []

    def too_large(layer, *args):
        layers.append(weakref.ref(layer))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    monkeypatch.setitem(bench.SIZES, "tiny", TINY)
    monkeypatch.setattr(bench, "published_loop", too_large)
    monkeypatch.setattr(bench, "HAVE_PEFT", False)
    flags = [*TIMED, "--groups=2", "--max_tokens=512", f"--out_dir={tmp_path}"]
    gc.disable()                                 # it frees them sooner or later, on a GPU too late
    try:
        rows = start(bench.bench, flags)
        assert len(layers) == 3 and not any(layer() for layer in layers)
    finally:
        gc.enable()
    said = capsys.readouterr().out
    assert [r["name"] for r in rows] == ["frozen base", "lora", "teamlora", "moelora", "hydralora"]
    assert not any(r["looped"] for r in rows) and said.count("does not fit into the GPU's memory") == 3
    monkeypatch.setattr(bench, "bench_model", lambda base, arm, cfg: too_large(base))
    with pytest.raises(SystemExit, match="out of GPU memory") as told:    # without the limit no table
        start(bench.bench, flags)
    assert "--resume" not in str(told.value)     # which no experiment has


# ---- The comparison: is it fair?

def test_load_and_specialisation_statistics():
    """Catches entropy in nats, negative weights counted, and information where experts ignore the task."""
    assert torch.allclose(entropy(torch.tensor([[0.25] * 4, [0, 0, 1.0, 0]])), torch.tensor([2.0, 0]))
    assert torch.equal(distribution(torch.tensor([3.0, -2.0, 1.0])), torch.tensor([0.75, 0, 0.25]))
    groups = torch.tensor([0, 0, 1, 1])
    apart, alike = torch.eye(2)[groups][:, None], torch.full((4, 1, 2), 0.5)         # (N, L, E)
    assert mutual_information(apart, groups) == 1 and mutual_information(alike, groups) == 0


def test_expert_use_leaves_padding_out_and_weighs_tasks_alike():
    """Catches statistics over padding, over the first micro-batch only, or that a large task dominates."""
    def routing(*experts):                       # (L=1, B, T=2, E=2); the second token of each row is padding
        rows = torch.eye(2)[list(experts)]
        return torch.stack((rows, 1 - rows), 1)[None]
    collected, mask = compare.ExpertUse(), torch.tensor([[True, False]])
    for task, experts in (("a", [0, 0]), ("a", [0]), ("b", [1])):
        collected(task, routing(*experts), mask.expand(len(experts), 2))
    statistics = collected.statistics()
    assert statistics["task_information"] == pytest.approx(1) and statistics["weight_entropy"] == 0
    assert statistics["usage_variation"] == pytest.approx(1)     # of 1 and 0: deviation 0.5, mean 0.5


def test_variants_are_of_one_size_and_one_effective_scale():
    """Catches a comparison that gives a method more parameters, or another alpha / r, than its rivals."""
    cfg, size = compare.CompareConfig(rank=8), {}
    model_config = LlamaConfig(vocab_size=1280, hidden_size=128, intermediate_size=336, num_hidden_layers=2,
                               num_attention_heads=4, num_key_value_heads=4, head_dim=32)
    variants = compare.variants(cfg, model_config)
    for name, settings in variants.items():
        one = compare.run_config(cfg, settings, 1e-3, 0)
        size[name] = compare.n_trained(Llama(model_config, one.adapter))
        factor = {"moelora_sum_E": 4, "hydralora_sum_E": 4, "teamlora_sum_1": 0.25}.get(name, 1)
        assert one.alpha / one.rank == pytest.approx(factor * cfg.alpha / cfg.rank), name
    for name in ("lora", "moelora", "hydralora", "moelora_sum_E", "hydralora_sum_E", "teamlora_sum_1"):
        assert abs(size[name] / size["teamlora"] - 1) < 0.02, name
    layers = [layer_of("moelora", 4, alpha=alpha) for alpha in (64.0, 16.0)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 11, dtype=torch.float64)  # four times alpha is four times the weights
    updates = [layer(x) - F.linear(x, layer.weight) for layer in layers]
    assert torch.allclose(updates[0], 4 * updates[1], atol=1e-10)


@pytest.mark.parametrize("rank, n_experts", [(1, 4), (7, 3), (8, 1)])
def test_odd_ranks_leave_out_only_what_cannot_be(rank, n_experts):
    """Catches a rank of 0, or a number of experts that does not divide the total rank."""
    cfg = compare.CompareConfig(rank=rank, n_experts=n_experts, methods=("all",))
    variants = compare.variants(cfg, TINY)
    for name, settings in variants.items():
        one = compare.run_config(cfg, settings, 1e-3, 0)
        if name.startswith("teamlora_E"):
            assert one.rank * one.n_experts == rank * n_experts, name
    assert ("teamlora_half_rank" in variants) == (rank > 1) and {"none", "lora", "full"} <= variants.keys()


def test_best_rate_looks_beyond_the_edge_but_not_for_ever():
    """Catches a best rate at the edge left so, a rate tried that is none, and a search without end."""
    assert compare.best_rate((1e-3, 1e-2), lambda rate: -abs(math.log(rate / 1e-2))) == 1e-2
    assert compare.best_rate((1e-3, 1e-2), lambda rate: -rate) == 1e-6           # three steps beyond
    assert compare.best_rate((1e-3, 1e-2, 1e-1), lambda rate: -abs(rate - 1e-2)) == 1e-2
    assert compare.best_rate((1e-3,), lambda rate: rate) == 1e-3


def test_paired_interval():
    """Catches a normal instead of Student's t, and an unpaired deviation."""
    d, half = interval([0.01, 0.03, 0.02, 0.02, 0.02])
    assert d == pytest.approx(0.02) and half == pytest.approx(2.776 * 0.0070711 / 5 ** 0.5, rel=2e-3)
    assert interval([0.5]) == (0.5, None)


def test_compare_chooses_by_validation_and_resumes(finished, base, tmp_path, capsys):
    """Catches a rate chosen on test questions, a best rate at the edge left so, finished runs made again."""
    flags = [*flags_of(base, tmp_path), "--steps=2", "--seeds=0,1"]
    table = start(compare.compare, flags + ["--methods=none,lora,teamlora", "--learning_rates=1e-3,1e-2"])
    bare = use("eval", base, finished[0], "--method=none", "--val_examples=3")
    assert table.pop("none")[0]["test_loss"] == train.val_loss(bare)     # accuracies are all 0 this early
    rows = [json.loads(line) for line in (tmp_path / "compare.jsonl").read_text().splitlines()]
    for name, chosen in table.items():
        sweep = [r for r in rows if r["variant"] == name and r["seed"] == 0]
        best = max((r["val_accuracy"], -r["val_loss"]) for r in sweep)
        rates = sorted(r["learning_rate"] for r in sweep)
        assert len(chosen) == 2 and (chosen[0]["val_accuracy"], -chosen[0]["val_loss"]) == best
        assert len(sweep) >= 3
        assert chosen[0]["learning_rate"] not in (rates[0], rates[-1]) or len(sweep) == 5
        assert chosen[0]["accuracy"].keys() == data.TASKS.keys()
    assert "task_information" in table["teamlora"][0] and "task_information" not in table["lora"][0]
    assert "to lora (95%)" in capsys.readouterr().out
    before = (tmp_path / "compare.jsonl").read_text()
    again = start(compare.compare, flags + ["--methods=lora,teamlora", "--learning_rates=1e-3,1e-2",
                                            "--reference=teamlora"])
    assert again == table and (tmp_path / "compare.jsonl").read_text() == before
    d, half = interval([l["mean_accuracy"] - t["mean_accuracy"] for l, t in zip(*again.values())])
    printed = capsys.readouterr().out
    assert "to teamlora (95%)" in printed and f"{d:+.3f} ±{half:.3f}" in printed


def test_a_shorter_search_chooses_the_rate_of_the_long_runs(base, tmp_path, capsys):
    """Catches a search that takes the long runs' steps, is judged by the test, or is taken for a long run."""
    flags = [*flags_of(base, tmp_path), "--methods=lora", "--seeds=0,1", "--steps=2", "--search_steps=1"]
    table = start(compare.compare, [*flags, "--learning_rates=1e-3,3e-3,1e-2"])
    printed = capsys.readouterr()
    assert "7 steps of 11 examples" in printed.out and "; 0 are there" in printed.out    # 3 x 1 + 2 x 2
    assert "s a step: about" in printed.out + printed.err
    assert printed.out.count("lora at 0.003, 1 steps: validation accuracy 0.000, loss ") == 1
    rows = [json.loads(line) for line in (tmp_path / "compare.jsonl").read_text().splitlines()]
    searched = [r for r in rows if "accuracy" not in r]
    best = max(searched, key=lambda r: (r["val_accuracy"], -r["val_loss"]))      # all accuracies are 0 yet
    assert len(searched) >= 3 and len(rows) == len(searched) + 2 and {r["steps"] for r in searched} == {1}
    assert [r["learning_rate"] for r in table["lora"]] == 2 * [best["learning_rate"]]
    assert best["val_loss"] < max(r["val_loss"] for r in searched)
    for row in table["lora"]:                    # each has left its adapter
        result = use("eval", base, tmp_path / row["settings"], "--val_examples=3")
        assert train.val_loss(result) == row["test_loss"]
    start(compare.compare, [*flags, "--learning_rates=1e-3,3e-3,1e-2"])
    assert "7 steps of 11 examples" in (again := capsys.readouterr().out) and "; 0 are" not in again


def test_options_and_majority():
    """Catches options of other tasks, a right answer that is none of them, and the commonest place missed."""
    def row(given, output, task="a"):
        return data.Row(task, "Choose.", given, output)
    listed = [row("x? Options: d; b c", "b c"), row("y? Options: e; f", "f"), row("z? Options: g; h", "i")]
    few, many = ([row(str(i), str(i % n), task) for i in range(24)] for n, task in ((3, "few"), (12, "many")))
    seen = [row("", "a fourth", "few"), row("", "7", "many")]
    asked = compare.with_options(compare.CompareConfig(val_examples=0), (seen, [], [*listed, *few, *many]))
    assert sorted(o for _, o in asked["a"]) == [[], ["d", "b c"], ["e", "f"]]
    assert all(o == ["0", "1", "2", "a fourth"] for _, o in asked["few"])
    assert all(o == [] for _, o in asked["many"])
    assert [compare.majority(asked[task]) for task in asked] == [
        {"a": 2 / 3, "few": 1 / 3, "many": 1 / 12}[task] for task in asked]          # a: the second place
    split = data.minicme_held_out("test", 3)
    assert {task: [row for row, _ in rows] for task, rows in compare.with_options(
        compare.CompareConfig(val_examples=3), None).items()} == split


def test_choice_is_the_likeliest_answer_whole(tokenizer):
    """Catches losses that go to other rows of a micro-batch, an end left out, and a mean for a sum."""
    torch.manual_seed(0)
    model = Llama(replace(TINY, vocab_size=tokenizer.size)).init_weights()
    answers = ("yes", "no", "red", "blue", "the old man")
    rows = [data.Row("a", f"Is it {n * n}?", n % 7 * "x", answers[n % 5]) for n in range(60)]
    rows += [data.Row("a", f"Is it {n}?", 900 * "x", "no") for n in range(10)]
    named = [data.Row("b", "Choose.", "Options: yes; the red book", "the red book"),
             data.Row("b", "Choose.", "Options: no; a house; a man", "no")]
    other = [data.Row("c", "Say it.", str(i), str(i)) for i in range(12)]
    cfg = compare.CompareConfig(max_length=500)  # one row is longer
    asked = compare.with_options(cfg, ([], [], [*rows, *named, *other]))

    def loss(row):
        x, y, _ = data.collate([data.to_example(tokenizer, row)])
        return model(x, y)[0].sum().item()
    expected = {}
    for task in "ab":
        few = [(row, o) for row, o in asked[task] if len(row.input) < 900][:compare.PROBES]
        right = [min(o, key=lambda option: loss(row._replace(output=option))) == row.output for row, o in few]
        expected[task] = sum(right) / len(few)
    given = compare.choice_accuracy(model, tokenizer, asked, cfg)
    assert given == expected and 0 < sum(expected.values()) < 2


def test_router_may_have_a_rate_of_its_own(base):
    """Catches a router left at the rate of A and B, and a parameter in no group or in two."""
    cfg = compare.CompareConfig(init_from=str(base), device="cpu")
    model, _, _ = train.prepare(cfg)
    slow, fast = compare.make_optimizer(model, cfg, "teamlora_router_x10").param_groups
    names = {p: name for name, p in train.trained(model).items()}
    assert {names[p].rpartition(".")[2] for p in fast["params"]} == {"router", "interaction"}
    assert {names[p].rpartition(".")[2] for p in slow["params"]} == {"lora_A", "lora_B"}
    assert len(slow["params"] + fast["params"]) == len(names) and fast["lr"] == 10 * slow["lr"]
    assert len(compare.make_optimizer(model, cfg, "teamlora").param_groups) == 1


def test_compare_judges_by_other_questions_than_it_chooses_by(base, tmp_path, monkeypatch):
    """Catches a learning rate chosen on the questions that then judge the method."""
    seen, evaluate = {}, train.evaluate

    def noted(model, split, max_tokens, name, **more):
        seen.setdefault(name, {tuple(e.ids) for examples in split.values() for e in examples})
        return evaluate(model, split, max_tokens, name, **more)
    monkeypatch.setattr(train, "evaluate", noted)
    start(compare.compare, [*flags_of(base, tmp_path), "--steps=1", "--seeds=0", "--methods=lora",
                            "--learning_rates=1e-3"])
    assert len(seen["test"]) > 20 and len(seen["validation"]) > 20 and not seen["test"] & seen["validation"]


@pytest.mark.parametrize("variant", ["teamlora", "teamlora_router_x10", "full"])
def test_a_comparison_that_was_interrupted_loses_no_step(base, tmp_path, monkeypatch, variant):
    """Catches a run that begins again, or ends otherwise, after a signal in training or in judgement, and a
    checkpoint that stays."""
    def flags(out):
        return [*flags_of(base, tmp_path / out), "--steps=6", "--seeds=0", "--learning_rates=1e-3",
                f"--methods={variant}", "--dropout=0.1", "--save_every=0"]
    whole = start(compare.compare, flags("whole"))[variant][0]
    step, judge, made = train.training_step, compare.judge, []

    def interrupted_at_two(*args):
        made.append(args)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    def interrupted(*args):
        monkeypatch.setattr(compare, "judge", judge)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "training_step", interrupted_at_two)
    monkeypatch.setattr(compare, "judge", interrupted)
    for steps in (2, 6):
        with pytest.raises(SystemExit, match="error: interrupted; the same command begins or goes on again"):
            start(compare.compare, flags("out"))
        assert len(made) == steps and not (tmp_path / "out" / "compare.jsonl").exists()
    row = start(compare.compare, flags("out"))[variant][0]
    assert len(made) == 6 and same(row, whole)
    assert not [*tmp_path.rglob("*checkpoint.pt")]


def test_compare_on_other_rows_is_run_again(base, tmp_path):
    """Catches results of another file or of fewer steps that are taken for these, and a torn file."""
    rows = [{"instruction": f"number {i}?", "output": f"it is {i}"} for i in range(60)]
    flags = [*flags_of(base, tmp_path), "--methods=lora", "--seeds=0", "--learning_rates=1e-3", "--steps=1",
             f"--data={tmp_path}/rows.json"]
    for n, lines in ((60, 1), (60, 1), (59, 2)):
        (tmp_path / "rows.json").write_text(json.dumps(rows[:n]))
        start(compare.compare, flags)
        assert (tmp_path / "compare.jsonl").read_text().count("\n") == lines
    start(compare.compare, [*flags, "--steps=2"])
    assert (tmp_path / "compare.jsonl").read_text().count("\n") == 3
    (tmp_path / "compare.jsonl").write_text("[1]\n")
    with pytest.raises(SystemExit, match="compare.jsonl, line 1: not a run of a comparison"):
        start(compare.compare, flags)


# ---- The experts' values: do they mean what they say?

def test_shapley_values_of_known_games():
    """Catches wrong coalition weights: efficiency, symmetry, null player, additivity, games done by hand."""
    def game(E, v):
        return torch.tensor([float(v({e for e in range(E) if S >> e & 1})) for S in range(2 ** E)],
                            dtype=torch.float64)

    gloves = game(3, lambda S: 0 in S and bool(S & {1, 2}))                # one left glove, two right ones
    assert torch.allclose(shapley_values(gloves), torch.tensor([4, 1, 1], dtype=torch.float64) / 6)
    airport = game(3, lambda S: max([0, *(c for e, c in enumerate((1, 2, 3)) if e in S)]))
    assert torch.allclose(shapley_values(airport), torch.tensor([2, 5, 11], dtype=torch.float64) / 6)
    null = game(4, lambda S: len(S - {2}) ** 2)
    value = shapley_values(null)
    assert value[2] == 0 and torch.allclose(value[[0, 1, 3]], torch.full((3,), 3.0, dtype=torch.float64))
    random_game = torch.randn(32, 5, dtype=torch.float64)                  # five games at once
    value = shapley_values(random_game)
    assert value.shape == (5, 5) and torch.allclose(value.sum(0), random_game[-1] - random_game[0])
    assert torch.allclose(shapley_values(random_game * 2 + random_game.flip(1)), value * 2 + value.flip(1))


def test_shapley_interactions_of_known_games():
    """Catches a sign or weight in the index: pairs that need or replace each other, or do not meet."""
    together = torch.tensor([0., 0, 0, 1, 0, 0, 0, 1], dtype=torch.float64)  # 1 where experts 0 and 1 are in
    either = torch.tensor([0., 1, 1, 1, 0, 1, 1, 1], dtype=torch.float64)
    for value, sign in ((together, 1), (either, -1)):
        index = shapley_interactions(value)
        assert index[0, 1] == index[1, 0] == sign and index.abs().sum() == 2
    assert shapley_interactions(torch.arange(16.).double()).abs().max() == 0         # additive: 1, 2, 4, 8


def test_rank_correlation():
    """Catches ranks that mishandle ties, and NaN, which is no JSON."""
    a = torch.tensor([1.0, 2.0, 3.0, 9.0])
    assert rank_correlation(a, a ** 3) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.tensor([1.0, 1.0, 2.0, 2.0])) == pytest.approx(0.8944, abs=1e-4)
    assert rank_correlation(a, torch.ones(4)) is None


def test_experts_switched_off_add_nothing_and_come_back():
    """Catches a mask that misses a layer, one that outlives its block, and a twin not worth the same."""
    model = tiny(dtype=torch.float64, targets=("down_proj", "q_proj"))
    x = torch.randint(0, 101, (2, 9))
    whole, bare = model(x), tiny("full", dtype=torch.float64)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if k in bare.state_dict()})
    with changed_weights(model, only([], 4)):
        assert torch.equal(model(x), bare(x))
    with changed_weights(model, only(range(4), 4)):
        assert torch.equal(model(x), whole)
    with pytest.raises(KeyError), changed_weights(model, only([1], 4)):
        assert not torch.allclose(model(x), whole)
        raise KeyError
    assert torch.equal(model(x), whole)
    for _, layer in adapter_layers(model):
        with torch.no_grad():  # expert 3 dead, expert 1 a twin of expert 0, and M blind to which is which
            layer.lora_B[:, 9:] = 0
            for p in (layer.lora_A, layer.router):
                n = len(p) // 4
                p[n:2 * n] = p[:n]
            layer.lora_B[:, 3:6] = layer.lora_B[:, :3]
            layer.interaction.zero_()
    values = []
    for S in range(16):
        with changed_weights(model, only(shapley.coalition(S), 4)):
            values.append(-F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()))
    worth = shapley_values(torch.stack(values).detach())
    assert worth[3] == 0 and torch.isclose(worth[0], worth[1], rtol=1e-10)
    assert not torch.isclose(worth[0], worth[2])


def test_top_k_keeps_the_largest_weights_and_their_sum():
    """Catches a top-k over the wrong axis, one that rescales wrongly, one that lets a small weight pass."""
    w = torch.tensor([[0.5, 2.0, 1.6, -0.1], [1.0, 0.9, 1.1, 1.0]])
    assert torch.allclose(top(1)(w), torch.tensor([[0, 4.0, 0, 0], [0, 0, 4.0, 0]]))
    assert torch.allclose(top(2)(w)[0], torch.tensor([0, 2.0, 1.6, 0]) * 4 / 3.6)
    assert torch.allclose(top(4)(w), w)


def test_shapley_explains_the_whole_gain(finished, base, capsys):
    """Catches coalitions misnamed: the values must sum to v(all) - v(none) for every task; usage of another
    coalition than that of all."""
    out, summary = finished
    result = start(shapley.shapley, [f"--out_dir={out}", f"--init_from={base}", "--device=cpu"])
    full, bare = use("eval", base, out), use("eval", base, out, "--method=none", "--val_examples=3")
    for key, sign in (("accuracy", 1), ("loss", -1)):
        gain = torch.tensor([sign * (full[t][key] - bare[t][key]) for t in data.TASKS], dtype=torch.float64)
        assert torch.allclose(result["shapley"][key].sum(1), gain, atol=1e-6)
    assert result["value"]["loss"].shape == (16, len(data.TASKS)) and (out / "shapley.json").is_file()
    usage = torch.tensor(list(summary["expert_usage"].values()), dtype=torch.float64)
    assert torch.allclose(result["usage"].double(), usage, atol=1e-5)
    assert "mean weight of the router" in capsys.readouterr().out


def test_shapley_of_lora_writes_json_that_others_read(base, tmp_path):
    """Catches NaN in shapley.json: LoRA's weights are all 1, so they have no rank, and it has no M."""
    train.main(flags_of(base, tmp_path, "--method=lora", "--steps=1"))
    start(shapley.shapley, [f"--out_dir={tmp_path}", f"--init_from={base}", "--device=cpu"])
    written = (tmp_path / "shapley.json").read_text()
    assert "NaN" not in written
    assert json.loads(written)["rank_correlation"]["loss"] == [None] * len(data.TASKS)


@pytest.mark.parametrize("flags", [["--method=full"], ["--n_experts=1"], ["--n_experts=9"]])
def test_shapley_needs_two_to_eight_experts(base, tmp_path, flags):
    """Catches values of one expert, or of 512 coalitions and more that nobody waits for."""
    train.main(flags_of(base, tmp_path, "--steps=1", "--val_examples=1", *flags))
    with pytest.raises(SystemExit, match="error: Shapley values need an adapter with 2 to 8 experts"):
        start(shapley.shapley, [f"--out_dir={tmp_path}", f"--init_from={base}", "--device=cpu"])


def test_pictures_are_drawn(tmp_path):
    """Catches a plot that fails on one seed, or on a method without experts."""
    pytest.importorskip("matplotlib")
    table = {name: [{"mean_accuracy": 0.5 + 0.1 * seed, "n_experts": E, "expert_usage": {"a": [1.0] * E}}
                    | {"usage_variation": 0.1} if E > 1 else {"mean_accuracy": 0.5, "n_experts": 1}
                    for seed in range(n)]
             for name, E, n in (("none", 1, 1), ("lora", 1, 2), ("teamlora", 4, 2), ("teamlora_E2", 2, 1))}
    compare.plot_comparison(table, tmp_path)
    result = {"tasks": ["a", "b"], "usage": torch.rand(2, 4), "shapley": {"loss": torch.rand(2, 4)}}
    shapley.plot_experts(result, torch.rand(2, 6, 4), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"compare.png", "experts.png", "experts_by_task.png",
                                                     "shapley.png", "usage.png"}
