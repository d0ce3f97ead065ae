"""A Llama with adapters inline: layers from leaf to root, generation, four bits, Hugging Face folders.

The idea: modules carry Hugging Face's names, and an adapted projection is a Linear with more parameters, so a
checkpoint loads key for key and nothing is patched afterwards. Architecture: arXiv 2302.13971 and 2307.09288.

What may surprise:
- A model that loads weights is built without memory and filled tensor by tensor: it never exists twice.
- No attention mask: rows are padded on the right, where causal attention never looks.
- With targets the head runs on supervised positions only and returns a loss for each, never a mean: so
  micro-batches add up to exactly the loss of their step.
- There are no buffers: the rotary tables are computed per forward, in fp32, from the config alone.

Letters: B batch, T time, C model width, H heads, D head width, V vocabulary, E experts, r rank of one expert,
K key/value heads, S time of queries plus cache, N supervised positions.
"""

import hashlib
import json
import math
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from teamlora import METHODS, InputError, adapter_layers, adapter_parameters, naming

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_LOGITS = 2 ** 25                             # logits that exist at once, 128 MB in fp32


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama, under the names of Hugging Face's config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None             # see `stretch`
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    eos_token_id: tuple = ()                     # every id that ends a text

    def __post_init__(self):
        if self.head_dim % 2 or self.num_attention_heads % self.num_key_value_heads:
            raise InputError("head_dim is odd, or num_attention_heads no multiple of num_key_value_heads")


def projection(adapter, name, n_in, n_out):
    """The projection `name`: the method's layer if it is a target, else a plain Linear without bias."""
    if adapter and name in adapter.targets:
        return METHODS[adapter.method](n_in, n_out, adapter=adapter)
    return nn.Linear(n_in, n_out, bias=False)


