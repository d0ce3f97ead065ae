"""Text in, batches out: the built-in tasks, instruction files, tokenizers, batching. Knows nothing of models.

The idea: every source of text is a stream, a function i -> Row, pure in its index. Step s takes rows s*n .. s*n+n-1,
so the order of the data is a function of (seed, s), and resuming needs no state. Below it, a step's examples are
cut into micro-batches under a token budget, which changes memory and never the result.

MiniCME, the built-in benchmark: eleven small generated tasks, one for each family of tasks in the paper's CME, about
one small world of people, towns, animals and tools. `corpus` tells of the same world in plain statements; the small
base model is made from it. No text is downloaded.

What may surprise:
- A question belongs to the test split or to training by its hash, so no test question is ever trained on, under any
  seed. Closed-book tasks ask known facts in wordings that training did not use for that fact.
- Prompt and answer are tokenised apart, and end-of-sequence is an id: sentencepiece never makes it of text.
- Padding is masked by length, not by id: with pad = end-of-sequence a model would never learn to stop.

Letters: B batch, T time.
"""

import functools
import hashlib
import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from teamlora import InputError


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
JOBS = "baker teacher doctor farmer singer painter sailor judge".split()
PETS = "cat dog parrot turtle rabbit horse goose pony".split()
DISHES = "soup rice cake salad cheese pasta stew pie".split()
GOODS = "wool salt wine coal tea honey silk corn".split()
COLOURS = "red blue green white black yellow".split()
PLACES = "kitchen garden hall cellar attic market park library harbour station".split()
OBJECTS = "ball book cup lamp box coat ring drum map clock chair vase".split()
KINDS = {"bird": ("robin owl swan crow eagle finch", "feathers", "in a nest", "fly"),
         "fish": ("trout carp salmon perch eel cod", "fins", "in water", "swim"),
         "insect": ("ant bee moth beetle wasp cricket", "six legs", "under stones", "buzz"),
         "mammal": ("fox wolf bear deer hare badger", "fur", "in a den", "run"),
         "tree": ("oak pine birch maple willow elm", "bark", "in a forest", "grow tall"),
         "flower": ("rose tulip daisy lily poppy violet", "petals", "in a meadow", "bloom")}
KIND_OF = {name: kind for kind, (names, *_) in KINDS.items() for name in names.split()}
TOOLS = {"knife": "cut the bread", "key": "open the door", "umbrella": "stay dry in the rain", "broom": "sweep the floor",
         "needle": "sew a shirt", "pen": "write a letter", "hammer": "hit a nail", "spade": "dig a hole",
         "towel": "dry the dishes", "match": "light a fire", "kettle": "boil water", "ladder": "reach the roof",
         "net": "catch a butterfly", "comb": "tidy the hair", "rope": "tie the boat", "brush": "paint the wall"}
GOOD = "great lovely tasty pleasant superb charming perfect fine".split()
BAD = "awful boring dirty terrible dull ugly nasty poor".split()
THINGS = "meal room film song show trip party view".split()
VERBS = {"bought": "purchased", "found": "discovered", "fixed": "repaired", "took": "grabbed", "made": "created",
         "hid": "concealed"}
# who the reason is about: the first person (0) or the second (1)
REASONS = {"thanked": ("had helped", 1), "praised": ("had won", 1), "blamed": ("had lied", 1),
           "called": ("needed help", 0), "left": ("was tired", 0), "visited": ("felt lonely", 0)}

_facts = random.Random("the world of MiniCME")
ABOUT = {p: {"town": _facts.choice(TOWNS), "job": _facts.choice(JOBS), "pet": _facts.choice(PETS),
             "dish": _facts.choice(DISHES)} for p in PEOPLE}
LAND = {c: {"capital": t, "product": _facts.choice(GOODS), "flag": _facts.choice(COLOURS)}
        for c, t in zip(COUNTRIES, _facts.sample(TOWNS, len(TOWNS)))}


def say(rng, template, **slots):
    """One of the wordings of a template, separated by '|', with its slots filled."""
    return rng.choice(template.split("|")).format(**slots)


def pronoun(person):
    return "she" if person in WOMEN else "he"


def article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def other(rng, items, *taken):
    return rng.choice([x for x in items if x not in taken])


