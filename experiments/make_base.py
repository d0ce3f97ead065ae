"""How the built-in base was made: a Llama of 0.94 M parameters that reads, copies and looks things up.

    python -m experiments.make_base              a Llama folder in out/base; 25 minutes on one CPU core, then
                                                 5 for the probe
    python -m experiments.make_base --resume     goes on with it if it was stopped or killed

The idea: adapters bring out what a base can do, so the base must be able to do it. It reads plain statements
about the world of MiniCME, without any instruction, and remembers them. Most tasks also ask for something in
the text at hand. A model of this size learns such looking up within minutes only with three helps:
- Lessons, each the ground of the next: copy a list, find in a table what is somebody's, find whose something
  is, then check claims. Statements come in earnest when that is learned. After one term (LESSONS) it was luck
  whether it was. In a second of the same length (SECOND_TERM) the learning rate starts afresh.
- Start values that look already (start_looking): queries near their keys, so that tokens look for their like,
  and in layer 0 heads that carry over the tokens 1, 2, 3 and 4 places back.
- Muon for the matrices inside: AdamW alone learns too slowly to copy lists, let alone to look things up.

What may surprise:
- A paragraph that answers a validation or test question of MiniCME is drawn again. Facts alone are not held
  back: the closed-book tasks ask for them.
- The folder holds bf16: training is in fp32, and each term ends with rounding.
- The probe (adapters trained on the finished base) uses validation questions, so that a choice among seeds
  leaves the test questions unseen.
"""

import hashlib
import json
import math
import platform
import random
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import train
from experiments.make_minicme import (
    COLOURS, COUNTRIES, GOODS, KIND_OF, LANDS, LIVES, NATURE, OBJECTS, PEOPLE, PLACES, TOWNS, VERBS, article,
    claim, claim_sighting, commonsense, coreference, event, knowledge, other, reading, report, say, scene,
    sentiment, sighting, split_of, summarisation, tell, twist)
from model import Llama, LlamaConfig, rotary_tables, save_llama
from teamlora import InputError, flag, load_parameters


# ---- The corpus. A kind of paragraph is a function rng -> (text, the questions of MiniCME that it answers).
# `fullness`, where it occurs: from 0, bare words, up to whole sentences as the tasks have them.

WORDS = PEOPLE + TOWNS + COUNTRIES + PLACES + OBJECTS + COLOURS + GOODS + list(KIND_OF)
# attribute -> wordings of a statement: {s} is the subject, {a} the answer to QUESTIONS
FACTS = {
    "town": "{s} lives in {a}.|The home town of {s} is {a}.|{a} is the home of {s}.|"
            "The town in which {s} lives is {a}.",
    "job": "{s} works as a {a}.|The job of {s} is {a}.|{s} is a {a}.|The work that {s} has is {a}.",
    "pet": "{s} keeps a {a}.|The pet of {s} is a {a}.|The animal {s} keeps at home is a {a}.|"
           "The pet {s} has got is a {a}.",
    "dish": "{s} likes to eat {a}.|The best dish for {s} is {a}.|The food {s} likes is {a}.|"
            "The dish {s} likes to eat is {a}.",
    "capital": "The capital of {s} is {a}.|{a} is the capital of {s}.|The main town of {s} is {a}.",
    "product": "The product of {s} is {a}.|{s} sells {a}.|What {s} sells is {a}.",
    "flag": "The flag of {s} is {a}.|The colour of {s} is {a}.|{s} has a {a} flag.",
    "kind": "{s} is {a}.|The kind {s} belongs to is {a}.|The kind of {s} is {a}.",
    "has": "{s} has {a}.|We find {a} on {s}.|What {s} has got is {a}.",
    "home": "{s} lives {a}.|The home of {s} is {a}.|We find {s} {a}.",
    "can": "{s} can {a}.|{s} is able to {a}.|What {s} can do is {a}."}