def fp32(x):
    """x in fp32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def queued(x, device):
    """x on the device. To a GPU it comes from pinned memory: that copy is queued, any other waited for."""
    pinned = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
    return pinned.to(device, non_blocking=True)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467); rms_norm itself computes the statistics in fp32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight.to(x.dtype)


def stretch(frequency, scaling):
    """Rotary frequencies for longer contexts: "linear" divides all by factor (arXiv 2306.15595); "llama3"
    those that turn less than low_freq_factor times in the original length, none above high_freq_factor, in
    between in part."""
    kept = 0.0
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = frequency * scaling["original_max_position_embeddings"] / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / scaling["factor"]


def rotary_tables(config, position, dtype=torch.float32):
    """cos and sin of the angles of positions (T,), each (T, D) (arXiv 2104.09864)."""
    exponent = torch.arange(0, config.head_dim, 2, device=position.device).float() / config.head_dim
    frequency = config.rope_theta ** -exponent                                       # (D/2,)
    if config.rope_scaling:
        frequency = stretch(frequency, config.rope_scaling)
    angle = torch.cat((position[:, None] * frequency,) * 2, -1)                      # (T, D)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, rotary):
    """Rotary embedding of x (B, H, T, D): pairs i with i + D/2, as Hugging Face (Meta's pairs neighbours)."""
    cos, sin = rotary
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def attend(q, k, v, causal):
    """Attention of q (B, H, T, D) to k and v (B, K, S, D), each shared by H / K heads -> (B, H, T, D).
    is_causal in place of a mask over all pairs keeps PyTorch's fast kernels."""
    if q.is_cuda and q.dtype == torch.float32 and q.shape[1] != k.shape[1]:
        # enable_gqa works, says PyTorch, for flash attention, of 16 bits only, and the slow math kernel
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key/value head (arXiv 2305.13245)."""

    def __init__(self, config, adapter):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj = projection(adapter, "q_proj", C, H * D)
        self.k_proj = projection(adapter, "k_proj", C, K * D)
        self.v_proj = projection(adapter, "v_proj", C, K * D)
        self.o_proj = projection(adapter, "o_proj", H * D, C)

    def forward(self, x, rotary, cache=None):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))  # (B, H, T, D), (B, K, T, D) twice
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:                    # of what came before, the keys and values of this layer
            if self in cache:
                k, v = (torch.cat(pair, 2) for pair in zip(cache[self], (k, v)))     # (B, K, S, D) twice
            cache[self] = k, v
        y = attend(q, k, v, causal=cache is None or q.shape[2] > 1)  # a single new token sees all before it
        return self.o_proj(y.transpose(1, 2).flatten(-2))                            # (B, T, C)


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202); its three projections are what the paper adapts."""

    def __init__(self, config, adapter):
        super().__init__()
        C, ffn = config.hidden_size, config.intermediate_size
        self.gate_proj = projection(adapter, "gate_proj", C, ffn)
        self.up_proj = projection(adapter, "up_proj", C, ffn)
        self.down_proj = projection(adapter, "down_proj", ffn, C)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer of the Llama: (B, T, C) -> (B, T, C)."""

    def __init__(self, config, adapter):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, adapter), MLP(config, adapter)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotary, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Llama with inline adapters: random weights from `init_weights`, real ones from `load_llama`.
    adapter: an AdapterConfig, or None for a plain Llama; what it adds trains, all else is frozen.
    Its attribute checkpointing: recompute each block in the backward pass, do not keep its activations."""

    def __init__(self, config, adapter=None):
        super().__init__()
        self.config, self.checkpointing = config, False
        if adapter and not {*adapter.targets} <= {*PROJECTIONS}:
            raise InputError(f"targets must be some of {','.join(PROJECTIONS)}, not "
                             f"'{','.join(adapter.targets)}'")
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, adapter) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for p in self.base_parameters().values():
            p.requires_grad_(False)

    def base_parameters(self):
        """name -> parameter of the plain Llama, under its checkpoint's names; a tied head is named once."""
        added = adapter_parameters(self)
        return {name: p for name, p in self.named_parameters() if name not in added}

    def init_weights(self):
        """Random base: normal of sqrt(2 / 5C) (arXiv 1910.05895), smaller where a layer ends (GPT-2)."""
        std, depth = math.sqrt(0.4 / self.config.hidden_size), math.sqrt(2 * self.config.num_hidden_layers)
        for name, p in self.base_parameters().items():
            ends = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.ones_(p) if p.dim() == 1 else nn.init.normal_(p, std=std / depth if ends else std)
        return self

    def compile_blocks(self, backend="inductor"):
        """torch.compile each block. Shapes are symbolic: all blocks share one graph for every batch; the
        first, whose input needs no gradient, has its own, and evaluation and single rows have more."""
        torch._dynamo.config.recompile_limit = 64  # of 8: what comes beyond it runs eagerly
        for block in self.model.layers:
            block.compile(dynamic=True, backend=backend)

    def hidden(self, tokens, cache=None):
        """tokens (B, T) -> final hidden states (B, T, C). cache: {} for the prompt, then one token each."""
        x = self.model.embed_tokens(tokens)                                          # (B, T, C)
        start = next(iter(cache.values()))[0].shape[2] if cache else 0
        position = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        rotary = rotary_tables(self.config, position, x.dtype)
        for block in self.model.layers:
            if cache is not None:  # its length changes with every token: eager, whatever --compile says
                x = block.forward(x, rotary, cache)
            elif self.checkpointing and torch.is_grad_enabled():
                # the reentrant kind would train the last layer only, because the base below it is frozen
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary)
        return self.model.norm(x)

    def token_losses(self, hidden, targets):
        """Head at supervised positions (targets >= 0): losses (N,) in fp32, and whether the argmax is right.
        Beyond MAX_LOGITS logits are made in chunks, again in the backward pass: never all at once."""
        def loss_and_correct(hidden, labels):
            logits = fp32(self.lm_head(hidden))
            return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels
        targets = targets.flatten()  # may stay on the CPU: to count those >= 0 a GPU would be waited for
        supervised = (targets >= 0).nonzero()[:, 0]
        labels, supervised = (queued(t, hidden.device) for t in (targets[supervised], supervised))   # (N,)
        hidden, n = hidden.flatten(0, 1)[supervised], max(1, MAX_LOGITS // self.config.vocab_size)  # (N, C)
        if len(labels) <= n:
            return loss_and_correct(hidden, labels)
        chunks = [checkpoint(loss_and_correct, *chunk, use_reentrant=False, preserve_rng_state=False)
                  for chunk in zip(hidden.split(n), labels.split(n))]
        return tuple(map(torch.cat, zip(*chunks)))

    def forward(self, tokens, targets=None):
        """tokens (B, T) -> logits (B, T, V); with targets (B, T), < 0 where unsupervised: losses (N,) in fp32
        and whether greedy decoding is right there (N,)."""
        hidden = self.hidden(tokens)
        return self.lm_head(hidden) if targets is None else self.token_losses(hidden, targets)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=0.0, generator=None):
        """Continue prompts of one length, tokens (B, T): yields each step's tokens (B,) until every row has
        ended; one that ended earlier repeats its end. temperature 0 is greedy."""
        eos = torch.tensor(self.config.eos_token_id, dtype=torch.long, device=tokens.device)
        ended, cache = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device), {}
        for _ in range(max_new_tokens):
            logits = fp32(self.lm_head(self.hidden(tokens, cache)[:, -1]))           # (B, V)
            new = logits.argmax(-1)                                                  # (B,)
            if temperature:
                p = torch.softmax(logits / max(temperature, 1e-4), -1)
                new = torch.multinomial(p, 1, generator=generator)[:, 0]
            new = torch.where(ended, tokens[:, -1], new)
            yield new
            tokens, ended = new[:, None], ended | torch.isin(new, eos)
            if ended.all():
                break