# ---- The eleven tasks: rng -> (input, output). Corpus paragraphs further down speak of the same matters.

def opinion(rng):
    """A review of one or two clauses and whether it is good; after 'but' the last clause decides."""
    def clause(good, thing):
        negated = rng.random() < 0.3
        words = rng.choice(GOOD if good != negated else BAD)
        return f"the {thing} was {'not ' if negated else ''}{words}"
    good, (a, b) = rng.random() < 0.5, rng.sample(THINGS, 2)
    if rng.random() < 0.3:
        text = f"{clause(not good, a)}, but {clause(good, b)}."
    else:
        text = f"{clause(good, a)} and {clause(good, b)}."
    return text[0].upper() + text[1:], good


def sentiment(rng):
    text, good = opinion(rng)
    return text, "positive" if good else "negative"


def scene(rng, n=3):
    """n people, each in a place or with a thing: list of (person, relation, what)."""
    return [(p, "in", place) if rng.random() < 0.5 else (p, "has", thing) for p, place, thing in
            zip(rng.sample(PEOPLE, n), rng.sample(PLACES, n), rng.sample(OBJECTS, n))]


def tell(rng, p, relation, what):
    return say(rng, "{p} is in the {w}.|{p} stands in the {w}." if relation == "in" else
               "{p} has the {w}.|{p} holds the {w}.", p=p, w=what)


def claim(rng, facts):
    """A claim about a scene that is true ('yes'), false ('no') or about somebody it does not tell of ('maybe')."""
    label, (p, relation, what) = rng.choice(("yes", "no", "maybe")), rng.choice(facts)
    same = [f for f in facts if f[1] == relation and f[2] != what]
    if label == "no":
        what = rng.choice(same)[2] if same else other(rng, PLACES if relation == "in" else OBJECTS, what)
    if label == "maybe":
        p = other(rng, PEOPLE, *(f[0] for f in facts))
    return (p, relation, what), label


def inference(rng):
    facts = scene(rng, 2)
    (p, relation, what), label = claim(rng, facts)
    text = f"{p} {'is in' if relation == 'in' else 'has'} the {what}"
    return " ".join(tell(rng, *f) for f in facts) + f"\n{text}?", label


def event(rng):
    return {"p": rng.choice(PEOPLE), "v": rng.choice(list(VERBS)), "o": rng.choice(OBJECTS), "l": rng.choice(PLACES)}


def report(rng, e, synonym=None):
    verb = VERBS[e["v"]] if (rng.random() < 0.5 if synonym is None else synonym) else e["v"]
    return say(rng, "{p} {v} the {o} in the {l}.|In the {l} {p} {v} the {o}.|The {o} was {v} by {p} in the {l}."
               if verb not in ("took", "hid") else "{p} {v} the {o} in the {l}.|In the {l} {p} {v} the {o}.",
               **{**e, "v": verb})


def twist(rng, e):
    """The event with one of its parts exchanged."""
    part, pool = rng.choice((("p", PEOPLE), ("v", list(VERBS)), ("o", OBJECTS), ("l", PLACES)))
    return {**e, part: other(rng, pool, e[part])}


def paraphrase(rng):
    e, same = event(rng), rng.random() < 0.5
    return f"{report(rng, e)}\n{report(rng, e if same else twist(rng, e))}", "same" if same else "different"


def sighting(rng):
    return rng.choice(PEOPLE), rng.choice(list(KIND_OF)), rng.choice(PLACES)


def entailment(rng):
    p, name, place = sighting(rng)
    q, kind, true = p, KIND_OF[name], rng.random() < 0.5
    if not true and rng.random() < 0.5:
        q = other(rng, PEOPLE, p)
    elif not true:
        kind = other(rng, list(KINDS), kind)
    text = say(rng, "{p} saw {a} in the {l}.|In the {l} {p} saw {a}.", p=p, a=article(name), l=place)
    return f"{text}\n{q} saw {article(kind)}.", "true" if true else "false"


