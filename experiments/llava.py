"""TeamLoRA on the language model of a LLaVA; by default a tiny random one that is made here, with pictures.

    python -m experiments.llava --out_dir=out/llava
    python -m experiments.llava --init_from=llava-1.5-7b-hf --data=rows.json --learning_rate=2e-4

The idea: to train.py it is a Llama. Tokens from PICTURE on stand for the patches of a picture, which only
`Llava.hidden` looks at. Rows are {"image", "instruction", "output"}, image a path from their file on; all
rows about one picture are held out, or none. There is no --resume.
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
from teamlora import METHODS, InputError, adapt, flag

PICTURE = 2 ** 24                                # beyond every vocabulary; PICTURE + i is picture i
SIDES, COLOURS = {"triangle": 3, "square": 4, "circle": 60}, ("red", "green", "blue", "yellow")


@dataclass(frozen=True)
class LlavaConfig(train.Config):
    template: str = flag("USER: <image>\\n{instruction}\\n{input} ASSISTANT:{output}{eos}",
                         "as in train.py, with <image> where the picture goes; this is LLaVA-1.5's")

    def check(self):
        super().check()
        if (self.method not in METHODS or self.compile or self.dtype == "nf4"
                or bool(self.data) != bool(self.init_from)):
            raise InputError("a LLaVA takes a --method of adapters, neither --compile nor --dtype=nf4, and "
                             "--data with --init_from")
        if not all(map(importlib.util.find_spec, ("transformers", "PIL"))):
            raise InputError("a LLaVA needs two packages more: pip install transformers pillow")


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


def read(paths):
    """[(row, file of its picture)] of instruction files, comma-separated."""
    rows = []
    for file in map(Path, paths.split(",")):
        for number, raw in data.read_objects(file):
            row = data.read_row(where := f"{file}, row {number}", raw, file.stem)
            if not (picture := file.parent / str(raw.get("image"))).is_file():
                raise InputError(f"{where}: 'image' is missing or no file, {picture}")
            rows += [(row, picture)] * bool(row.output.strip())  # no answer, nothing to learn
    return rows


def encode(tokenizer, cfg, rows, model):
    """Examples by data.py's rules, with the number of a picture, which model learns, in place of <image>."""
    examples, numbered = [], [row._replace(task=i) for i, (row, _) in enumerate(rows)]
    for i, ids, n_prompt in data.to_examples(tokenizer, numbered, cfg.max_length - model.patches + 1, "rows"):
        if (n := ids.count(model.image)) != 1:
            raise InputError(f"{rows[i][1]}: <image> is {n} times in --template and row within --max_length")
        at = ids.index(model.image)
        ids[at:at + 1] = [PICTURE + len(model.pictures)] * model.patches
        model.pictures.append(rows[i][1])
        examples.append(data.Example(rows[i][0].task, ids, n_prompt + model.patches - 1))
    return examples


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
        adapt(language := self.llava.model.language_model, cfg.targets, cfg.adapter)
        if cfg.checkpointing:
            language.gradient_checkpointing_enable({"use_reentrant": False})
        self.processor, self.pictures = AutoImageProcessor.from_pretrained(cfg.init_from), []
        self.lm_head, self.adapter, config = self.llava.lm_head, cfg.adapter, self.llava.config
        self.config, self.image, vision = config.text_config, config.image_token_index, config.vision_config
        self.patches = (vision.image_size // vision.patch_size) ** 2

    def hidden(self, tokens):
        """tokens (B, T) -> final hidden states (B, T, C)."""
        from PIL import Image
        opened = [Image.open(self.pictures[i - PICTURE]).convert("RGB") for i in tokens.amax(1).tolist()]
        pixels = self.processor(opened, return_tensors="pt")["pixel_values"].to(self.lm_head.weight)
        ids = tokens.masked_fill(tokens >= PICTURE, self.image)
        return self.llava.model(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state


def llava(cfg, _):
    """Training on the rows, evaluation before and after, returned; writes log.jsonl and adapter.pt."""
    out = Path(cfg.out_dir)
    chance = {} if cfg.data else {"shape": 1 / len(SIDES), "colour": 1 / len(COLOURS)}
    torch.manual_seed(cfg.seed)
    if not cfg.init_from:
        make_example(folder := out / "llava")
        cfg = replace(cfg, init_from=str(folder), data=str(folder / "rows.json"))
    rows, model = read(cfg.data), Llava(cfg)
    pictures = [data.Row(i, picture.name, "", "") for i, (_, picture) in enumerate(rows)]
    parts = (rows, read(cfg.val_data)) if cfg.val_data else (
        [rows[row.task] for row in part] for part in data.hold_out(pictures, cfg.val_share))
    tokenizer = data.JsonTokenizer(Path(cfg.init_from) / "tokenizer.json", model.config.eos_token_id)
    tokenizer.use(cfg.template)
    examples, held_out = (encode(tokenizer, cfg, part, model) for part in parts)
    split = {task: [e for e in held_out if e.task == task][:cfg.val_examples or None]
             for task in dict.fromkeys(e.task for e in held_out)}
    stream, base = data.shuffled(examples, cfg.seed), fingerprint(model)
    out.mkdir(parents=True, exist_ok=True)
    train.print_start(cfg, model, tokenizer, stream)
    before = train.evaluate(model, split, cfg.max_tokens, "before")
    train.fit(model, train.step_batches(cfg, model, stream), train.make_optimizer(model, cfg), cfg, cfg.steps,
              log=train.Log(out / "log.jsonl"), save=lambda *_: train.write_atomically(
                  out / "adapter.pt", lambda f: torch.save(train.adapter_content(cfg, base, model.llava), f)))
    train.print_results(results := train.evaluate(model, split, cfg.max_tokens, "after"), chance, before)
    return results


if __name__ == "__main__":
    train.main(run=llava, config=LlavaConfig)
