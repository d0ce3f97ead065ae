"""Does a run do what it says, and does it survive whatever happens to it?

Every run here is one of train.main, most of 8 steps on a tiny random base. The same run: the same bits of
parameters, optimizer, counters, log. SLOW=1 adds eight kills and the default run.
"""

import fcntl
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import data
import model as llama
import train
from model import load_llama, save_llama
from teamlora import AdapterConfig, adapter_layers, adapter_parameters
from tests.conftest import flags_of, forked, load, prepared, read_log, same, stopped_at, use

slow = pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes; SLOW=1 pytest runs it")
INT, TERM, HUP, KILL = (getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP", "KILL"))


def stopped(flags, step):
    """A run that SIGINT ends in its step number `step`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match=f"stopped after {step} of"):
        stopped_at(patch, step)
        train.main(flags)


def counted(monkeypatch, module, name, at=0, signals=()):
    """Count the calls of module.name, a list of one number; call number `at` begins with these signals."""
    calls, real = [0], getattr(module, name)

    def call(*args, **more):
        calls[0] += 1
        for number in signals if calls[0] == at else ():
            os.kill(os.getpid(), number)
        return real(*args, **more)
    monkeypatch.setattr(module, name, call)
    return calls


def assert_same_run(whole, out):
    """The run in `out` ended like the one in `whole`, bit for bit."""
    assert (out / "adapter.pt").read_bytes() == (whole / "adapter.pt").read_bytes()
    assert same(*([load(o / "checkpoint.pt"), read_log(o)] for o in (whole, out)))


def test_summary_has_what_it_promises_and_eval_reproduces_it(finished, base):
    """Catches a missing key, and an adapter file that is not what was evaluated."""
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {"method", "seed", "seconds", "skipped", "base_accuracy", "trainable_parameters"} < summary.keys()
    assert [r["step"] for r in read_log(out)] == list(range(1, 9))
    results = use("eval", base, out)
    for key in ("accuracy", "majority", "usage"):
        assert {task: r[key] for task, r in results.items()} == summary[key]
    assert results.keys() == {"colours", "sizes"} and train.overall(results)[1] == summary["val_loss"]


def assert_follows(base, rows, out, parameters, parts, *flags):
    """A run with these flags, beside it a loop with its own order, clipping, cosine and AdamW: they agree in
    every step. parts(batch) yields what a step's loss is the sum of -> summary, examples."""
    summary = train.main(flags_of(base, out, "--seed=3", "--clip=0.5", "--weight_decay=0.3", "--warmup=0.34",
                                  "--batch_size=7", "--max_tokens=80", "--max_length=80", "--checkpointing",
                                  f"--val_data={rows}", "--val_examples=0", *flags))
    examples = [*map(prepared(base, out)[1], data.read_rows([rows]))]
    order = sum((random.Random(f"order 3 {epoch}").sample(examples, 60) for epoch in range(3)), [])
    optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.99), weight_decay=0.3)
    warm = round(0.34 * summary["steps"])
    for step, record in enumerate(read_log(out)):
        total, cosine = 0.0, (1 + math.cos(math.pi * (step - warm) / (summary["steps"] - warm))) / 2
        for part in parts(order[step * 7:step * 7 + 7]):
            part.backward()
            total += part.item()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in parameters.values()))
        for p in parameters.values():
            p.grad *= min(1, 0.5 / norm)
        optimizer.param_groups[0]["lr"] = rate = 0.01 * ((step + 1) / warm if step < warm else cosine)
        optimizer.step()
        optimizer.zero_grad()
        assert record["loss"] == pytest.approx(total, abs=1e-5), step
        assert record["gradient_norm"] == pytest.approx(norm, rel=1e-4), step
        assert record["learning_rate"] == pytest.approx(rate, rel=1e-9), step
    return summary, examples


