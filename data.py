"""Text in, batches out: the built-in tasks, instruction files, tokenizers, batching. Knows nothing of models.

The idea: a source of text is a stream, a function i -> Row, pure in its index. Step s takes rows s*n ..
s*n+n-1, so the order of the data is a function of (seed, s), and resuming needs no state. A step's examples
are then cut into micro-batches under a token budget, which changes memory and never the result.

MiniCME, the built-in benchmark: eleven small generated tasks, one for each family of tasks in the paper's
CME, about one small world of people, towns, animals and tools. No text is downloaded.

What may surprise:
- A question belongs to training, validation or the test split by its hash, under any seed. The built-in base
  has read answers to training questions alone. Closed-book tasks (science, openqa, knowledge) ask facts that
  it has read, in words that no training question used.
- Prompt and answer are tokenised apart, and end-of-sequence is an id: sentencepiece never makes it of text.
- Padding is masked by length, not by id: with pad = end-of-sequence a model would never learn to stop.

Letters: B batch, T time.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from teamlora import InputError, foreign


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


# ---- The world of MiniCME: fixed lists, and facts drawn once from them

WOMEN = "Anna Clara Emma Flora Greta Ivy Lena Mona Nora Ruth Vera Zoe".split()
MEN = "Adam Boris Carl David Felix Hugo Jonas Leo Oscar Paul Simon Tom".split()
PEOPLE = WOMEN + MEN
TOWNS = "Arden Belmont Corfield Dunmore Elton Farley Granby Holt Kelm Lorne Marlow Tarn".split()
COUNTRIES = "Norland Suria Vestia Ostrom Calda Brenia Tirol Galdor Mirania Pelagia Quent Zamora".split()
GOODS = "wool salt wine coal tea honey silk corn".split()
COLOURS = "red blue green white black yellow".split()
PLACES = "kitchen garden hall cellar attic market park library harbour station".split()
OBJECTS = "ball book cup lamp box coat ring drum map clock chair vase".split()
GOOD = "great lovely tasty pleasant superb charming perfect fine".split()
BAD = "awful boring dirty terrible dull ugly nasty poor".split()
THINGS = "meal room film song show trip party view".split()
# kind -> (names, what it has, its home, what it can)
KINDS = {"bird": ("robin owl swan crow eagle finch", "feathers", "in a nest", "fly"),
         "fish": ("trout carp salmon perch eel cod", "fins", "in water", "swim"),
         "insect": ("ant bee moth beetle wasp cricket", "six legs", "under stones", "buzz"),
         "mammal": ("fox wolf bear deer hare badger", "fur", "in a den", "run"),
         "tree": ("oak pine birch maple willow elm", "bark", "in a forest", "grow tall"),
         "flower": ("rose tulip daisy lily poppy violet", "petals", "in a meadow", "bloom")}
KIND_OF = {name: kind for kind, (names, *_) in KINDS.items() for name in names.split()}
TOOLS = {"knife": "cut the bread", "key": "open the door", "umbrella": "stay dry in the rain",
         "broom": "sweep the floor", "needle": "sew a shirt", "pen": "write a letter", "hammer": "hit a nail",
         "spade": "dig a hole", "towel": "dry the dishes", "match": "light a fire", "kettle": "boil water",
         "ladder": "reach the roof", "net": "catch a butterfly", "comb": "tidy the hair",
         "rope": "tie the boat", "brush": "paint the wall"}
# verb -> synonym
VERBS = {"bought": "purchased", "found": "discovered", "fixed": "repaired", "sold": "traded",
         "made": "created"}
# verb -> (reason, whose: 0 of who did it, 1 of whom it was done to)
REASONS = {"thanked": ("had helped", 1), "praised": ("had won", 1), "blamed": ("had lied", 1),
           "called": ("needed help", 0), "left": ("was tired", 0), "visited": ("felt lonely", 0)}


def article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def pronoun(person):
    return "she" if person in WOMEN else "he"


# subject -> attribute -> answer
_facts = random.Random("the world of MiniCME")
LIVES = {p: {"town": _facts.choice(TOWNS),
             "pet": _facts.choice("cat dog parrot turtle rabbit horse goose pony".split()),
             "job": _facts.choice("baker teacher doctor farmer singer painter sailor judge".split()),
             "dish": _facts.choice("soup rice cake salad cheese pasta stew pie".split())} for p in PEOPLE}
LANDS = {c: {"capital": town, "product": _facts.choice(GOODS), "flag": _facts.choice(COLOURS)}
         for c, town in zip(COUNTRIES, _facts.sample(TOWNS, len(TOWNS)))}
NATURE = {article(name): dict(zip(("kind", "has", "home", "can"), (article(kind), *KINDS[kind][1:])))
          for name, kind in KIND_OF.items()}

# attribute -> wordings of the question; {s} is the subject
QUESTIONS = {
    "town": "Where does {s} live?|What is the home town of {s}?|In which town does {s} live?|"
            "Name the town of {s}.|Which town is the home of {s}?",
    "job": "What is the job of {s}?|What does {s} work as?|What is the work of {s}?|Name the job of {s}.|"
           "Which job does {s} have?",
    "pet": "Which pet does {s} keep?|What is the pet of {s}?|Which animal does {s} keep at home?|"
           "Name the pet of {s}.|What pet has {s} got?",
    "dish": "What does {s} like to eat?|What is the best dish for {s}?|Which dish does {s} like?|"
            "Name the dish of {s}.|Which food does {s} like to eat?",
    "capital": "The capital of {s}?|The main town of {s}?", "product": "The product of {s}?|What {s} sells?",
    "flag": "The flag of {s}?|The colour of {s}?",
    "kind": "What is {s}?|What kind of thing is {s}?|Which kind does {s} belong to?|Name the kind of {s}.",
    "has": "What does {s} have?|What do we find on {s}?|What has {s} got?|Name what {s} has.",
    "home": "Where does {s} live?|Where do we find {s}?|Where is the home of {s}?|Name the home of {s}.",
    "can": "What can {s} do?|What is {s} able to do?|What does {s} do?|Name what {s} can do."}


# ---- The eleven tasks: rng -> (question, answer, *parts of them that other sentences can be made of)

def say(rng, wordings, **slots):
    """One of several wordings, separated by '|', with its slots filled and a capital in front."""
    text = rng.choice(wordings.split("|")).format(**slots)
    return text[:1].upper() + text[1:]


def other(rng, items, *taken):
    return rng.choice([x for x in items if x not in taken])


def sentiment(rng):
    """A review of two clauses and whether it is good: 'not' turns a word round, 'but' lets the last win."""
    def clause(good, thing):
        negated = rng.random() < 0.3
        return f"the {thing} was {'not ' * negated}{rng.choice(GOOD if good != negated else BAD)}"
    good, but, (a, b) = rng.random() < 0.5, rng.random() < 0.3, rng.sample(THINGS, 2)
    text = say(rng, clause(good != but, a) + (", but " if but else " and ") + clause(good, b) + ".")
    return text, "positive" if good else "negative"


def scene(rng, n=3):
    """n people, each in a place or with a thing: list of facts (person, relation, what)."""
    return [(p, "in", place) if rng.random() < 0.5 else (p, "has", thing) for p, place, thing in
            zip(rng.sample(PEOPLE, n), rng.sample(PLACES, n), rng.sample(OBJECTS, n))]


def tell(rng, *facts):
    """Facts of a scene as sentences, the last without its full stop."""
    wordings = {"in": "{p} is in the {w}|{p} stands in the {w}", "has": "{p} has the {w}|{p} holds the {w}"}
    return ". ".join(say(rng, wordings[relation], p=p, w=what) for p, relation, what in facts)


def claim(rng, facts):
    """A claim about a scene that is true ('yes'), false ('no') or about somebody not in it ('maybe')."""
    label, (p, relation, what) = rng.choice(("yes", "no", "maybe")), rng.choice(facts)
    if label == "no":
        same = [w for _, r, w in facts if r == relation and w != what]
        what = rng.choice(same) if same else other(rng, PLACES if relation == "in" else OBJECTS, what)
    if label == "maybe":
        p = other(rng, PEOPLE, *(person for person, *_ in facts))
    return (p, relation, what), label


def inference(rng):
    facts = scene(rng, 2)
    claimed, label = claim(rng, facts)
    return f"{tell(rng, *facts)}.\n{tell(rng, claimed)}?", label


def event(rng):
    """Who did what to which thing."""
    return {"p": rng.choice(PEOPLE), "v": rng.choice(list(VERBS)), "o": rng.choice(OBJECTS)}


def report(rng, e):
    """The event in one of two wordings, its verb as it is or as a synonym."""
    verb = rng.choice((e["v"], VERBS[e["v"]]))
    return say(rng, "{p} {v} the {o}.|It was {p} who {v} the {o}.", **{**e, "v": verb})


def twist(rng, e):
    """The event with one of its parts exchanged."""
    part, pool = rng.choice((("p", PEOPLE), ("v", VERBS), ("o", OBJECTS)))
    return {**e, part: other(rng, pool, e[part])}


def paraphrase(rng):
    e, same = event(rng), rng.random() < 0.5
    return f"{report(rng, e)}\n{report(rng, e if same else twist(rng, e))}", "same" if same else "different"


def sighting(rng, p, name):
    """Somebody saw an animal or a plant."""
    return say(rng, "{p} saw {a} in the {l}.|In the {l} {p} saw {a}.",
               p=p, a=article(name), l=rng.choice(PLACES))


def claim_sighting(rng, p, name):
    """A claim about that, half of them true: (person, kind of what was seen, 'true' or 'false')."""
    right = p, KIND_OF[name]
    claimed = rng.choice((right, right, (other(rng, PEOPLE, p), right[1]), (p, other(rng, KINDS, right[1]))))
    return *claimed, "true" if claimed == right else "false"


def entailment(rng):
    p, name = rng.choice(PEOPLE), rng.choice(list(KIND_OF))
    q, kind, label = claim_sighting(rng, p, name)
    return f"{sighting(rng, p, name)}\n{q} saw {article(kind)}.", label


def summarisation(rng):
    e = event(rng)
    e |= {"l": rng.choice(PLACES), "q": other(rng, PEOPLE, e["p"]), "s": pronoun(e["p"]),
          "d": rng.choice(COLOURS), "w": rng.choice(THINGS), "g": rng.choice(GOOD)}
    story = [say(rng, "{p} went to the {l}.|{p} was in the {l} that day.", **e),
             say(rng, "{q} told {p} about a {w}.|The {w} there was {g}.|{q} wore a {d} coat.", **e),
             say(rng, "Then {s} {v} the {o}.|There {s} {v} the {o}.", **e),
             say(rng, "{q} went home.|It was a {g} day.|Later {s} met {q}.", **e)]
    return " ".join(story), "{p} {v} the {o} in the {l}.".format(**e)


def commonsense(rng, wordings="{p} wants to {g}. Should {s} use the {a}, the {b} or the {c}?|"
                              "To {g}, does {p} need the {a}, the {b} or the {c}?"):
    """Person p has a goal g, for which one of a, b and c is the right tool t."""
    tool, p = rng.choice(list(TOOLS)), rng.choice(PEOPLE)
    options = rng.sample([tool] + rng.sample([t for t in TOOLS if t != tool], 2), 3)
    slots = dict(zip("abc", options), p=p, s=pronoun(p), g=TOOLS[tool], t=tool)
    return say(rng, wordings, **slots), f"the {tool}"


def question(rng, world):
    """A question about a fact of one of the worlds LIVES, LANDS, NATURE: (question, answer, attribute)."""
    subject = rng.choice(list(world))
    attribute = rng.choice(list(world[subject]))
    return say(rng, QUESTIONS[attribute], s=subject), world[subject][attribute], attribute


def knowledge(rng):
    """A question about a country with three choices; parts: question, choices, right choice."""
    asked, right, attribute = question(rng, LANDS)
    pool = {"capital": TOWNS, "product": GOODS, "flag": COLOURS}[attribute]
    options = rng.sample([right] + rng.sample([x for x in pool if x != right], 2), 3)
    listed = " ".join(f"({letter}) {x}" for letter, x in zip("ABC", options))
    return f"{asked} {listed}", "ABC"[options.index(right)], asked, listed, right


def reading(rng):
    """A scene and a question about it; parts: facts, the scene's text, the question as after 'he asked'."""
    facts = scene(rng)
    p, relation, what = rng.choice(facts)
    if rng.random() < 0.5:
        who = f"{'is in' if relation == 'in' else 'has'} the {what}"
        direct, indirect, answer = f"Who {who}?", f"who {who}", p
    elif relation == "in":
        direct, indirect, answer = f"Where is {p}?", f"where {p} is", f"in the {what}"
    else:
        direct, indirect, answer = f"What does {p} have?", f"what {p} has", f"the {what}"
    text = tell(rng, *facts) + "."
    return f"{text}\n{direct}", answer, facts, text, indirect


