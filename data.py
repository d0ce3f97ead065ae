"""Text in, batches out: instruction files, templates, tokenizers, micro-batches. Knows nothing of models.

The idea: a source of text is a function i -> Example, pure in its index. Step s takes examples s*n .. s*n+n-1
whenever it is run, so the order of the data follows from (seed, s), and resuming needs no state. A step's
examples are then split into micro-batches of similar length under a token budget.

What may surprise:
- A row is held out by a hash of its prompt: equal prompts are never parted, and new rows move no old one.
- Prompt and answer are tokenised apart. Control words of a template are ids; no text of a row can spell one.
- Padding is masked by length, not by id: with pad = end of sequence a model would never learn to stop.
"""

import functools
import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

from teamlora import InputError, naming


class Row(NamedTuple):
    """One instruction with its answer, as text."""
    task: str
    instruction: str
    input: str
    output: str


class Example(NamedTuple):
    """One tokenised row: ids of prompt and answer, of which the first n_prompt are not supervised."""
    task: str
    ids: list
    n_prompt: int


# ---- Instruction files

HELD_OUT = re.compile(r"(^|[-_. ])(test|testing|val|valid|validation|dev|eval)$", re.I)
TRAINED = re.compile(r"(^|[-_. ])(train|training)$", re.I)
HALF_PAIR = re.compile("[\ud800-\udfff]")        # of a surrogate pair, from JSON's escapes, is no character


def list_files(paths):
    """The files of a comma-separated list, in which a folder stands for its .json and .jsonl files."""
    files = []
    for path in paths.split(","):
        inside = [p for p in Path(path).glob("[!.]*") if p.suffix in (".json", ".jsonl")]
        if not path or Path(path).is_dir() and not inside:
            raise InputError(f"no .json or .jsonl file in '{path}'")
        files += sorted(inside) or [Path(path)]
    return files


def task_of(path):
    """The name of a file's data set: boolq-train.json, boolq_test.json and boolq/dev.json are all boolq."""
    names = (TRAINED.sub("", HELD_OUT.sub("", name)) for name in (path.stem, path.absolute().parent.name))
    return next(filter(None, names), path.stem)


def read_rows(files):
    """Rows of JSON lists or lines of {"instruction", "input" (optional), "output", "task" (optional, else by
    the file's name)}; null is none. What is left out is printed. InputError tells the file and the row."""
    rows, unused = [], Counter()
    for path in files:
        with naming(path):
            text = path.read_text("utf-8-sig")
            raws = json.loads(text) if text.lstrip().startswith("[") else filter(str.strip, text.split("\n"))
        for number, raw in enumerate(raws, 1):
            with naming(path, f", row {number}"):
                raw = json.loads(raw) if isinstance(raw, str) else raw
                row = isinstance(raw, dict) and "output" in raw and Row(*(
                    default if raw.get(key) in (None, "") else raw[key]
                    for key, default in zip(Row._fields, (task_of(path), "", "", ""))))
                if not row or not all(isinstance(v, str) and not HALF_PAIR.search(v) for v in row):
                    raise InputError(f"not texts under instruction, output (input, task): {str(raw)[:80]}")
                unused.update(key for key in raw if key not in Row._fields and raw[key])
                rows.append(row)
    full = [row for row in rows if row.output.strip() and (row.instruction + row.input).strip()]
    if not full:
        raise InputError(f"no row with a question and an answer in {', '.join(map(str, files))}")
    if len(full) < len(rows) or unused:
        print(f"rows left out, question or answer blank: {len(rows) - len(full)}; keys not used: "
              f"{', '.join(f'{key} ({n} rows)' for key, n in unused.most_common(9)) or 'none'}")
    return full


def hash_fraction(row):
    """A number in [0, 1) by a hash of the prompt: equal prompts have equal ones."""
    hashed = hashlib.sha256(f"{row.instruction}\n{row.input}".encode()).digest()
    return int.from_bytes(hashed[:4], "big") / 2 ** 32


def hold_out(rows, share):
    """(training rows, held-out rows): about `share` of them, by `hash_fraction`."""
    return [r for r in rows if hash_fraction(r) >= share], [r for r in rows if hash_fraction(r) < share]


def by_task(items):
    """task -> its rows or examples, tasks in the order of their names."""
    return {task: [i for i in items if i.task == task] for task in sorted({i.task for i in items})}


# ---- Templates and tokenizers

# What stands around a row. What follows {output} ends an answer and must be one id; {eos} is the end of
# sequence. A space or newline before an empty {input} goes with it.
TEMPLATES = {
    "paper": "{instruction}\n{input}{eos}{output}{eos}",
    "llama2": "[INST] {instruction}\n{input} [/INST]{output}{eos}",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{instruction}\n{input}<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n{output}<|eot_id|>",
    "chatml": "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n{output}<|im_end|>"}


