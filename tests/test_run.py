"""Does a run do what it says, and does it survive whatever happens to it?

    pytest tests/test_run.py                half a minute
    SLOW=1 pytest -s tests/test_run.py      also thirty kills and twenty thousand steps

Every run here is one of train.main, most of them 20 steps on a tiny random base. "The same run" means the
same bits: parameters, optimizer, counters, log. Each docstring says which break the test catches.
"""

import errno
import io
import json
import math
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import data
import train
from model import fingerprint, load_llama, open_weights
from teamlora import InputError, adapter_parameters
from tests.conftest import (QUICK, Code, assert_same_run, files_in, flags_of, load, prepared, read_log, same,
                            use)

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            train.__file__]
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes; SLOW=1 pytest runs it")


# ---- Does a run do what it says?

def test_summary_has_what_it_promises(finished):
    """Catches a missing key and numbers that do not belong together."""
    out, summary = finished
    written = json.loads((out / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    assert {"method", "seed", "steps", "seconds", "tokens_per_second", "skipped_steps",
            "trainable_parameters", "total_parameters", "accuracy", "chance", "base_accuracy",
            "mean_accuracy", "base_mean_accuracy", "val_loss", "base_val_loss", "expert_usage",
            "peak_memory_mb", "device"} <= written.keys()
    for key in ("accuracy", "chance", "base_accuracy", "expert_usage"):
        assert written[key].keys() == data.TASKS.keys()
    assert all(math.isclose(sum(u), 4, rel_tol=1e-3) for u in written["expert_usage"].values())
    assert written["val_loss"] < written["base_val_loss"]
    lines = read_log(out)
    assert [r["step"] for r in lines] == list(range(1, 21)) and lines[-1]["loss"] < lines[0]["loss"]
    layers, C, F, E, r = 2, 64, 160, 4, 2
    assert written["trainable_parameters"] == layers * (3 * (E * r * (C + F) + E * E) + E * (2 * C + F))


def test_training_leaves_the_base_alone(finished, base):
    """Catches a run that changes the weights it calls frozen, in memory or in their folder."""
    weights = {name: t.clone() for name, t in open_weights(base).items()}
    model, *_ = prepared(base, finished[0])
    assert all(torch.equal(p, weights[name]) for name, p in model.base_parameters().items())
    assert any(p.abs().max() > 0 for n, p in adapter_parameters(model).items() if n.endswith("lora_B"))
    assert sorted(p.name for p in base.iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]


def test_eval_reproduces_the_numbers_exactly(finished, base):
    """Catches an adapter file that is not what was evaluated."""
    out, summary = finished
    results = use("eval", base, out)
    assert {t: r["accuracy"] for t, r in results.items()} == summary["accuracy"]
    assert train.val_loss(results) == summary["val_loss"]
    assert {t: r["usage"] for t, r in results.items()} == summary["expert_usage"]


def test_default_base_and_files_take_the_same_road(base, tmp_path):
    """Catches a default that differs from --init_from=assets/base, and files of which a task is lost."""
    flags = [*QUICK, "--steps=1", "--val_examples=1"]
    for name, more in (("default", []), ("named", [f"--init_from={train.BUILT_IN_BASE}"])):
        train.main([*flags, *more, f"--out_dir={tmp_path}/{name}"])
    assert same(*(load(tmp_path / name / "adapter.pt")["parameters"] for name in ("default", "named")))
    (tmp_path / "rows").mkdir()
    for task, n in (("colours", 40), ("sizes", 30)):
        rows = [{"instruction": f"{task}: which is number {i}?", "output": f"it is {i % 3} 🙂"}
                for i in range(n)]
        (tmp_path / "rows" / f"{task}.json").write_text(json.dumps(rows))
    summary = train.main(flags_of(base, tmp_path / "out", f"--data={tmp_path}/rows", "--method=lora",
                                  "--steps=4", "--val_share=0.2"))
    assert summary["accuracy"].keys() == {"colours", "sizes"} and not summary["chance"]
    assert summary["val_loss"] < summary["base_val_loss"]


def test_every_flag_has_help(capsys):
    """Catches a flag that nobody explained."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and train.__doc__.splitlines()[0] in text
    for f in train.fields(train.Config):
        assert f"--{f.name}" in text and len(f.metadata["help"]) > 10, f.name


def test_paper_settings_are_one_flag_that_others_override(tmp_path):
    """Catches a preset that other flags do not override, or that sets what is no setting."""
    cfg, _ = train.compose(train.parse_flags(["--paper", "--rank=16", f"--out_dir={tmp_path}"]))
    assert (cfg.rank, cfg.n_experts, cfg.alpha, cfg.dropout, cfg.learning_rate) == (16, 4, 32.0, 0.05, 2e-4)


def test_deterministic_flag_gives_the_same_bits_here(finished, base, tmp_path):
    """Catches a flag that breaks a run; what it is for needs a GPU."""
    try:
        train.main(flags_of(base, tmp_path, "--deterministic"))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(*(load(out / "adapter.pt")["parameters"] for out in (finished[0], tmp_path)))


# ---- Answers and exports

def test_sample_of_the_bare_base_continues_the_text(base, tmp_path, capsys):
    """Catches a bare base that is asked as an adapter is, and a length that is ignored."""
    text, out = "Anna lives in", tmp_path / "none"
    model, tokenizer, _ = prepared(base, out, method="none")
    ids, cfg = tokenizer.prefix + tokenizer.encode(text), train.Config()
    answers = [train.answers(model, tokenizer, [ids], cfg, n)[0] for n in (5, 9)]
    capsys.readouterr()
    for n, answer in zip((5, 9), answers):
        use("sample", base, out, "--method=none", f"--prompt={text}", f"--max_new_tokens={n}")
        assert capsys.readouterr().out == f"{answer}\n"
    assert len(answers[0]) < len(answers[1])


def test_without_a_prompt_every_line_is_answered_as_it_comes(finished, base, capsys, monkeypatch):
    """Catches a chat that drops a line, repeats what it printed, or answers otherwise than --prompt does."""
    questions = ["Where does Anna live?", "Is it a hammer? 🙂"]
    model, tokenizer, _ = prepared(base, finished[0])
    asked = [data.to_example(tokenizer, data.Row("", q, "", "")).ids[:-1] for q in questions]
    expected = [train.answers(model, tokenizer, [ids], train.Config(), 9)[0] for ids in asked]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(questions) + "\n"))
    capsys.readouterr()
    use("sample", base, finished[0], "--max_new_tokens=9")
    assert capsys.readouterr().out == "".join(f"{a}\n" for a in expected)
    use("sample", base, finished[0], "--max_new_tokens=9", f"--prompt={questions[1]}")
    assert capsys.readouterr().out == f"{expected[1]}\n"


def test_generation_ends_where_the_template_ends_an_answer(base, tmp_path):
    """Catches an answer that runs past <|eot_id|> because the base's files name another end."""
    model, tokenizer, _ = prepared(base, tmp_path, method="none", template="{instruction}{output}the")
    assert model.config.eos_token_id == (tokenizer.end, 2) == (tokenizer.encode("the")[0], 2)


def test_letters_of_several_tokens_are_printed_once_whole(tokenizer, capsys):
    """Catches half a letter on the terminal: an unknown character is spelt in bytes, one token each."""
    show, text = train.printer(tokenizer, (2,)), "Anna 🙂 naïve"
    for t in tokenizer.encode(text) + [2]:
        show(torch.tensor([[t]]))
    out = capsys.readouterr().out
    assert out == text and "\ufffd" not in out


@pytest.mark.parametrize("method", ["lora", "full"])
def test_export_writes_a_plain_llama(base, tmp_path, method):
    """Catches an export without tokenizer, chat template or what was trained, and one that replaces an older
    export."""
    base = shutil.copytree(base, tmp_path / "base")
    (base / "tokenizers.old").mkdir()
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "generation_config.json").write_text('{"eos_token_id": 7, "top_p": 0.9}')
    train.main(flags_of(base, tmp_path, "--steps=4", f"--method={method}", "--template=llama2"))
    use("export", base, tmp_path)
    model, tokenizer, _ = prepared(base, tmp_path)
    exported, tokens = load_llama(tmp_path / "export"), torch.randint(0, tokenizer.size, (2, 65))
    with torch.no_grad():
        assert (exported(tokens) - model(tokens)).abs().max() < 1e-4
    frozen = load_llama(base).model.layers[0].mlp.up_proj.weight
    assert not torch.equal(exported.model.layers[0].mlp.up_proj.weight, frozen)
    assert data.open_tokenizer(tmp_path / "export", 2).size == tokenizer.size
    assert (tmp_path / "export" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text()) == {
        "eos_token_id": [2, 7], "top_p": 0.9}
    with pytest.raises(SystemExit, match="exists already"):
        use("export", base, tmp_path)


def test_export_refuses_what_cannot_be_merged_and_copies_a_bare_base(finished, base, tmp_path):
    """Catches a merge that drops the router, a folder that a refused export leaves, a base that changes."""
    before = files_in(finished[0])
    with pytest.raises(SystemExit, match="4 experts cannot be merged"):
        use("export", base, finished[0])
    assert files_in(finished[0]) == before
    use("export", base, tmp_path, "--method=none")
    assert fingerprint(load_llama(tmp_path / "export")) == fingerprint(load_llama(base))


def test_adapter_that_does_nothing_is_reported(finished, base, tmp_path, capsys):
    """Catches an adapter whose B was never written: it is exactly the base model, with no other symptom."""
    saved = load(finished[0] / "adapter.pt")
    for name, p in saved["parameters"].items():
        p.zero_() if name.endswith("lora_B") else None
    torch.save(saved, tmp_path / "adapter.pt")
    for out, reported in ((tmp_path, True), (finished[0], False)):
        use("sample", base, out, "--prompt=Where does Anna live?")
        assert ("every B of the adapter" in capsys.readouterr().out) == reported


# ---- Is a resumed run the same run?

@pytest.mark.parametrize("more", [[], ["--dropout=0.2", "--balance=0.1"], ["--method=full"]])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(finished, base, tmp_path, more):
    """Catches state that a checkpoint forgets: moments, step, dropout's seed, counters, log."""
    whole, halves = tmp_path / "whole" if more else finished[0], tmp_path / "halves"
    if more:
        train.main(flags_of(base, whole, *more))
    assert train.main(flags_of(base, halves, *more, "--stop_at=10")) is None
    train.main(flags_of(base, halves, *more, "--resume"))
    assert load(halves / "checkpoint.pt")["totals"]["step"] == 20 == len(read_log(halves))
    assert_same_run(whole, halves)


def test_resume_starts_where_nothing_is_there_and_needs_no_flag_twice(finished, base, tmp_path, capsys):
    """Catches a first call with --resume that fails, and settings that a resumed run forgets."""
    assert train.main(flags_of(base, tmp_path, "--resume", "--stop_at=5")) is None
    assert "nothing to resume" in capsys.readouterr().out
    assert train.main([f"--out_dir={tmp_path}", "--device=cpu", "--resume", "--stop_at=7"]) is None
    train.main([f"--out_dir={tmp_path}", "--device=cpu", "--resume"])
    assert_same_run(finished[0], tmp_path)


def test_unfinished_run_is_not_overwritten(base, tmp_path):
    """Catches a forgotten --resume that throws a night's work away."""
    assert train.main(flags_of(base, tmp_path, "--stop_at=2")) is None
    before = files_in(tmp_path)
    with pytest.raises(SystemExit, match="at step 2 of 20 of a run that has not ended: "
                                         "continue it with --resume"):
        train.main(flags_of(base, tmp_path))
    assert files_in(tmp_path) == before


def test_a_finished_run_may_be_replaced_whole(base, tmp_path):
    """Catches lines and checkpoints of the old run beside those of the new one."""
    train.main(flags_of(base, tmp_path, "--steps=8", "--val_examples=1"))
    assert train.main(flags_of(base, tmp_path, "--steps=9", "--val_examples=1", "--stop_at=2")) is None
    assert [r["step"] for r in read_log(tmp_path)] == [1, 2]
    assert load(tmp_path / "checkpoint.pt")["totals"]["step"] == 2
    assert not (tmp_path / "previous_checkpoint.pt").exists()


def write_rows(path, n=60):
    """A file of n rows, sorted by a task of their own."""
    rows = [{"instruction": f"number {i}?", "output": f"it is {i % 3}", "task": "ab"[i >= n // 2]}
            for i in range(n)]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def test_resuming_with_other_built_in_tasks_is_refused(base, tmp_path, monkeypatch):
    """Catches a run that goes on with another stream of questions after TASKS was edited."""
    assert train.main(flags_of(base, tmp_path, "--stop_at=2")) is None
    monkeypatch.setattr(data, "TASKS", dict([*data.TASKS.items()][1:]))  # an own one: their order counts
    with pytest.raises(SystemExit, match="rows are not those"):
        train.main(flags_of(base, tmp_path, "--resume"))


def test_resuming_on_other_rows_is_refused_but_files_may_move(base, tmp_path):
    """Catches a data file that changed between parts of a run, a resumed run that wants its paths again, or
    the old ones, and flags that are checked without the saved ones."""
    rows, out = write_rows(tmp_path / "rows.json"), tmp_path / "out"
    flags = flags_of(base, out, f"--data={rows}", "--steps=4", "--max_length=200")
    assert train.main(flags + ["--stop_at=2"]) is None
    write_rows(rows, 58)
    with pytest.raises(SystemExit, match="rows are not those"):
        train.main(flags + ["--resume"])
    write_rows(rows)
    resume = [f"--out_dir={out}", "--device=cpu", "--resume"]
    assert train.main([*resume, "--max_tokens=208", "--stop_at=3"]) is None
    rows.unlink()
    moved = [f"--data={write_rows(tmp_path / 'moved' / 'rows.json')}",
             f"--init_from={shutil.copytree(base, tmp_path / 'base')}"]
    assert train.main([*resume, *moved])["steps"] == 4


def test_a_run_that_has_ended_goes_on_with_more_steps(finished, base, tmp_path, capsys):
    """Catches more steps that are refused, begin anew, or at a learning rate nobody was told of."""
    out = shutil.copytree(finished[0], tmp_path / "more")
    assert train.main([f"--out_dir={out}", "--device=cpu", "--resume", "--steps=30"])["steps"] == 30
    log, old = read_log(out), read_log(finished[0])
    assert [r["step"] for r in log] == list(range(1, 31)) and same(log[:20], old)
    rates = [3e-3 * train.schedule(i, 30, 0.2) for i in range(20, 30)]
    assert [r["learning_rate"] for r in log[20:]] == rates
    assert "--steps=30, 20 before: the learning rate goes on at 0.0011, not at 0," in capsys.readouterr().out


def test_a_new_run_starts_from_an_adapter(finished, base, tmp_path):
    """Catches an adapter that is not loaded, lends more than itself, or is taken for another later."""
    old = [f"--init_from={base},{finished[0]}/adapter.pt", "--device=cpu", f"--out_dir={tmp_path}"]
    quick = [flag for flag in QUICK if not flag.startswith(("--rank", "--steps", "--warmup"))]
    for more in (["--stop_at=2"], ["--resume"]):         # the second says as the first how it began
        summary = train.main([*quick, *old, "--steps=4", *more])
    assert summary["base_val_loss"] == finished[1]["val_loss"] > summary["val_loss"]
    log, config = read_log(tmp_path), load(tmp_path / "adapter.pt")["config"]
    assert [r["step"] for r in log] == [1, 2, 3, 4] and log[0]["learning_rate"] == 3e-3
    assert (config["rank"], config["warmup"], config["init_from"]) == (2, train.Config.warmup, str(base))
    assert train.val_loss(use("eval", base, tmp_path)) == summary["val_loss"]
    assert train.val_loss(train.main([*old, "--mode=eval"])) == finished[1]["val_loss"]


def test_training_on_all_rows_evaluates_nothing(base, tmp_path, capsys):
    """Catches a share of 0 that is refused, loses rows, or crashes where there is nothing to evaluate."""
    flags = flags_of(base, tmp_path / "out", f"--data={write_rows(tmp_path / 'rows.json')}", "--val_share=0",
                     "--method=lora", "--steps=4")
    assert train.main([*flags, "--stop_at=2"]) is None
    summary = train.main([*flags, "--resume"])
    assert summary["mean_accuracy"] is summary["val_loss"] is summary["base_mean_accuracy"] is None
    assert summary["accuracy"] == {} and "mean accuracy" not in capsys.readouterr().out
    assert len(train.read_data(train.Config(data=f"{tmp_path}/rows.json", val_share=0.0))[0]) == 60
    with pytest.raises(SystemExit, match="holding out 0% of 60 rows .* give --val_data"):
        train.main([*flags, "--mode=eval"])
    use("export", base, tmp_path / "out")


def test_evaluation_takes_a_sample_that_new_rows_hardly_change(tokenizer, tmp_path):
    """Catches the first rows of a sorted file in place of a sample of all."""
    cfg, picked = train.Config(val_examples=20), []
    for n in (400, 401):
        rows = [data.Row("t", f"number {i}?", "", "low" if i < n // 2 else "high") for i in range(n)]
        picked.append(train.encode_held_out(cfg, tokenizer, rows, "test")["t"])
    answers = Counter(tokenizer.decode(e.ids[e.n_prompt:-1]) for e in picked[0])
    assert sum(answers.values()) == 20 and min(answers["low"], answers["high"]) >= 5
    assert len([e for e in picked[1] if e in picked[0]]) >= 19


def test_what_is_told_of_length_and_home(base, tmp_path, monkeypatch, capsys):
    """Catches rows longer than the base was made for of which nobody hears, and a folder called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg, _ = train.compose(train.parse_flags(["--out_dir=~/out", "--data=~/a,b~/~"]))
    assert (cfg.out_dir, cfg.data) == (f"{tmp_path}/out", f"{tmp_path}/a,b~/~")
    for length, told in ((2048, False), (2049, True)):
        prepared(base, tmp_path, method="none", data="x", max_length=length, max_tokens=4096)
        assert ("max_position_embeddings=2048" in capsys.readouterr().out) == told


# ---- Bad steps, several processes

def test_many_steps_that_are_not_finite_stop_the_run(base, tmp_path, monkeypatch):
    """Catches nights of skipped steps, and an infinite loss whose gradient is finite."""
    real, steps = train.sum_over_processes, []

    def infinite(*tensors):
        real(*tensors)
        if len(tensors) > 3:                     # loss and gradients, once a step
            steps.append(len(tensors))
            tensors[0].mul_(math.inf if len(steps) > 5 else 1)
    monkeypatch.setattr(train, "sum_over_processes", infinite)
    with pytest.raises(SystemExit, match="20 steps in a row up to step 25 .* --learning_rate"):
        train.main(flags_of(base, tmp_path, "--steps=40"))
    monkeypatch.undo()
    saved = train.read_checkpoint(tmp_path / "checkpoint.pt")
    assert saved["totals"]["step"] == 25 and saved["totals"]["skipped"] == 20
    assert [r["loss"] is None for r in read_log(tmp_path)] == [False] * 5 + [True] * 20
    assert train.main(flags_of(base, tmp_path / "five", "--steps=40", "--stop_at=5")) is None
    assert same(saved["parameters"], load(tmp_path / "five" / "checkpoint.pt")["parameters"])


def test_two_processes_train_and_evaluate_as_one(base, tmp_path):
    """Catches a mean of means of processes, adapters drifting apart, lost or double examples, two writers, a
    process without an example of some task."""
    flags = flags_of(base, tmp_path, "--steps=4", "--save_every=2", "--learning_rate=1e-3", "--balance=0.3",
                     "--max_tokens=512", "--max_length=512", "--val_examples=1")
    one = train.main([*flags, f"--out_dir={tmp_path}/one"])
    run = subprocess.run([*TORCHRUN, *flags, f"--out_dir={tmp_path}/two"], capture_output=True, text=True,
                         env=ONE_THREAD, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("mean accuracy") == 1
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 4
    for a, b in zip(*logs):
        assert a["supervised_tokens"] == b["supervised_tokens"]
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5)
        assert math.isclose(a["gradient_norm"], b["gradient_norm"], rel_tol=1e-4)
    saved = [load(tmp_path / name / "checkpoint.pt") for name in ("one", "two")]
    assert saved[0]["totals"]["tokens"] == saved[1]["totals"]["tokens"]
    for name, p in saved[0]["parameters"].items():
        assert (p - saved[1]["parameters"][name]).norm() <= 1e-4 * p.norm(), name
    assert math.isclose(one["val_loss"], two["val_loss"], rel_tol=1e-5) and one["accuracy"] == two["accuracy"]
    for task, usage in one["expert_usage"].items():
        assert two["expert_usage"][task] == pytest.approx(usage, rel=1e-4)


@pytest.mark.parametrize("more", [["--mode=sample"], ["--mode=export"], ["--batch_size=1"]])
def test_several_processes_are_refused_where_they_have_no_work(finished, base, monkeypatch, more):
    """Catches a chat or an export that every process does for itself, and a process without an example."""
    monkeypatch.setattr(train, "RANKS", 2)
    with pytest.raises(SystemExit, match="2 processes are for --mode=train and eval"):
        train.main(flags_of(base, finished[0], *more))


# ---- Signals

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [6, 19], ids=["middle", "last step"])
def test_a_signal_finishes_the_step_and_tells_how_to_continue(
        finished, base, tmp_path, monkeypatch, capsys, number, at):
    """Catches a signal that tears a step or is forgotten, a told command that does not continue."""
    schedule = train.schedule
    monkeypatch.setattr(train, "schedule", lambda step, *args: (
        signal.raise_signal(number) if step == at else None) or schedule(step, *args))
    handler, out = signal.getsignal(number), tmp_path / "a folder"
    assert train.main(flags_of(base, out, "--targets=gate_proj,up_proj,down_proj")) is None
    assert signal.getsignal(number) == handler
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"stopped after {at + 1} of 20 steps; continue with: python train.py ")
    monkeypatch.undo()
    train.main(shlex.split(told.partition("python train.py ")[2]))
    assert_same_run(finished[0], out)


def test_a_signal_while_pytorch_loads_is_no_traceback(tmp_path):
    """Catches Ctrl-C in the first seconds that prints a page."""
    (tmp_path / "torch.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)")
    with subprocess.Popen([sys.executable, train.__file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}) as process:
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == (b"", b"") and process.returncode == -signal.SIGINT


def test_a_signal_outside_of_training_is_one_line(base, tmp_path, monkeypatch):
    """Catches a traceback where somebody pressed Ctrl-C or a queue sent SIGTERM, in any mode."""
    monkeypatch.setattr(train, "load_llama", lambda *args: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match="error: interrupted; the same command"):
        use("eval", base, tmp_path, "--method=none")


def test_a_signal_to_torchrun_saves_at_the_next_step(base, tmp_path):
    """Catches processes that leave at different steps, that wait for a log line until torchrun kills them, or
    that lock each other out when they go on."""
    flags = flags_of(base, tmp_path, "--steps=100000", "--log_every=100000", "--save_every=0")
    with open(tmp_path / "printed", "w+") as printed:
        process = subprocess.Popen([*TORCHRUN, *flags], stdout=printed, stderr=subprocess.STDOUT,
                                   env=ONE_THREAD)
        deadline = time.time() + 120
        while "train:" not in (tmp_path / "printed").read_text() and time.time() < deadline:
            time.sleep(0.1)
        process.terminate()
        process.wait(timeout=60)
    told = (tmp_path / "printed").read_text()
    for once in ("before:   0%|", "SIGTERM: finishing this step", "stopped after"):    # by process 0 alone
        assert told.count(once) == 1, told
    assert "continue with: torchrun --nproc_per_node=2 train.py --" in told
    step = train.read_checkpoint(tmp_path / "checkpoint.pt")["totals"]["step"]
    assert f"stopped after {step} of 100000 steps" in told and step > 0
    more = subprocess.run([*TORCHRUN, *flags, "--resume", f"--stop_at={step + 1}"], capture_output=True,
                          text=True, env=ONE_THREAD)
    assert f"stopped after {step + 1} of 100000 steps" in more.stdout, more.stderr


def test_a_signal_to_another_process_stops_this_one_at_the_same_step(finished, base, tmp_path, monkeypatch):
    """Catches a process that goes on and waits for ever in the sums of the next step."""
    asked = []

    def with_another(*tensors):                  # whose signal comes in step 7
        if len(tensors) == 1 and tensors[0].dim() == 0 and tensors[0] == 0:
            asked.append(tensors[0])
            tensors[0].add_(len(asked) == 7)
    monkeypatch.setattr(train, "sum_over_processes", with_another)
    assert train.main(flags_of(base, tmp_path)) is None
    assert load(tmp_path / "checkpoint.pt")["totals"]["step"] == 7
    monkeypatch.undo()
    train.main(flags_of(base, tmp_path, "--resume"))
    assert_same_run(finished[0], tmp_path)


def test_second_signal_ends_at_once():
    """Catches a run that cannot be stopped while a step or a save hangs."""
    code = ("import signal, train\nwith train.held_signals() as noted:\n"
            "    signal.raise_signal(signal.SIGINT)\n    print(noted, flush=True)\n"
            "    signal.raise_signal(signal.SIGTERM)\n    print('still here')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(train.__file__).parent)
    assert done.returncode == -signal.SIGTERM and "SIGINT" in done.stderr
    assert "[2]" in done.stdout and "still here" not in done.stdout


# ---- Damaged files

def truncated(raw):
    return raw[:len(raw) // 2]


def zeroed(raw):
    return bytes(len(raw))


def flipped(raw):
    return raw[:len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1:]


@pytest.mark.parametrize("damage", [truncated, zeroed, flipped, lambda raw: b"", None],
                         ids=lambda d: getattr(d, "__name__", "gone"))
def test_damaged_checkpoint_falls_back_on_the_one_before(finished, base, tmp_path, capsys, damage):
    """Catches damage that is loaded or ends the run; None is a kill between the two renames of a save."""
    assert train.main(flags_of(base, tmp_path, "--stop_at=10")) is None
    newest, before = tmp_path / "checkpoint.pt", tmp_path / "previous_checkpoint.pt"
    assert [load(p)["totals"]["step"] for p in (newest, before)] == [10, 8]
    newest.write_bytes(damage(newest.read_bytes())) if damage else newest.unlink()
    capsys.readouterr()
    train.main(flags_of(base, tmp_path, "--resume"))
    warned = f"warning: {newest}: not a readable file" in capsys.readouterr().out
    assert warned == (damage is not None)
    assert_same_run(finished[0], tmp_path)
    for path in (newest, before):
        path.write_bytes(zeroed(path.read_bytes()))
    with pytest.raises(SystemExit, match="previous_checkpoint.pt: not a readable file"):
        train.main(flags_of(base, tmp_path, "--resume"))


def test_every_flipped_bit_is_noticed_or_changes_nothing(finished, tmp_path):
    """Catches a checksum that leaves out part of the file."""
    raw, rng, refused = (finished[0] / "adapter.pt").read_bytes(), random.Random(0), 0
    expected = train.read_saved(finished[0] / "adapter.pt")
    for _ in range(300):
        bad = bytearray(raw)
        bad[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (tmp_path / "adapter.pt").write_bytes(bad)
        try:
            assert same(train.read_saved(tmp_path / "adapter.pt"), expected)
        except InputError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("name", ["adapter.pt", "checkpoint.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("dump", [torch.save, lambda code, path: path.write_bytes(pickle.dumps(code))],
                         ids=["zip", "pickle"])
def test_code_in_a_file_is_refused_and_does_not_run(base, tmp_path, name, dump):
    """Catches a load without weights_only."""
    path = tmp_path / name
    dump({"config": Code()}, path)
    with pytest.raises(SystemExit, match="ran"):                                     # so it is real code
        torch.load(path, weights_only=False) if dump is torch.save else pickle.loads(path.read_bytes())
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    flags = {"adapter.pt": ["--mode=eval"], "checkpoint.pt": ["--resume"],
             "pytorch_model.bin": ["--mode=eval", "--method=none", f"--init_from={tmp_path}"]}[name]
    with pytest.raises(SystemExit, match=name):
        train.main([f"--out_dir={tmp_path}", *flags])


# ---- Full disks, power cuts, too little memory, two runs in one folder

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_leaves_the_last_good_checkpoint_and_training_goes_on(
        finished, base, tmp_path, monkeypatch, capsys):
    """Catches a failed save that ends the run, or that takes the checkpoint before it along."""
    seen, schedule = [], train.schedule

    def fill_disk(step, *args):
        if step == 4:
            (tmp_path / "checkpoint.pt.tmp").symlink_to("/dev/full")     # the save after step 8 meets it
        if step == 8:
            seen.append(load(tmp_path / "checkpoint.pt")["totals"]["step"])
        return schedule(step, *args)
    monkeypatch.setattr(train, "schedule", fill_disk)
    train.main(flags_of(base, tmp_path))
    assert seen == [4] and capsys.readouterr().out.count("No space left on device") == 1
    monkeypatch.undo()
    assert_same_run(finished[0], tmp_path)
    # where there is no next time, the run must not end as if it had saved
    (tmp_path / "stop" / "checkpoint.pt.tmp").mkdir(parents=True)
    with pytest.raises(SystemExit, match="error: .*checkpoint.pt.tmp"):
        train.main(flags_of(base, tmp_path / "stop", "--stop_at=3"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of a file")
def test_a_disk_that_fills_up_in_the_middle_of_a_file(finished, base, tmp_path, monkeypatch, capsys):
    """Catches the error that torch.save makes of a refused write, after which a run used to end."""
    import resource
    limits, schedule = resource.getrlimit(resource.RLIMIT_FSIZE), train.schedule

    def fill_disk(step, *args):                  # the save after step 8 may write half of its checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (90_000 if 4 <= step < 8 else limits[0], limits[1]))
        return schedule(step, *args)
    monkeypatch.setattr(train, "schedule", fill_disk)
    train.main(flags_of(base, tmp_path))
    told = f"File too large: '{tmp_path}/checkpoint.pt.tmp'; training goes on"
    assert capsys.readouterr().out.count(told) == 1
    monkeypatch.undo()
    assert_same_run(finished[0], tmp_path)


@pytest.mark.parametrize("n", [0, 1000, 30_000, 60_000])
def test_a_refused_write_is_an_error_of_the_disk(finished, tmp_path, n):
    """Catches the RuntimeError that torch.save makes of it, wherever it comes, and half a file that stays."""
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, raw):
            if self.file.tell() + len(raw) > n:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(raw)

        def flush(self):
            pass
    path = Path(shutil.copy(finished[0] / "adapter.pt", tmp_path))
    before, content = path.read_bytes(), load(path)
    with pytest.raises(OSError, match="No space left on device: .*adapter.pt.tmp"):
        train.write_atomically(path, lambda f: torch.save(content, Full(f)))
    assert path.read_bytes() == before and files_in(tmp_path).keys() == {path}


def test_log_lines_wait_while_they_cannot_be_written(tmp_path, capsys):
    """Catches lost, doubled or torn lines, lines of steps that are done again, and NaN, which is no JSON."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 9)) + '{"st')
    log = train.Log(path, len('{"step": 1}\n'))
    path.rename(tmp_path / "away")
    path.mkdir()                                 # cannot be opened
    assert not train.attempt(log, {"step": 2, "loss": math.nan})
    path.rmdir()
    (tmp_path / "away").rename(path)
    assert train.attempt(log, {"step": 3})
    assert read_log(tmp_path) == [{"step": 1}, {"step": 2, "loss": None}, {"step": 3}]
    assert log.size == path.stat().st_size and "training goes on" in capsys.readouterr().out


def test_a_power_cut_finds_whole_files_and_a_log_not_behind_its_checkpoint(base, tmp_path, monkeypatch):
    """Catches a rename before the new file is on the disk, and a checkpoint of steps that the log lacks."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(number):
        inode = os.fstat(number).st_ino
        done.append(("to disk", next(p.name for p in tmp_path.iterdir() if p.stat().st_ino == inode)))
        fsync(number)

    def renamed(old, new):
        done.append(("renamed", Path(new).name))
        replace(old, new)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    train.main(flags_of(base, tmp_path, "--steps=8", "--val_examples=1"))
    save = [("to disk", "log.jsonl"), ("to disk", "checkpoint.pt.tmp")]
    kept = [("renamed", "previous_checkpoint.pt"), ("renamed", "checkpoint.pt")]
    ends = [step for name in ("adapter.pt", "summary.json")
            for step in (("to disk", f"{name}.tmp"), ("renamed", name))]
    assert done == [*save, kept[1], *save, *kept, *ends]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")], ids=repr)
def test_out_of_memory_saves_and_names_the_flags(finished, base, tmp_path, monkeypatch, error):
    """Catches work lost to a large batch, a half step in what was saved, a library's own words for it."""
    real, calls = torch.nn.utils.clip_grad_norm_, []

    def too_large(parameters, clip):             # once the gradients of step 7 are there
        calls.append(clip)
        if len(calls) == 7:
            raise error
        return real(parameters, clip)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", too_large)
    with pytest.raises(SystemExit, match="lower --max_tokens or add --checkpointing"):
        train.main(flags_of(base, tmp_path))
    assert load(tmp_path / "checkpoint.pt")["totals"]["step"] == 6
    monkeypatch.undo()
    train.main(flags_of(base, tmp_path, "--resume"))
    assert_same_run(finished[0], tmp_path)


def test_folder_is_locked_by_a_run_and_freed_by_its_death(base, tmp_path):
    """Catches two runs that write into one folder, and a killed run whose lock stays behind."""
    code = (f"import train, sys\ntrain.lock(train.Path({str(tmp_path)!r}))\n"
            "print('held', flush=True)\nsys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          cwd=Path(train.__file__).parent) as holder:
        assert holder.stdout.readline() == b"held\n"
        before = files_in(tmp_path)
        for more in ("--steps=1", "--resume"):
            with pytest.raises(SystemExit, match=f"in use by process {holder.pid};"):
                train.main(flags_of(base, tmp_path, more))
        assert files_in(tmp_path) == before
        holder.kill()
    assert (tmp_path / "lock").exists()
    assert train.main(flags_of(base, tmp_path, "--steps=1"))["steps"] == 1


# ---- Hours: SLOW=1

def command(base, out, *more):
    """A run as its own process, always with --resume."""
    return [sys.executable, train.__file__, "--device=cpu", "--batch_size=4", "--val_examples=2", "--rank=2",
            "--dropout=0.1", "--log_every=1", "--resume", f"--init_from={base}", f"--out_dir={out}", *more]


def saving(folder, since):
    """Whether a checkpoint is half written; what an earlier kill left behind does not count."""
    try:
        return (folder / "checkpoint.pt.tmp").stat().st_mtime > since
    except FileNotFoundError:
        return False


@slow
def test_thirty_kills_leave_no_trace(base, tmp_path):
    """SIGKILL at 30 random moments, every second one while a checkpoint is being written; the same command
    line each time. Catches any state that is lost, torn or done twice: adapters, optimizer and log must equal
    those of a run left alone."""
    def start(out):
        return subprocess.Popen(command(base, out, "--steps=500", "--save_every=1"), stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)
    whole, begun = tmp_path / "whole", time.perf_counter()
    process = start(whole)
    assert process.communicate() and process.returncode == 0
    seconds, rng, kills, n_runs, out = time.perf_counter() - begun, random.Random(0), Counter(), 0, whole
    while sum(kills.values()) < 30 or not (out / "summary.json").exists():
        if (out / "summary.json").exists():
            n_runs += 1
            out = tmp_path / f"run {n_runs}"
        process, since = start(out), time.time()
        if (n := sum(kills.values())) < 30:
            deadline = since + rng.uniform(0, seconds / 2)
            while process.poll() is None and (time.time() < deadline or n % 2 and not saving(out, since)):
                time.sleep(0.0005)
            process.kill()
        printed, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), printed
        if process.returncode:
            where = ("training" if (out / "log.jsonl").exists() else "starting") + (
                ", during a save" * saving(out, since))
            kills[where] += 1
            print(f"kill {n + 1} in run {n_runs}: {where}", flush=True)
        if (out / "summary.json").exists():
            assert_same_run(whole, out)
            assert [r["step"] for r in read_log(out)] == list(range(1, 501))
    print(f"\n{sum(kills.values())} kills survived in {n_runs} runs of {seconds:.0f} s: {dict(kills)}")
    assert sum(n for where, n in kills.items() if "save" in where) >= 5


@slow
def test_memory_stays_flat_over_twenty_thousand_steps(base, tmp_path):
    """Catches whatever piles up: resident memory after 2,000 steps and later, size of log and checkpoint."""
    process = subprocess.Popen(command(base, tmp_path, "--steps=20000", "--batch_size=1", "--save_every=500"))
    resident = []
    while process.poll() is None:
        time.sleep(1)
        if (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "adapter.pt").exists():
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            kb = [line for line in status if line.startswith("VmRSS")]
            steps = (tmp_path / "log.jsonl").read_bytes().count(b"\n")
            resident += [(steps, int(kb[0].split()[1]))] if kb else []
    assert process.returncode == 0
    first = next(kb for step, kb in resident if step >= 2000)
    most = max(kb for step, kb in resident if step >= 2000)
    sizes = [(tmp_path / n).stat().st_size for n in ("previous_checkpoint.pt", "checkpoint.pt", "log.jsonl")]
    print(f"\nresident: {first:,} kB after 2,000 steps, at most {most:,} kB later "
          f"(+{most / first - 1:.2%}); checkpoint {sizes[1]:,} bytes, log {sizes[2]:,} bytes for "
          f"{len(read_log(tmp_path)):,} steps")
    assert [r["step"] for r in read_log(tmp_path)] == list(range(1, 20001))
    assert most < 1.01 * first and abs(sizes[0] - sizes[1]) < 64