def coreference(rng):
    """Whom a pronoun means: gender tells or, if it is the same, the verb."""
    verb = rng.choice(list(REASONS))
    why, index = REASONS[verb]
    pair = rng.sample(PEOPLE, 2)
    return f"{pair[0]} {verb} {pair[1]} because {pronoun(pair[index])} {why}.\nWho {why}?", pair[index]


# name -> (function, chance of a guess among the possible answers, wordings of the instruction)
TASKS = {
    "sentiment": (sentiment, 1 / 2,
                  "Is this review positive or negative?|Tell if the review is positive or negative."),
    "inference": (inference, 1 / 3,
                  "Answer with yes, no or maybe.|Read the text and decide: yes, no or maybe?"),
    "paraphrase": (paraphrase, 1 / 2,
                   "Do the two sentences say the same?|Compare the two sentences: same or different?"),
    "entailment": (entailment, 1 / 2,
                   "Is the second sentence true?|Decide if the second sentence is true or false."),
    "summarisation": (summarisation, 0.0, "Sum up the story in one sentence.|Tell the story in short."),
    "commonsense": (commonsense, 1 / 3, "Choose the right tool.|Which of these tools is right?"),
    "science": (functools.partial(question, world=NATURE), 1 / 6,
                "Answer the question about nature.|Tell a fact about nature."),
    "openqa": (functools.partial(question, world=LIVES), 1 / 8, "Answer the question.|Tell in one word."),
    "reading": (reading, 1 / 3, "Read the text and answer the question.|Find the answer in the text."),
    "knowledge": (knowledge, 1 / 3, "Choose the letter of the right answer.|Which letter is right?"),
    "coreference": (coreference, 1 / 2, "Answer with a name.|Decide whom the sentence is about.")}
