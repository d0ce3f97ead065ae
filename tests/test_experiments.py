"""Are the experiments honest: MiniCME's files, the base, the benchmark, the comparison, the experts' values?

Tiny settings: what is tested is the procedure, never a result. A docstring says which break its test catches.
"""

import contextlib
import hashlib
import io
import itertools
import json
import runpy
import sys
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean as mean, stdev

import pytest
import torch

import data
import train
from experiments import bench, compare, llava, make_base, make_minicme, shapley
from experiments.peers import INSTALLED, PEERS
from experiments.shapley import only, rank_correlation, shapley_interactions, shapley_values, top
from model import Llama
from teamlora import adapter_layers, adapter_parameters, changed_weights, load_parameters
from test_teamlora import TINY, close, randomise, tiny
from tests.conftest import files_in, flags_of, same, stopped_at, use

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")         # by runpy
CONFIGS = {make_base.make_base: make_base.BaseConfig, bench.bench: bench.BenchConfig,
           compare.compare: compare.CompareConfig, shapley.shapley: shapley.ShapleyConfig,
           llava.llava: llava.LlavaConfig}


def start(run, flags):
    """What `python -m experiments.NAME FLAGS` does."""
    return train.main([*map(str, flags)], run=run, config=CONFIGS[run])


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Flags, and what is said of bad ones

BAD = {
    make_base.make_base: {"--width=33": "--width must be a multiple", "--layers=0": "--layers must be",
                          "--method=lora": "have no part in making", "--resume": "checkpoint.pt"},
    bench.bench: {"--groups=x": "--groups takes", "--groups=1025": "--groups takes", "--rounds=0": "--rounds",
                  "--method=full": "--method must be one of", "--init_from={base} --layers=3": "2 layers"},
    compare.compare: {"--methods=x": "'x' is none of none, lora", "--reference=x": "'x' is none of none,",
                      "--seeds=1,1": "--seeds must be distinct", "--seeds=-1": "--seed must be",
                      "--methods=all --rank=300000000": "--rank must be", "--plot": "--plot needs matplotlib",
                      "--adapter_from={out}/adapter.pt --rank=2": "--adapter_from has no part",
                      "--init_from={base} --data={base}/rows.json --val_share=0": "0 to judge on"},
    shapley.shapley: {"--out_dir={out}/nowhere": "adapter.pt", "--method=none": "with 2 to 8 experts",
                      "--out_dir={out} --rank=3": "made with", "--out_dir={out} --plot": "--plot needs"},
    llava.llava: {"--method=full": "--method", "--data=x": "--data with --init_from"}}


@pytest.mark.parametrize("run, flags, said", [
    pytest.param(run, *bad, id=f"{run.__name__} {bad[0]}") for run in BAD for bad in BAD[run].items()])
def test_bad_flags_end_in_one_line_and_write_nothing(finished, base, tmp_path, monkeypatch, run, flags, said):
    """Catches a traceback where a sentence belongs, and a refusal after an hour instead of at once."""
    before, given = files_in(finished[0], base), flags.format(base=base, out=finished[0]).split()
    monkeypatch.setitem(sys.modules, "matplotlib", None)         # as if it were not installed
    with pytest.raises(SystemExit) as stop:
        start(run, [f"--out_dir={tmp_path}/new", "--device=cpu", *given])
    text = str(stop.value)
    assert text.startswith("error: ") and text.isprintable() and said in text
    assert files_in(finished[0], base) == before and not files_in(tmp_path)


@pytest.mark.parametrize("run", CONFIGS, ids=lambda run: run.__name__)
def test_every_experiment_starts_from_a_shell_and_explains_its_flags(run, capsys, monkeypatch):
    """Catches the flags or the text of another program, a flag without help."""
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(run.__module__, run_name="__main__", alter_sys=True)
    text = capsys.readouterr().out
    assert stop.value.code == 0 and sys.modules[run.__module__].__doc__.splitlines()[0] in text
    assert all(f"--{f.name}" in text and f.metadata["help"] for f in fields(CONFIGS[run]))


# ---- MiniCME and the base: is nothing given away, are they what this code makes?

