"""Is the benchmark honest? Do files, prompts and batches leave the data alone?

Each docstring says which break the test catches. A new task of MiniCME is tested as soon as it stands in
data.TASKS: nothing here counts them.
"""

import json
import random
from collections import Counter

import pytest
import torch

import data
from experiments.make_base import N_LESSONS, corpus
from teamlora import InputError

# ---- MiniCME

def questions(split, n):
    """(task, question) of n held-out questions of every task."""
    return {(task, row.input) for task, rows in data.minicme_held_out(split, n).items() for row in rows}


def test_minicme_never_trains_on_held_out_questions():
    """Catches leakage under any seed, a task that is never trained, a split that depends on luck."""
    held_out = {split: questions(split, 60) for split in ("test", "validation")}
    assert not held_out["test"] & held_out["validation"]
    n = Counter(task for task, _ in held_out["test"])
    assert n == dict.fromkeys(data.TASKS, 60), f"not 60 distinct test questions: {n}"
    assert {task for task, _ in held_out["validation"]} == data.TASKS.keys() == data.CHANCE.keys()
    for seed in (0, 1):
        stream = data.minicme(seed)
        rows = [stream(i) for i in range(5000)]
        assert {r.task for r in rows} == data.TASKS.keys()
        leaked = {(r.task, r.input) for r in rows} & set().union(*held_out.values())
        assert not leaked, f"seed {seed} trains on {leaked}"
    assert data.minicme_held_out("test", 60) == data.minicme_held_out("test", 60)
    assert data.minicme(3)(17) == data.minicme(3)(17) != data.minicme(4)(17)


def test_the_base_has_read_no_held_out_question():
    """Catches a base that knows answers to held-out questions, whatever separates their sentences."""
    stream = corpus(1)                           # the built-in base's
    read = " ".join(" ".join(stream(i).output.split()) for i in range(0, 2 * N_LESSONS, 4))
    for split in ("test", "validation"):
        found = [(task, q) for task, q in questions(split, 60) if " ".join(q.split()) in read]
        assert not found, f"the corpus answers {split} questions: {found}"


def test_cheap_tricks_do_not_solve_minicme():
    """Catches a task that the majority answer, the last word, or a random one of its words nearly solves."""
    rng = random.Random(0)
    for task, rows in data.minicme_held_out("test", 300).items():
        chance = data.CHANCE[task]
        majority = Counter(r.output for r in rows).most_common(1)[0][1] / len(rows)
        words = [[w.strip(".?,") for w in r.input.split()] for r in rows]
        last = sum(r.output == w[-1] for r, w in zip(rows, words)) / len(rows)
        drawn = sum(r.output == rng.choice(w) for r, w in zip(rows, words)) / len(rows)
        assert majority <= chance + 0.1, f"{task}: always the same answer gets {majority:.2f}"
        assert max(last, drawn) <= max(chance, 0.1), f"{task}: last word {last:.2f}, a random one {drawn:.2f}"


# ---- Tokenizers and templates

def test_prompt_answer_border(tokenizer):
    """Catches an eos as text, a second bos, a supervised prompt, prompt and answer tokenised as one."""
    e = data.to_example(tokenizer, data.Row("t", "Answer the question.", "Where does Anna live?", "Tarn"))
    head = [1] + tokenizer.encode("Answer the question.\nWhere does Anna live?") + [2]
    assert e.ids == head + tokenizer.encode("Tarn") + [2] and e.n_prompt == len(head)
    x, y, m = data.collate([e])
    assert [t for t in y[0].tolist() if t >= 0] == tokenizer.encode("Tarn") + [2]
    first = y[0].ge(0).nonzero()[0, 0]
    assert x[0, first] == 2 and m.sum() == len(e.ids) - 1
    assert tokenizer.decode(tokenizer.encode("naïve 中文 🙂\nAnna")) == "naïve 中文 🙂\nAnna"