CHANCE = {task: chance for task, (_, chance, _) in TASKS.items()}


def split_of(asked):
    """The split a question belongs to, by its hash: one in five for the test, one in ten for validation."""
    byte = hashlib.sha256(asked.encode()).digest()[0]
    return "test" if byte < 51 else "validation" if byte < 77 else "training"


def draw(rng, task, split):
    """A random row of the task from a split."""
    make, _, instructions = TASKS[task]
    while True:
        asked, answer, *_ = make(rng)
        if split_of(asked) == split:
            return Row(task, say(rng, instructions), asked, answer)


def minicme(seed):
    """The training stream of MiniCME: i -> Row, tasks in turn, so that every step sees them evenly."""
    names = list(TASKS)
    return lambda i: draw(random.Random(f"minicme {seed} {i}"), names[i % len(names)], "training")


def minicme_held_out(split, n=100):
    """A held-out split: task -> n distinct questions, or as many as a task has. Independent of any seed."""
    held_out = {}
    for task in TASKS:
        rng, rows = random.Random(f"{split} {task}"), {}
        for _ in range(20 * n):
            if len(rows) < n:
                row = draw(rng, task, split)
                rows.setdefault(row.input, row)
        held_out[task] = list(rows.values())
    return held_out


# ---- Instruction files