def about_facts(rng):
    world = rng.choice((LIVES, LIVES, LANDS, NATURE, NATURE))
    subject = rng.choice(list(world))
    facts = world[subject]
    told = rng.sample(list(facts), rng.randint(2, len(facts)))
    return " ".join(say(rng, FACTS[a], s=subject, a=facts[a]) for a in told), []


def about_choices(rng):
    """A list with letters, then things and their letters; in full, a question of `knowledge`, answered."""
    fullness = rng.randrange(4)
    if fullness == 3:
        question, letter, asked, listed, right = knowledge(rng)
        return say(rng, "{q} {l}. It is {r}, so the answer is {x}.|"
                   "{p} read {l}. {q} The answer is {x}, that is {r}.|{q} {l}. The right letter is {x}.",
                   p=rng.choice(PEOPLE), q=asked, l=listed, x=letter, r=right), [question]
    letters = dict(zip(rng.sample(rng.choice((TOWNS, GOODS, COLOURS)), 3), "ABC"))
    wording = ("{w} {x}.", "{w} is {x}.", "It is {w}, so the answer is {x}.")[fullness]
    named = rng.sample(list(letters), 3) + [rng.choice(list(letters))]
    return " ".join([" ".join(f"({x}) {w}" for w, x in letters.items()) + ".",
                     *(wording.format(w=w, x=letters[w]) for w in named)]), []


def about_tools(rng):
    return commonsense(rng, "{p} used the {t} to {g}.|To {g}, {p} needs the {t}.|"
                       "{p} wants to {g}, so {s} should use the {t}.|"
                       "{p} wants to {g}. There were the {a}, the {b} and the {c}. {s} took the {t}.|"
                       "To {g}, does one need the {a}, the {b} or the {c}? The right tool is the {t}.")[0], []


def about_opinions(rng):
    text, label = sentiment(rng)
    moods = ("glad", "happy") if label == "positive" else ("sad", "angry")
    return text + " " + say(rng, "So {p} was {m}.|It was a {n} review.|{p} told a {n} story about it.",
                            p=rng.choice(PEOPLE), m=rng.choice(moods), n=label), [text]


def about_scenes(rng):
    question, answer, facts, text, asked = reading(rng)
    q = other(rng, PEOPLE, *(person for person, *_ in facts))
    lines = [say(rng, "{q} asked {w}. The answer was {a}.|Then we know {w}: {a}.", q=q, w=asked, a=answer),
             tell(rng, rng.choice(facts)) + "."]
    for _ in range(4):
        claimed, label = claim(rng, facts)
        lines.append(say(rng, "{q} asked if {c}. The answer was {l}.|Does it say that {c}? {l}.|{c}? {l}.",
                         q=q, c=tell(rng, claimed), l=label))
    return text + rng.choice(" \n") + " ".join(rng.sample(lines, 4)), [question]


def about_sameness(rng):
    """Words and verbs beside each other, or an event and others: is it the same?"""
    fullness = rng.choice((0, 1, 2, 2))          # half of the last are drawn again
    if fullness == 0:
        pairs = [(w, w) if rng.random() < 0.5 else rng.sample(WORDS, 2) for w in rng.sample(WORDS, 3)]
        pairs += [(v, VERBS[v if rng.random() < 0.5 else other(rng, VERBS, v)])
                  for v in rng.sample(list(VERBS), 3)]
        return " ".join(f"{a} {b} {'same' if a == b or VERBS.get(a) == b else 'different'}."
                        for a, b in pairs), []

    def told(e):
        if fullness == 2:
            return report(rng, e)
        return f"{e['p']} {rng.choice((e['v'], VERBS[e['v']]))} {e['o']}."
    e = event(rng)
    first, lines, asked = told(e), [], []
    for same in rng.choices((True, False), k=5 - fullness):
        then, label = told(e if same else twist(rng, e)), "same" if same else "different"
        lines += [then, f"{label}." if fullness == 1 else
                  rng.choice(("That is {w}.", "The two sentences are {w}.")).format(w=label)]
        asked.append(f"{first}\n{then}")
    return " ".join([first, *lines]), asked