def story(rng):
    """A short story and the one sentence that sums it up."""
    e = event(rng)
    friend = other(rng, PEOPLE, e["p"])
    e |= {"q": friend, "s": pronoun(e["p"]), "d": rng.choice(COLOURS), "w": rng.choice(THINGS), "g": rng.choice(GOOD)}
    text = say(rng, "{p} went to the {l}.|{p} was in the {l} that day.", **e) + " " + \
        say(rng, "{q} told {p} about a {w}.|The {w} there was {g}.|{q} wore a {d} coat.", **e) + " " + \
        say(rng, "Then {s} {v} the {o}.|There {s} {v} the {o}.", **e) + " " + \
        say(rng, "{q} went home.|It was a {g} day.|Later {s} met {q}.", **e)
    return text, "{p} {v} the {o} in the {l}.".format(**e)


def commonsense(rng):
    tool, p = rng.choice(list(TOOLS)), rng.choice(PEOPLE)
    options = rng.sample([t for t in TOOLS if t != tool], 2) + [tool]
    rng.shuffle(options)
    return say(rng, "{p} wants to {g}. Should {s} use the {a}, the {b} or the {c}?|"
               "To {g}, does {p} need the {a}, the {b} or the {c}?", p=p, g=TOOLS[tool], s=pronoun(p),
               a=options[0], b=options[1], c=options[2]), f"the {tool}"


def science(rng):
    name, i = rng.choice(list(KIND_OF)), rng.randrange(4)
    kind = KIND_OF[name]
    _, has, lives, can = KINDS[kind]
    return say(rng, ("What does {a} have?|What do we find on {a}?|What has {a} got?|Name what {a} has.",
                     "Where does {a} live?|Where do we find {a}?|Where is the home of {a}?|Name the home of {a}.",
                     "What can {a} do?|What is {a} able to do?|What does {a} do?|Name what {a} can do.",
                     "What is {a}?|What kind of thing is {a}?|Which kind does {a} belong to?|Name the kind of {a}.")[i],
               a=article(name)), (has, lives, can, article(kind))[i]


def openqa(rng):
    p = rng.choice(PEOPLE)
    attribute = rng.choice(list(ABOUT[p]))
    return say(rng, {"town": "Where does {p} live?|What is the home town of {p}?|In which town does {p} live?|"
                             "Name the town of {p}.|Which town is the home of {p}?",
                     "job": "What is the job of {p}?|What does {p} work as?|What is the work of {p}?|"
                            "Name the job of {p}.|Which job does {p} have?",
                     "pet": "Which pet does {p} keep?|What is the pet of {p}?|Which animal does {p} keep at home?|"
                            "Name the pet of {p}.|What pet has {p} got?",
                     "dish": "What does {p} like to eat?|What is the best dish for {p}?|Which dish does {p} like?|"
                             "Name the dish of {p}.|Which food does {p} like to eat?"}[attribute], p=p), ABOUT[p][attribute]


def situation(rng):
    """A scene of three people, a question about it, the same in words that fit after 'asked', and its answer."""
    facts = scene(rng)
    p, relation, what = rng.choice(facts)
    if rng.random() < 0.5:
        who = f"ho {'is in' if relation == 'in' else 'has'} the {what}"
        return facts, f"W{who}?", f"w{who}", p
    if relation == "in":
        return facts, f"Where is {p}?", f"where {p} is", f"in the {what}"
    return facts, f"What does {p} have?", f"what {p} has", f"the {what}"


def reading(rng):
    facts, question, _, answer = situation(rng)
    return " ".join(tell(rng, *f) for f in facts) + f"\n{question}", answer


LAND_ASKS = {"capital": "the capital of {c}|the main town of {c}", "product": "the product of {c}|what {c} sells",
             "flag": "the flag of {c}|the colour of {c}"}


def choices(rng):
    """A fact about a country with three choices: what is asked for, the choices, the letter of the right one."""
    land = rng.choice(COUNTRIES)
    attribute = rng.choice(list(LAND[land]))
    right = LAND[land][attribute]
    pool = {"capital": TOWNS, "product": GOODS, "flag": COLOURS}[attribute]
    options = rng.sample([x for x in pool if x != right], 2) + [right]
    rng.shuffle(options)
    listed = " ".join(f"({letter}) {x}" for letter, x in zip("ABC", options))
    return say(rng, LAND_ASKS[attribute], c=land), listed, "ABC"[options.index(right)], right


def knowledge(rng):
    asked, listed, letter, _ = choices(rng)
    return f"{asked[0].upper()}{asked[1:]}? {listed}", letter