def test_templates(tokenizer):
    """Catches a template whose parts get lost, an end that is text, and a newline beside an empty field."""
    tokenizer = data.Tokenizer(tokenizer.path)   # not the one that other tests share
    ids, row = tokenizer.encode, data.Row("t", "Who is it?", "Anna or Ben", "Anna")
    tokenizer.use("llama2")
    head = [1] + ids("[INST] Who is it?\nAnna or Ben [/INST]")
    assert data.to_example(tokenizer, row) == data.Example("t", head + ids("Anna") + [2], len(head))
    without = data.to_example(tokenizer, row._replace(input=""))
    assert without.ids[:-2] == [1] + ids("[INST] Who is it? [/INST]") + ids("Anna")[:-1]
    tokenizer.use("{input}{eos}{instruction}\\n{{A}}")
    head = [1] + ids("Anna or Ben") + [2] + ids("Who is it?\n{A}")
    assert data.to_example(tokenizer, row) == data.Example("t", head + ids("Anna") + [2], len(head))
    plain = data.Row("t", "", "", "Anna was here")
    tokenizer.use("{instruction}{output}the")    # one id, though not the end of sequence
    assert data.to_example(tokenizer, row).ids[-1:] == [tokenizer.end] == ids("the")
    assert data.to_example(tokenizer, plain).ids == [1] + ids("Anna was here") + [2]
    for wrong in ("chatml", "{instruction}{output}the end of the answer"):
        with pytest.raises(InputError, match="must be a single control word"):
            tokenizer.use(wrong)
    for wrong in ("lama2", "{question}", "{instruction} {", "{instruction}{0}", "{input}",
                  "{instruction}{instruction}"):
        with pytest.raises(InputError, match="--template must be paper, llama2, llama3, chatml or a text"):
            tokenizer.use(wrong)


WORDS = "<s>", "</s>", "<|im_start|>", "<|im_end|>", "user", "assistant", "hi", "\n"


