"""A Llama with adapters inline: layers from leaf to root, generation, real weights in and out.

The idea: modules carry Hugging Face's names, and an adapted projection is a Linear with more parameters, so a
checkpoint loads key for key and nothing is patched afterwards. Architecture: arXiv 2302.13971 and 2307.09288.

What may surprise:
- A model that loads weights is built on the meta device, given memory once, and filled tensor by tensor from
  memory-mapped files: it never exists twice.
- No attention mask: rows are padded on the right, where causal attention never looks. Only new tokens after
  prompts of different lengths need one.
- With targets the head runs on supervised positions only and returns a loss for each, never a mean, so that
  micro-batches add up to exactly the loss of their step.
- Real weights come from Hugging Face or from Meta; both end as Hugging Face's names and rotary layout.
- With nf4, a projection's weight is a tensor of another class, NF4, which is a matrix only while it is used.
- There are no buffers: the rotary tables are computed per forward, in fp32, from the config alone.

Letters: B batch, T time, C model width, H heads, D head width, V vocabulary, E experts, r rank of one expert,
K key/value heads, S time of queries plus cache, N supervised positions.
"""

import hashlib
import json
import math
import re
import zipfile
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from teamlora import METHODS, AdapterConfig, InputError, adapter_layers, adapter_parameters, foreign

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

MAX_LOGITS = 2 ** 25                             # logits that exist at once, 128 MB in fp32
MOST = {"num_hidden_layers": 1000, "max_position_embeddings": 2 ** 63}


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama, under the names of Hugging Face's config.json. InputError if one is impossible."""
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
    bos_token_id: int = 1
    eos_token_id: tuple = (2,)                   # none: the tokenizer has to know

    def __post_init__(self):
        for f in fields(self):
            v, most = getattr(self, f.name), MOST.get(f.name, 2 ** 24)
            if f.type is int:                    # bounded, or a file could ask for a billion layers
                right = type(v) is int and (f.name != "bos_token_id") <= v <= most
                wanted = f"a whole number up to {most}"
            elif f.type is bool:
                right, wanted = type(v) is bool, "true or false"
            elif f.type is tuple:
                right = all(type(t) is int and 0 <= t < self.vocab_size for t in v)
                wanted = "ids of the vocabulary"
            else:                                # a number, or the numbers of rope_scaling
                numbers = [v] if f.type is float else [x for k, x in (v or {}).items() if k != "rope_type"]
                right = all(type(x) in (int, float) and 0 < x < 1e30 for x in numbers)
                wanted = "positive numbers" if f.name == "rope_scaling" else "a positive number"
            if not right:
                raise InputError(f"{f.name} is {v!r}, not {wanted}")
        if self.head_dim % 2 or self.num_attention_heads % self.num_key_value_heads:
            raise InputError(f"head_dim {self.head_dim} must be even, num_attention_heads "
                             f"{self.num_attention_heads} a multiple of num_key_value_heads "
                             f"{self.num_key_value_heads}")


def projection(adapter, name, n_in, n_out):
    """The projection `name`: the method's layer if it is a target, else a plain Linear without bias."""
    if adapter.method in METHODS and name in adapter.targets:
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
    """cos and sin of the angles of positions (T,) or (B, T), each (1 or B, 1, T, D) (arXiv 2104.09864)."""
    exponent = torch.arange(0, config.head_dim, 2, device=position.device).float() / config.head_dim
    frequency = config.rope_theta ** -exponent                                       # (D/2,)
    if config.rope_scaling:
        frequency = stretch(frequency, config.rope_scaling)
    angle = position.float()[..., None] * frequency                                  # (..., T, D/2)
    angle = torch.cat((angle, angle), -1).view(-1, 1, position.shape[-1], config.head_dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, rotary):
    """Rotary embedding of x (B, H, T, D): pairs i with i + D/2, as Hugging Face (Meta's pairs neighbours)."""
    cos, sin = rotary
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def attend(q, k, v, mask, causal):
    """Attention of q (B, H, T, D) to k and v (B, K, S, D), each shared by H / K heads -> (B, H, T, D).

    is_causal in place of a mask over all pairs keeps PyTorch's fast kernels.
    """
    if q.is_cuda and q.dtype == torch.float32 and q.shape[1] != k.shape[1]:
        # enable_gqa works, says PyTorch, for flash attention, of 16 bits only, and the slow math kernel
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=shared)


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
        mask, causal = None, cache is None or q.shape[2] > 1     # a single new token sees the whole cache
        if cache is not None:
            k, v, mask = cache.extend(self, k, v)                # (B, K, S, D) twice, (B, 1, 1, S)
        y = attend(q, k, v, mask, causal)
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