def test_a_run_is_the_naive_loop(base, rows, tmp_path, monkeypatch):
    """Beside a loop over one row at a time. Catches a flag without effect, every step on the first batch, a
    mean of means, a val_loss of tasks or micro-batches, adapters that --seed does not make."""
    torch.manual_seed(3)
    model, seen, micro = load_llama(base, AdapterConfig(rank=2, alpha=6.0)), {}, []
    for name, layer in adapter_layers(model):
        layer.register_forward_pre_hook(lambda layer, x, name=name: seen.update(
            {name: layer.gate(x[0] @ layer.router.T)[0].sum(0)}))                    # (E,)

    def losses(e):
        answer = torch.tensor(e.ids[e.n_prompt:])
        logits = model(torch.tensor([e.ids[:-1]]))[0, e.n_prompt - 1:]
        return torch.nn.functional.cross_entropy(logits, answer, reduction="none")

    def parts(batch):
        supervised, tokens = sum(len(e.ids) - e.n_prompt for e in batch), sum(len(e.ids) - 1 for e in batch)
        for part in data.micro_batches(batch, 80):               # the balance term is of these
            micro.append(part)
            n, loss, usage = sum(len(e.ids) - 1 for e in part), 0.0, Counter()
            for e in part:
                loss = loss + losses(e).sum() / supervised
                usage.update(seen)
            uneven = sum((u / n - 1).square().mean() for u in usage.values()) / len(usage)
            yield loss + 0.2 * uneven * n / tokens
    calls = counted(monkeypatch, llama, "checkpoint")
    summary, examples = assert_follows(
        base, rows, tmp_path, adapter_parameters(model), parts, "--balance=0.2", "--alpha=6", "--steps=10")
    assert calls[0] == 2 * len(micro) and len(micro) > 20    # 2 layers, 10 steps
    val_loss = torch.cat([*map(losses, examples)]).mean().item()
    assert summary["val_loss"] == pytest.approx(val_loss, rel=1e-4)