def write_words(folder, opening="<s>", cut=False):
    """A tokenizer.json of whole words and control words, of which one may open every text and one ends it;
    cut: saved with truncation and padding."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "hi"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("\n", "isolated")
    model.add_special_tokens([w for w in WORDS if w.startswith("<")])
    if opening:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            f"{opening} $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    if cut:
        model.enable_truncation(2)
        model.enable_padding(length=9)
    model.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("bos", [True, False])
def test_tokenizer_json_has_one_bos_and_its_control_words_are_ids(tmp_path, bos):
    """Catches a second bos, an end that the file itself would add, and <|im_end|> as text."""
    write_words(tmp_path, opening="<s>" * bos)
    tokenizer = data.open_tokenizer(tmp_path, 1)
    for template in ("chatml", "<s>" * bos + data.TEMPLATES["chatml"]):
        tokenizer.use(template)
        assert tokenizer.prefix == [0] * bos and tokenizer.end == 3 and tokenizer.size == 8
        ids = data.to_example(tokenizer, data.Row("t", "hi", "", "hi")).ids
        assert ids[:len(tokenizer.prefix) + 1] == [0] * bos + [2] and ids[-2:] == [6, 3]
        assert ids.count(3) == 2 and 1 not in ids


# what tokenizer_config.json says beside <s> and </s>, what the file itself opens a text with: what opens it
# here, what ends it
@pytest.mark.parametrize("said, own, opening, eos", [
    (None, "<s>", ["<s>"], "</s>"), (None, "", [], "</s>"),
    ({}, "<s>", ["<s>"], "</s>"), ({}, "", [], "</s>"),
    ({"add_bos_token": None}, "<s>", ["<s>"], "</s>"), ({"add_bos_token": True}, "<s>", ["<s>"], "</s>"),
    ({"add_bos_token": True}, "", ["<s>"], "</s>"), ({"add_bos_token": False}, "<s>", [], "</s>"),
    ({"add_bos_token": True, "bos_token": {"content": "user"}}, "", ["user"], "</s>"),
    ({"bos_token": "</s>"}, "</s>", ["</s>"], "</s>"), ({"eos_token": "user"}, "<s>", ["<s>"], "user"),
    ({"eos_token": {"content": "hi"}}, "<s>", ["<s>"], "hi"), ({"eos_token": "none"}, "<s>", ["<s>"], "</s>"),
    ({"eos_token": ["hi"], "bos_token": 5, "add_bos_token": "x"}, "<s>", ["<s>"], "</s>")])
def test_what_opens_and_ends_a_text(tmp_path, said, own, opening, eos):
    """Catches a bos against the makers' words, or lost because it is eos too, another end than the named one,
    and a tokenizer that cuts and pads because its file was saved so."""
    write_words(tmp_path, own, cut=True)
    if said is not None:
        said = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"} | said
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = data.open_tokenizer(tmp_path, 1)
    assert [tokenizer.names[i] for i in tokenizer.prefix] == opening and tokenizer.names[tokenizer.eos] == eos
    assert tokenizer.encode("hi\nhi\nhi") == [6, 7, 6, 7, 6]


@pytest.mark.parametrize("said, prefix, eos", [
    ({}, [1], 2), ({"add_bos_token": True}, [1], 2), ({"add_bos_token": False}, [], 2),
    ({"bos_token": "", "eos_token": ""}, [1], 2), ({"eos_token": "<|im_end|>"}, [1], 1281)])
@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer.json"])
def test_words_that_a_chat_added_to_a_sentencepiece_model(tmp_path, tokenizer, said, prefix, eos, place):
    """Catches a control word of a template that is read as text, and one of a row that is not."""
    n = tokenizer.size
    added = {"<|im_start|>": n, "<|im_end|>": n + 1}
    listed = {"added_tokens": [{"content": word, "id": i} for word, i in added.items()]}
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    (tmp_path / place).write_text(json.dumps(added if place == "added_tokens.json" else listed))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    ours, ids = data.open_tokenizer(tmp_path), tokenizer.encode
    row = data.Row("t", "Is it <|im_end|>?", "", "no")
    assert (ours.prefix, ours.eos, ours.size) == (prefix, eos, n + 2)
    ours.use("chatml")
    e = data.to_example(ours, row)
    assert e.ids == (prefix + [n] + ids("user\nIs it <|im_end|>?") + [n + 1] + ids("\n") + [n]
                     + ids("assistant\n") + ids("no") + [n + 1])
    assert ours.decode(e.ids[e.n_prompt:]) == "no<|im_end|>"
    examples = []
    for template in ("{instruction}{output}{eos}", "<s>{instruction}{output}" + ours.names[eos]):
        ours.use(template)
        examples.append(data.to_example(ours, row))
    assert examples[0].ids[len(prefix):] == examples[1].ids[1:] and examples[1].ids[0] == 1


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_ids_that_only_one_of_tokenizer_and_base_knows(tmp_path, tokenizer, kind):
    """Catches an answer of a spare id that crashes, and a word without an embedding that crashes later."""
    if kind == "tokenizer.json":
        write_words(tmp_path)
        tokenizer = data.open_tokenizer(tmp_path, 1)
    ids, n = tokenizer.encode("hi"), tokenizer.size
    assert tokenizer.decode([n, *ids, n + 7, n]) == f"<{n}>{tokenizer.decode(ids)}<{n + 7}><{n}>"
    assert tokenizer.decode([]) == ""
    tokenizer = data.Tokenizer(tokenizer.path) if kind == "tokenizer.model" else tokenizer
    row = data.Row("t", "hi", "", "user")
    tokenizer.limit = 1 + max(data.to_example(tokenizer, row).ids)
    data.to_example(tokenizer, row)
    tokenizer.limit -= 1
    with pytest.raises(InputError, match="is id {0}, but the base has {0} emb".format(tokenizer.limit)):
        data.to_example(tokenizer, row)


def test_which_tokenizer_is_used(tmp_path, tokenizer, capsys):
    """Catches a silent choice among several, and Llama 3's tokenizer.model read as sentencepiece."""
    with pytest.raises(InputError, match="neither tokenizer.model nor tokenizer.json"):
        data.open_tokenizer(tmp_path, 2)
    pieces, ranks = tmp_path / "tokenizer.model", b"IQ== 0\nIg== 1\nIw== 2\n"
    for content, message in ((ranks, "tokenizer.model is Llama 3's in tiktoken's format.*tokenizer.json"),
                             (b"no such thing", "not a sentencepiece model")):
        pieces.write_bytes(content)
        with pytest.raises(InputError, match=message):
            data.open_tokenizer(tmp_path, 2)
    write_words(tmp_path)                        # from here on with the package tokenizers only
    for content, name in ((tokenizer.path.read_bytes(), "tokenizer.model"), (ranks, "tokenizer.json")):
        pieces.write_bytes(content)
        assert data.open_tokenizer(tmp_path, 1).path.name == name
        assert f"tokenizer: {name}" in capsys.readouterr().out


# ---- Row files

def test_files_and_folders_become_tasks(tmp_path):
    """Catches an ignored "input", a task named wrongly, a file that a BOM or Windows line ends break."""
    rows = [{"instruction": "Say", "input": "a", "output": "b"},
            {"instruction": "Say", "output": "c", "task": "other", "x": 1}]
    rows.append({"instruction": "", "input": "asked here", "output": "d", "task": "other"})
    (tmp_path / "one.json").write_text(json.dumps(rows))
    lines = b"\r\n\r\n".join(json.dumps(r).encode() for r in rows)
    (tmp_path / "two.jsonl").write_bytes(b"\xef\xbb\xbf" + lines + b"\r\n")
    rest = [("other", "Say", "", "c"), ("other", "", "asked here", "d")]
    expected = [("one", "Say", "a", "b"), *rest, ("two", "Say", "a", "b"), *rest]
    assert data.read_rows(str(tmp_path)) == [expected]
    assert data.read_rows(f"{tmp_path}/one.json,{tmp_path}/two.jsonl", str(tmp_path)) == [expected, expected]