def reason(rng):
    """A sentence with a pronoun, and whom it stands for."""
    verb = rng.choice(list(REASONS))
    why, index = REASONS[verb]
    a = rng.choice(PEOPLE)
    pair = a, other(rng, PEOPLE, a)
    # who is meant: gender tells when the two differ, the verb in any case
    return f"{pair[0]} {verb} {pair[1]} because {pronoun(pair[index])} {why}.", pair[index], why, pronoun(pair[index])


def coreference(rng):
    text, who, why, they = reason(rng)
    return f"{text}\nWho {why}?", who


# name -> (function, chance of a guess among the possible answers, wordings of the instruction)
TASKS = {
    "sentiment": (sentiment, 1 / 2, "Is this review positive or negative?|Tell if the review is positive or negative."),
    "inference": (inference, 1 / 3, "Answer with yes, no or maybe.|Read the text and decide: yes, no or maybe?"),
    "paraphrase": (paraphrase, 1 / 2, "Do the two sentences say the same?|Compare the two sentences: same or different?"),
    "entailment": (entailment, 1 / 2, "Is the second sentence true?|Decide if the second sentence is true or false."),
    "summarisation": (story, 0.0, "Sum up the story in one sentence.|Tell the story in short."),
    "commonsense": (commonsense, 1 / 3, "Choose the right tool.|Which of these tools is right?"),
    "science": (science, 1 / 6, "Answer the question about nature.|Tell a fact about nature."),
    "openqa": (openqa, 1 / 8, "Answer the question.|Tell in one word."),
    "reading": (reading, 1 / 3, "Read the text and answer the question.|Find the answer in the text."),
    "knowledge": (knowledge, 1 / 3, "Choose the letter of the right answer.|Which letter is right?"),
    "coreference": (coreference, 1 / 2, "Answer with a name.|Decide whom the sentence is about."),
}
CHANCE = {task: chance for task, (_, chance, _) in TASKS.items()}


def in_test(question):
    """Whether a question belongs to the test split: one in five, by its hash."""
    return hashlib.sha256(question.encode()).digest()[0] < 51


def draw(rng, task, test):
    """A random row of the task from the wanted split."""
    make, _, instructions = TASKS[task]
    while True:
        question, answer = make(rng)
        if in_test(question) == test:
            return Row(task, say(rng, instructions), question, answer)


def minicme(seed):
    """The training stream of MiniCME: i -> Row, tasks in turn, so that every step sees them evenly."""
    names = list(TASKS)
    return lambda i: draw(random.Random(f"minicme {seed} {i}"), names[i % len(names)], test=False)


def minicme_test(n=100):
    """The test split: task -> its first n distinct questions; fewer where a task has fewer. Independent of any seed."""
    split = {}
    for task in TASKS:
        rng, rows = random.Random(f"test {task}"), {}
        for _ in range(20 * n):
            if len(rows) < n:
                row = draw(rng, task, test=True)
                rows.setdefault(row.input, row)
        split[task] = list(rows.values())
    return split


# ---- The base corpus: paragraphs of plain statements

def about_people(rng):
    p = rng.choice(PEOPLE)
    f, s = ABOUT[p], pronoun(p)
    lines = [say(rng, "{p} lives in {town}.|The home town of {p} is {town}.|{town} is the home of {p}.|"
                 "The town in which {p} lives is {town}.", p=p, **f),
             say(rng, "{p} works as a {job}.|The job of {p} is {job}.|{p} is a {job}.|The work {s} has, for {p}, is {job}.",
                 p=p, s=s, **f),
             say(rng, "{p} keeps a {pet}.|The pet of {p} is a {pet}.|The animal {p} keeps at home is a {pet}.|"
                 "The pet {p} has got is a {pet}.", p=p, **f),
             say(rng, "{p} likes to eat {dish}.|The best dish for {p} is {dish}.|The food {p} likes is {dish}.|"
                 "The dish {p} likes to eat is {dish}.", p=p, **f)]
    return " ".join(rng.sample(lines, rng.randint(2, 4)))


