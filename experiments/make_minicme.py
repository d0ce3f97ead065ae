"""MiniCME, the built-in benchmark: eleven small generated tasks, written as ordinary instruction files.

    python -m experiments.make_minicme [OUT]     train.jsonl, validation.jsonl, test.jsonl in assets/minicme

The idea: one task for each family of tasks in the paper's CME, all about one small world of people, towns,
animals and tools, so that a Llama of a million parameters can have read of all of it. No text is downloaded.
Every row is drawn by a random generator that is seeded with a text, so the files are the same bytes on every
machine. A line is {"task", "instruction", "input", "output"}.

What may surprise:
- A question belongs to training, validation or test by its hash. The built-in base, whose corpus is made of
  the functions below (make_base.py), has read answers to training questions alone.
- Closed-book tasks (science, openqa, knowledge) ask for facts that the base has read, in words that no
  training question used.
- Science and openqa have few questions. They do not fill their part of a held-out file, and the training
  file leaves out rows whose prompt it has already, most of which are theirs.
- Knowledge is learned last by far: a fact must be recalled, found in the list, and its letter named, in one
  step. It has more training rows than the others, and a run then needs half the steps.
"""

import argparse
import functools
import hashlib
import json
import random
from pathlib import Path

from data import Row

N_TRAINING, N_KNOWLEDGE = 600, 1500              # rows a task drawn for train.jsonl; knowledge has more
N_HELD_OUT = 200                                 # rows a task of validation.jsonl and of test.jsonl, at most


# ---- The world: fixed lists, and facts drawn once from them

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


# name -> (function, wordings of the instruction)
TASKS = {
    "sentiment": (sentiment,
                  "Is this review positive or negative?|Tell if the review is positive or negative."),
    "inference": (inference, "Answer with yes, no or maybe.|Read the text and decide: yes, no or maybe?"),
    "paraphrase": (paraphrase,
                   "Do the two sentences say the same?|Compare the two sentences: same or different?"),
    "entailment": (entailment,
                   "Is the second sentence true?|Decide if the second sentence is true or false."),
    "summarisation": (summarisation, "Sum up the story in one sentence.|Tell the story in short."),
    "commonsense": (commonsense, "Choose the right tool.|Which of these tools is right?"),
    "science": (functools.partial(question, world=NATURE),
                "Answer the question about nature.|Tell a fact about nature."),
    "openqa": (functools.partial(question, world=LIVES), "Answer the question.|Tell in one word."),
    "reading": (reading, "Read the text and answer the question.|Find the answer in the text."),
    "knowledge": (knowledge, "Choose the letter of the right answer.|Which letter is right?"),
    "coreference": (coreference, "Answer with a name.|Decide whom the sentence is about.")}


# ---- The rows, and the files of them

def split_of(asked):
    """The split a question belongs to, by its hash: one in five for the test, one in ten for validation."""
    byte = hashlib.sha256(asked.encode()).digest()[0]
    return "test" if byte < 51 else "validation" if byte < 77 else "training"


def draw(rng, task, split):
    """A random row of the task from a split."""
    make, instructions = TASKS[task]
    while True:
        asked, answer, *_ = make(rng)
        if split_of(asked) == split:
            return Row(task, say(rng, instructions), asked, answer)


def minicme(seed):
    """The training stream of MiniCME: i -> Row, tasks in turn."""
    names = list(TASKS)
    return lambda i: draw(random.Random(f"minicme {seed} {i}"), names[i % len(names)], "training")


def minicme_training(seed=0):
    """The rows of train.jsonl: the first of each task, without those whose prompt has come before."""
    stream, rows = minicme(seed), {}
    for i in range(len(TASKS) * N_KNOWLEDGE):
        row = stream(i)
        if i < len(TASKS) * N_TRAINING or row.task == "knowledge":
            rows.setdefault((row.instruction, row.input), row)
    return list(rows.values())


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


def write(path, rows):
    """One JSON object a line."""
    text = "".join(json.dumps(row._asdict()) + "\n" for row in rows)
    path.write_bytes(text.encode())              # not write_text: on Windows it would write other line ends
    print(f"{path}: {len(rows):,} rows, {len(text):,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write MiniCME as instruction files.")
    parser.add_argument("out", metavar="OUT", nargs="?", default="assets/minicme", type=Path, help="folder")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write(out / "train.jsonl", minicme_training())
    for split in ("validation", "test"):
        write(out / f"{split}.jsonl", sum(minicme_held_out(split, N_HELD_OUT).values(), []))