# ---- The frozen base in four bits

# the 16 levels: 0, and quantiles of a normal distribution, each as likely as the next, over the largest
NF4_LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
              0.7229568362236023, 1.0)


class NF4(torch.Tensor):
    """A frozen matrix in 4.25 bits a number: NF4 of QLoRA (arXiv 2305.14314), a scale in bf16 for each 64. It
    acts as the matrix that it stands for, in its dtype: whatever uses it makes that anew and drops it. So a
    layer needs no change, and autograd, which keeps what a product was given, keeps these bits."""

    def __new__(cls, codes, scales, pairs, packed_shape, dtype, transposed=False):
        shape = packed_shape[::-1] if transposed else packed_shape
        return cls._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)

    def __init__(self, codes, scales, pairs, packed_shape, dtype, transposed=False):
        self.codes, self.scales = codes, scales          # (N/64, 32), a byte holds two codes; (N/64,)
        self.pairs = pairs                               # (256, 2): the levels that a byte stands for
        self.packed_shape, self.transposed = packed_shape, transposed

    @classmethod
    def of(cls, w, dtype):
        """The NF4 nearest to w (out, in); each 64 numbers, row by row, are scaled by their largest."""
        blocks = F.pad(w.flatten().float(), (0, -w.numel() % 64)).view(-1, 64)       # (N/64, 64)
        scales = torch.linalg.vector_norm(blocks, math.inf, dim=1).to(torch.bfloat16)
        levels = torch.tensor(NF4_LEVELS, device=w.device)

        def coded(blocks, scales):
            unit = blocks / scales.float().clamp(min=1e-30)[:, None]
            codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2, out_int32=True).byte()     # 0 to 15
            return codes[:, ::2] << 4 | codes[:, 1::2]
        codes = torch.cat(tuple(map(coded, blocks.split(2 ** 12), scales.split(2 ** 12))))   # in small memory
        return cls(codes, scales, torch.cartesian_prod(levels, levels), tuple(w.shape), dtype)

    def matrix(self):
        """What it stands for, as a plain tensor."""
        w = F.embedding(self.codes.int(), self.pairs).flatten(1).mul_(self.scales[:, None])     # (N/64, 64)
        w = w.to(self.dtype).flatten()[:math.prod(self.packed_shape)].view(self.packed_shape)
        return w.T if self.transposed else w

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        aten, w = torch.ops.aten, args[0]
        if function in (aten.detach.default, aten.alias.default, aten.t.default):    # the same bits
            transposed = w.transposed != (function is aten.t.default)
            return cls(w.codes, w.scales, w.pairs, w.packed_shape, w.dtype, transposed)
        if function._schema.is_mutable and isinstance(w, cls):
            raise RuntimeError("a weight in NF4 cannot be changed in place; dequantize the model first")
        args, kwargs = tree_map_only(cls, cls.matrix, (args, kwargs or {}))
        return function(*args, **kwargs)