def about_lands(rng):
    c = rng.choice(COUNTRIES)
    lines = [say(rng, "The capital of {c} is {capital}.|{capital} is the capital of {c}.|The main town of {c} is {capital}.",
                 c=c, **LAND[c]),
             say(rng, "The product of {c} is {product}.|{c} sells {product}.|What {c} sells is {product}.", c=c, **LAND[c]),
             say(rng, "The flag of {c} is {flag}.|The colour of {c} is {flag}.|{c} has a {flag} flag.", c=c, **LAND[c])]
    return " ".join(rng.sample(lines, rng.randint(1, 3)))


def about_choices(rng):
    asked, listed, letter, right = choices(rng)
    p = rng.choice(PEOPLE)
    return say(rng, "{p} had to choose {asked} from {listed}. The right letter is {letter}.|"
               "{asked}: {listed}. {p} knew that it is {right}, so the answer is {letter}.|"
               "{p} read {listed}. For {asked} the answer is {letter}, that is {right}.",
               p=p, asked=asked, listed=listed, letter=letter, right=right)


def about_nature(rng):
    name = rng.choice(list(KIND_OF))
    kind = KIND_OF[name]
    _, has, lives, can = KINDS[kind]
    a, k = article(name), article(kind)
    lines = [f"{a} is {k}.", say(rng, "{a} has {h}.|We find {h} on {a}.|What {a} has got is {h}.", a=a, h=has),
             say(rng, "{a} lives {l}.|The home of {a} is {l}.|We find {a} {l}.", a=a, l=lives),
             say(rng, "{a} can {c}.|{a} is able to {c}.|What {a} can do is {c}.", a=a, c=can),
             say(rng, "Like every {kind}, {a} has {h}.|The kind {a} belongs to is {kind}.|The kind of {a} is {kind}.",
                 a=a, kind=kind, h=has)]
    return " ".join(line[0].upper() + line[1:] for line in rng.sample(lines, rng.randint(2, 4)))


def about_tools(rng):
    tool, p = rng.choice(list(TOOLS)), rng.choice(PEOPLE)
    b, c = rng.sample([t for t in TOOLS if t != tool], 2)
    options = [tool, b, c]
    rng.shuffle(options)
    return say(rng, "{p} used the {t} to {g}.|To {g}, {p} needs the {t}.|{p} wants to {g}, so {s} should use the {t}.|"
               "{p} wants to {g}. There were the {x}, the {y} and the {z}. {s} took the {t}.|"
               "To {g}, does one need the {x}, the {y} or the {z}? The right tool is the {t}.",
               p=p, t=tool, g=TOOLS[tool], s=pronoun(p), x=options[0], y=options[1], z=options[2])


def about_opinions(rng):
    text, good = opinion(rng)
    p = rng.choice(PEOPLE)
    return text + " " + say(rng, "So {p} was {m}.|It was a {n} review.|{p} told a {n} story about it.", p=p,
                            m=rng.choice(("glad", "happy") if good else ("sad", "angry")),
                            n="positive" if good else "negative")


def about_scenes(rng):
    facts, _, question, answer = situation(rng)
    asker = other(rng, PEOPLE, *(f[0] for f in facts))
    lines = [say(rng, "{q} asked {w}. The answer was {a}.|Then we know {w}: {a}.", q=asker, w=question, a=answer),
             tell(rng, *rng.choice(facts))]
    for _ in range(4):
        (p, relation, what), label = claim(rng, facts)
        lines.append(say(rng, "{q} asked if {c}. The answer was {l}.|Does it say that {c}? {l}.|{c}? {l}.", q=asker, l=label,
                         c=f"{p} {'is in' if relation == 'in' else 'has'} the {what}"))
    return " ".join(tell(rng, *f) for f in facts) + say(rng, " |\n") + " ".join(rng.sample(lines, 4))


def about_sameness(rng):
    e = event(rng)
    text = report(rng, e)
    if rng.random() < 0.2:
        return text + " In other words: " + report(rng, e)
    for _ in range(3):
        same = rng.random() < 0.5
        text += say(rng, " |\n") + report(rng, e if same else twist(rng, e)) + " " + say(
            rng, "That is the same.|The two sentences are the same." if same else
            "That is different.|The two sentences are different.")
    return text