class KVCache:
    """Keys and values of every attention layer, each (B, K, size, D), of which the first n columns are known.

    real (B, S): where a column is not padding, for prompts of different lengths; None: everywhere.
    """

    def __init__(self, size, real=None):
        self.layers, self.size, self.n, self.real = {}, size, 0, real

    def positions(self, tokens):
        """Where new tokens (B, T) stand: (T,), or (B, 1) for one more in rows of different lengths."""
        start, self.n = self.n, self.n + tokens.shape[1]
        if self.real is None or not start:
            return torch.arange(start, self.n, device=tokens.device)
        self.real = F.pad(self.real, (0, 1), value=True)                             # (B, S)
        return self.real.sum(1, keepdim=True) - 1

    def extend(self, layer, k, v):
        """All keys and values with the new ones; a mask (B, 1, 1, S) if a new token must not see padding."""
        mask = None if self.real is None or k.shape[2] > 1 else self.real[:, None, None]
        if layer not in self.layers:
            self.layers[layer] = k.new_empty(2, *k.shape[:2], self.size, k.shape[3])
        known = self.layers[layer][:, :, :, :self.n]                                 # (2, B, K, S, D)
        known[:, :, :, -k.shape[2]:] = torch.stack((k, v))
        return *known, mask


class Llama(nn.Module):
    """Llama with inline adapters: random weights from `init_weights`, real ones from `load_llama`.

    checkpointing: recompute each block in the backward pass instead of keeping its activations. InputError if
    a target is no projection of a Llama.
    """

    def __init__(self, config, adapter=None):
        super().__init__()
        self.config, self.adapter = config, adapter or AdapterConfig(method="none")
        self.checkpointing = False
        unknown = [str(t) for t in self.adapter.targets if t not in PROJECTIONS]
        if unknown or not self.adapter.targets:
            raise InputError(f"targets must be some of {','.join(PROJECTIONS)}, not '{','.join(unknown)}'")
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, self.adapter) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for p in self.base_parameters().values():
            p.requires_grad_(self.adapter.method == "full")

    def base_parameters(self):
        """name -> parameter of the plain Llama, under its checkpoint's names; a tied head is named once."""
        added = adapter_parameters(self)
        return {name: p for name, p in self.named_parameters() if name not in added}

    def init_weights(self):
        """Random base: normal of sqrt(2 / 5C) (arXiv 1910.05895), smaller by sqrt(2 * layers) where a layer
        ends (GPT-2)."""
        std, depth = math.sqrt(0.4 / self.config.hidden_size), math.sqrt(2 * self.config.num_hidden_layers)
        for name, p in self.base_parameters().items():
            if p.dim() == 1:
                nn.init.ones_(p)
            else:
                ends = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=std / depth if ends else std)
        return self

    def compile_blocks(self, backend="inductor"):
        """torch.compile each block. Shapes are symbolic: all blocks share one graph for every batch; the
        first, whose input needs no gradient, has its own, and evaluation and single rows have more."""
        torch._dynamo.config.recompile_limit = 64  # of 8: what comes beyond it runs eagerly
        for block in self.model.layers:
            block.compile(dynamic=True, backend=backend)

    def hidden(self, tokens, cache=None):
        """tokens (B, T) -> final hidden states (B, T, C)."""
        x = self.model.embed_tokens(tokens)                                          # (B, T, C)
        position = (torch.arange(tokens.shape[1], device=tokens.device) if cache is None
                    else cache.positions(tokens))
        rotary = rotary_tables(self.config, position, x.dtype)
        for block in self.model.layers:
            if cache is not None:  # a cache grows with every token: eager, whatever --compile says
                x = block.forward(x, rotary, cache)
            elif self.checkpointing and torch.is_grad_enabled():
                # the reentrant kind would train the last layer only, for the base below it is frozen
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary)
        return self.model.norm(x)

    def token_losses(self, hidden, targets):
        """Head at supervised positions (targets >= 0): losses (N,) in fp32, and whether the argmax hits (N,).

        Beyond MAX_LOGITS of them logits are made in chunks, again in the backward pass: never all at once.
        """
        def judge(hidden, labels):
            logits = fp32(self.lm_head(hidden))
            return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels
        targets = targets.flatten()  # may stay on the CPU: how many are >= 0, a GPU tells only if waited for
        supervised = (targets >= 0).nonzero()[:, 0]
        labels, supervised = (queued(t, hidden.device) for t in (targets[supervised], supervised))   # (N,)
        hidden, n = hidden.flatten(0, 1)[supervised], max(1, MAX_LOGITS // self.config.vocab_size)  # (N, C)
        if len(labels) <= n:
            return judge(hidden, labels)
        chunks = [checkpoint(judge, *chunk, use_reentrant=False, preserve_rng_state=False)
                  for chunk in zip(hidden.split(n), labels.split(n))]
        return tuple(map(torch.cat, zip(*chunks)))

    def forward(self, tokens, targets=None):
        """tokens (B, T) -> logits (B, T, V); with targets (B, T), < 0 where unsupervised: losses (N,) in fp32
        and whether greedy decoding is right there (N,)."""
        hidden = self.hidden(tokens)
        return self.lm_head(hidden) if targets is None else self.token_losses(hidden, targets)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, *, lengths=None, temperature=0.0, top_k=0, use_cache=True,
                 generator=None, on_token=None):
        """Continue tokens (B, T) -> the new tokens (B, up to max_new_tokens).

        lengths (B,): of prompts of different lengths, padded on the right; None: all are T long. temperature
        0 is greedy; top_k > 0 samples among the k likeliest. Ends when every row has met an end-of-sequence
        token; a row that ended earlier is filled up with it. on_token gets each step's tokens (B, 1).
        """
        eos = torch.tensor(self.config.eos_token_id, dtype=torch.long, device=tokens.device)
        (B, T), rows, generated = tokens.shape, torch.arange(len(tokens), device=tokens.device), []
        lengths = torch.full_like(rows, T) if lengths is None else lengths.clone()
        real = torch.arange(T, device=tokens.device) < lengths[:, None]              # (B, T)
        cache = KVCache(T + max_new_tokens, None if real.all() else real) if use_cache else None
        tokens = F.pad(tokens, (0, max_new_tokens))
        ended = torch.zeros(B, dtype=torch.bool, device=tokens.device)
        for i in range(max_new_tokens):
            if use_cache and generated:
                hidden = self.hidden(generated[-1], cache)[:, 0]                  # (B, C)
            else:
                hidden = self.hidden(tokens[:, :T + i], cache)[rows, lengths - 1]
            logits = fp32(self.lm_head(hidden))                                      # (B, V)
            if temperature > 0:
                if top_k > 0:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
            else:
                new = logits.argmax(-1, keepdim=True)                                # (B, 1)
            new = torch.where(ended[:, None], generated[-1], new) if generated else new
            generated.append(new)
            if on_token:
                on_token(new)
            tokens[rows, lengths] = new[:, 0]
            lengths += 1
            ended |= torch.isin(new[:, 0], eos)
            if ended.all():
                break
        return torch.cat(generated, 1)