def dequantize(model):
    """Replace every NF4 weight of the model by the matrix that it stands for."""
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), NF4):
            module.weight = nn.Parameter(module.weight.matrix(), requires_grad=False)


# ---- Real weights: a Hugging Face folder in and out

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# what config.json may say for the model to be the one built here; the first value is what a missing key means
SUPPORTED = {"model_type": ("llama",), "hidden_act": ("silu", "swish"), "attention_bias": (False,),
             "mlp_bias": (False,), "rope_type": ("default", "linear", "llama3"),
             "partial_rotary_factor": (1.0,), "quantization_config": (None,)}


def read_json(path):
    """The JSON object in a file, without what is null; {} where there is no file."""
    with naming(path):
        raw = json.loads(path.read_text("utf-8-sig")) if path.is_file() else {}
        return {key: value for key, value in raw.items() if value is not None}


def read_config(folder):
    """LlamaConfig of a Hugging Face folder. InputError if it is no Llama, or one that is not built here."""
    raw = read_json(path := folder / "config.json")
    if not raw:
        raise InputError(f"{folder}: no config.json; get one with hf download NAME --local-dir FOLDER, or "
                         f"of a folder of Meta's with python -m experiments.from_meta {folder} OUT")
    with naming(path):
        # "type" is older than "rope_type"; rope_scaling than rope_parameters, and transformers prefers it
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        rope = {"rope_type": rope.get("type", "default"), "rope_theta": raw.get("rope_theta", 10000.0)} | rope
        for key, known in SUPPORTED.items():
            if (value := (raw | rope).get(key, known[0])) not in known:
                raise InputError(f"{key} is {value!r}; only {' or '.join(map(repr, known))} is supported")
        heads, length = raw["num_attention_heads"], raw.get("max_position_embeddings", 2048)
        values = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads}
        values |= raw | {"rope_theta": rope["rope_theta"], "rope_scaling": None}
        if rope["rope_type"] != "default":
            key = "original_max_position_embeddings"
            values["rope_scaling"] = {key: raw.get(key, length)} | rope
            stretch(torch.ones(1), values["rope_scaling"])       # or an error that names what is missing
        # both files may name ends: Llama-3-8B-Instruct's end of a turn is in the second alone
        ends = [c.get("eos_token_id", []) for c in (raw, read_json(folder / "generation_config.json"))]
        ends = [i for e in ends for i in (e if isinstance(e, list) else [e])]
        values["eos_token_id"] = tuple(i for i in dict.fromkeys(ends) if 0 <= i < raw["vocab_size"])
        known = {f.name: f.type for f in fields(LlamaConfig) if f.name in values}
        return LlamaConfig(**{k: t(values[k]) if t in (int, float) else values[k] for k, t in known.items()})