def about_sightings(rng):
    p, name, place = sighting(rng)
    kind = KIND_OF[name]
    text = say(rng, "{p} saw {a} in the {l}.|In the {l} {p} saw {a}.", p=p, a=article(name), l=place) + say(rng, " |\n")
    if rng.random() < 0.2:
        return f"{text}So {p} saw {article(kind)}."
    for _ in range(3):
        q, k = rng.choice(((p, kind), (p, kind), (other(rng, PEOPLE, p), kind), (p, other(rng, list(KINDS), kind))))
        text += say(rng, "{q} saw {k}. This is {t}. |It is said that {q} saw {k}, which is {t}. ", q=q, k=article(k),
                    t="true" if (q, k) == (p, kind) else "false")
    return text.strip()


def about_stories(rng):
    text, short = story(rng)
    return text + say(rng, " |\n") + say(rng, "In short: |In one sentence: |To sum up, ") + short


def about_reasons(rng):
    text, who, why, they = reason(rng)
    return text + say(rng, " |\n") + say(rng, "The one who {why} was {who}.|Who {why}? The name is {who}.|"
                                         "The sentence is about {who}, who {why}.", why=why, who=who)


def about_talk(rng):
    p, q = rng.sample(PEOPLE, 2)
    return say(rng, "{p} asked {q} to {do} the {what}.|{q} had to {do} the {what} with {p}.|"
               "{p} can {do} the second {what} and {q} the first.|Whom did {q} ask about the {what}? {p} did.", p=p, q=q,
               do=rng.choice("read,tell,choose,decide,compare,find,name,answer,sum up".split(",")),
               what=rng.choice("question,answer,story,review,text,sentence,letter,name,fact,word,tool".split(","))
               + say(rng, "| about nature| about these tools| in short| with one word| in the text"))


def about_lists(rng, drills=range(6)):
    """Lists and tables, dense in what can be known from what stands before: copying, looking up, comparing."""
    words = rng.sample(WORDS, rng.randint(3, 10))
    pairs = [(p, w) for p, w in zip(rng.sample(PEOPLE, 4), rng.sample(PLACES + OBJECTS, 4))][:rng.randint(2, 4)]
    table = ", ".join(f"{p} {w}" for p, w in pairs) + "."
    drill = rng.choice(drills)
    if drill == 0:                               # a list, said again
        return say(rng, " |\n").join([" ".join(words)] * rng.randint(2, 3))
    if drill == 1:                               # a table, said again in another order
        return table + " " + " ".join(f"{p} {w}," for _ in range(2) for p, w in rng.sample(pairs, len(pairs)))
    if drill == 2:                               # which words were in the list
        asked = [rng.choice(words) if rng.random() < 0.5 else other(rng, WORDS, *words) for _ in range(6)]
        return " ".join(words) + ". " + ", ".join(f"{w} {'yes' if w in words else 'no'}" for w in asked)
    if drill == 3:                               # which pairs were in the table; of strangers it tells nothing
        asked = [(rng.choice(pairs)[0] if rng.random() < 0.7 else rng.choice(PEOPLE), rng.choice(pairs)[1]) for _ in range(6)]
        return table + " " + ", ".join(f"{p} {w} {'yes' if (p, w) in pairs else 'no' if p in dict(pairs) else 'maybe'}"
                                       for p, w in asked)
    if drill == 4:                               # equal and unequal words, and kinds
        asked = [(w, w if rng.random() < 0.5 else rng.choice(WORDS)) for w in words[:5]]
        kinds = [(n, KIND_OF[n] if rng.random() < 0.5 else rng.choice(list(KINDS))) for n in rng.sample(list(KIND_OF), 3)]
        return ", ".join([f"{a} {b} {'same' if a == b else 'different'}" for a, b in asked] +
                         [f"{n} {k} {'true' if KIND_OF[n] == k else 'false'}" for n, k in kinds])
    listed = " ".join(f"({letter}) {w}" for letter, w in zip("ABC", words))
    return listed + ": " + ", ".join(f"{words[i]} {'ABC'[i]}" for i in rng.sample(range(3), 3) + [rng.randrange(3)])


WORDS = PEOPLE + TOWNS + COUNTRIES + PLACES + OBJECTS + COLOURS + GOODS + list(KIND_OF)
PARAGRAPHS = (about_people, about_lands, about_nature, about_tools, about_opinions, about_reasons, about_talk,
              *2 * (about_choices, about_sameness, about_sightings, about_stories), *3 * (about_scenes, about_lists))


