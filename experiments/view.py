"""One page that shows which expert speaks for which token: out_dir/experts.html, for any browser.

    python -m experiments.view                             the run in out, two held-out questions of each task
    python -m experiments.view --prompt="Where is Anna?" --prompt="Who sings?"             your own questions

The idea: the page holds phi of every token and layer, and M; its script computes w. So every layer can be
looked at without a server, a network or a library.

What may surprise:
- A token is read with its weights; its loss is that of predicting it, one token earlier.
- Accuracy and tasks are measured on all questions of --mode=eval; of a large base fewer tokens are shown.
"""

import argparse
import base64
import json
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

import data
import train
from experiments.compare import ExpertUse
from teamlora import METHODS, InputError, TeamLoRALinear, adapter_layers, collected_weights, flag, naming


@dataclass(frozen=True)
class ViewConfig(train.Config):
    mode: str = flag("eval", "how out_dir is read: as with train.py --mode=eval", choices=("eval",))
    prompt: str = flag("", "show this question in place of held-out ones; may be given several times")
    room: int = flag(400, "KB of the page for the numbers of its tokens: where they take more, show fewer", 1)

    def check(self):
        super().check()
        if self.method not in METHODS or self.n_experts > 8:
            raise InputError(f"out_dir={self.out_dir} must hold an adapter of at most 8 experts, not one of "
                             f"--method={self.method}, --n_experts={self.n_experts}")


def token_texts(tokenizer, ids):
    """What each token adds to the text; a control word, or a token that ends within a letter, by its name."""
    texts, before = [], ""
    for i, token in enumerate(ids):
        text = tokenizer.decode(ids[:i + 1])
        whole = len(text) > len(before) and not text.endswith("\ufffd")
        texts.append(text[len(before):] if whole else tokenizer.names.get(token, "?"))
        before = text if whole else before
    return texts


@torch.no_grad()
def look(model, tokenizer, example, from_phi):
    """A question of the page: texts and losses of its tokens; phi, else w, in 16 bits a number, as base64."""
    ids, n, phi, gate = example.ids, example.n_prompt, [], TeamLoRALinear.gate
    tokens, targets = torch.tensor([ids]), torch.tensor([[-1] * (n - 1) + ids[n:] + [-1]])
    with collected_weights(model) as w, patch.object(TeamLoRALinear, "gate", lambda layer, logits: (
            phi.append(torch.softmax(logits, -1)) or gate(layer, logits))):          # append returns None
        losses, _ = model(tokens.to(model.lm_head.weight.device), targets)
    w = torch.stack(w, 2)[0].cpu()                                                   # (T, L, E)
    phi = torch.stack(phi, 2)[0].cpu() if from_phi else w
    numbers = 32000 * phi[..., :-1] if from_phi else 4000 * w        # the last phi follows: they sum to 1
    codes = numbers.round().clamp(-32768, 32767).numpy().astype("<i2")
    return {"task": example.task, "tokens": token_texts(tokenizer, ids), "prompt": n,
            "losses": losses.tolist(), "codes": base64.b64encode(codes.tobytes()).decode(),
            "moved": (w / w.shape[-1] - phi).abs().mean((0, 2)).tolist()}


def view(cfg, saved):
    """Write out_dir/experts.html; return what it shows."""
    _, rows = train.read_data(cfg)
    model, encode, _ = train.prepare(cfg, saved)
    if not (split := data.by_task(data.encode_rows(encode, rows, cfg.max_length))):
        raise InputError("there is nothing to evaluate on: give --val_data")
    use, layers, E, out = ExpertUse(), adapter_layers(model), cfg.n_experts, Path(cfg.out_dir)
    results = train.evaluate(model, split, cfg.max_tokens, each=use)
    usage = [torch.cat(w).mean(0) for w in use.weights.values()]                     # (L, E), by task
    from_phi, shown = type(layers[0][1]).gate is TeamLoRALinear.gate, []
    prompts = [data.Row("your question", text, "", "") for text in cfg.prompt.split("\0") if text.strip()]
    for e in data.encode_rows(encode, prompts, cfg.max_length):      # with answers of at most 64 tokens
        start = torch.tensor([e.ids[:e.n_prompt]], device=model.lm_head.weight.device)
        shown.append(e._replace(ids=e.ids[:e.n_prompt] + [int(new) for new in model.generate(start, 64)]))
    room = cfg.room * 1000 / (len(layers) * (E - from_phi or 1) * 8 / 3)     # in tokens; 8/3 bytes a number
    for e in [] if prompts else [e for i in (0, 1) for some in split.values() for e in some[i:i + 1]]:
        if sum(len(other.ids) for other in [*shown, e]) <= room:
            shown = sorted([*shown, e], key=lambda e: e.task)
    with naming(path := out / "shapley.json"):
        worth = json.loads(path.read_text()) if path.is_file() else None
    content = {
        "E": E, "fromPhi": from_phi, "routed": layers[0][1].routed and E > 1, "worth": worth,
        "tasks": [{"name": task, "bits": torch.cat(use.bits[task]).mean().item(), **r}
                  for task, r in results.items()],
        "questions": [look(model, encode.tokenizer, e, from_phi) for e in shown],
        "layers": [{"name": ".".join(name.split(".")[2::2]), "usage": [task[i].tolist() for task in usage],
                    "M": layer.interaction.tolist() if from_phi else None}
                   for i, (name, layer) in enumerate(layers)],
        "run": f"{cfg.method} on {Path(cfg.init_from).name}, E = {E}, r = {cfg.rank}: mean accuracy "
               f"{train.overall(results)[0]:.3f} over {len(split)} tasks, {len(rows)} questions. Shown: "
               f"{len(shown)} questions."}
    content = json.loads(json.dumps(content), parse_float=lambda number: round(float(number), 5))
    text = PAGE.replace("DATA", json.dumps(content).replace("<", "\\u003c"))         # of a row's </script>
    train.write_atomically(out / "experts.html", lambda f: f.write(text.encode()))
    print(f"wrote {out}/experts.html, {len(text) / 1000:.0f} KB, with {len(shown)} questions")
    return content


