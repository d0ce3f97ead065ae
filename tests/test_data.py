"""Do files, prompts and batches leave the data alone? Half of it needs the optional package tokenizers."""

import json
import math
import random
import re
import shutil

import jinja2
import pytest

import data
import train
from teamlora import InputError

# ---- Tokenizers and templates

PIECES = train.ASSETS / "base" / "tokenizer.model"
WORDS = "<s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()
ROW = data.Row("t", "Who is it?", "Anna or Ben", "Anna")
# template: what the model reads; @ is the question, and the supervised part begins at ^
TEXTS = {
    "paper": "<s>@</s>^Anna</s>", "llama2": "<s>[INST] @ [/INST]^Anna</s>",
    "llama3": "<s>{0}user{1}\n\n@{2}{0}assistant{1}\n\n^Anna{2}".format(*WORDS[4:]),
    "chatml": "<s><|im_start|>user\n@<|im_end|>\n<|im_start|>assistant\n^Anna<|im_end|>",
    "<s>\U0001f642: {instruction}\\nA:{output}</s>": "<s>\U0001f642: @\nA:^Anna</s>",
    "{instruction}\\n{input} {{A}} {0}": "<s>@ {{A}} {0}^Anna</s>"}


def write_json(folder, opening="<s>"):
    """A tokenizer.json that cuts, pads and may open a text, and a tokenizer.model like Llama 3's."""
    tokenizers = pytest.importorskip("tokenizers")
    model, pre = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    model.pre_tokenizer, model.decoder = pre(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    model.train_from_iterator(["it is positive: Anna Ben who"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=WORDS, initial_alphabet=pre.alphabet(), show_progress=False))
    model.post_processor = tokenizers.processors.TemplateProcessing(
        f"{opening} $A </s>".strip(), special_tokens=[("<s>", 0), ("</s>", 1)])
    model.enable_truncation(2)
    model.enable_padding(length=9)
    model.save(f"{folder}/tokenizer.json")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")


@pytest.fixture(params=["tokenizer.model", "tokenizer.json"])
def folder(request, tmp_path):
    """A folder with a tokenizer of either kind; both put <s> in front of a text."""
    write_json(tmp_path) if request.param == "tokenizer.json" else shutil.copy(PIECES, tmp_path)
    return tmp_path


def encoder(folder, template="paper", vocab_size=10 ** 6, ends=(1,)):
    return data.Encoder(data.Tokenizer(folder), template, vocab_size, ends)


def spelled(encode, text):
    """Ids of a text whose control words are meant; </s> is the end of sequence, whatever its id."""
    ids = encode.tokenizer.words | {"</s>": encode.eos}
    return [i for part in filter(None, re.split("(<[^>]*>)", text))
            for i in ([ids[part]] if part in ids else encode.tokenizer.encode(part))]


@pytest.mark.parametrize("template", TEXTS)
def test_templates_say_their_text(folder, template):
    """Catches a part, an input or a bos lost or doubled, control words as text, a border that moves, another
    prompt in an export's chat template."""
    if template in ("llama3", "chatml") and not (folder / "tokenizer.json").exists():
        with pytest.raises(InputError, match="must be one control word of its own"):
            encoder(folder, template)
        return
    encode = encoder(folder, template)
    for row, asked in (ROW._replace(input=""), "Who is it?"), (ROW, "Who is it?\nAnna or Ben"):
        prompt, answer = (spelled(encode, part) for part in TEXTS[template].replace("@", asked).split("^"))
        assert encode(row) == data.Example("t", prompt + answer, len(prompt))
        assert encode(data.Row("t", "", asked, "Anna")).ids == prompt + answer
    asked = 'Who "is" \\n \n{{it}} \'中文\' \U0001f642?'
    text = jinja2.Template(encode.chat_template()).render(messages=[{"role": "user", "content": asked}])
    assert text == TEXTS[template].replace("@", asked).split("^")[0]


@pytest.mark.parametrize("answer", ["positive", "Anna and Ben", "5", "中文", "it's"])
def test_a_space_before_the_answer_gives_the_ids_of_the_whole_text(folder, answer):
    """Catches a space tokenised with the prompt: no base has seen ": " and "positive" apart."""
    encode = encoder(folder, "Q: {instruction} {input}\\nA: {output}{eos}")
    e = encode(data.Row("t", "who is it", "Anna or Ben", answer))
    assert e.ids == spelled(encode, f"<s>Q: who is it Anna or Ben\nA: {answer}</s>")
    assert e.ids[:e.n_prompt] == spelled(encode, "<s>Q: who is it Anna or Ben\nA:")


def test_texts_of_rows_stay_texts(folder):
    """Catches a row that spells control words or fields, text that does not come back, a corpus unlearnt."""
    encode, odd = encoder(folder), f"{{input}} {{output}} \\1 \\n {{eos}}{''.join(WORDS)} naïve 中文 🙂\nA\0b"
    e, control = encode(data.Row("t", odd, odd, odd)), {*encode.words.values()}
    assert [i for i in e.ids if i in control] == [*encode.tokenizer.bos, encode.eos, encode.eos]
    assert encode.tokenizer.decode(e.ids[e.n_prompt:]) == odd
    assert encode(data.Row("t", "", "", "Anna")) == data.Example("t", spelled(encode, "<s>Anna</s>"), 1)


# tokenizer_config.json; what tokenizer.json puts first (None: sentencepiece's) -> what comes first, what last
@pytest.mark.parametrize("said, own, bos, eos", [
    ("{}", "<s>", ["<s>"], "<|eot_id|>"), ('{"add_bos_token": true}', "", [], "<|eot_id|>"),
    ('{"add_bos_token": null, "eos_token": "</s>"}', "<s>", ["<s>"], "</s>"),
    ('{"add_bos_token": false, "bos_token": "<s>", "eos_token": "no word"}', "<s>", [], "<|eot_id|>"),
    ('{"bos_token": "<s>", "eos_token": "<s>"}', "<s>", ["<s>"], "<s>"),
    ('{"bos_token": {"content": "</s>"}, "eos_token": {"content": "<|im_end|>"}, "add_bos_token": true}', "",
     ["</s>"], "<|im_end|>"),
    ("{}", None, ["<s>"], "</s>"), ('{"add_bos_token": true}', None, ["<s>"], "</s>"),
    ('{"add_bos_token": false}', None, [], "</s>"), ('{"eos_token": "<s>"}', None, ["<s>"], "<s>")])
def test_what_opens_and_ends_a_text(tmp_path, said, own, bos, eos):
    """Catches a bos against the makers' words, doubled or lost, another end, truncation and padding kept."""
    shutil.copy(PIECES, tmp_path) if own is None else write_json(tmp_path, own)
    (tmp_path / "tokenizer_config.json").write_text(said)
    encode = encoder(tmp_path, ends=(WORDS.index("<|eot_id|>"), 1))
    assert [encode.tokenizer.names[i] for i in encode.tokenizer.bos] == bos
    assert encode.tokenizer.names[encode.eos] == eos
    for template in "{instruction}", f"{''.join(bos)}{{instruction}}":
        assert encoder(tmp_path, template, ends=(encode.eos,))(ROW).ids == (
            encode.tokenizer.bos + spelled(encode, "Who is it?\nAnna or Ben") + spelled(encode, "Anna</s>"))


def test_ids_that_only_one_of_tokenizer_and_base_knows(folder):
    """Catches an answer of a spare id that crashes, and a word without an embedding that crashes later."""
    encode = encoder(folder)
    n, largest = len(encode.tokenizer.names), max(encode(ROW).ids)
    assert encode.tokenizer.decode([n, *encode.tokenizer.encode("Anna"), n + 7]) == "Anna"
    assert encoder(folder, vocab_size=largest + 1)(ROW) == encode(ROW)
    with pytest.raises(InputError, match=f"is id {largest} of the tokenizer, but the base has {largest} emb"):
        encoder(folder, vocab_size=largest)(ROW)


# ---- Instruction files

def test_files_and_folders_become_rows(tmp_path, capsys):
    """Catches an ignored "input", a BOM or line ends that break a file, rows and keys left out, not told."""
    row = {"instruction": "x", "input": None, "output": "b\u2028c", "task": ""}
    more = row | {"input": "a", "task": "other", "id": 1, "history": []}
    rows = [row, row | {"output": " "}, row | {"output": None}, row | {"instruction": ""}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    one, two = tmp_path / "1.json", tmp_path / "2.jsonl"
    one.write_text(json.dumps([row, more]))
    two.write_bytes("\r\n\r\n".join(["\ufeff", *lines, ""]).encode())
    for other in ("README.md", "._1.json"):      # macOS writes such beside a file
        (tmp_path / other).touch()
    assert data.list_files(f"{two},{tmp_path}") == [two, one, two]
    assert data.read_rows([one]) == [("1", "x", "", "b\u2028c"), ("other", "x", "a", "b\u2028c")]
    assert "blank: 0; keys not used: id (1 rows)\n" in capsys.readouterr().out
    assert data.read_rows([two]) == [("2", "x", "", "b\u2028c")]
    assert "question or answer blank: 3; keys not used: none\n" in capsys.readouterr().out


@pytest.mark.parametrize("name, task", [
    ("q-train.json", "q"), ("q_Test.jsonl", "q"), ("q.dev.json", "q"), ("q-val/train.json", "q"),
    ("q/rows.json", "rows"), ("latest.json", "latest"), ("contest-test.json", "contest")])
def test_a_task_is_named_by_its_data_set(name, task):
    """Catches training and test files of one data set that do not meet, and a name cut wrongly."""
    assert data.task_of(data.Path(name)) == task


def test_files_that_are_named_so_are_held_out(tmp_path, capsys):
    """Catches a test file in a folder that is trained on, and questions on both sides that no line tells."""
    for name, numbers in ("q-train.json", "01"), ("q-test.json", "12"):
        (tmp_path / name).write_text("\n".join(f'{{"instruction": "{n}", "output": "{n}"}}' for n in numbers))
    rows, val = train.read_data(train.Config(data=str(tmp_path), val_data=""))
    assert [r.output for r in rows] == ["0", "1"] and {r.output for r in val} == {"1", "2"}
    held_out, shared = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "q-test.json") in held_out and "1 of 2 rows" in shared


def test_rows_are_held_out_by_their_prompts():
    """Catches equal prompts on both sides, rows lost, a share not kept, a split that new rows change."""
    rows = [data.Row("t", f"question {i % 200}", "", f"answer {i}") for i in range(400)]
    trained, held_out = data.hold_out(rows, 0.2)
    assert sorted(trained + held_out) == sorted(rows) and 40 < len(held_out) < 120
    assert not {r.instruction for r in trained} & {r.instruction for r in held_out}
    assert data.hold_out(rows[7:300], 0.2)[1] == [r for r in rows[7:300] if r in held_out]


# ---- Examples and batches

def test_the_order_is_a_pure_function_of_seed_and_step():
    """Catches sampling with replacement, one order for all epochs or seeds, one that depends on history."""
    examples = [data.Example("t", [i], 1) for i in range(7)]
    orders = [[data.shuffled(examples, seed)(i).ids[0] for i in range(21)] for seed in (0, 1)]
    epochs = {tuple(order[i:i + 7]) for order in orders for i in (0, 7, 14)}
    assert len(epochs) == 6 and all(sorted(epoch) == [*range(7)] for epoch in epochs)
    late = data.shuffled(examples, 0)
    assert [late(i).ids[0] for i in (20, 9, 0, 9)] == [orders[0][i] for i in (20, 9, 0, 9)]


@pytest.mark.parametrize("budget, longer", [(96, 1.25), (9999, 1.25), (200, math.inf), (9999, math.inf)])
def test_micro_batches(budget, longer):
    """Catches an example lost or doubled, a budget exceeded, too much padding, micro-batches too small."""
    examples = [data.Example("t", [1] * n, 1) for n in random.Random(0).choices(range(2, 90), k=50)]
    batches = data.micro_batches(examples, budget, longer)
    assert sorted(id(e) for b in batches for e in b) == sorted(map(id, examples))
    lengths = [sorted(data.padded_length(len(e.ids)) for e in b) for b in batches]
    assert all(len(b) * b[-1] <= budget and b[-1] <= longer * b[0] for b in lengths)
    assert all((len(b) + 1) * b[-1] > budget or b[-1] > longer * after[-1]
               for b, after in zip(lengths, lengths[1:]))


def test_long_rows_lose_prompt_never_answer(folder, capsys):
    """Catches an answer cut, a prompt that loses its start or its end, and drops that nobody hears of."""
    encode, many = encoder(folder), "Anna has the ball. " * 40
    rows = [data.Row("t", f"Start. {many}", "", "the ball"), data.Row("t", "Say", "", many), ROW]
    whole = encode(rows[0])
    cut, short = data.encode_rows(encode, rows, 60)
    assert short == encode(ROW) and cut.n_prompt == 60 - len(whole.ids) + whole.n_prompt
    first = (cut.n_prompt + 1) // 2
    assert cut.ids == whole.ids[:first] + whole.ids[first - 60:]
    assert capsys.readouterr().out == "--max_length=60: 1 prompts shortened, 1 rows dropped of 3\n"
    assert data.encode_rows(encode, rows[:1], len(whole.ids)) == [whole] and not capsys.readouterr().out


def test_padding_is_masked_by_length_not_by_id():
    """Catches a mask by token id: with pad = end of sequence a model would never learn to stop."""
    short, long = data.Example("t", [1, 5, 0, 7, 0], 3), data.Example("t", [1] + [6] * 23 + [2], 10)
    x, y, mask = data.collate([short, long])
    assert x[0, :4].tolist() == [1, 5, 0, 7] and x[1].tolist() == long.ids[:-1]
    assert mask.tolist() == [[True] * 4 + [False] * 20, [True] * 24]
    assert y.tolist() == [[-1, -1, 7, 0] + [-1] * 20, [-1] * 9 + [6] * 14 + [2]]