# ---- The frozen base in four bits

# the 16 levels: 0, and quantiles of a normal distribution, each as likely as the next, over the largest
NF4_LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
              0.7229568362236023, 1.0)


class NF4(torch.Tensor):
    """A frozen matrix in 4.25 bits a number: NF4 of QLoRA (arXiv 2305.14314), a scale in bf16 for each 64.

    It acts as the matrix that it stands for, in its dtype: whatever uses it makes that anew and drops it. So
    a layer needs no change, and autograd, which keeps what a product was given, keeps these bits.
    """

    def __new__(cls, parts, flipped=False):
        codes, _, _, shape, dtype = parts
        shape = shape[::-1] if flipped else shape
        return cls._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)

    def __init__(self, parts, flipped=False):
        # codes (N/64, 32): a byte holds two; scales (N/64,); pairs (256, 2): the levels of every byte
        self.parts, self.flipped = parts, flipped    # flipped: it stands for the transpose

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
        return cls((codes, scales, torch.cartesian_prod(levels, levels), tuple(w.shape), dtype))

    @property
    def nbytes(self):
        """What it takes in memory, but for the table of pairs."""
        return sum(t.nbytes for t in self.parts[:2])

    def matrix(self):
        """What it stands for, as a plain tensor."""
        codes, scales, pairs, shape, dtype = self.parts
        w = F.embedding(codes.int(), pairs).flatten(1).mul_(scales[:, None]).to(dtype)       # (N/64, 64)
        w = w.flatten()[:math.prod(shape)].view(shape)
        return w.T if self.flipped else w

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].parts, args[0].flipped)
        if function is torch.ops.aten.t.default:
            return cls(args[0].parts, not args[0].flipped)
        if function._schema.is_mutable and isinstance(args[0], cls):
            raise RuntimeError("a weight in NF4 cannot be changed in place; dequantise the model first")
        args, kwargs = tree_map_only(cls, cls.matrix, (args, kwargs or {}))
        return function(*args, **kwargs)