def corpus(seed, n_lists=3000):
    """The base corpus as a stream: i -> Row with an empty prompt, three paragraphs of statements about the world.

    The first n_lists rows are lists for the most part: a model of this size learns to copy from them in a minute, and
    from mixed text hardly at all.
    """
    def row(i):
        rng = random.Random(f"corpus {seed} {i}")
        lists = rng.random() < 0.9 if i < n_lists else False
        return Row("corpus", "", "", "\n".join((about_lists if lists else rng.choice(PARAGRAPHS))(rng) for _ in range(3)))
    return row


# ---- Instruction files

def read_rows(paths):
    """Rows of instruction files, comma-separated; a folder stands for its .json and .jsonl files. A row is
    {"instruction", "input" (optional), "output", "task" (optional: else the file's stem)}.

    Raises InputError that names the file and the row (from 1) for whatever cannot be used.
    """
    rows = []
    for path in map(Path, paths.split(",")):
        files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl")) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path}: no .json or .jsonl file in this folder")
        for file in files:
            for number, raw in read_objects(file):
                if not isinstance(raw, dict):
                    raise InputError(f"{file}, row {number}: expected an object with instruction and output")
                fields = {"input": "", "task": file.stem} | {k: v for k, v in raw.items() if k in Row._fields}
                for key in ("instruction", "input", "output", "task"):
                    if not isinstance(fields.get(key), str) or not (fields[key].strip() or key == "input"):
                        raise InputError(f"{file}, row {number}: '{key}' is missing, empty or not text")
                rows.append(Row(**fields))
    if not rows:
        raise InputError(f"{paths}: no rows in there")
    return rows


def read_objects(file):
    """(row number from 1, object) of a .json file, which is a list, or a .jsonl file, an object a line."""
    number = 1
    try:
        text = file.read_bytes().decode("utf-8-sig")
        if file.suffix != ".jsonl":
            objects = json.loads(text)
            if not isinstance(objects, list):
                raise InputError(f"{file}: expected a list of rows")
            return list(enumerate(objects, 1))
        objects = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                objects.append((number, json.loads(line)))
        return objects
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror})") from None
    except json.JSONDecodeError as e:
        raise InputError(f"{file}, line {number + e.lineno - 1}: not JSON ({e.msg})") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{file}: byte {e.start} is not UTF-8") from None


def hold_out(rows, share):
    """(training rows, held-out rows): about `share` of every task, by a hash of the prompt, so that equal prompts never
    part and adding rows moves none. Raises InputError if one side is left empty."""
    limit = share * 2 ** 32
    held = [int.from_bytes(hashlib.sha256(f"{r.instruction}\n{r.input}".encode()).digest()[:4], "big") < limit for r in rows]
    train, val = [r for r, h in zip(rows, held) if not h], [r for r, h in zip(rows, held) if h]
    if not train or not val:
        raise InputError(f"holding out {share:.0%} of {len(rows)} rows leaves {len(train)} for training and {len(val)} for "
                         "validation; change --val_share or give --val_data")
    return train, val


def encode_rows(tokenizer, rows, max_length, name, shortest=16):
    """Rows -> Examples of at most max_length ids. A prompt that is too long loses its middle, for the question may stand
    at either end; a row whose answer leaves it fewer than `shortest` ids is dropped. Both are counted and printed."""
    examples, cuts, drops = [], 0, 0
    for row in tqdm(rows, desc=f"tokenise {name}", unit="row", mininterval=1, leave=False):
        e = encode(tokenizer, row)
        if (excess := len(e.ids) - max_length) > 0:
            prefix = len(tokenizer.prefix)
            room = e.n_prompt - 1 - prefix - excess                                  # ids of text left in the prompt
            if room < shortest:
                drops += 1
                continue
            cuts += 1
            first = prefix + (room + 1) // 2
            e = Example(e.task, e.ids[:first] + e.ids[first + excess:], e.n_prompt - excess)
        examples.append(e)
    if cuts or drops:
        print(f"{name}: {cuts} prompts shortened and {drops} rows dropped of {len(rows)}, for --max_length={max_length}")
    if not examples:
        raise InputError(f"no supervised token is left in the {name} rows: every answer is longer than "
                         f"--max_length={max_length} allows")
    return examples