HALF_PAIR = re.compile("[\ud800-\udfff]")        # from JSON's escapes or a command line; tokenizers crash
LONGEST_TEXT = 1_000_000                         # characters; beyond it tokenising takes minutes, for nothing


def fault(key, value):
    """What is wrong with the text of a row under `key`, or nothing."""
    if not isinstance(value, str):
        return "is not text"
    if len(value) > LONGEST_TEXT:
        return f"has {len(value):,} characters, more than {LONGEST_TEXT:,}"
    if HALF_PAIR.search(value):
        return "has half of a surrogate pair, which is no character"
    return "is not one printable line" if key == "task" and not value.isprintable() else ""


def read_objects(file):
    """(number from 1, value) of every row of a JSON file: the items of one list, or values one after another,
    as a rule an object a line, numbered by line. Names do not tell which."""
    decoder = json.JSONDecoder(parse_constant=lambda name: None)                     # NaN: pandas' nothing
    values, space, line, last, at = [], re.compile(r"\s*"), 1, 0, 0
    try:
        text = file.read_bytes().decode("utf-8-sig")
        while (begin := space.match(text, at).end()) < len(text):
            line, last = line + text.count("\n", last, begin), begin
            value, at = decoder.raw_decode(text, begin)
            values.append((line, value))
    except (ValueError, RecursionError) as e:    # bytes, JSON, numbers of 5000 digits, brackets 1000 deep
        why = foreign(file) or f"not JSON in UTF-8, from line {line} on ({e})"
        raise InputError(f"{file}: {why}") from None
    return list(enumerate(values[0][1], 1)) if [type(v) for _, v in values] == [list] else values