def read_safetensors(path):
    """name -> tensor, memory-mapped: nothing is read before it is used. Format: 8-byte little-endian length
    of a JSON header {name: {dtype, shape, data_offsets}}, then raw bytes."""
    raw = np.memmap(path, mode="c")      # copy-on-write: torch wants writable memory, the file stays as it is
    body = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    tensors, header = {}, json.loads(raw[8:body].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{name} is {entry['dtype']}; only {', '.join(DTYPES)} are supported")
        start, stop = entry["data_offsets"]
        t = torch.from_numpy(raw[body + start:body + stop]).view(DTYPES[entry["dtype"]])
        tensors[name] = t.view(entry["shape"])
    return tensors


def write_safetensors(tensors, path):
    """Write name -> tensor as a safetensors file."""
    names, header, end = {v: k for k, v in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            f.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def open_weights(folder):
    """name -> tensor, memory-mapped, of every weight file in a Hugging Face folder."""
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        with naming(path):
            found = read_safetensors(path) if path.suffix == ".safetensors" else torch.load(
                path, map_location="cpu", weights_only=True, mmap=True)  # what would run code is refused
            for name, t in found.items():
                if name in tensors or t.dtype not in DTYPES.values():
                    raise InputError(f"{name} is " + ("in another file, too" if name in tensors else
                                                      f"{t.dtype}; only floating-point is supported"))
                if not name.endswith(("rotary_emb.inv_freq", "rope.freqs")):     # of old files; computed here
                    tensors[name] = t
    if not tensors:
        raise InputError(f"{folder}: neither model*.safetensors nor pytorch_model*.bin is there")
    return tensors


def load_llama(folder, adapter=None, device="cpu", dtype=None, nf4=False):
    """The Llama in a Hugging Face folder, with fresh adapters in fp32. Base weights are converted one by one
    into `dtype` (None: they keep their own) on `device`, with nf4 those of projections into NF4.
    InputError if one is missing, unexpected, misshapen, or holds inf or NaN."""
    config, weights = read_config(folder := Path(folder)), open_weights(folder)
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        head = weights.pop("lm_head.weight")
        embedding = weights.setdefault("model.embed_tokens.weight", head)    # some files hold the head alone
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            print(f"{folder}: lm_head.weight is used: it is not the embedding to which it should be tied")
            config, weights["lm_head.weight"] = replace(config, tie_word_embeddings=False), head
    with naming(folder / "config.json"), torch.device("meta"):
        model = Llama(config, adapter)
    own, found = ({n: tuple(t.shape) for n, t in some.items()} for some in (model.base_parameters(), weights))
    if wrong := [n for n in sorted(own.keys() | found.keys()) if own.get(n) != found.get(n)]:
        raise InputError(f"{folder}: the weights are not those of config.json: " + "; ".join(
            f"{n} is {found.get(n, 'missing')}, expected {own.get(n, 'nothing')}" for n in wrong[:5]))
    for name, t in weights.items():
        if not torch.stack(t.aminmax()).isfinite().all():
            raise InputError(f"{folder}: {name} holds inf or NaN")
        module = name.removesuffix(".weight")
        t = (NF4.of(t.to(device, torch.float32), dtype or t.dtype) if nf4 and module.endswith(PROJECTIONS)
             else t.to(device, dtype, copy=True))
        model.get_submodule(module).weight = nn.Parameter(t, requires_grad=False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for _, layer in adapter_layers(model):
        layer.add_adapter(layer.adapter)
    return model


def save_llama(model, folder, like=None, **more):
    """Write the base weights and config.json as a Hugging Face folder, which transformers reads too. like: a
    folder whose tokenizer is copied, and whose config.json, as `more`, says more, such as pad_token_id."""
    (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
    ends = [*model.config.eos_token_id]
    dtype = str(model.lm_head.weight.dtype)[6:]
    config = (read_json(Path(like) / "config.json") if like else {}) | asdict(model.config) | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": dtype,
        "torch_dtype": dtype, "eos_token_id": ends[0] if len(ends) == 1 else ends or None, **more}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_safetensors(model.base_parameters(), folder / "model.safetensors")
    for pattern in ("*token*", "chat_template*", "generation_config.json") if like else ():
        for file in filter(Path.is_file, Path(like).glob(pattern)):
            shutil.copy(file, folder)
    if generation := read_json(folder / "generation_config.json"):
        generation["eos_token_id"] = ends
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def fingerprint(model):
    """Hash of the base: names, shapes and up to 256 evenly spaced values of each tensor, as bf16 so that
    dtype and device do not matter (four bits do). Tells bases apart; it is no checksum of every weight."""
    digest = hashlib.sha256()
    for name, p in model.base_parameters().items():
        flat = getattr(p, "codes", p.detach()).flatten()
        sample = flat[::max(1, flat.numel() // 256)][:256].to(torch.bfloat16).cpu()
        digest.update(f"{name} {tuple(p.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