def read_template(text):
    """(what stands before the answer, what ends it) of the template of that name, or of a text, \\n for
    newlines. InputError if its fields are not those of TEMPLATES, once each."""
    template = TEMPLATES.get(text, text).replace("\\n", "\n")
    template += "" if "{output}" in template else "{output}{eos}"
    if "{input}" not in template:                # it must not be lost
        template = template.replace("{instruction}", "{instruction}\n{input}")
    if [template.count(field) for field in ("{instruction}", "{input}", "{output}")] != [1, 1, 1]:
        raise InputError(f"template must be {', '.join(TEMPLATES)} or a text with {{instruction}}, perhaps "
                         f"{{input}}, and {{output}}, once each, and {{eos}}, not '{text}'")
    return template.split("{output}")


class Tokenizer:
    """Text to ids and back, by the files in a Llama folder: tokenizer.model if it is sentencepiece's (Llama 1
    and 2, the built-in base), else tokenizer.json by the optional package `tokenizers` (Llama 3, SmolLM2).

    encode(text): ids, none of them a control word's; decode(ids): text; bos: the ids that open a text; eos:
    the id that ends one, below 0 if none is named; words: control word -> id; names: id -> word; adds_space:
    whether it writes a space before a text that has none.
    """

    def __init__(self, folder):
        pieces, words = Path(folder) / "tokenizer.model", Path(folder) / "tokenizer.json"
        # Llama 3's tokenizer.model is a list of lines; sentencepiece's begins with the tag of its first field
        if pieces.is_file() and pieces.open("rb").read(1) == b"\n":
            with naming(pieces):
                ids = self.open_pieces(sentencepiece.SentencePieceProcessor(model_file=str(pieces)))
        elif words.is_file():
            with naming(words):
                ids = self.open_words(words)
        else:
            raise InputError(f"{folder}: neither tokenizer.json nor tokenizer.model of sentencepiece's "
                             "(Llama 3's is not) is there; copy one from where the model was published")
        self.names = {i: word for word, i in ids.items()}
        self.adds_space = self.names[self.encode("a")[0]] != "a"
        with naming(path := Path(folder) / "tokenizer_config.json"):     # has the last word on bos and eos
            said = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            bos, eos = (ids.get(v["content"] if isinstance(v, dict) else v) for v in (
                said.get("bos_token"), said.get("eos_token")))
            self.eos = self.eos if eos is None else eos
            if said.get("add_bos_token") is not None:
                self.bos = (self.bos or [i for i in [bos] if i is not None]) if said["add_bos_token"] else []

    def open_pieces(self, model):
        """Set encode, decode, bos, eos, words; return word -> id."""
        ids = {model.id_to_piece(i): i for i in range(model.vocab_size())}
        self.encode = model.encode
        self.decode = lambda some: model.decode([i for i in some if i < len(ids)])
        self.words = {word: i for word, i in ids.items() if model.is_control(i)}
        self.bos, self.eos = [i for i in [model.bos_id()] if i >= 0], model.eos_id()     # -1: none
        return ids

    def open_words(self, path):
        """The same for a tokenizer.json."""
        try:
            from tokenizers import Tokenizer as Model
        except ImportError:
            raise InputError("needs the package tokenizers: pip install tokenizers") from None
        model = Model.from_file(str(path))
        model.no_truncation()                    # a file may have been saved with both switched on
        model.no_padding()
        a = model.encode("a")                    # Llama 3 was trained with a bos in front, SmolLM2 was not
        model.encode_special_tokens = True       # from here on a control word in a text is text
        self.bos, self.eos = a.ids[:1] if a.special_tokens_mask[0] else [], -1
        self.encode, self.decode = lambda text: model.encode(text, add_special_tokens=False).ids, model.decode
        self.words = {t.content: i for i, t in model.get_added_tokens_decoder().items() if t.special}
        return model.get_vocab()


# ---- Examples and micro-batches