def test_lora_trains_like_transformers_and_peft(base, rows, tmp_path):
    """Catches masks, labels, loss or scale that are not everybody's: there one padded batch a step."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(3)
    ours = adapter_parameters(load_llama(base, AdapterConfig("lora", rank=2)))
    settings = peft.LoraConfig(r=4 * 2, lora_alpha=4 * 16, target_modules=[*AdapterConfig().targets])
    theirs = transformers.LlamaForCausalLM.from_pretrained(base, dtype="float32")
    theirs = peft.get_peft_model(theirs, settings)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        p.data.copy_(ours[name.removeprefix("base_model.model.").removesuffix(".default.weight")].data)

    def parts(batch):
        ids, mask, labels = (pad_sequence([*map(torch.tensor, lists)], True, pad) for lists, pad in (
            ([e.ids for e in batch], 0), ([[1] * len(e.ids) for e in batch], 0),
            ([[-100] * e.n_prompt + e.ids[e.n_prompt:] for e in batch], -100)))
        yield theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert_follows(base, rows, tmp_path, trained, parts, "--method=lora", "--steps=20")


@pytest.mark.parametrize("flag", [
    "--clip=0.1", "--weight_decay=0.5", "--balance=0.5", "--alpha=4", "--dropout=0.5", "--seed=1", "--rank=3",
    "--learning_rate=0.02", "--warmup=0.9", "--batch_size=5", "--n_experts=2", "--targets=q_proj,o_proj",
    "--method=lora", "--method=moelora", "--method=hydralora", "--method=full", "--dtype=bfloat16",
    "--dtype=nf4", "--template={instruction}{output}{eos}", "--val_share=0.5", "--max_length=32"])
def test_flag_changes_the_losses(finished, base, tmp_path, flag):
    """Catches a flag that is accepted and has no effect."""
    train.main(flags_of(base, tmp_path, flag))
    assert [r["loss"] for r in read_log(tmp_path)][1:] != [r["loss"] for r in read_log(finished[0])][1:]


def test_which_rows_are_evaluated(base, tmp_path):
    """Catches training on a folder's test rows; the first rows of a sorted file in place of a sample of all
    that new rows hardly change; a share of 0 that loses rows or crashes."""
    picked, out = [], tmp_path / "out"
    for n in (400, 401):
        for name, answers in (("train", ["yes"] * 30), ("test", ["low"] * 200 + ["high"] * (n - 200))):
            texts = [{"instruction": f"{name} {i}?", "output": answer} for i, answer in enumerate(answers)]
            (tmp_path / f"{name}.json").write_text(json.dumps(texts))
        rows, val = train.read_data(train.Config(data=str(tmp_path), val_data="", val_examples=20))
        assert [r.output for r in rows] == ["yes"] * 30 and len(val) == 20
        picked.append(val)
    assert 5 <= sum(row.output == "low" for row in picked[0]) <= 15
    assert len({*picked[0]} & {*picked[1]}) >= 19
    assert len(train.read_data(train.Config(data=f"{base}/rows.json", val_data="", val_share=0.0))[0]) == 60
    summary = train.main(flags_of(base, out, "--val_share=0", "--steps=2"))
    assert summary["mean_accuracy"] is summary["val_loss"] is None and summary["accuracy"] == {}
    with pytest.raises(SystemExit, match="nothing to evaluate on"):
        use("eval", base, out)


def test_sample_answers_a_prompt_or_every_line_that_comes(finished, base, monkeypatch, capsys):
    """Catches a line that is dropped, an answer that is not the model's, half a letter, a bare base that does
    not continue its text, --temperature or --seed without effect, no input."""
    def sampled(*more):
        use("sample", base, finished[0], "--max_length=64", *more)
        return capsys.readouterr().out

    def answer(model, ids):
        ids = torch.cat([*model.eval().generate(torch.tensor([ids]), 64)]).tolist()
        return encode.tokenizer.decode(ids) + "\n"
    (model, encode, _), smile = prepared(base, finished[0]), "Is it? \U0001f642"
    asked = [encode(data.Row("", text, "", "")) for text in ("What is number 7?", smile)]
    expected = [answer(model, e.ids[:e.n_prompt]) for e in asked]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"What is number 7?\n\n{smile}"))
    assert sampled() == "".join(expected) and sampled(f"--prompt={smile}") == expected[1]
    hot = [sampled("--temperature=2", f"--seed={seed}", f"--prompt={smile}") for seed in (0, 0, 1)]
    assert hot[0] == hot[1] and len({expected[1], *hot}) == 3
    bare, text = prepared(base, finished[0], method="none")[0], 30 * "Anna lives in "
    continued = answer(bare, encode.tokenizer.bos + encode.tokenizer.encode(text.strip()))
    assert sampled("--method=none", f"--prompt={text}") == continued
    pieces = []
    monkeypatch.setattr(llama.Llama, "generate", lambda *args, **more: (
        pieces.append(capsys.readouterr().out) or torch.tensor([i]) for i in encode.tokenizer.encode(smile)))
    pieces.append(sampled("--prompt=a"))
    assert "".join(pieces) == f"{smile}\n" and len([*filter(None, pieces)]) > 3
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit, match="error: there is no input"):
        sampled()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_export_is_a_plain_llama_that_computes_the_same(base, tmp_path, method):
    """Catches an export without tokenizer, the template's end or what was trained, one with files of another
    that was interrupted, one that is overwritten."""
    folder, out, export = tmp_path / "base", tmp_path / "out", tmp_path / "out" / "export"
    save_llama(load_llama(base, dtype=torch.bfloat16), shutil.copytree(base, folder))
    (out / "export.tmp" / "stale").mkdir(parents=True)
    train.main(flags_of(folder, out, f"--method={method}"))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "of the base", "bos_token": "<s>"}')
    use("export", folder, out)
    (model, encode, _), exported = prepared(folder, out), load_llama(export)
    tokens = torch.randint(1280, (2, 65))
    assert exported.lm_head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        logits, expected, plain = (m.float().eval()(tokens) for m in (exported, model, load_llama(folder)))
    assert (logits - expected).norm() < 0.05 * (expected - plain).norm()
    assert exported.config.eos_token_id == (encode.end,) and data.Tokenizer(export).names
    assert not (export / "stale").exists()
    asked = json.loads((export / "tokenizer_config.json").read_text())["chat_template"]
    assert asked == encode.chat_template() == (export / "chat_template.jinja").read_text()
    cfg, _ = train.compose({"mode": "sample", "method": "none", "init_from": str(export)})
    assert cfg.template == data.TEMPLATES["paper"]       # and not "paper", with which a bare base continues
    with pytest.raises(SystemExit, match="exists already"):
        use("export", folder, out)


@pytest.mark.parametrize("more", [[], ["--dropout=0.2", "--balance=0.1"], ["--method=full"]])
def test_resumed_run_is_the_same_run(finished, base, tmp_path, more):
    """Catches state that a checkpoint forgets (moments, step, dropout's seed, counters, log), flags that must
    be given twice, lines of steps that are done again."""
    whole, out = tmp_path / "whole" if more else finished[0], tmp_path / "out"
    flags, resume = flags_of(base, out, *more), [f"--out_dir={out}", "--device=cpu", "--resume"]
    if more:
        train.main([*flags, f"--out_dir={whole}"])
    stopped(flags, 3)
    older = (out / "checkpoint.pt").read_bytes()
    stopped(resume, 6)
    (out / "checkpoint.pt").write_bytes(older)
    train.main(resume)
    assert_same_run(whole, out)
    train.main([*resume, "--steps=12"])          # more steps after the end
    log = read_log(out)
    assert [r["step"] for r in log] == list(range(1, 13)) and same(log[:8], read_log(whole))
    assert [r["learning_rate"] for r in log[8:]] == [0.01 * train.schedule(i, 12, 0.2) for i in range(8, 12)]


def test_a_run_starts_from_an_adapter_and_takes_over_a_folder(finished, base, rows, tmp_path, monkeypatch,
                                                              capsys):
    """Catches an adapter that is not loaded, or lends more than itself; an old run's results by a new log, or
    gone without a word; two runs in one folder; a file system without locks that no run can use."""
    adapter = f"--adapter_from={finished[0]}/adapter.pt"
    new = use("train", base, tmp_path, adapter, f"--data={rows}", f"--val_data={rows}", "--steps=2")
    results = use("eval", base, finished[0], f"--val_data={rows}", "--val_examples=100")
    config = load(tmp_path / "adapter.pt")["config"]
    assert new["base_val_loss"] == train.overall(results)[1] and config["rank"] == 2
    assert {"warmup", "adapter_from", "val_share"}.isdisjoint(config)
    monkeypatch.setattr(fcntl, "flock", lambda *_: os.listdir("/no locks here"))
    stopped(flags_of(base, tmp_path), 2)
    monkeypatch.undo()
    assert capsys.readouterr().out.count("is removed; it will be made anew") == 3
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "log.jsonl"}
    assert len(read_log(tmp_path)) == 2
    with pytest.raises(SystemExit, match="there is no .*adapter.pt"):
        use("eval", base, tmp_path)
    for flags in flags_of(base, tmp_path), [f"--out_dir={tmp_path}", "--device=cpu", "--resume"]:
        with train.open_locked(tmp_path / "log.jsonl"), pytest.raises(SystemExit, match="in use by another"):
            train.main(flags)


@pytest.mark.parametrize("name,call,signals,code,saved", [
    ("schedule", 5, [INT], 1, 5), ("schedule", 5, [TERM], 1, 5), ("schedule", 5, [HUP], 1, 5),
    ("schedule", 8, [INT], 0, 8), ("schedule", 6, [INT, INT], -INT, 4), ("schedule", 7, [KILL], -KILL, 4),
    ("schedule", 2, [KILL], -KILL, None),
    ("fsync", 2, [KILL], -KILL, 4), ("replace", 2, [KILL], -KILL, 4),
    *(pytest.param(name, n, [KILL], -KILL, None, marks=slow) for name in ("fsync", "replace")
      for n in range(1, 5))])
def test_interrupted_run_ends_like_one_left_alone(finished, base, tmp_path, monkeypatch, name, call, signals,
                                                  code, saved):
    """Catches a signal that tears a step, is forgotten or loses a step; a second one that does not end the
    run at once; what a kill in a step or in a save leaves."""
    counted(monkeypatch, train if name == "schedule" else os, name, call, signals)
    ended, printed = forked(lambda: train.main(flags_of(base, tmp_path)))
    monkeypatch.undo()
    assert ended == code and ("stopped after 5 of 8 steps; continue with --resume" in printed) == (code == 1)
    assert (name, code) != ("schedule", -KILL) or len(read_log(tmp_path)) == call - 1
    there = (tmp_path / "checkpoint.pt").exists()
    assert saved is None or load(tmp_path / "checkpoint.pt")["totals"]["step"] == saved
    train.main(flags_of(base, tmp_path, *["--resume"] * there))
    assert_same_run(finished[0], tmp_path)


def test_ignored_signals_threads_and_poor_streams(base, tmp_path, monkeypatch):
    """Catches nohup's SIGHUP that ends a run, a run in a thread, without stderr, or that dies of printing."""
    flags = flags_of(base, tmp_path, "--steps=2", "--val_examples=1")
    counted(monkeypatch, train, "schedule", 1, [HUP])
    assert forked(lambda: (signal.signal(HUP, signal.SIG_IGN), train.main(flags)))[0] == 0
    monkeypatch.undo()
    assert ThreadPoolExecutor().submit(train.main, flags).result()["steps"] == 2
    chinese = [{"task": "\u989c\u8272", "instruction": f"{i}\uff1f", "output": "\u84dd"} for i in range(9)]
    (tmp_path / "rows.json").write_text(json.dumps(chinese))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252", write_through=True))
    monkeypatch.setattr(sys, "stderr", None)
    train.main([*flags, f"--data={tmp_path}/rows.json"])
    assert b"\n??  " in sys.stdout.buffer.getvalue()


def test_a_full_disk_is_one_line(base, tmp_path):
    """Catches a traceback where a line of the log cannot be written, a run that goes on without it."""
    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000))
        train.main(flags_of(base, tmp_path, "--steps=120", "--save_every=999"))
    code, printed = forked(run)
    assert code == 1 and "error: " in printed.splitlines()[-1] and "Traceback" not in printed
    assert 40 < (tmp_path / "log.jsonl").read_text().count("\n") < 80