def main(argv=None):
    """The command line; several --prompt become one text."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompt", action="append", default=[])
    given, others = parser.parse_known_args(argv)
    return train.main([*others, "--prompt=" + "\0".join(given.prompt)], view, ViewConfig)


PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Experts at work</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><style>/* eight colours that the colour-blind tell apart */
:root { color-scheme: light dark; --most: 1; --0: 255 139 15; --1: 75 201 255; --2: 112 97 255;
  --3: 153 125 84; --4: 223 209 112; --5: 58 142 161; --6: 210 80 4; --7: 143 183 168 }
@media screen and (prefers-color-scheme: dark) { :root { --most: .5 } }  /* text keeps 4.5:1 */
@media print { * { print-color-adjust: exact; break-inside: avoid; position: static !important } }
body { max-width: 96rem; margin: auto; padding: 0 1rem 3rem; font: 1rem/1.5 system-ui, sans-serif }
p { max-width: 52rem; margin: .4rem 0 } h2 { margin: 2rem 0 0 } h3 { margin: .6rem 0 0; font-size: .85rem }
#control, #details { position: sticky; top: 0; background: Canvas; padding: .4rem 0; overflow: auto }
#details { top: auto; bottom: 0; min-height: 7rem } :focus-visible { outline: 3px solid }
#questions { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)) }
.tables { display: flex; flex-wrap: wrap; gap: .5rem 2rem; overflow: auto; align-items: start }
button { font: inherit; border: 0; padding: 0 1px; color: CanvasText; white-space: pre }
td { text-align: right } th, caption { text-align: left } sub { font-size: .65em; line-height: 0 }
table { font-size: .85rem } td, th, #legend > * { font-weight: normal; padding: 0 .3rem; white-space: nowrap }
</style><h1>Experts at work</h1>
<p>A frozen language model was given small trained helpers, the experts, in many of its layers:
y = W x + (α / r) Σ wₑ Bₑ Aₑ x. At every token a router gives each a share, φ = softmax(R x); in TeamLoRA a
matrix M lets them raise or lower each other: w = φ + φ M, scaled to sum E.</p><p id="run"></p>
<div id="control"><label>layer <select id="layer"></select></label> <span id="legend"></span></div>
<h2>Tokens</h2><p id="colours">The colour is that of a token’s strongest expert, whose number is beside it;
the larger its weight, the stronger. Above: at how many tokens each is the strongest.</p>
<div id="questions"></div><div id="details" role="status">Point at a token, or use Tab and arrow keys.</div>
<h2>Competition</h2><p>Row i, column j: what a unit of φ of expert i adds to j, in the colour of j; striped
where it lowers j. Behind a layer’s name: how far M moves the shares, mean |w / E − φ|.</p>
<div id="matrices" class="tables">This method has no M.</div>
<h2>Tasks and worth</h2><p>If a token chose one expert by weight: bits of that choice, and about the task. If
experiments.shapley has run: Shapley values, what an expert adds to minus the loss as it joins the others.</p>
<div class="tables"><div id="tasks"></div><div id="worth"></div><div id="layers"></div></div>
<script type="application/json" id="data">DATA</script><script>
const find = id => document.getElementById(id), fixed = x => x.toFixed(3).replace("-", "−");
const { E, fromPhi, routed, layers, tasks, questions, worth, run } = JSON.parse(find("data").textContent);
const sum = xs => xs.reduce((a, b) => a + b, 0), mean = xs => sum(xs) / xs.length;
const entropy = xs => -sum(xs.map(x => x > 0 ? x / sum(xs) * Math.log2(x / sum(xs)) : 0));
const each = f => Array.from({ length: E }, (_, e) => f(e)), show = (id, ...inside) => put(find(id), inside);
const make = (tag, ...inside) => put(document.createElement(tag), inside);
function put(node, inside) { node.replaceChildren(...inside); return node; }
function shade(node, e, x) {                             // in the colour of expert e; striped if x < 0
  const ink = `rgb(var(--${e}) / calc(var(--most) * ${Math.min(1, Math.abs(x))}))`;
  node.style.background = `repeating-linear-gradient(135deg, ${ink} 0 4px, ${x < 0 ? "#0000" : ink} 0 8px)`;
  return node;
}
function table(caption, head, rows) {                    // a row: its name, E numbers to shade, other numbers
  const shaded = rows.flatMap(row => row.slice(1, E + 1)), zero = Math.max(0, Math.min(...shaded));
  const range = Math.max(...shaded.map(Math.abs)) - zero || 1;
  const cell = (x, e) => e < E ? shade(make("td", fixed(x)), e, (x - zero) / range) : make("td", fixed(x));
  const chips = each(e => shade(make("th", e + 1), e, 1)), others = head.map(name => make("th", name));
  return make("table", make("caption", caption), make("tr", make("th", "expert"), ...chips, ...others),
    ...rows.map(([name, ...xs]) => make("tr", make("th", name), ...xs.map(cell))));
}
function weigh(q, t, l) {                                // phi and w of token t in layer l, 2 E numbers
  const n = E - fromPhi, at = (t * layers.length + l) * n, { M } = layers[l];
  const phi = Array.from(q.codes.subarray(at, at + n), x => x / (fromPhi ? 32000 : 4000));
  if (!fromPhi) return [...phi, ...phi];
  phi.push(1 - sum(phi));
  const raised = each(j => phi[j] + sum(each(i => phi[i] * M[i][j])));
  return [...phi, ...raised.map(x => x * E / Math.max(sum(raised), 0.1))];
}
function render() {                                      // what depends on the chosen layer
  const chosen = find("layer").value ? [+find("layer").value] : [...layers.keys()], leads = each(() => 0);
  const seen = questions.map(q => q.tokens.map((_, t) => chosen.map(l => weigh(q, t, l)))
    .map(all => all[0].map((_, i) => mean(all.map(both => both[i])))));
  const tops = seen.flat().map(both => Math.max(...both.slice(E)));
  const least = Math.min(...tops), range = Math.max(...tops) - least || 1;
  show("questions", ...questions.map((q, i) => {
    const buttons = q.tokens.map((text, t) => {
      const w = seen[i][t].slice(E), top = w.indexOf(Math.max(...w)), loss = q.losses[t - q.prompt] ?? 0;
      const button = make("button", text.replaceAll("\n", "↵"), routed ? make("sub", top + 1) : "");
      const rows = [["φ, before M", ...seen[i][t].slice(0, E)], ["w", ...w]].slice(1 - fromPhi);
      const title = `“${text}”: ${t < q.prompt ? "not supervised" : `loss ${fixed(loss)}`}`;
      leads[top] += 100 / tops.length;
      button.onclick = button.onfocus = button.onpointerenter = () => show("details", table(title, [], rows));
      button.onkeydown = ({ key }) => buttons[t + (key == "ArrowRight") - (key == "ArrowLeft")]?.focus();
      button.tabIndex = t ? -1 : 0;
      return shade(button, top, routed ? 0.2 + 0.8 * (w[top] - least) / range : loss / 3);
    });
    return make("div", make("h3", q.task), ...buttons.slice(0, q.prompt), make("br"), make("b", "answer: "),
      ...buttons.slice(q.prompt));
  }));
  if (routed) show("legend", ...each(e => shade(make("span", `${e + 1}: ${leads[e].toFixed()} %`), e, 1)));
  show("tasks", table("mean weight, in the chosen layer", ["bits", "accuracy"], tasks.map((task, i) =>
    [task.name, ...each(e => mean(chosen.map(l => layers[l].usage[i][e]))), task.bits, task.accuracy])));
}
questions.forEach(q => q.codes = new Int16Array(Uint8Array.from(atob(q.codes), c => c.charCodeAt()).buffer));
find("layer").append(new Option("mean over layers", ""), ...layers.map(({ name }, l) => new Option(name, l)));
find("layer").onchange = render;
render();
show("run", run);
if (!routed) show("colours", "There is no router: every weight is 1. The colour is a token’s loss.");
show("layers", table("mean weight by layer", ["bits about the task"], layers.map(({ name, usage }) => {
  const all = each(e => mean(usage.map(u => u[e])));
  return [name, ...all, entropy(all) - mean(usage.map(entropy))];
})));
if (fromPhi) show("matrices", ...layers.map(({ name, M }, l) => table(
  `${name}: ${fixed(mean(questions.map(q => q.moved[l])))}`, [], M.map((row, i) => [i + 1, ...row]))));
if (worth && tasks.every(({ usage }, i) => usage.every((u, e) => Math.abs(u - worth.usage[i]?.[e]) < 1e-3)))
  show("worth", table("Shapley value", [], tasks.map(({ name }, i) => [name, ...worth.shapley.loss[i]])));
</script>
"""


if __name__ == "__main__":
    main()