def about_sightings(rng):
    """Names and kinds, then who saw what, told in few words or in full, and claims about it."""
    fullness, lines, asked = rng.choice((0, 1, 2, 2)), [], []    # half of the last are drawn again
    for _ in range((6, 3, 1)[fullness]):
        p, name = rng.choice(PEOPLE), rng.choice(list(KIND_OF))
        lines.append(("", f"{p} {name}.", sighting(rng, p, name))[fullness])
        for _ in range((1, 2, 3)[fullness]):
            q, kind, label = claim_sighting(rng, p, name)
            if fullness == 0:
                label = "true" if kind == KIND_OF[name] else "false"
            lines.append((f"{name} {kind} {label}.", f"{q} {kind} {label}.",
                          f"{q} saw {article(kind)}. This is {label}.")[fullness])
            asked.append(f"{lines[0]}\n{q} saw {article(kind)}.")
    return " ".join(filter(None, lines)), asked


def about_stories(rng):
    text, short = summarisation(rng)
    return text + rng.choice(" \n") + say(rng, "In short: |In one sentence: |To sum up, ") + short, [text]


def about_reasons(rng):
    question, who = coreference(rng)
    text, why = question.removesuffix("?").split("\nWho ")
    space = rng.choice(" \n")
    return text + space + say(rng, "The one who {why} was {who}.|Who {why}? The name is {who}.|"
                              "The sentence is about {who}, who {why}.", why=why, who=who), [question]


def about_talk(rng):
    """The words of MiniCME's instructions in other sentences."""
    p, q = rng.sample(PEOPLE, 2)
    do = rng.choice("read,tell,choose,decide,compare,find,name,answer,sum up,do".split(","))
    w = rng.choice("question,answer,story,review,text,sentence,letter,name,fact,word,tool".split(","))
    w += rng.choice(("", " about nature", " about these tools", " in short", " with one word",
                     " in the text"))
    return say(rng, "{p} asked {q} to {do} the {w}.|{q} had to {do} the {w} with {p}.|"
               "{p} can {do} the second {w} and {q} the first.|Whom did {q} ask about the {w}? {p} did.|"
               "Which of these tools does {q} need?|{Do} the {w}, said {p}. Should {q} {do} it?|"
               "Is this the {w}? Where is it? Name it, said {q}.|{Do} it, {p}, said {q}.|"
               "Does it belong to {p}? Then {q} did find it.", p=p, q=q, do=do, Do=do.capitalize(), w=w), []


def copying(rng):
    """A list of words, said two or three times."""
    words = rng.sample(WORDS, rng.randint(3, 10))
    return rng.choice(" \n").join([" ".join(words)] * rng.randint(2, 3)), []


def table(rng):
    """Who is where or has what: (facts, function that writes one of them, text of all)."""
    fullness = rng.randrange(4)

    def line(fact):
        p, relation, what = fact
        between = ("", " the", " in the" if relation == "in" else " has the")
        return tell(rng, fact) if fullness == 3 else f"{p}{between[fullness]} {what}"
    facts = scene(rng, rng.randint(3 if fullness == 3 else 2, 6))  # two in full would be one of `inference`
    return facts, line, ". ".join(map(line, facts)) + ". "


def recalling(rng):
    """A table, said twice more in other orders."""
    facts, line, text = table(rng)
    return text + ". ".join(line(f) for _ in range(2) for f in rng.sample(facts, len(facts))) + ".", []


def reversing(rng):
    """A table, said twice more in other orders and from its other end."""
    facts, _, text = table(rng)
    return text + ". ".join(f"The {what} {p}" for _ in range(2)
                            for p, _, what in rng.sample(facts, len(facts))) + ".", []


def judging(rng):
    """Claims about a table or a list; of strangers a table says nothing."""
    if rng.random() < 0.5:
        facts, line, text = table(rng)
        claims = (claim(rng, facts) for _ in range(5))
        return text + " ".join(f"{line(claimed)}? {label}." for claimed, label in claims), []
    words = rng.sample(WORDS, rng.randint(3, 10))
    asked = [rng.choice(words) if rng.random() < 0.5 else other(rng, WORDS, *words) for _ in range(6)]
    return " ".join(words) + ". " + ", ".join(f"{w} {'yes' if w in words else 'no'}" for w in asked), []