@pytest.mark.parametrize("train, test, names", [
    (["boolq.json"], ["test/boolq.json"], ["boolq"]), (["boolq-train.json"], ["boolq-test.json"], ["boolq"]),
    (["boolq_train.jsonl"], ["boolq.dev.json"], ["boolq"]),
    (["d/boolq/train.json"], ["d/boolq/test.json"], ["boolq"]),
    (["q/train-00-of-02.jsonl", "q/train-01-of-02.jsonl"], ["q/test-00-of-01.jsonl"], ["q"]),
    (["boolq/train.json", "piqa/train.json"], ["piqa/Test.JSON", "boolq/validation.json"], ["boolq", "piqa"]),
    (["a/rows.json", "b/rows.json"], ["b/test/rows.json"], ["a/rows", "b/rows"]),
    (["a/q/train.json", "b/q/train.json", "c.json"], ["a/q/val.json"], ["a/q", "b/q", "c"]),
    (["latest.json", "contest.json", "test-1.json"], ["contest-test.json"], ["contest", "latest", "test-1"])])
def test_a_task_is_named_by_its_data_set(tmp_path, train, test, names):
    """Catches different data sets that become one task, and train and test files of one that do not meet."""
    for name in train + test:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"instruction": "a", "output": "b"}')
    parts = data.read_rows(*(",".join(f"{tmp_path}/{name}" for name in names) for names in (train, test)))
    tasks = [sorted({row.task for row in rows}) for rows in parts]
    assert tasks[0] == names and len(tasks[1]) == len(test) and set(tasks[1]) <= set(names)


ROW = '{"instruction": "x", "input": null, "output": "y", "task": ""}'
BLANK = [ROW, ROW.replace('"y"', '" "'), ROW.replace('"y"', "null"), ROW.replace('"x"', '""')]


@pytest.mark.parametrize("files, n_rows, said", [
    ({"f.json": f"{ROW}\n{ROW}\n"}, 2, ""), ({"f.jsonl": f"[{ROW},\n{ROW}]"}, 2, ""),
    ({"F.JSON": f"[{ROW}]"}, 1, ""), ({"f.JsonL": ROW}, 1, ""),
    ({"f.json": ROW.replace(",", ",\n") + ROW}, 2, ""), ({"f.json": ROW.replace("null", "NaN")}, 1, ""),
    ({"f.json": ROW, ".f.json": "{", "._f.json": b"\0\x05\x16", "README.md": "# f", "g.json/x": "{"}, 1, ""),
    ({"f.json": f"[{','.join(BLANK)}]"}, 1,
     "rows left out because their question or their answer is blank: 3\n"),
    ({"f.jsonl": ROW[:-1] + ', "context": "c", "id": 1}' + ROW[:-1] + ', "context": "d", "history": []}'}, 2,
     "keys not used: context (2 rows), id (1 rows)\n"),
    ({"f-train.json": ROW, "f_test.json": ROW}, 2, "2 files are one task, f\n")],
    ids=lambda v: ascii(v)[:30] if isinstance(v, dict) else "")