def test_minicme_and_base_are_those_that_this_code_makes_and_give_nothing_away(monkeypatch, tmp_path):
    """Catches files edited by hand, a corpus or default that changed after they were made, an answer or an
    instruction that was trained, whatever separates its sentences."""
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path)])
    runpy.run_module("experiments.make_minicme", run_name="__main__")
    made, asked = train.ASSETS / "minicme", {}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (made / path.name).read_bytes(), path.name
        asked[path.stem] = {(line["task"], line["input"]) for line in json_lines(path)}
    assert len(asked) == 3 and len(set.union(*asked.values())) == sum(map(len, asked.values()))
    streams, some = make_base.terms(make_base.BaseConfig.seed), range(0, 2 * make_base.N_LESSONS, 32)
    read = " ".join(" ".join(stream(i).output.split()) for stream in streams for i in some)
    texts = [text for _, wordings in make_minicme.TASKS.values() for text in wordings.split("|")]
    texts += [" ".join(question.split()) for _, question in asked["validation"] | asked["test"]]
    assert not [text for text in texts if text in read]
    readme, base = (train.ASSETS / "base" / name for name in ("README.md", "model.safetensors"))
    assert make_base.recipe_of(make_base.BaseConfig()) in readme.read_text()
    assert hashlib.sha256(base.read_bytes()).hexdigest() in readme.read_text()


def test_a_base_is_the_same_whether_it_was_interrupted_in_both_terms_or_not(monkeypatch, tmp_path):
    """Catches a signal that tears a step, a part of Muon, AdamW, term or corpus that a checkpoint forgets, a
    base that is made over another, a README that describes another."""
    make, first = make_base.make_tokenizer, itertools.islice
    monkeypatch.setattr(make_base, "make_tokenizer", lambda path, rows: make(path, first(rows, 300), 500))
    whole, pieces = ([f"--out_dir={tmp_path}/{name}", "--steps=4", "--layers=2", "--width=64", "--device=cpu",
                      "--batch_size=2", "--probe_steps=0"] for name in ("whole", "pieces"))
    start(make_base.make_base, whole)
    stopped_at(monkeypatch, 3)                   # of either term
    for more, said in (([], "stopped after 3 of 4"), (["--resume"], "stopped after 3 of 4"),
                       ([], "holds a base"), (["--resume", "--width=32"], "is of another recipe")):
        with pytest.raises(SystemExit, match=said):
            start(make_base.make_base, [*pieces, *more])
    start(make_base.make_base, [*pieces, "--resume"])
    made = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "pieces")]
    _, readme = (files.pop("README.md").decode() for files in made)
    assert made[0] == made[1] and made[0].keys() == {"config.json", "model.safetensors", "tokenizer.model"}
    assert hashlib.sha256(made[1]["model.safetensors"]).hexdigest() in readme and '"steps": 4' in readme


# ---- The benchmark: is the speed measured fairly?

def test_arms_share_the_base_compute_the_same_and_need_the_computed_memory(monkeypatch):
    """Catches an arm with weights of its own, a looped arm that is none, a limit without a backward pass, a
    peer that is not on the base, or trains more or less than is compared; a formula of memory that forgets a
    part: the table for a 7B comes from it."""
    config = replace(TINY, vocab_size=2000, hidden_size=96, intermediate_size=256, num_hidden_layers=3)
    monkeypatch.setitem(bench.SIZES, "smollm2-135m", config)
    cfg = bench.BenchConfig(max_length=128, max_tokens=512)
    torch.manual_seed(0)
    base, x = bench.bench_base(cfg, "cpu", torch.float32), torch.randint(0, 101, (2, 9))
    own, limit = dict(base.named_parameters()), bench.bench_model(base, bench.Arm("none", 4, 8, 3), cfg)
    batches = bench.bench_batches(cfg, 2000, 1.0)
    for method in ("teamlora", "moelora", "hydralora"):
        arm = bench.bench_model(base, bench.Arm(method, 4, 8, 3), cfg)
        assert all(p is own[name] for name, p in arm.base_parameters().items())
        if method == "moelora":
            looped = bench.bench_model(base, bench.Arm("looped", 4, 8, 3), cfg)
            load_parameters(adapter_parameters(arm), adapter_parameters(randomise(looped)))
            assert close([arm(x)], [looped(x)], atol=1e-4)
            assert all("forward" in vars(layer) for _, layer in adapter_layers(looped))
        step, _, held = bench.bench_runs(arm, bench.Arm(method, 4, 8, 3), batches, cfg)
        parts = bench.training_memory(config, adapter_layers(arm)[0][1].adapter, 4, 128, torch.float32)
        assert 0.9 < sum(parts.values()) / (held + bench.allocated_peak(step, "cpu")) < 1.15
        assert parts["weights"] + 0.75 * parts["adapters"] == pytest.approx(held, rel=0.01)     # no gradients
    assert limit(x, x)[0].requires_grad and not any(p.requires_grad for p in limit.parameters())
    tokens, targets, mask = batches[0]
    targets[:, -1] = -1                          # transformers has no use for the last
    for peer in INSTALLED:
        model, routed = bench.bench_model(base, bench.Arm(peer, 4, 8, 3), cfg), peer == "moe_peft"
        loss = PEERS[peer][2](model, tokens, targets, mask)
        assert loss.item() == pytest.approx(base(tokens, targets)[0].mean().item(), abs=1e-5)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == 3 * (3 * 32 * (96 + 256) + routed * 4 * (2 * 96 + 256))