STATEMENTS = (4 * (about_facts,) + 3 * (about_scenes,)
              + 2 * (about_choices, about_sameness, about_sightings, about_stories)
              + (about_tools, about_opinions, about_reasons, about_talk, about_talk))
EXERCISES = (copying, recalling, reversing, judging, judging, about_choices, about_sameness, about_sameness,
             about_sightings)
# up to which text of a term, share of statements, exercises
LESSONS = ((2000, 0.0, (copying,)), (4500, 0.05, (copying, recalling, recalling)),
           (11500, 0.05, (recalling, reversing, reversing)), (20000, 0.2, EXERCISES),
           (math.inf, 0.7, EXERCISES))
SECOND_TERM = ((12000, 0.2, (reversing, reversing, judging, recalling)),
               (20000, 0.2, EXERCISES + 2 * (reversing,)), (math.inf, 0.6, EXERCISES + 2 * (reversing,)))
N_LESSONS = 20000                                # from here on the mixture stays the same


def paragraph(rng, make):
    """Text of a paragraph that answers no question but training's."""
    while True:
        text, asked = make(rng)
        if all(split_of(question) == "training" for question in asked):
            return text


def corpus(seed, lessons=LESSONS):
    """The corpus as a stream: i -> Row without a prompt, three paragraphs of statements or exercises."""
    def row(i):
        rng = random.Random(f"corpus {seed} {i}")
        share, exercises = next((share, kinds) for end, share, kinds in lessons if i < end)
        return data.Row("corpus", "", "", "\n".join(
            paragraph(rng, rng.choice(STATEMENTS if rng.random() < share else exercises)) for _ in range(3)))
    return row


def make_tokenizer(path, rows, vocab_size=1280):
    """Train a sentencepiece model on the text of the rows (BPE, byte fallback) and save it at `path`."""
    with open(path, "wb") as f:                  # a name would be written into the file
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for row in rows for line in row.output.split("\n")), model_writer=f,
            vocab_size=vocab_size, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
            normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2)


# ---- The model and its optimizer

def new_llama(vocab_size, layers, width):
    """A Llama with start values, all of which will be trained; width in heads of 32."""
    C = width
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=C, intermediate_size=8 * C // 3 // 16 * 16,
                         num_hidden_layers=layers, num_attention_heads=C // 32, num_key_value_heads=C // 32,
                         head_dim=32, rms_norm_eps=1e-5, rope_theta=100.0, tie_word_embeddings=True,
                         max_position_embeddings=256, eos_token_id=(2,))
    model = Llama(config).init_weights().requires_grad_(True)
    start_looking(model)
    return model