def test_files_that_users_have(tmp_path, capsys, files, n_rows, said):
    """Catches a usual file that is refused or half read, and anything left out of which no line tells."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    rows, = data.read_rows(str(tmp_path))
    assert {(r.instruction, r.input, r.output) for r in rows} == {("x", "", "y")} and len(rows) == n_rows
    assert {r.task.lower() for r in rows} == {"f"} and capsys.readouterr().out == said


def test_a_file_that_stands_twice_is_told(tmp_path, capsys):
    """Catches rows that count twice because a file and its folder were both named."""
    (tmp_path / "f.json").write_text(ROW)
    rows, = data.read_rows(f"{tmp_path},{tmp_path}/../{tmp_path.name}/f.json")
    assert len(rows) == 2 and f"warning: a file stands twice in {tmp_path}," in capsys.readouterr().out


def test_long_rows_lose_prompt_never_answer(tokenizer, capsys):
    """Catches right truncation, which drops the answer and its end, and drops that nobody hears of."""
    words = " ".join(["Anna has the ball."] * 40)
    rows = [data.Row("t", "Start here. " + words + " End there.", "", "the ball"),
            data.Row("t", "Say", "", words)]
    examples = data.to_examples(tokenizer, rows, 60, "train")
    assert len(examples) == 1 and len(examples[0].ids) == 60
    assert examples[0].ids[examples[0].n_prompt:] == tokenizer.encode("the ball") + [2]
    text = tokenizer.decode(examples[0].ids)
    assert text.startswith("Start here.") and "End there." in text
    assert examples[0].ids[examples[0].n_prompt - 1] == 2
    assert "1 prompts shortened and 1 rows dropped of 2" in capsys.readouterr().out
    with pytest.raises(InputError, match="no supervised token"):
        data.to_examples(tokenizer, rows[1:], 60, "train")


def test_rows_that_end_themselves_are_told(tokenizer, capsys):
    """Catches answers that were stored with their end of sequence, which would be learnt as text."""
    texts = ("who?", "", "Anna</s>"), ("<s>who?", "", "Anna"), ("s", "", "s")
    rows = [data.Row("t", *parts) for parts in texts]
    data.to_examples(tokenizer, rows, 60, "training")
    told = "warning: 2 training rows hold </s> or <s>; remove it, for it is added here\n"
    assert capsys.readouterr().out == told


def test_hold_out_keeps_equal_prompts_together_and_every_row():
    """Catches leakage of duplicates into validation, rows lost in the split, a split that new rows change."""
    rows = [data.Row("t", f"question {i % 200}", "", f"answer {i}") for i in range(400)]
    train_rows, val_rows = data.hold_out(rows, 0.2)
    assert sorted(train_rows + val_rows) == sorted(rows) and 20 < len(val_rows) < 140
    assert not {r.instruction for r in train_rows} & {r.instruction for r in val_rows}
    assert data.hold_out(rows[:300], 0.2)[1] == [r for r in val_rows if r in rows[:300]]
    assert data.hold_out(rows, 0.2, salt="other")[1] != val_rows
    for share in (0.0, 1.0):
        with pytest.raises(InputError, match="change --val_share or give --val_data"):
            data.hold_out(rows, share)


# ---- Batches

def test_stream_visits_every_example_once_per_epoch():
    """Catches sampling with replacement and an order that depends on history."""
    examples = [data.Example("t", [i], 1) for i in range(7)]
    stream = data.shuffled(examples, 0)
    epochs = [[stream(i).ids[0] for i in range(e * 7, e * 7 + 7)] for e in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1]
    assert data.shuffled(examples, 0)(9).ids == [epochs[1][2]]


def test_padding_is_masked_by_length_not_by_id():
    """Catches a mask by token id: with pad = end-of-sequence the model would never learn to stop."""
    short, long = data.Example("t", [1, 5, 2, 7, 2], 3), data.Example("t", [1] + [6] * 20 + [2], 10)
    x, y, m = data.collate([short, long])
    assert x.shape == (2, 24) and m.sum(1).tolist() == [4, 21]
    assert y[0].tolist() == [-1, -1, 7, 2] + [-1] * 20
    assert x[0, :4].tolist() == [1, 5, 2, 7] and torch.equal(m[0], torch.arange(24) < 4)


def test_cut_is_the_cheapest_of_all():
    """Catches padding that another cut would save, and micro-batches too small to be worth their start."""
    rng = random.Random(1)
    examples = [data.Example("t", [1] * rng.randint(2, 200), 1) for _ in range(9)]
    examples.sort(key=lambda e: len(e.ids))

    def cost(batches):
        return sum(data.collate(b)[0].numel() + 32 for b in batches)
    every = []
    for bits in range(2 ** 8):
        edges = [0, *(i for i in range(1, 9) if bits >> (i - 1) & 1), 9]
        batches = [examples[a:b] for a, b in zip(edges, edges[1:])]
        if all(data.collate(b)[0].numel() <= 600 for b in batches):
            every.append(cost(batches))
    assert cost(data.cut(examples, 600)) == min(every) < max(every)
    assert len(data.cut(examples, 10 ** 6, overhead=10 ** 6)) == 1


def test_cut_keeps_every_example_within_the_budget():
    """Catches lost or doubled examples and micro-batches over max_tokens."""
    rng = random.Random(0)
    examples = [data.Example("t", [1] * rng.randint(2, 90), 1) for _ in range(50)]
    for budget in (96, 200, 10 ** 6):
        batches = data.cut(examples, budget)
        assert sorted(id(e) for b in batches for e in b) == sorted(map(id, examples))
        assert all(data.collate(b)[0].numel() <= budget for b in batches)
    with pytest.raises(InputError, match="max_tokens=64"):
        data.cut(examples, 64)