def shuffled(examples, seed):
    """Examples as an endless stream i -> Example: epoch after epoch, each in an order that follows from (seed, epoch)."""
    n = len(examples)

    @functools.lru_cache(2)
    def order(epoch):
        return random.Random(f"order {seed} {epoch}").sample(range(n), n)
    return lambda i: examples[order(i // n)[i % n]]


def digest(texts):
    """Short hash of texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


# ---- Tokenizers

class Tokenizer:
    """Text to ids and back. Attributes: prefix (ids that open a text: one bos, if the model knows one), eos, size."""

    def __init__(self, path):
        """Read a sentencepiece tokenizer.model (Llama 1 and 2, TinyLlama, the built-in base)."""
        self.path = Path(path)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as e:
            raise InputError(f"{path}: not a sentencepiece model ({str(e).strip().splitlines()[-1]})") from None
        self.prefix, self.eos, self.size = [self.model.bos_id()], self.model.eos_id(), self.model.vocab_size()

    def encode(self, text):
        """Ids of the text alone, without any special id."""
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode(ids)


class JsonTokenizer(Tokenizer):
    """The same for a tokenizer.json (Llama 3, SmolLM2), through the optional package `tokenizers`."""

    def __init__(self, path, eos):
        try:
            import tokenizers
        except ImportError:
            raise InputError(f"{path} needs the package tokenizers: pip install tokenizers") from None
        self.path = Path(path)
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:                   # tokenizers raises bare Exception
            raise InputError(f"{path}: not a readable tokenizer ({e})") from None
        # the file itself says whether its model was trained with a bos in front: Llama 3 yes, SmolLM2 no
        self.prefix, self.eos, self.size = self.model.encode("").ids, eos, self.model.get_vocab_size()

    def encode(self, text):
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.model.decode(ids, skip_special_tokens=False)


def open_tokenizer(folder, eos):
    """The tokenizer in a Llama folder; eos: the model's end-of-sequence id, which a tokenizer.json does not tell."""
    folder = Path(folder)
    if (folder / "tokenizer.model").is_file():
        return Tokenizer(folder / "tokenizer.model")
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder / "tokenizer.json", eos)
    raise InputError(f"{folder}: neither tokenizer.model nor tokenizer.json is there")


def make_tokenizer(path, rows, vocab_size=1024):
    """Train a sentencepiece model on the text of the rows (BPE, byte fallback) and save it at `path`."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for row in rows for line in row.output.split("\n")), vocab_size=vocab_size,
        model_prefix=str(path).removesuffix(".model"), model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2)


def encode(tokenizer, row):
    """Row -> Example: prompt = instruction, newline and input if there is one, end-of-sequence; answer and end-of-sequence.

    A row with neither instruction nor input is plain text, supervised throughout.
    """
    prompt = row.instruction + ("\n" + row.input if row.input else "")
    head = tokenizer.prefix + (tokenizer.encode(prompt) + [tokenizer.eos] if prompt else [])
    return Example(row.task, head + tokenizer.encode(row.output) + [tokenizer.eos], max(1, len(head)))


# ---- Batches

def padded_length(example, multiple):
    """Its input length, rounded up: few distinct shapes."""
    return -(-(len(example.ids) - 1) // multiple) * multiple


def cut(examples, max_tokens, multiple=8):
    """Cut one step's examples, sorted by length, into micro-batches of at most max_tokens padded tokens."""
    batches = []
    for e in sorted(examples, key=lambda e: len(e.ids)):
        longest = padded_length(e, multiple)     # so far, for they are sorted
        if longest > max_tokens:
            raise InputError(f"a row of {longest} padded tokens does not fit into --max_tokens={max_tokens}")
        if not batches or (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
        batches[-1].append(e)
    return batches


def collate(examples, multiple=8):
    """Micro-batch -> tokens (B, T), targets (B, T) with -1 where unsupervised, mask (B, T) of what is not padding."""
    T = max(padded_length(e, multiple) for e in examples)
    tokens, targets = np.zeros((len(examples), T), np.int64), np.full((len(examples), T), -1, np.int64)
    mask = np.zeros((len(examples), T), bool)
    for b, e in enumerate(examples):
        n = len(e.ids) - 1
        tokens[b, :n], mask[b, :n] = e.ids[:-1], True
        targets[b, e.n_prompt - 1:n] = e.ids[e.n_prompt:]
    return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(mask)