def read_object(path):
    """The one object of a JSON file, {} where there is no such file."""
    values = [value for _, value in read_objects(path)] if path.is_file() else [{}]
    if [type(value) for value in values] != [dict]:
        raise InputError(f"{path}: expected a JSON object")
    return values[0]


def read_row(where, raw, task):
    """A JSON object as a Row; `where` begins an error, `task` is its task if the object names none."""
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected an object with instruction and output")
    if not ("output" in raw and ("instruction" in raw or "input" in raw)):
        raise InputError(f"{where}: a row has instruction, input or both, and output, but this has: "
                         f"{', '.join(raw) or 'nothing'}; rename these keys, or leave the file out")
    row = Row(*(default if raw.get(key) in (None, "") else raw[key]
                for key, default in zip(Row._fields, (task, "", "", ""))))
    for key, value in row._asdict().items():
        if wrong := fault(key, value):
            raise InputError(f"{where}: '{key}' {wrong}")
    return row


def list_files(paths):
    """The files of a comma-separated list, in which a folder stands for its .json and .jsonl files."""
    if not all(paths.split(",")):                # an empty name would mean the current folder
        raise InputError(f"{paths}: a name is missing beside a comma; write ./ for the current folder")
    files = []
    for path in map(Path, paths.split(",")):
        inside = sorted(p for p in path.iterdir() if p.name[0] != ".") if path.is_dir() else []
        rows = [p for p in inside if p.suffix.lower() in (".json", ".jsonl") and p.is_file()]
        if path.is_dir() and not rows:
            raise InputError(f"{path}: no .json or .jsonl file in this folder, but: "
                             f"{', '.join(p.name for p in inside[:9]) or 'nothing'}")
        files += rows or [path]
    if len({os.path.realpath(file) for file in files}) < len(files):
        print(f"warning: a file stands twice in {paths}; its rows count twice")
    return files


PART = re.compile(r"(^|[-_. ])(train|training|test|testing|val|valid|validation|dev|eval)([-_]\d+-of-\d+)?$",
                  re.I)


def task_names(files):
    """file -> its task, by the name of the data set: NAME-train.json and NAME_test.json, NAME/train.json and
    test/NAME.json are all NAME, with so many folders before it that different data sets stay apart."""
    paths, names = {}, {}
    for file in files:
        parts = [PART.sub("", part) for part in Path(os.path.abspath(file)).with_suffix("").parts]
        paths[file] = [part for part in parts if part]
    for file, path in paths.items():
        n = 1
        while any(other[-n:] == path[-n:] and other != path for other in paths.values()):
            n += 1
        names[file] = "/".join(path[-n:])
    return names


def read_rows(*lists):
    """Rows of each of some comma-separated lists of files and folders (see list_files). A row is
    {"instruction", "input" (optional), "output", "task" (optional: else see task_names)}; null is none.

    What is left out is printed: rows of a blank question or answer, keys that nothing here uses. Raises
    InputError that names the file and the row (from 1) for whatever cannot be used.
    """
    found, parts, blank, unused = [list_files(paths) for paths in lists], [], 0, Counter()
    tasks = task_names(sum(found, []))
    for files in found:
        parts.append([])
        for file in files:
            objects = read_objects(file)
            rows = [read_row(f"{file}, row {number}", raw, tasks[file]) for number, raw in objects]
            kept = [row for row in rows if row.output.strip() and (row.instruction + row.input).strip()]
            if not kept:
                raise InputError(f"{file}: no rows in there" + " with a question and an answer" * bool(rows))
            blank += len(rows) - len(kept)
            unused.update(key for _, raw in objects for key in raw.keys() - Row._fields if raw[key])
            parts[-1] += kept
        for task, n in Counter(map(tasks.get, files)).items():
            if n > 1:
                print(f"{n} files are one task, {task}")
    if blank:
        print(f"rows left out because their question or their answer is blank: {blank}")
    if unused:
        print("keys not used: " + ", ".join(f"{key} ({n} rows)" for key, n in unused.most_common(9)))
    return parts


def place(row, salt=""):
    """A number in [0, 1) by a hash of the prompt: equal prompts have equal ones."""
    hashed = hashlib.sha256(f"{salt}{row.instruction}\n{row.input}".encode()).digest()
    return int.from_bytes(hashed[:4], "big") / 2 ** 32