def test_bench_writes_what_it_promises_without_what_does_not_fit(monkeypatch, tmp_path, rows, capsys):
    """Catches a missing key, method or group, lengths of --data ignored, an arm that takes the rest down."""
    def without_room(layer, x):
        raise torch.OutOfMemoryError
    monkeypatch.setitem(bench.SIZES, "smollm2-135m", TINY)
    monkeypatch.setattr(bench, "INSTALLED", [])          # else their import takes longer than all this
    monkeypatch.setattr(bench.gc, "collect", lambda: 0)  # slow where much is imported
    monkeypatch.setattr(bench, "published_loop", without_room)
    start(bench.bench, ["--device=cpu", "--max_length=16", "--rounds=1", "--layers=1", "--groups=2,spread",
                        "--max_tokens=80", "--batch_size=9", f"--data={rows}", f"--out_dir={tmp_path}"])
    written = json.loads((tmp_path / "bench.json").read_text())
    names = [r["name"] for r in written if r["group"] == "2"]
    assert names == ["frozen base", "teamlora", "lora", "moelora", "hydralora"]
    spread = [(r["n_experts"], r["rank"]) for r in written if r["group"] == "spread"]
    assert spread[1:] == [(n, 32 // n) for n in (1, 2, 4, 8, 16)] and written[0]["layers"] == 1
    positive = ("step_ms", "inference_ms", "peak_memory_mb", "utilisation", "tokens_per_second")
    assert all(r[key] > 0 for r in written for key in positive) and written[0]["over_limit"] == 1
    assert 9 * 8 < written[0]["tokens"] < 9 * 16 and capsys.readouterr().out.count("does not fit into") == 1


# ---- The comparison: is it fair?

@pytest.fixture(scope="module")
def compared(base, tmp_path_factory):
    """A small comparison: (its flags, folder, name -> lines, what it printed)."""
    out = tmp_path_factory.mktemp("compared")
    flags = [*flags_of(base, out), "--steps=7", "--search_steps=3", "--seeds=0,1", "--dropout=0.1",
             "--learning_rates=0.01,0.1", "--val_examples=0", "--methods=none,lora,teamlora"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        table = start(compare.compare, flags)
    return flags, out, table, printed.getvalue()


@pytest.mark.parametrize("name", ["lora", "teamlora"])
def test_the_rate_of_lowest_validation_loss_is_chosen_and_its_lead_said(compared, name):
    """Catches a rate chosen on test questions, a best rate at the edge left so, a search that takes the long
    runs' steps, noise that is not that of rows in pairs."""
    _, out, table, printed = compared
    tried = [line for line in json_lines(out / "compare.jsonl") if "accuracy" not in line]
    tried = sorted((t for t in tried if t["settings"]["variant"] == name), key=lambda t: t["val_loss"])
    rates = [line["settings"]["learning_rate"] for line in tried]
    assert {(line["settings"]["steps"], line["settings"]["seed"]) for line in tried} == {(3, 0)}
    assert len(rates) > 2 and (rates[0] not in (min(rates), max(rates)) or len(rates) == 5)
    chosen = [[line["settings"][key] for key in ("learning_rate", "steps", "seed")] for line in table[name]]
    assert chosen == [[rates[0], 7, 0], [rates[0], 7, 1]]
    pairs = [b - a for a, b in zip(*(line["val_losses"] for line in tried[:2]))]
    lead = tried[1]["val_loss"] - tried[0]["val_loss"]
    noise = 2 * stdev(pairs) / len(pairs) ** 0.5 * lead / mean(pairs)
    assert (f"{rates[0]:g} leads {rates[1]:g} by {lead:.4f} ± {noise:.4f} (95%, rows in pairs), "
            f"{'within' if lead <= noise else 'beyond'} noise") in printed


def test_a_line_that_is_there_is_not_made_again(compared, monkeypatch, capsys):
    """Catches hours spent twice, a setting that is no part of a line's, differences not in pairs of seeds."""
    flags, out, table = compared[0], compared[1], dict(compared[2])
    monkeypatch.setattr(train, "run_train", lambda *args: pytest.fail("trained again"))
    before = (out / "compare.jsonl").read_bytes()
    assert start(compare.compare, flags) == table and (out / "compare.jsonl").read_bytes() == before
    for name, values in (("lora", (0.5, 0.6)), ("teamlora", (0.53, 0.61))):
        table[name] = [line | {"mean_accuracy": v} for line, v in zip(table[name], values)]
    compare.print_comparison(table, "lora")
    assert "0.570  0.057   +0.020 ±0.127" in capsys.readouterr().out      # 12.71 * 0.0141 / sqrt(2)
    for other in ("--dropout=0.2", "--batch_size=5", "--val_share=0.35", "--seeds=2"):
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            start(compare.compare, [*flags, other])


def test_a_line_is_what_train_says_of_the_adapter_that_is_left(compared, base, tmp_path):
    """Catches judgement of another adapter, or by questions that were trained or chosen on."""
    flags, out, table, _ = compared
    cfg, _ = train.compose(train.parse_flags(flags, compare.CompareConfig), compare.CompareConfig)
    rows, test = compare.split_rows(cfg), f"{tmp_path}/test.json"
    prompts = [{(row.instruction, row.input) for row in part} for part in rows]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 60 and min(map(len, prompts)) > 5
    assert data.read_rows([out / "train.jsonl"]) == rows[0]
    Path(test).write_text(json.dumps([row._asdict() for row in rows[2]]))
    for line in (*table["lora"], *table["teamlora"]):
        s = line["settings"]
        folder, = out.glob(f"{s['variant']}-{s['learning_rate']}-{s['seed']}-7-*")
        result = use("eval", base, folder, f"--val_data={test}")
        assert train.overall(result)[1] == line["test_loss"]
        assert {task: r["usage"] for task, r in result.items()} == line["expert_usage"]
        assert ("task_information" in line) == (s["variant"] == "teamlora")
    bare = use("eval", base, out, "--method=none", f"--data={test}", f"--val_data={test}")
    assert train.overall(bare)[1] == table["none"][0]["test_loss"] > table["lora"][0]["test_loss"]


@pytest.mark.parametrize("variant", ["teamlora", "teamlora_router_x10"])
def test_a_comparison_that_was_interrupted_loses_no_step(compared, tmp_path, monkeypatch, variant):
    """Catches a run that begins again, or ends otherwise, after a signal in training or in judgement; routers
    at ten times the rate whose rate does nothing, or is lost by that."""
    (flags, _, table, _), judge, kept = compared, compare.judge, []
    rate = table["teamlora"][0]["settings"]["learning_rate"]
    monkeypatch.setattr(compare, "top", lambda k: kept.append(k) or top(k))
    flags = [*flags, "--seeds=0", f"--learning_rates={rate}", f"--methods={variant}", f"--out_dir={tmp_path}"]
    whole = start(compare.compare, [*flags, f"--out_dir={tmp_path}/whole"])[variant][0]
    assert (whole["val_losses"] == table["teamlora"][0]["val_losses"]) == (variant == "teamlora")
    assert kept == [1, 2, 4]

    def interrupted(*args):
        monkeypatch.setattr(compare, "judge", judge)
        raise KeyboardInterrupt
    monkeypatch.setattr(compare, "judge", interrupted)
    stopped_at(monkeypatch, 2)
    for done in (2, 7):
        with pytest.raises(SystemExit, match="interrupted; the same command goes on again"):
            start(compare.compare, flags)
        log, = tmp_path.glob(f"{variant}-*/log.jsonl")
        assert len(json_lines(log)) == done and not (tmp_path / "compare.jsonl").exists()
    monkeypatch.setattr(train, "run_train", lambda *args: pytest.fail("trained again"))
    assert same(start(compare.compare, flags)[variant][0], whole)


def test_committed_lines_are_those_of_the_documented_command(tmp_path):
    """Catches a default, a rank, a field more: the lines would not be found, and days be spent again."""
    lines = json_lines(Path(compare.__file__).with_name("smollm2.jsonl"))
    cfg = compare.CompareConfig(val_examples=200, batch_size=22, max_length=256, out_dir=str(tmp_path))
    runs = compare.Runs(cfg, compare.variants(cfg, bench.SIZES["smollm2-135m"]), "", [])
    for s in [line["settings"] for line in lines]:
        one = {"steps": s["steps"]} | runs.possible[s["variant"]]
        one = compare.run_config(cfg, one, s["learning_rate"], s["seed"])
        assert same(runs.settings(s["variant"], one) | {key: s[key] for key in ("base", "rows")}, s)
    assert len({json.dumps(line["settings"]) for line in lines}) == len(lines) >= 24


def test_variants_are_of_one_size_and_one_effective_scale():
    """Catches a method with more parameters, or another alpha / r, than the others; a rank of 0, a number of
    experts that does not divide the total rank; router and M not at ten times the rate of A and B."""
    for rank, E in ((8, 4), (1, 4), (7, 3)):
        cfg, size, config = compare.CompareConfig(rank=rank, n_experts=E), {}, replace(TINY, hidden_size=192)
        for name, settings in compare.variants(cfg, config).items():
            one = compare.run_config(cfg, settings, 1e-3, 0)
            size[name] = sum(p.numel() for p in adapter_parameters(Llama(config, one.adapter)).values())
            factor = E if name.endswith("_sum_E") else 1 / E if name.endswith("_sum_1") else 1
            assert one.alpha / one.rank == pytest.approx(factor * cfg.alpha / cfg.rank), name
            assert not name.startswith("teamlora_E") or one.rank * one.n_experts == rank * E, name
        for name in ("lora", "moelora", "hydralora", "moelora_sum_E", "hydralora_sum_E", "teamlora_sum_1"):
            assert abs(size[name] - size["teamlora"]) < size["hydralora"] / rank, name   # less than a rank
    slow, fast = compare.fast_routers(model := tiny(), train.Config()).param_groups
    names = {p: name.rpartition(".")[2] for name, p in adapter_parameters(model).items()}
    assert {names[p] for p in slow["params"]} == {"lora_A", "lora_B"} and "scale" not in slow
    assert {names[p] for p in fast["params"]} == {"router", "interaction"} and fast["scale"] == 10


def test_best_rate_looks_beyond_the_edge_but_not_for_ever():
    """Catches a best rate at the edge left so, a search without end."""
    assert compare.best_rate((1e-3, 1e-2), lambda rate: -abs(rate - 1e-2)) == 1e-2
    assert compare.best_rate((1e-3, 1e-2), lambda rate: -rate) == 1e-6           # three steps beyond
    assert compare.best_rate((1e-3,), lambda rate: pytest.fail("nothing to choose")) == 1e-3


def test_use_of_experts_is_measured_in_bits_without_padding_and_tasks_weigh_alike():
    """Catches nats, negative weights counted, information where experts ignore the task, statistics over
    padding or the first micro-batch only, or that a large task dominates."""
    assert torch.equal(compare.entropy(torch.tensor([[0.25] * 4, [0, 0, 1.0, 0]])), torch.tensor([2.0, 0]))
    assert torch.equal(compare.distribution(torch.tensor([3.0, -2.0, 1.0])), torch.tensor([0.75, 0, 0.25]))
    assert compare.mutual_information(torch.full((4, 1, 2), 0.5), torch.tensor([0, 0, 1, 1])) == 0
    use_of, wanted = compare.ExpertUse(), {"task_information": 1, "weight_entropy": 0, "usage_variation": 1}
    for task, experts in (("a", [0, 0]), ("a", [0]), ("b", [1])):
        some = torch.eye(2)[experts]             # (B, E); the second token of each row is padding
        use_of(task, torch.stack((some, 1 - some), 1)[None], torch.tensor([[True, False]] * len(some)))
    assert {key: use_of.statistics()[key] for key in wanted} == pytest.approx(wanted)


def test_options_majority_and_the_likeliest_answer_whole(base):
    """Catches options of other tasks, the commonest place missed, losses that go to other rows of a
    micro-batch, an end left out, a mean for a sum."""
    listed = [data.Row("listed", "Choose.", f"Options: {text}", answer) for text, answer in (
        ("d; b c", "b c"), ("e; f", "f"), ("g; h", "i"))]
    few = [data.Row("few", f"Is it {i * i}?", i % 7 * "x", ("yes", "no", "red")[i % 3]) for i in range(60)]
    many = [data.Row("many", "Say it.", str(i), str(i % 12)) for i in range(24)]
    trained = few[0]._replace(output="the old man")
    asked = compare.with_options([*listed, *few, *many], [*listed, *few, *many, trained])
    assert [options for _, options in asked["listed"]] == [["d", "b c"], ["e", "f"], []]
    assert all(options == ["no", "red", "the old man", "yes"] for _, options in asked["few"])
    assert [*map(compare.majority, asked.values())] == [1 / 3, 2 / 3, 1 / 12]        # few, listed, many
    model, encode, _ = train.prepare(train.Config(init_from=str(base), device="cpu"))

    def loss(row):
        return model(*data.collate([encode(row)])[:2])[0].sum().item()
    right = [min(options, key=lambda o: loss(row._replace(output=o))) == row.output
             for row, options in asked["few"][:compare.PROBES]]
    given = compare.choice_accuracy(model, encode, asked, compare.CompareConfig())
    assert given.keys() == {"few", "listed"} and given["few"] == mean(right) and 0 < mean(right) < 1


# ---- The experts' values: do they mean what they say?

def test_shapley_values_and_interactions_are_those_of_all_orders():
    """Catches wrong weights of coalitions, an expert mistaken for another, a sign in the index."""
    value = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # three games
    naive, pairs = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 4, 3, dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        joined = [sum(1 << e for e in order[:n]) for n in range(5)]
        for n, e in enumerate(order):
            naive[e] += (value[joined[n + 1]] - value[joined[n]]) / 24
        for n, (i, j) in enumerate(zip(order, order[1:])):       # six orders have j right after i
            alone = value[joined[n] | 1 << i] + value[joined[n] | 1 << j]
            pairs[i, j] += (value[joined[n + 2]] - alone + value[joined[n]]) / 6
    assert torch.allclose(shapley_values(value), naive) and torch.allclose(shapley_interactions(value), pairs)
    a, tied = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([1.0, 1.0, 2.0, 3.0])
    assert [rank_correlation(a, b) for b in (a ** 3, -a, tied)] == pytest.approx([1, -1, 0.9 ** 0.5])
    assert rank_correlation(a, torch.ones(4)) is None    # NaN is no JSON


def test_experts_switched_off_add_nothing_and_the_largest_take_over_their_sum():
    """Catches a mask that misses a layer, a top-k over the wrong axis, one that rescales wrongly."""
    model, bare, x, y = tiny(targets=("down_proj", "q_proj")), Llama(TINY), torch.randint(0, 101, (2, 9)), []
    load_parameters(bare.base_parameters(), model.base_parameters())
    for _, layer in adapter_layers(model):
        layer.lora_B.data[:, 9:] = 0             # expert 3 is worth nothing
    for experts in ([], [3], shapley.coalition(0b0111), shapley.coalition(0b1111), [1]):
        with changed_weights(model, only(experts, 4)):
            y.append(model(x))
    assert torch.equal(y[0], bare(x)) and torch.equal(y[1], y[0]) and torch.equal(y[2], y[3])
    assert not close(y[3:4], y[4:], atol=1e-3)
    w = torch.tensor([[0.5, 2.0, 1.6, -0.1], [1.0, 0.9, 1.1, 1.0]])
    assert torch.allclose(top(1)(w), torch.tensor([[0, 4.0, 0, 0], [0, 0, 4.0, 0]]))
    assert torch.allclose(top(2)(w)[0], torch.tensor([0, 2.0, 1.6, 0]) * 4 / 3.6)


def test_shapley_values_explain_the_whole_gain(finished, base, rows):
    """Catches coalitions misnamed: the values must sum to v(all) - v(none) for every task; other usage."""
    out, summary = finished
    result = start(shapley.shapley, [f"--out_dir={out}", f"--init_from={base}", "--device=cpu"])
    full = use("eval", base, out)
    bare = use("eval", base, out, "--method=none", f"--data={rows}", "--val_share=0.3", "--val_examples=5")
    for key, sign in (("accuracy", 1), ("loss", -1)):
        gain = torch.tensor([sign * (full[task][key] - bare[task][key]) for task in full])
        assert close(result["shapley"][key].sum(1).float(), gain) and gain.all()
    written = json.loads((out / "shapley.json").read_text())
    assert written["tasks"] == [*full] and len(written["value"]["loss"]) == 16
    assert close(torch.tensor(written["usage"]), torch.tensor([*summary["usage"].values()]))