class Encoder:
    """Row -> Example by a tokenizer and a template; the base has vocab_size embeddings, and the first of its
    `ends` serves where the tokenizer names none. end: the id that ends an answer; InputError if not one."""

    def __init__(self, tokenizer, template, vocab_size, ends=()):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.eos = next((i for i in (tokenizer.eos, *ends) if i >= 0), None)
        self.words = tokenizer.words | {"{eos}": self.eos}
        self.split = re.compile("(" + "|".join(map(re.escape, sorted(self.words, key=len)[::-1])) + ")").split
        self.before, end = read_template(template)
        # a space before the answer belongs to the answer's first token, as in a text that is tokenised whole
        self.space = " " if self.before.endswith(" ") and not tokenizer.adds_space else ""
        self.before, ids = self.before.removesuffix(" "), self.ids_of(end)
        if len(ids) != 1 or ids[0] is None:
            raise InputError(f"--template={template} ends an answer with '{end}', {len(ids)} ids for this "
                             "tokenizer; it must be one control word of its own, or {eos} where one is named")
        self.end = ids[0]

    def ids_of(self, template, **texts):
        """Ids of a template: its control words' own, and those of what is between them, texts filled in."""
        ids = []
        for part in filter(None, self.split(template)):
            filled = re.sub("{(instruction|input)}", lambda field: texts[field[1]], part)
            ids += [self.words[part]] if part in self.words else self.tokenizer.encode(filled)
        return ids

    def __call__(self, row):
        """A row without a question is plain text, supervised throughout."""
        question, more = (row.instruction, row.input) if row.instruction else (row.input, "")
        before = self.before if more else re.sub(r"[ \n]?{input}", "", self.before)
        prompt = self.ids_of(before, instruction=question, input=more) if question else []
        if prompt[:len(self.tokenizer.bos)] != self.tokenizer.bos:   # else the template has written it
            prompt = self.tokenizer.bos + prompt
        space, end = (self.space, self.end) if question else ("", self.eos)
        ids = prompt + self.tokenizer.encode(space + row.output) + [end]
        if max(ids) >= self.vocab_size:
            raise InputError(f"'{self.tokenizer.names[max(ids)]}' is id {max(ids)} of the tokenizer, but the "
                             f"base has {self.vocab_size} embeddings; take the tokenizer of this base")
        return Example(row.task, ids, max(1, len(prompt)))

    def chat_template(self):
        """The prompt in Jinja, for transformers' apply_chat_template: the last message is the question."""
        bos = "".join(self.tokenizer.names[i] for i in self.tokenizer.bos)
        before = re.sub(r"[ \n]?{input}", "", self.before).removeprefix(bos)
        before = bos + before.replace("{eos}", self.tokenizer.names.get(self.eos, ""))
        first, last = (json.dumps(t, ensure_ascii=False) for t in before.split("{instruction}"))
        return f"{{{{ {first} + messages[-1]['content'] + {last} }}}}"


def encode_rows(encode, rows, max_length, shortest=16):
    """Rows -> Examples of at most max_length ids. Too long a prompt loses its middle: the question may stand
    at either end. A row whose answer leaves it fewer than `shortest` ids is dropped. Both are counted."""
    examples, shortened = [], 0
    for e in map(encode, rows):
        excess = len(e.ids) - max_length
        if 0 < excess <= e.n_prompt - shortest:
            first, shortened = (e.n_prompt - excess + 1) // 2, shortened + 1
            e = Example(e.task, e.ids[:first] + e.ids[first + excess:], e.n_prompt - excess)
        if len(e.ids) <= max_length:
            examples.append(e)
    if shortened or len(examples) < len(rows):
        print(f"--max_length={max_length}: {shortened} prompts shortened, {len(rows) - len(examples)} rows "
              f"dropped of {len(rows)}")
    return examples


def shuffled(examples, seed):
    """Examples as an endless stream i -> Example: epoch after epoch, the order of each from (seed, epoch)."""
    if not (n := len(examples)):
        raise InputError("no training row is left: see --data, --val_share and --max_length")

    @functools.lru_cache(2)
    def order(epoch):
        return random.Random(f"order {seed} {epoch}").sample(range(n), n)
    return lambda i: examples[order(i // n)[i % n]]


def padded_length(n):
    """Input length of n ids, rounded up to a multiple of 8: few distinct shapes."""
    return -(-(n - 1) // 8) * 8


def micro_batches(examples, max_tokens, longer=1.25):
    """Split examples by length into micro-batches of at most max_tokens padded tokens, none with a row more
    than `longer` times another's length: on a CPU padding costs most, on a GPU starting one (math.inf)."""
    batches, longest = [], 0
    for e in sorted(examples, key=lambda e: -len(e.ids)):
        n = padded_length(len(e.ids))
        if not batches or n * longer < longest or (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
            longest = n
        batches[-1].append(e)
    return batches


def collate(examples):
    """B examples -> tokens (B, T), targets (B, T) of -1 where unsupervised, mask (B, T) False at padding."""
    T = max(padded_length(len(e.ids)) for e in examples)
    tokens, targets = np.zeros((len(examples), T), np.int64), np.full((len(examples), T), -1, np.int64)
    mask = np.zeros((len(examples), T), bool)
    for b, e in enumerate(examples):
        n = len(e.ids) - 1
        tokens[b, :n], mask[b, :n] = e.ids[:-1], True
        targets[b, e.n_prompt - 1:n] = e.ids[e.n_prompt:]
    return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(mask)