def test_a_power_cut_finds_whole_files(base, tmp_path, monkeypatch):
    """Catches a rename before the new file is on the disk."""
    synced, fsync, replace, renamed = set(), os.fsync, os.replace, []
    monkeypatch.setattr(os, "fsync", lambda n: (fsync(n), synced.add(os.fstat(n).st_ino)))
    monkeypatch.setattr(os, "replace", lambda old, new: (
        renamed.append((new.name, os.stat(old).st_ino in synced)), replace(old, new)))
    train.main(flags_of(base, tmp_path))
    names = ["checkpoint.pt", "checkpoint.pt", "adapter.pt", "summary.json"]
    assert renamed == [(name, True) for name in names]


def test_two_processes_train_and_evaluate_as_one(base, tmp_path):
    """Catches a mean of means of processes, adapters drifting apart, lost or double examples, two writers,
    processes that leave at different steps."""
    flags = flags_of(base, tmp_path, "--steps=6", "--learning_rate=1e-3")

    def rank(n, port, flags, at=0):
        os.environ.update(WORLD_SIZE="2", RANK=str(n), MASTER_ADDR="localhost", MASTER_PORT=str(port))
        train.RANK, train.RANKS = n, 2
        counted(pytest.MonkeyPatch(), train, "schedule", at * n, [TERM])
        train.main([*flags, f"--out_dir={tmp_path}/two"])
    one, port = train.main([*flags, f"--out_dir={tmp_path}/one"]), random.randrange(20000, 30000)
    *codes, printed = forked(*(lambda n=n: rank(n, port, flags, 3) for n in (0, 1)))
    assert codes == [1, 1] and "stopped after 3 of 6" in printed
    *codes, printed = forked(*(lambda n=n: rank(n, port + 1, [*flags, "--resume"]) for n in (0, 1)))
    assert codes == [0, 0] and printed.count("majority") == 1
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        for key in ("loss", "gradient_norm", "supervised_tokens", "tokens"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert all(two[key] == pytest.approx(one[key], rel=1e-4) for key in ("val_loss", "accuracy", "majority"))


def test_torchrun(base, tmp_path):
    """Catches a run that torchrun cannot start, or that both processes write."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, train.__file__, *flags_of(base, tmp_path, "--steps=2")], text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1 and len(read_log(tmp_path)) == 2


@slow
def test_default_run_learns_all_tasks(tmp_path):
    """Catches defaults that do not reach what the README promises."""
    assert train.main([f"--out_dir={tmp_path}", "--device=cpu"])["mean_accuracy"] >= 0.99