def dequantise(model):
    """Replace every NF4 weight of the model by the matrix that it stands for; returns how many."""
    found = [m for m in model.modules() if isinstance(getattr(m, "weight", None), NF4)]
    for module in found:
        module.weight = nn.Parameter(module.weight.matrix(), requires_grad=False)
    return len(found)


# ---- Real weights: config.json and tensors (Hugging Face) or params.json and consolidated.*.pth (Meta)

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
PLAIN_TENSORS = f"only tensors of {', '.join(DTYPES)} are supported, nothing quantised"
SCALING = {"linear": {"factor": 1.0},
           "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192}}                     # Llama 3.1's
# what config.json may say for the model to be the one built here; the first value is what a missing key means
KNOWN = {"rope_type": ("default", *SCALING), "partial_rotary_factor": (1.0,), "hidden_act": ("silu", "swish"),
         "attention_bias": (False,), "mlp_bias": (False,), "quantization_config": (None,)}
META_KEYS = """dim n_layers n_heads n_kv_heads head_dim hidden_dim vocab_size multiple_of ffn_dim_multiplier
    norm_eps rope_theta use_scaled_rope max_seq_len max_batch_size""".split()  # of Llama 1 to 3's params.json
META_NAMES = {"tok_embeddings": "embed_tokens", "output": "lm_head", "attention_norm": "input_layernorm",
              "ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj",
              "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
              **{f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"}}
BUFFERS = re.compile(r"rotary_emb\.\w+$|\bposition_ids$|^rope\.freqs$")         # in old files; computed here
# what training wraps around a Llama: torch.compile and FSDP within a name, DDP and Lightning in front of it;
# and the keys under which whole checkpoints hold the weights
WRAPPERS = re.compile(r"^.*\.(?=model\.(?:_\w+\.)*(?:embed_tokens|layers|norm)\.|lm_head\.)|\b_\w+\.")
STATES = ("state_dict", "model_state_dict", "model", "module")


def read_json(path):
    """The JSON object in a file, without what is null, or an InputError that names the file."""
    try:
        value = json.loads(Path(path).read_text("utf-8-sig"), object_pairs_hook=lambda pairs: {
            k: v for k, v in pairs if v is not None})
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: {foreign(path) or f'cannot be read as JSON ({e})'}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def instead(folder):
    """What a folder without a model seems to be, and the way out."""
    if (peft := folder / "adapter_config.json").is_file():
        return ("it is a PEFT adapter: merge it with PEFT into its base, "
                f"{read_json(peft).get('base_model_name_or_path')}, or give that base alone")
    if below := sorted(p.parent for pattern in ("*/config.json", "*/*/config.json", "*/params.json")
                       for p in folder.glob(pattern)):
        return f"perhaps {below[-1]} is meant"
    if not folder.is_dir():
        return (foreign(folder) or "it is no folder") + (
            "; a model of the Hugging Face Hub is fetched with: hf download NAME --local-dir FOLDER")
    names = [p.name + " (a broken link)" * (not p.exists()) for p in sorted(folder.iterdir())]
    return f"it holds: {', '.join(names[:10]) or 'nothing'}"


def read_ids(path, raw, key, size):
    """The ids under key, a number or a list; those beyond the vocabulary are ignored, with a word."""
    ids = raw.get(key, [])
    ids = ids if isinstance(ids, list) else [ids]
    if any(type(i) is not int for i in ids):
        raise InputError(f"{path}: {key} is {raw[key]!r}, not ids of the vocabulary")
    if wrong := [i for i in ids if type(size) is int and not 0 <= i < size]:
        print(f"{path}: {key} {wrong} is not in the vocabulary and ignored")
    return [i for i in ids if i not in wrong]


def read_config(folder):
    """LlamaConfig's values of a Hugging Face folder. InputError if it is no Llama, or one not built here."""
    path, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    raw = read_json(path)
    if raw.get("model_type") != "llama":
        raise InputError(f"{path}: model_type is {raw.get('model_type')!r}; only 'llama' is supported")
    if "auto_map" in raw:
        print(f"{path}: names code of its own (auto_map), which is not run: this is a plain Llama")
    for place in ("rope_scaling", "rope_parameters"):    # of transformers before 5, and since
        if not isinstance(rope := raw.pop(place, {}), dict):
            raise InputError(f"{path}: {place} is {rope!r}, not an object")
        for key, value in rope.items():
            key = "rope_type" if key == "type" else key
            if raw.setdefault(key, value) != value:
                raise InputError(f"{path}: {key} is {raw[key]!r} and, in {place}, {value!r}; delete one")
    for key, known in KNOWN.items():
        if (value := raw.get(key, known[0])) not in known:
            raise InputError(f"{path}: {key} is {value!r}; only {' or '.join(map(repr, known))} is supported")
    scaling, width, heads = (raw.get(k) for k in ("rope_type", "hidden_size", "num_attention_heads"))
    raw = {"original_max_position_embeddings": raw.get("max_position_embeddings", 2048),
           "num_key_value_heads": heads,         # LlamaConfig refuses what is no number
           "head_dim": width // heads if heads and type(width) is type(heads) is int else 1} | raw
    needed = [f.name for f in fields(LlamaConfig) if f.default is MISSING] + [*SCALING.get(scaling, ())]
    if absent := [key for key in needed if key not in raw]:
        raise InputError(f"{path}: {absent[0]!r} is missing")
    if scaling in SCALING:
        raw["rope_scaling"] = {key: raw[key] for key in ("rope_type", *SCALING[scaling])}
    # both files may name ends, and they differ: Llama-3-8B-Instruct's end of a turn is in the second alone
    begin, ends = (read_ids(path, raw, f"{x}os_token_id", raw["vocab_size"]) for x in "be")
    if generation.is_file():
        ends += read_ids(generation, read_json(generation), "eos_token_id", raw["vocab_size"])
    raw |= {"bos_token_id": (begin or [1])[0], "eos_token_id": tuple(dict.fromkeys(ends))}
    return {f.name: raw[f.name] for f in fields(LlamaConfig) if f.name in raw}


def read_safetensors(path):
    """name -> tensor, memory-mapped: nothing is read before it is used. Raises InputError for a damaged file.

    Format: 8-byte little-endian length of a JSON header {name: {dtype, shape, data_offsets}}, then raw bytes.
    """
    tensors = {}
    try:
        raw = np.memmap(path, mode="c")  # copy-on-write: torch wants writable memory, the file stays as it is
        n = int(np.frombuffer(raw[:8], "<u8")[0])
        if n > min(len(raw) - 8, 100_000_000):
            raise ValueError("its header is longer than the file")
        header = json.loads(bytes(raw[8:8 + n]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if BUFFERS.search(name):
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} is {entry['dtype']}; {PLAIN_TENSORS}")
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if (not 0 <= start <= stop <= len(raw) - 8 - n
                    or stop - start != math.prod(shape) * dtype.itemsize):
                raise ValueError(f"{name} lies outside the file or has another size than its shape says")
            tensors[name] = torch.from_numpy(raw[8 + n + start:8 + n + stop]).view(dtype).view(shape)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as e:
        raise InputError(f"{path}: {foreign(path) or f'not a readable safetensors file ({e})'}") from None
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


def read_pickle(path, mapped=False):
    """What torch.save wrote, if that is tensors and plain values; what would run code is refused, not run.

    mapped: tensors stay in the file until they are used, unless torch was older than 1.6. Otherwise its
    checksums must fit.
    """
    try:
        if not mapped:
            with zipfile.ZipFile(path) as archive:           # torch.load never looks at the checksums
                if archive.testzip():
                    raise ValueError
        return torch.load(path, map_location="cpu", weights_only=True,
                          mmap=mapped and zipfile.is_zipfile(path))
    except Exception as e:                       # torch raises anything from EOFError to UnpicklingError here
        wanted = re.search(r"GLOBAL (\S+)", str(e))
        why = (f"it holds code, {wanted[1]}, which is not run" if wanted else
               foreign(path) or "damaged or foreign")
        raise InputError(f"{path}: not a readable file of tensors ({why})") from None


def plain(name, t):
    """Whether it is a name and a tensor of floating-point numbers: not quantised, sparse or without data."""
    return isinstance(name, str) and isinstance(t, torch.Tensor) and t.dtype in DTYPES.values() and (
        t.layout is torch.strided and not t.is_meta)


def read_tensors(*paths):
    """name -> memory-mapped tensor of .safetensors, .bin or .pth files, under the names of a bare Llama."""
    tensors = {}
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path.parent}: {path.name} is missing")
        found = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path, mapped=True)
        found = found if isinstance(found, dict) else {"its content": found}
        for name, t in next((found[k] for k in STATES if isinstance(found.get(k), dict)), found).items():
            if BUFFERS.search(str(name)):
                continue
            if not plain(name, t):
                kind = getattr(t, "dtype", type(t).__name__)
                raise InputError(f"{path}: {name} is {kind}; {PLAIN_TENSORS}")
            if (name := WRAPPERS.sub("", name)) in tensors:
                raise InputError(f"{path}: {name} is there twice")
            tensors[name] = t
    return tensors


def open_weights(folder):
    """name -> tensor of a Hugging Face folder, memory-mapped."""
    folder = Path(folder)
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if (whole := folder / f"{stem}.{suffix}").is_file():
            return read_tensors(whole)
        if (index := folder / f"{stem}.{suffix}.index.json").is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError(f"{index}: weight_map is missing or no object")
            names = sorted({Path(str(name)).name for name in weight_map.values()})  # follow no path in a file
            return read_tensors(*(folder / name for name in names))
        shards = {(len(m[1]), m[2]) for p in folder.glob(f"{stem}-*.{suffix}")
                  if (m := re.fullmatch(stem + r"-(\d+)-of-(\d{1,6})", p.stem))}
        if shards:
            return read_tensors(*(folder / f"{stem}-{i:0{digits}}-of-{n}.{suffix}"
                                  for digits, n in sorted(shards) for i in range(1, int(n) + 1)))
    raise InputError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there, whole or in "
                     f"shards; {instead(folder)}")


def open_meta(folder):
    """(LlamaConfig's values, name -> its parts, one per shard) of a Meta folder, with Hugging Face's names.

    params.json leaves out or hides (-1) what the tensors tell: vocabulary, width of the MLP, key/value heads.
    """
    path = folder / "params.json"
    raw = read_json(path)
    raw = next((v for v in raw.values() if isinstance(v, dict) and "dim" in v), raw)       # some are nested
    if unknown := [k for k in raw if k not in META_KEYS and raw[k]]:
        raise InputError(f"{path}: {', '.join(unknown)} is not of Llama 1 to 3, which alone are supported")
    files = sorted(folder.glob("consolidated*.pth")) or sorted(folder.glob("consolidated*.safetensors"))
    shards = [read_tensors(file) for file in files or [folder / "consolidated.00.pth"]]
    try:
        C, H, first = raw["dim"], raw["n_heads"], shards[0]
        D = raw.get("head_dim") or C // H
        n = max(1, H * D // len(first["layers.0.attention.wq.weight"]))
        embedding = first["tok_embeddings.weight"]   # Llama 1 and 2 cut it by columns, Llama 3 by rows
        V = len(embedding) * (n if embedding.shape[1] == C else 1)
        # Llama 3.2 (1B and 3B, narrower than all others) stretches by 32; its file does not say so
        scaling = {"rope_type": "llama3", **SCALING["llama3"], "factor": 32.0 if C < 4096 else 8.0}
        llama3 = {"bos_token_id": 128000, "eos_token_id": (128001, 128008, 128009),
                  "max_position_embeddings": 131072 if raw.get("use_scaled_rope") else 8192}
        values = dict(
            vocab_size=V, hidden_size=C,
            intermediate_size=n * len(first["layers.0.feed_forward.w1.weight"]),
            num_hidden_layers=raw["n_layers"], num_attention_heads=H, head_dim=D,
            rms_norm_eps=raw["norm_eps"],
            num_key_value_heads=raw.get("n_kv_heads") or n * len(first["layers.0.attention.wk.weight"]) // D,
            rope_theta=raw.get("rope_theta") or 10000.0,
            rope_scaling=scaling if raw.get("use_scaled_rope") else None,
            tie_word_embeddings=first.get("output.weight", embedding).data_ptr() == embedding.data_ptr(),
            **(llama3 if V == 128256 else {"max_position_embeddings": 4096}))
    except (LookupError, TypeError, ZeroDivisionError) as e:
        raise InputError(f"{folder}: {e} is missing or wrong in params.json or {files[0].name}") from None
    if n != len(shards):
        raise InputError(f"{folder}: the model was cut into {n} shards, but there are {len(shards)}: "
                         f"{', '.join(file.name for file in files)}")

    def renamed(name):
        for theirs, ours in META_NAMES.items():
            name = name.replace(theirs, ours)
        return name if name.startswith("lm_head") else f"model.{name}"
    names = {name for shard in shards for name in shard}
    return values, {renamed(name): [shard[name] for shard in shards if name in shard] for name in names}


def cut_of(parts, shape):
    """(n, axis) of the chunks of `shape` that parts are; (1, 0) if each is all (Meta's norms); else None."""
    n, own = len(parts), {tuple(t.shape) for t in parts}
    cuts = {(*shape[:d], shape[d] / n, *shape[d + 1:]): (n, d) for d in range(len(shape))}
    cuts |= {tuple(shape): (1, 0)}
    return cuts.get(own.pop()) if len(own) == 1 else None


def materialise(model, device, dtype, nf4=False):
    """Give memory to every parameter that is still on the meta device: the base's in `dtype`, empty, those of
    adapters in fp32, fresh. One that modules share, like a tied head, stays one. nf4: weights of projections
    stay, until their values are there."""
    added, real = set(adapter_parameters(model).values()), {}
    for name, module in model.named_modules():
        for key, p in list(module.named_parameters(recurse=False)):
            if nf4 and key == "weight" and name.endswith(PROJECTIONS):
                continue
            if p.is_meta and p not in real:
                memory = torch.empty(p.shape, dtype=torch.float32 if p in added else dtype, device=device)
                real[p] = nn.Parameter(memory, requires_grad=p.requires_grad)
            setattr(module, key, real.get(p, p))
    for _, layer in adapter_layers(model):
        layer.reset_adapter()


def open_llama(folder):
    """(LlamaConfig, name -> its parts, whether q and k are Meta's) of a folder of either kind."""
    hub, meta = ((folder / name).is_file() for name in ("config.json", "params.json"))
    if not hub and not meta:
        raise InputError(f"{folder}: neither config.json (Hugging Face) nor params.json (Meta) is there; "
                         f"{instead(folder)}")
    if hub and any(any(folder.glob(f"{stem}[.-]*")) for stem in ("model", "pytorch_model")):
        meta = False                             # a Meta folder may hold a config.json, too
    values, weights = open_meta(folder) if meta else (
        read_config(folder), {name: [t] for name, t in open_weights(folder).items()})
    try:
        config = LlamaConfig(**values)
    except InputError as e:
        raise InputError(f"{folder / ('params.json' if meta else 'config.json')}: {e}") from None
    if (folder / "adapter_config.json").is_file():
        print(f"{folder}: the PEFT adapter beside the model (adapter_config.json) is not used")
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        head = weights.pop("lm_head.weight")
        embedding = weights.setdefault("model.embed_tokens.weight", head)    # some files hold the head alone
        if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(head, embedding)):
            print(f"{folder}: lm_head.weight is used: it is not the embedding to which it should be tied")
            config, weights["lm_head.weight"] = replace(config, tie_word_embeddings=False), head
    return config, weights, meta


def load_llama(folder, adapter=None, device="cpu", dtype=torch.float32, nf4=False):
    """The Llama in a Hugging Face or Meta folder, with fresh adapters in fp32.

    Base weights are converted one by one into `dtype` on `device`, with nf4 those of projections into NF4.
    Raises InputError if a key is missing or unexpected or a shape differs, before anything is allocated; and
    if a value is inf or NaN.
    """
    config, weights, meta = open_llama(folder := Path(folder))
    with torch.device("meta"):
        model = Llama(config, adapter)
    own = model.base_parameters()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise InputError(f"{folder}: not the weights of its config: missing {missing[:10]}, "
                         f"unexpected {unexpected[:10]}")
    for name, p in own.items():
        if not cut_of(weights[name], p.shape):
            found = " + ".join(str(tuple(t.shape)) for t in weights[name])
            raise InputError(f"{folder}: {name} has shape {found}, its config says {tuple(p.shape)}")
    materialise(model, device, dtype, nf4)
    for name, p in model.base_parameters().items():
        # fp32, so that its four bits are the same whatever computes with them
        target = whole = torch.empty(p.shape, device=device) if p.is_meta else p.detach()
        if meta and name.endswith(("q_proj.weight", "k_proj.weight")):   # pairs of rows: side by side there,
            target = target.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2)      # halves here
        for part, piece in zip(weights[name], target.chunk(*cut_of(weights[name], p.shape))):
            piece.copy_(part.detach().reshape(piece.shape))
        if not torch.stack(whole.aminmax()).isfinite().all():
            raise InputError(f"{folder}: {name} holds inf or NaN")
        if p.is_meta:
            model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(
                NF4.of(whole, dtype), requires_grad=False)
    return model


def save_llama(model, folder):
    """Write the base weights and config.json as a Hugging Face folder, which transformers reads too."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = asdict(model.config)
    eos = config["eos_token_id"]
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
               "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None, "attention_bias": False,
               "mlp_bias": False, "torch_dtype": str(model.lm_head.weight.dtype)[6:]}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_safetensors(model.base_parameters(), folder / "model.safetensors")


def fingerprint(model):
    """Hash of the base: names, shapes and up to 256 evenly spaced values of each tensor, as bf16 so that
    dtype and device do not matter. Tells one base from another; it is no checksum of every weight."""
    digest = hashlib.sha256()
    for name, p in model.base_parameters().items():
        flat = p.detach().flatten()
        sample = flat[::max(1, flat.numel() // 256)][:256].to(torch.bfloat16).cpu()
        digest.update(f"{name} {tuple(p.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