def hold_out(rows, share, salt=""):
    """(training rows, held-out rows): about `share` of every task, by `place`: equal prompts never part,
    adding rows moves none, another salt holds out others. InputError if one side is empty."""
    train, val = [], []
    for row in rows:
        (val if place(row, salt) < share else train).append(row)
    if not train or not val:
        raise InputError(f"holding out {share:.0%} of {len(rows)} rows leaves {len(train)} for training and "
                         f"{len(val)} for validation; change --val_share or give --val_data")
    return train, val


def digest(texts):
    """Short hash of texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


# ---- Tokenizers and prompts

# What stands around a row. What follows {output} ends an answer and must be one id; {eos} is the end of
# sequence as an id; a newline beside an empty field goes with it. Control words like <|eot_id|> become ids in
# a tokenizer.json only.
TEMPLATES = {
    "paper": "{instruction}\n{input}{eos}{output}{eos}",
    "llama2": "[INST] {instruction}\n{input} [/INST]{output}{eos}",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{instruction}\n{input}<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n{output}<|eot_id|>",
    "chatml": "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n{output}<|im_end|>"}


def read_template(text):
    """The template of that name, or the text, \\n for newlines; without {output}, {output}{eos} is added.

    Raises InputError if it is no format string of {instruction}, {input}, {output} and {eos} alone.
    """
    template = TEMPLATES.get(text, text).replace("\\n", "\n")
    template += "" if "{output}" in template else "{output}{eos}"
    head = template.partition("{output}")[0]
    found = [f for part in head.split("{eos}") for f in re.findall("{{|}}|{instruction}|{input}|[{}]", part)]
    if ({"{", "}"} & {*found} or found.count("{instruction}") != 1 or found.count("{input}") > 1
            or template.count("{output}") > 1 or HALF_PAIR.search(template)):
        raise InputError(f"--template must be {', '.join(TEMPLATES)} or a text with {{instruction}}, "
                         f"{{input}}, {{output}} and {{eos}}, each of the first three once, not '{text}'")
    return template


class Tokenizer:
    """Text to ids and back, by sentencepiece's tokenizer.model (Llama 1 and 2, TinyLlama, the built-in base).

    Attributes: ids (of all words it knows) and names (the reverse), prefix (ids that open a text), eos, size,
    template and end (see `use`), limit (the base has embeddings for smaller ids only), and words: what is one
    id in a template, "{eos}" and control words, though text in a row; split: a template at them.
    """

    def __init__(self, path, eos=None):
        """tokenizer_config.json beside it has the last word; eos: the base's, if no file names one."""
        self.path, self.limit = Path(path), math.inf
        opening, own_eos = self.read()
        said = read_object(self.path.with_name("tokenizer_config.json"))
        said |= {key: v.get("content") for key, v in said.items() if isinstance(v, dict)}
        bos, named_eos = (self.ids.get(said[key]) if isinstance(said.get(key), str) else None
                          for key in ("bos_token", "eos_token"))
        if said.get("add_bos_token") in (True, False):
            opening = opening or [bos] * (bos is not None) if said["add_bos_token"] else []
        ends = [i for i in (named_eos, own_eos, eos) if i is not None]
        if not ends:
            raise InputError(f"{path}: no end of sequence is named, here or as eos_token in "
                             "tokenizer_config.json or eos_token_id in config.json, so no answer could end")
        self.prefix, self.eos, self.words = opening, ends[0], self.words | {"{eos}": ends[0]}
        self.split = re.compile(f"({'|'.join(sorted(map(re.escape, self.words), key=len)[::-1])})").split
        self.names = {i: word for word, i in self.ids.items()}
        self.size = 1 + max(*self.names, *opening, self.eos)                         # ids may have gaps
        self.use("paper")

    def read(self):
        """Set model, ids, words, text (ids -> text) and known (ids that it takes); return the ids that open a
        text and the one, or None, that ends it."""
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
            self.known, self.text = range(self.model.vocab_size()), self.model.decode
            self.ids = {self.model.id_to_piece(i): i for i in self.known}
        except (OSError, RuntimeError, ValueError) as e:   # its message may itself be no UTF-8: a ValueError
            why = foreign(self.path) or f"not a sentencepiece model ({e})"
            raise InputError(f"{self.path}: {why}") from None
        other, more = (self.path.with_name(name) for name in ("tokenizer.json", "added_tokens.json"))
        try:                                     # words that were added for chats, which this file leaves out
            added = [(t["content"], t["id"]) for t in read_object(other).get("added_tokens", [])]
            added = {str(word): int(i) for word, i in [*added, *read_object(more).items()]}
        except (LookupError, TypeError, ValueError) as e:
            raise InputError(f"{other} or {more.name}: added tokens that cannot be read ({e})") from None
        words = {word: i for word, i in self.ids.items() if self.model.is_control(i)} | added
        self.words = {word: i for word, i in words.items() if word not in "{instruction}{input}"}
        self.ids |= added
        bos, eos = self.model.bos_id(), self.model.eos_id()
        return [bos] * (bos >= 0), eos if eos >= 0 else None

    def use(self, template):
        """Write prompts by this template, a name or a text; end: the id that ends an answer in it. Raises
        InputError if that is not one id."""
        self.template = read_template(template)
        end = self.template.partition("{output}")[2]
        ids = [self.words[end]] if end in self.words else self.encode(end)
        if len(ids) != 1:
            raise InputError(f"--template={template!r} ends an answer with {end!r}, which {self.path} reads "
                             f"as {len(ids)} ids; it must be a single control word of this tokenizer, "
                             "or {eos}")
        self.end = ids[0]

    def encode(self, text):
        """Ids of the text alone, without any special id."""
        return self.model.encode(text)

    def decode(self, ids):
        """The text of ids; one that only the base knows, whose embeddings may be more, as its number."""
        return "".join(self.text([*run]) if known else "".join(self.names.get(i, f"<{i}>") for i in run)
                       for known, run in itertools.groupby(ids, self.known.__contains__))


