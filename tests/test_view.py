"""The page of experiments/view.py: what is in it, and what a browser makes of it."""

import base64
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import train
from experiments import view
from model import Llama, load_llama, save_llama
from teamlora import METHODS, TeamLoRALinear, collected_weights
from tests.conftest import flags_of, prepared

HOSTILE = "<script>alert(1)</script> </script> <!-- &lt; ' \" \\u0041"
PROBE = """<script>
const texts = selector => [...document.querySelectorAll(selector)].map(node => node.innerText);
const buttons = [...document.querySelectorAll("button")], before = find("questions").innerHTML;
buttons[2].focus();
const values = texts("#details td"), tokens = buttons.map(button => button.firstChild.data);
buttons[2].onkeydown({ key: "ArrowRight" });
find("layer").value = "1"; find("layer").onchange();
document.title = JSON.stringify({ values, tokens, next: texts("caption")[0][1], worth: texts("#worth td, h3"),
  changed: find("questions").innerHTML != before, requests: performance.getEntriesByType("resource") });
</script>"""


def page_of(base, out, *flags):
    """What the page of a run holds, read from its file."""
    view.main([f"--init_from={base}", f"--out_dir={out}", "--device=cpu", *flags])
    return json.loads(re.search(r'id="data">(.*?)</script>', (out / "experts.html").read_text(), re.S)[1])


def weights(page, question):
    """phi and w of a question (2, T, L, E), from the page alone; where it has no phi, w twice."""
    codes = torch.tensor(np.frombuffer(base64.b64decode(question["codes"]), "<i2").astype("f"))
    codes = codes.view(len(question["tokens"]), len(page["layers"]), page["E"] - page["fromPhi"])
    if not page["fromPhi"]:
        return torch.stack((codes, codes)) / 4000
    phi = torch.cat((codes, 32000 - codes.sum(-1, keepdim=True)), -1) / 32000
    w = phi + torch.einsum("tli,lij->tlj", phi, torch.tensor([layer["M"] for layer in page["layers"]]))
    return torch.stack((phi, page["E"] * w / w.sum(-1, keepdim=True).clamp(min=0.1)))


@pytest.mark.parametrize("method, E, depth", [("teamlora", 1, 2), ("teamlora", 2, 3), ("teamlora", 8, 2),
                                              ("lora", 2, 2), ("moelora", 3, 2), ("doubled", 2, 2)])
def test_page_has_every_token_and_weight(method, E, depth, base, tmp_path, monkeypatch):
    """Red if a token, loss or weight is missing, inexact, or another expert's, layer's or token's."""
    gate = {"gate": lambda layer, logits: 2 * TeamLoRALinear.gate(layer, logits)}    # not what M makes of phi
    monkeypatch.setitem(METHODS, "doubled", type("Doubled", (TeamLoRALinear,), gate))
    config, base, out = load_llama(base).config, shutil.copytree(base, tmp_path / "base"), tmp_path / "out"
    save_llama(Llama(replace(config, num_hidden_layers=depth)).init_weights(), base)
    train.main(flags_of(base, out, "--steps=1", "--val_examples=2", f"--method={method}", f"--n_experts={E}"))
    page, (model, encode, _) = page_of(base, out), prepared(base, out)
    cfg, _ = train.compose({"mode": "eval", "init_from": str(base), "out_dir": str(out)})
    split = data.by_task(data.encode_rows(encode, train.read_data(cfg)[1], cfg.max_length))
    assert page["routed"] == (method != "lora" and E > 1) and page["fromPhi"] == (method == "teamlora")
    for i, (task, examples) in enumerate(split.items()):
        usage = torch.tensor([layer["usage"][i] for layer in page["layers"]])        # (L, E)
        for e, question in zip(examples, page["questions"][2 * i:]):
            targets = torch.tensor([[-1] * (e.n_prompt - 1) + e.ids[e.n_prompt:]])
            with collected_weights(model) as w, torch.no_grad():
                losses, _ = model(torch.tensor([e.ids[:-1]]), targets)
            w = torch.stack(w, 2)[0]                                                 # (T, L, E)
            assert torch.allclose(weights(page, question)[1, :-1], w, 1e-3, 1e-3) and question["task"] == task
            assert question["losses"] == pytest.approx(losses.tolist(), abs=1e-3)
            assert encode.tokenizer.decode(e.ids) in re.sub("</?s>", "", "".join(question["tokens"]))
            usage = usage - w.mean(0) / len(examples)
        assert usage.abs().max() < 1e-3


def test_prompts_are_answered(base, finished):
    """Red if a prompt is lost, merged with another or cut at a comma, or letters of several tokens are."""
    out, _ = finished
    first, second = page_of(base, out, "--prompt=a, \u00e9", "--prompt", "\U0001f600")["questions"]
    assert "a, " in "".join(first["tokens"]) and "\u00e9" in first["tokens"] and len(first["losses"]) > 1
    assert "\U0001f600" in second["tokens"] and 4 == len(page_of(base, out)["questions"])
    assert 0 < len(page_of(base, out, "--room=2")["questions"]) < 4
    for flag, words in ("--method=none", "at most 8 experts"), ("--max_length=8", "nothing to evaluate on"):
        with pytest.raises(SystemExit, match=words):
            page_of(base, out, flag)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
def test_in_a_browser(base, tmp_path):
    """Red if the page logs an error, loads anything, shows text as markup, or control, focus or keys fail."""
    (tmp_path / "row.json").write_text(json.dumps([{"task": HOSTILE, "instruction": HOSTILE, "output": "b"}]))
    train.main(flags_of(base, out := tmp_path / "out", "--steps=1", f"--val_data={tmp_path}/row.json"))
    worth = {"usage": [page_of(base, out)["tasks"][0]["usage"]], "shapley": {"loss": [[0.5, -1, 2, 3]]}}
    (out / "shapley.json").write_text(json.dumps(worth))
    page = page_of(base, out)
    (out / "probed.html").write_text((out / "experts.html").read_text() + PROBE)
    flags = "no-sandbox no-first-run disable-gpu disable-quic disable-background-networking disable-sync"
    flags = f"headless enable-logging=stderr dump-dom disable-component-update user-data-dir={out}/c {flags}"
    run = subprocess.run(["chromium", *(f"--{flag}" for flag in flags.split()), f"file://{out}/probed.html"],
                         capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in run.stderr
    seen = json.loads(html.unescape(re.search("<title>(.*?)</title>", run.stdout, re.S)[1]))
    question, numbers = page["questions"][0], [float(x.replace("\u2212", "-")) for x in seen["values"]]
    assert numbers == pytest.approx(weights(page, question)[:, 2].mean(1).flatten().tolist(), abs=2e-3)
    assert seen["tokens"] == question["tokens"] and HOSTILE in "".join(seen["tokens"])
    assert seen["next"] == question["tokens"][3] and seen["changed"] and seen["requests"] == []
    assert seen["worth"] == [HOSTILE, "0.500", "\u22121.000", "2.000", "3.000"]