@torch.no_grad()
def start_looking(model):
    """Let attention start by looking: everywhere at what resembles the token, and head h of layer 0 at the
    token h + 1 places back, which it carries over into directions of its own, so that later layers can tell
    the distances apart."""
    C, D = model.config.hidden_size, model.config.head_dim       # width, head width
    for block in model.model.layers:
        q, k = block.self_attn.q_proj.weight, block.self_attn.k_proj.weight          # (C, C)
        q.copy_(q / 2 + k)
    # a direction that all embeddings share lets q and k of layer 0 see the position and ignore the token
    embedding, first = model.model.embed_tokens.weight, model.model.layers[0].self_attn
    shared = F.normalize(torch.randn(C), dim=0)
    embedding += shared * embedding.norm(dim=1).mean()
    directions = nn.init.orthogonal_(torch.empty(C, C))
    for head in range(C // D):
        cos, sin = (t.flatten()[:D // 2] for t in rotary_tables(model.config, torch.tensor([head + 1])))
        here, back = torch.cat((cos * 0 + 1, sin * 0)), torch.cat((cos, -sin))       # (D,) each
        own = slice(head * D, head * D + D)
        first.q_proj.weight[own] = 0.5 * torch.outer(back, shared)
        first.k_proj.weight[own] = 0.5 * torch.outer(here, shared)
        first.v_proj.weight[own] = directions[own]
        # as long as an embedding
        first.o_proj.weight[:, own] = directions[own].T * math.sqrt(0.4 / C) * math.sqrt(C / D)


class MuonAndAdamW:
    """Muon for the matrices inside, AdamW for embedding and norms, as one optimizer for train.fit."""

    def __init__(self, model, learning_rate):
        inside = {True: [], False: []}
        for name, p in model.named_parameters():
            inside[p.dim() == 2 and "embed_tokens" not in name].append(p)
        self.parts = (torch.optim.Muon(inside[True], lr=learning_rate, weight_decay=0.1),
                      torch.optim.AdamW([{"params": inside[False], "scale": 0.15}], lr=learning_rate,
                                        betas=(0.9, 0.95), weight_decay=0.0, fused=True))
        self.found_inf = None                    # training_step sets it: where it is 1, the step is skipped

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        if not self.found_inf:
            for part in self.parts:
                part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, own in zip(self.parts, state["parts"]):
            part.load_state_dict(own)


# ---- One base: made, then probed

@dataclass(frozen=True)
class BaseConfig(train.Config):
    out_dir: str = flag("out/base", "folder of the base")
    method: str = flag("full", "full: a base has no adapters")
    steps: int = flag(2800, "optimizer steps of each of the two terms", least=1)
    batch_size: int = flag(12, "texts of the corpus per step", least=1)
    learning_rate: float = flag(0.02, "peak learning rate of Muon; AdamW takes 0.15 of it", least=1e-12)
    seed: int = flag(4, "seed of corpus and start values")
    layers: int = flag(4, "layers", least=1)
    width: int = flag(128, "width, in heads of 32", least=32)
    threads: int = flag(1, "CPU threads; another number adds in another order: another base", least=1)
    probe_steps: int = flag(1500, "steps of the adapters that probe the base; 0: no probe")

    def check(self):
        super().check()
        if (self.init_from, self.data, self.method) != (train.Config.init_from, train.Config.data, "full"):
            raise InputError("init_from, data and method have no part in making a base; leave them out")
        if self.width % 32:
            raise InputError(f"width must be a multiple of 32, not {self.width}")


def terms(seed):
    """The streams of texts of the two terms; the second is of a seed of its own, to read nothing twice."""
    return corpus(seed), corpus(seed + 1000, SECOND_TERM)


def recipe_of(cfg):
    """All that decides about a base, as lines of JSON; the corpus stands there by its hash."""
    names = "seed steps batch_size learning_rate warmup clip max_tokens layers width threads".split()
    texts = (stream(i).output for stream in terms(cfg.seed) for i in range(0, 2 * N_LESSONS, 100))
    corpus = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    recipe = {name: getattr(cfg, name) for name in names} | {"corpus": corpus}
    return "    " + json.dumps(recipe, indent=1).replace("\n", "\n    ")


def cheapest_micro_batches(examples, max_tokens, overhead=32):
    """A step's micro-batches of the least cost: padded tokens, and `overhead` more for starting each. Not
    data.micro_batches, which splits otherwise: sums in another order would make another base."""
    examples = sorted(examples, key=lambda e: len(e.ids))
    best = [(0, 0, [])]                          # for the first 0, 1, .. of them: cost, and where each starts
    for stop, e in enumerate(examples, 1):
        n = data.padded_length(len(e.ids))
        best.append(min((best[start][0] + (stop - start) * n + overhead, start, [*best[start][2], start])
                        for start in range(max(0, stop - max_tokens // n), stop)))
    starts = best[-1][2]
    return [examples[start:stop] for start, stop in zip(starts, [*starts[1:], None])]


def make(cfg, saved, recipe):
    """Train a base, from a checkpoint on if one is given, and write it to out_dir; returns the seconds."""
    folder, streams, n = Path(cfg.out_dir), terms(cfg.seed), cfg.batch_size
    if not saved:
        make_tokenizer(folder / "tokenizer.model", map(streams[0], range(N_LESSONS, N_LESSONS + 5000)))
    tokenizer = data.Tokenizer(folder)
    encode = data.Encoder(tokenizer, cfg.template, len(tokenizer.names))
    torch.manual_seed(cfg.seed)
    model = new_llama(len(tokenizer.names), cfg.layers, cfg.width).to(train.device_and_dtype(cfg)[0])
    first, seconds = (saved["term"], saved["seconds"]) if saved else (0, 0.0)
    for term in range(first, len(streams)):
        def step_batches(step):
            examples = [encode(streams[term](i)) for i in range(step * n, (step + 1) * n)]
            return list(map(data.collate, cheapest_micro_batches(examples, cfg.max_tokens)))

        def save(totals):
            train.save_run(folder / "checkpoint.pt", cfg, "", model, optimizer=optimizer.state_dict(),
                           totals=totals, term=term, seconds=seconds, recipe=recipe)
        optimizer = MuonAndAdamW(model, cfg.learning_rate)
        if saved:
            load_parameters(dict(model.named_parameters()), saved["parameters"])
            optimizer.load_state_dict(saved["optimizer"])
        totals = train.fit(model, step_batches, optimizer, cfg, saved and saved["totals"], save=save)
        saved, seconds = None, seconds + totals["seconds"]
        model.to(torch.bfloat16).float()         # as it will be stored, also between the terms
    save_llama(model.to(torch.bfloat16), folder)
    return seconds


def probe(cfg):
    """task -> accuracy on validation questions after the training of `python train.py` on this base."""
    out = Path(cfg.out_dir) / "probe"
    summary = train.run_train(*train.compose({
        "init_from": cfg.out_dir, "out_dir": str(out), "steps": cfg.probe_steps, "device": cfg.device,
        "dtype": "float32", "val_data": f"{train.ASSETS}/minicme/validation.jsonl",
        "val_examples": cfg.val_examples, "resume": (out / "checkpoint.pt").is_file()}))
    return summary["accuracy"] | {"mean": summary["mean_accuracy"]}


def make_base(cfg, saved):
    """Make a base, probe it, and describe it in its README, which is written last."""
    torch.set_num_threads(cfg.threads)
    torch.set_float32_matmul_precision("highest")        # no TF32: no base depends on a GPU's rounding
    folder, recipe = Path(cfg.out_dir), recipe_of(cfg)
    checkpoint, readme = folder / "checkpoint.pt", folder / "README.md"
    folder.mkdir(parents=True, exist_ok=True)
    if saved and saved.get("recipe") != recipe:
        raise InputError(f"{checkpoint} is of another recipe; leave flags out, or choose another --out_dir")
    if not saved and (checkpoint.is_file() or readme.is_file()):
        raise InputError(f"{folder} holds a base: --resume it if it is unfinished, or take another --out_dir")
    seconds = make(cfg, saved, recipe)
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    probed = probe(cfg) if cfg.probe_steps else {}
    accuracy = "\n".join(f"    {task:15}{a:.3f}" for task, a in probed.items()) or "    none"
    text = f"""# The built-in base

Made by `python -m experiments.make_base`, which tells how and why; nothing was downloaded. Recipe:

{recipe}

Trained in fp32 for {seconds:.0f} s, then rounded to bf16, with {versions} and
sentencepiece {sentencepiece.__version__} on {train.device_and_dtype(cfg)[0]}. SHA-256 of model.safetensors:

    {sha256}

Accuracy on MiniCME's validation questions, up to {cfg.val_examples} a task, after {cfg.probe_steps} steps of
TeamLoRA with train.py's defaults on this base:

{accuracy}
"""
    train.write_atomically(readme, lambda f: f.write(text.encode()))
    checkpoint.unlink()
    print(f"\n{text}\nwrote {folder}")


if __name__ == "__main__":
    train.main(run=make_base, config=BaseConfig)