class JsonTokenizer(Tokenizer):
    """The same for a tokenizer.json (Llama 3, SmolLM2), through the optional package `tokenizers`."""

    def read(self):
        try:
            import tokenizers
        except ImportError:
            raise InputError(f"{self.path} needs the package tokenizers: pip install tokenizers") from None
        try:
            self.model = tokenizers.Tokenizer.from_file(str(self.path))
            self.model.no_truncation()           # a file may have been saved with both switched on
            self.model.no_padding()
            a = self.model.encode("a")
        except Exception as e:                   # tokenizers raises bare Exception
            why = foreign(self.path) or f"not a readable tokenizer ({e}); is the package older than it?"
            raise InputError(f"{self.path}: {why}") from None
        self.ids, self.words = self.model.get_vocab(), {}  # its control words become ids by themselves
        self.known = set(self.ids.values())
        self.text = functools.partial(self.model.decode, skip_special_tokens=False)
        # the file itself says whether its model was trained with a bos in front: Llama 3 yes, SmolLM2 no
        opening = itertools.takewhile(lambda pair: pair[1], zip(a.ids, a.special_tokens_mask))
        return [i for i, _ in opening], None

    def encode(self, text):
        return self.model.encode(text, add_special_tokens=False).ids


def open_tokenizer(folder, eos=None):
    """The tokenizer in a Llama folder; eos: the model's end of sequence, if the tokenizer names none."""
    pieces, words = Path(folder) / "tokenizer.model", Path(folder) / "tokenizer.json"
    # Meta's Llama 3 calls a list of lines "base64 rank", for the package tiktoken, tokenizer.model too
    ranks = pieces.is_file() and re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", pieces.open("rb").read(1000))
    if words.is_file() and (ranks or not pieces.is_file()):
        chosen = JsonTokenizer(words, eos)
    elif ranks:
        raise InputError(f"{pieces} is Llama 3's in tiktoken's format, which is not read here; put the "
                         "tokenizer.json of the same model on Hugging Face beside it and "
                         "pip install tokenizers")
    elif pieces.is_file():
        chosen = Tokenizer(pieces, eos)
    else:
        raise InputError(f"{folder}: neither tokenizer.model nor tokenizer.json is there; transformers makes "
                         "one of other files: AutoTokenizer.from_pretrained(A).save_pretrained(B)")
    if pieces.is_file() and words.is_file():
        print(f"tokenizer: {chosen.path.name}; the other one in {folder} is not used")
    return chosen


# ---- Examples and batches

