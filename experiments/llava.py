"""TeamLoRA on the language model of a LLaVA; by default a tiny random one that is made here, with pictures.

    python -m experiments.llava --out_dir=out/llava
    python -m experiments.llava --init_from=llava-1.5-7b-hf --data=rows.json --learning_rate=2e-4

The idea: to train.py it is a Llama. Tokens from PICTURE on stand for the patches of a picture, which only
`Llava.hidden` looks at. A file is a list of {"image", "instruction", "output"}, image a path from that file
on; all rows about one picture are held out, or none. Instead of --resume there is --adapter_from.
"""

import importlib.util
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import data
import train
from model import Llama, fingerprint, read_json
from teamlora import METHODS, InputError, adapt, adapter_parameters, flag, load_parameters, naming

PICTURE = 2 ** 24                                # beyond every vocabulary; PICTURE + i is picture i
SIDES, COLOURS = {"triangle": 3, "square": 4, "circle": 60}, ("red", "green", "blue", "yellow")


@dataclass(frozen=True)
class LlavaConfig(train.Config):
    init_from: str = flag("", "folder of a LLaVA; empty, and so --data: a tiny one is made, with pictures")
    data: str = flag("", "files of rows with pictures, comma-separated")
    val_data: str = flag("", "such files to evaluate on; empty: a part of --data")
    template: str = flag("USER: <image>\\n{instruction}\\n{input} ASSISTANT:{output}{eos}", "LLaVA-1.5's")
    steps: int = flag(2400, "optimizer steps", least=1)

    def check(self):
        super().check()
        if (self.method not in METHODS or self.compile or self.dtype == "nf4"
                or bool(self.data) != bool(self.init_from)):
            raise InputError("method: adapters only, no --compile, no --dtype=nf4; --data with --init_from")
        if not all(map(importlib.util.find_spec, ("transformers", "PIL"))):
            raise InputError("init_from: a LLaVA needs two packages more: pip install transformers pillow")