def to_example(tokenizer, row):
    """Row -> Example: the row in the tokenizer's template; instruction or input may be empty.

    A row with neither is plain text, supervised throughout. Else prompt and answer are tokenised apart.
    """
    prompt, n, head = tokenizer.template.partition("{output}")[0], len(tokenizer.prefix), []
    if row.instruction or row.input:
        if not (row.instruction and row.input):
            prompt = prompt.replace("{instruction}\n{input}", "{instruction}{input}")
        for part in tokenizer.split(prompt):
            head += [tokenizer.words[part]] if part in tokenizer.words else tokenizer.encode(
                part.format(instruction=row.instruction, input=row.input))
    end = tokenizer.end if head else tokenizer.eos
    head = tokenizer.prefix + head[n * (head[:n] == tokenizer.prefix):]  # bos may stand in the template, too
    ids = head + tokenizer.encode(row.output) + [end]
    if (i := max(ids)) >= tokenizer.limit:
        raise InputError(f"{tokenizer.path}: {tokenizer.names[i]!r}, in --template or a row, is id {i}, but "
                         f"the base has {tokenizer.limit} embeddings; leave it out")
    return Example(row.task, ids, max(1, len(head)))


def to_examples(tokenizer, rows, max_length, name, shortest=16):
    """Rows -> Examples of at most max_length ids. Too long a prompt loses its middle, for the question may
    stand at either end; a row whose answer leaves it fewer than `shortest` ids is dropped. Both are counted
    and printed."""
    examples, cuts, drops, prefix = [], 0, 0, len(tokenizer.prefix)
    for row in tqdm(rows, desc=f"tokenise {name}", unit="row", mininterval=1, leave=False):
        e = to_example(tokenizer, row)
        if (excess := len(e.ids) - max_length) > 0:
            room = e.n_prompt - 1 - prefix - excess  # ids of text left in the prompt
            if room < shortest:
                drops += 1
                continue
            cuts += 1
            first = prefix + (room + 1) // 2
            e = Example(e.task, e.ids[:first] + e.ids[first + excess:], e.n_prompt - excess)
        examples.append(e)
    marks = {tokenizer.names.get(i, "\n\0") for i in (*tokenizer.prefix, tokenizer.eos)}
    if n := sum(any(mark in text for mark in marks for text in row[1:]) for row in rows):
        print(f"warning: {n} {name} rows hold {' or '.join(sorted(marks))}; remove it, for it is added here")
    if cuts or drops:
        print(f"{name}: {cuts} prompts shortened and {drops} rows dropped of {len(rows)}, "
              f"for --max_length={max_length}")
    if not examples:
        raise InputError(f"no supervised token is left in the {name} rows: every answer is longer than "
                         f"--max_length={max_length} allows")
    return examples


def shuffled(examples, seed):
    """Examples as an endless stream i -> Example: epoch after epoch, the order of each from (seed, epoch)."""
    n = len(examples)

    @functools.lru_cache(2)
    def order(epoch):
        return random.Random(f"order {seed} {epoch}").sample(range(n), n)
    return lambda i: examples[order(i // n)[i % n]]


def padded_length(example, multiple):
    """Its input length, rounded up: few distinct shapes."""
    return -(-(len(example.ids) - 1) // multiple) * multiple


def cut(examples, max_tokens, multiple=8, overhead=32):
    """Cut one step's examples, sorted by length, into micro-batches of at most max_tokens padded tokens.

    The cut is the cheapest. Its cost is the padded tokens, for padding is the largest waste, and `overhead`
    more for each micro-batch, about what starting its kernels takes. Raises InputError if a row alone is
    longer than max_tokens.
    """
    examples = sorted(examples, key=lambda e: len(e.ids))
    best = [(0, 0)]  # for the first 0, 1, .. rows: cost, where their last micro-batch begins
    for stop, longest in enumerate((padded_length(e, multiple) for e in examples), 1):
        if longest > max_tokens:
            raise InputError(f"a row of {longest} padded tokens does not fit into --max_tokens={max_tokens}")
        best.append(min((best[start][0] + (stop - start) * longest + overhead, start)
                        for start in range(max(0, stop - max_tokens // longest), stop)))
    batches, stop = [], len(examples)
    while stop:
        start = best[stop][1]
        batches, stop = [examples[start:stop], *batches], start
    return batches


def collate(examples, multiple=8):
    """Micro-batch -> tokens (B, T), targets (B, T) of -1 where unsupervised, mask (B, T) False at padding."""
    T = max(padded_length(e, multiple) for e in examples)
    tokens, targets = np.zeros((len(examples), T), np.int64), np.full((len(examples), T), -1, np.int64)
    mask = np.zeros((len(examples), T), bool)
    for b, e in enumerate(examples):
        n = len(e.ids) - 1
        tokens[b, :n], mask[b, :n] = e.ids[:-1], True
        targets[b, e.n_prompt - 1:n] = e.ids[e.n_prompt:]
    return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(mask)