def make_example(folder, n=4000):
    """A random LLaVA of 0.2 M parameters, whose adapters alone will learn; n drawn pictures, 2 rows each."""
    import tokenizers
    from PIL import Image, ImageDraw
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    words = [*"<unk> <s> </s> <image> USER : What shape colour is it ? ASSISTANT".split(), *SIDES, *COLOURS]
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    LlavaForConditionalGeneration(LlavaConfig(
        text_config=LlamaConfig(**sizes, vocab_size=len(words), initializer_range=0.125), image_token_index=3,
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=8))).save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(words, range(99))), "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:4])
    tokenizer.save(str(folder / "tokenizer.json"))
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    rng, rows = random.Random("pictures"), []
    for i in range(n):
        shape, colour, radius = rng.choice([*SIDES]), rng.choice(COLOURS), rng.randint(7, 12)
        picture, centre = Image.new("RGB", (32, 32)), [rng.randint(radius, 31 - radius) for _ in "xy"]
        ImageDraw.Draw(picture).regular_polygon((*centre, radius), SIDES[shape], fill=colour)
        picture.save(folder / f"{i}.png")
        rows += [{"image": f"{i}.png", "task": task, "instruction": f"What {task} is it?", "output": answer}
                 for task, answer in (("shape", shape), ("colour", colour))]
    (folder / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")


def read(paths, encode, model, max_length):
    """Examples, by data.py's rules, of comma-separated files; <image> becomes the number of a picture."""
    rows, first = [], len(model.pictures)
    for file in data.list_files(paths):
        with naming(file):
            for number, raw in enumerate(json.loads(file.read_text("utf-8-sig")), 1):
                with naming(f"row {number}"):
                    row = {"task": file.stem, "input": ""} | raw
                    rows.append(data.Row(*(row[key] + "" for key in data.Row._fields)))  # all are text
                    model.pictures.append((file.parent / row["image"]).resolve(strict=True))
    numbered = [row._replace(task=i) for i, row in enumerate(rows) if row.output.strip()]
    for i, ids, n_prompt in data.encode_rows(encode, numbered, max_length - model.patches + 1):
        if ids.count(model.image) != 1:
            raise InputError(f"{paths}: <image> must be once in --template, and within --max_length")
        at = ids.index(model.image)
        ids[at:at + 1] = [PICTURE + first + i] * model.patches
        yield data.Example(rows[i].task, ids, n_prompt + model.patches - 1)


class Llava(torch.nn.Module):
    """A LLaVA as train.py knows models: tokens (B, T) are ids, or PICTURE + i for each patch of picture i."""
    forward, token_losses, base_parameters = Llama.forward, Llama.token_losses, Llama.base_parameters

    def __init__(self, cfg):
        from transformers import AutoImageProcessor, LlavaForConditionalGeneration as Base
        super().__init__()
        if read_json(path := Path(cfg.init_from) / "config.json").get("model_type") != "llava":
            raise InputError(f"{path}: model_type is not 'llava'")
        device, dtype = train.device_and_dtype(cfg)
        self.llava = Base.from_pretrained(cfg.init_from, dtype=dtype).to(device).requires_grad_(False)
        adapt(self.llava, [f"language_model.*.{target}" for target in cfg.targets], cfg.adapter)
        if cfg.checkpointing:
            self.llava.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        self.processor, self.pictures = AutoImageProcessor.from_pretrained(cfg.init_from), []
        self.lm_head, config = self.llava.lm_head, self.llava.config
        self.config, self.image, vision = config.text_config, config.image_token_index, config.vision_config
        self.patches = (vision.image_size // vision.patch_size) ** 2

    def hidden(self, tokens):
        """tokens (B, T) -> final hidden states (B, T, C)."""
        from PIL import Image
        opened = [Image.open(self.pictures[i - PICTURE]).convert("RGB") for i in tokens.amax(1).tolist()]
        pixels = self.processor(opened, return_tensors="pt")["pixel_values"].to(self.lm_head.weight)
        ids = tokens.masked_fill(tokens >= PICTURE, self.image)
        return self.llava.model(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state


def llava(cfg, saved):
    """Training on the rows, evaluation before and after, returned; writes log.jsonl and adapter.pt."""
    out = Path(cfg.out_dir)
    torch.manual_seed(cfg.seed)
    if not cfg.init_from:
        make_example(folder := out / "llava")
        cfg = replace(cfg, init_from=str(folder), data=str(folder / "rows.json"))
    model = Llava(cfg)
    if saved:
        load_parameters(adapter_parameters(model.llava), saved["parameters"])
    encode = data.Encoder(data.Tokenizer(cfg.init_from), cfg.template, model.config.vocab_size,
                          [model.config.eos_token_id])
    examples, held_out = ([*read(paths, encode, model, cfg.max_length)] if paths else []
                          for paths in (cfg.data, cfg.val_data))
    if not cfg.val_data:                         # all about one picture, or nothing
        named = [data.Row(e, model.pictures[max(e.ids) - PICTURE].name, "", "") for e in examples]
        examples, held_out = ([row.task for row in part] for part in data.hold_out(named, cfg.val_share))
    split = {task: some[:cfg.val_examples or None] for task, some in data.by_task(held_out).items()}
    stream, base = data.shuffled(examples, cfg.seed), fingerprint(model)
    out.mkdir(parents=True, exist_ok=True)
    train.print_start(cfg, model, encode, stream(0))
    before = train.evaluate(model, split, cfg.max_tokens, "before")
    with open(out / "log.jsonl", "w") as log:
        train.fit(model, train.step_batches(model, stream, cfg), train.make_optimizer(model, cfg), cfg,
                  log=lambda record: print(json.dumps(record), file=log, flush=True),
                  save=lambda totals: train.save_run(out / "adapter.pt", cfg, base, model.llava))
    train.print_results(results := train.evaluate(model, split, cfg.max_tokens, "after"), before)
    return results


if __name__ == "__main__":
    train.main(run=llava, config=LlavaConfig)
