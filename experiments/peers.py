"""What people would use instead, as experiments.bench times it: each on the weights of one base.

    pip install peft transformers
    pip install --no-deps litgpt lightning lightning-utilities torchmetrics jsonargparse moe-peft

The idea: every peer has its own layers and its own head, as its users run it. PEFT's LoRA and MoE-PEFT's
LoRAMoE are in transformers' Llama, which makes the logits of every position, by autocast on a base in bf16.
litgpt's LoRA is in litgpt's GPT, whose head and loss go in chunks of 128 positions.

What may surprise:
- Rank and alpha are E times an expert's where there are no experts: all have one total rank and one scale.
- Of MoE-PEFT only the layers are used: the package itself imports what trains and evaluates.
"""

import importlib.util
import sys
from dataclasses import asdict, replace

import torch
import torch.nn as nn

from model import queued

NEEDS = {"peft": ("peft", "transformers"), "litgpt": ("litgpt", "lightning"),
         "moe_peft": ("moe_peft", "transformers")}
INSTALLED = [peer for peer, names in NEEDS.items() if all(map(importlib.util.find_spec, names))]


def transformers_llama(base, layers, checkpointing):
    """transformers' Llama on the base's own weights."""
    import transformers
    c = replace(base.config, num_hidden_layers=layers)
    config = transformers.LlamaConfig(**asdict(c) | {"eos_token_id": None, "rope_parameters": {
        "rope_type": "default", "rope_theta": c.rope_theta}})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(base.state_dict(keep_vars=True), strict=False, assign=True)
    with base.lm_head.weight.device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # a table that no checkpoint holds
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.requires_grad_(False)


def transformers_loss(model, x, y, mask):
    """Its mean loss on tokens and targets (B, T): it takes -100 for our -1, and shifts to the left."""
    p = next(model.parameters())
    x, mask, y = (queued(t, p.device) for t in (x, mask.long(), y.where(y >= 0, -100).roll(1, 1)))
    with torch.autocast(p.device.type, torch.bfloat16, enabled=p.dtype == torch.bfloat16):
        return model(input_ids=x, attention_mask=mask, labels=y, use_cache=False).loss


def peft_model(base, arm, cfg):
    """PEFT's LoRA of rank E*r."""
    import peft
    return peft.get_peft_model(transformers_llama(base, arm.layers, cfg.checkpointing), peft.LoraConfig(
        r=arm.n_experts * arm.rank, lora_alpha=arm.n_experts * cfg.alpha, lora_dropout=cfg.dropout,
        target_modules=list(cfg.targets)))


class LoRAMoELinear(nn.Module):
    """A Linear in MoE-PEFT's LoRAMoE, by its own classes: (B, T, in) -> (B, T, out)."""

    def __init__(self, linear, arm, cfg):
        super().__init__()
        if "moe_peft" not in sys.modules:        # its own __init__ wants `datasets`
            spec = importlib.util.find_spec("moe_peft")
            sys.modules["moe_peft"] = importlib.util.module_from_spec(spec)
        from moe_peft.adapters.loramoe import LoraMoe, LoraMoeConfig
        from moe_peft.common import Linear, LLMBatchConfig, LLMModelInput
        device, alpha = linear.weight.device, cfg.alpha
        # it refuses a dropout of 0, which its layer can compute
        config = LoraMoeConfig("a", lora_r_=arm.rank, lora_alpha_=alpha, lora_dropout_=0.1,
                               num_experts_=arm.n_experts, router_init_range_=5.0)
        self.linear = Linear(linear, device)
        self.linear.moes_["a"] = LoraMoe(linear.in_features, device, config)
        self.gate = self.linear.moes_["a"].gate_         # in dicts, where parameters() does not look
        for e in range(arm.n_experts):
            self.linear.init_lora_weight(config, adapter_name=f"moe.a.experts.{e}")
        self.experts = nn.ModuleList(self.linear.loras_.values())
        for expert in self.experts:
            expert.base_layer_, expert.dropout_.p = None, cfg.dropout
        self.whole_batch = lambda n: LLMModelInput(batch_configs_=[LLMBatchConfig("a", 0, n)])

    def forward(self, x):
        return self.linear(x, self.whole_batch(len(x)))


def moe_peft_model(base, arm, cfg):
    """MoE-PEFT's LoRAMoE, E experts of rank r in a loop."""
    model = transformers_llama(base, arm.layers, cfg.checkpointing)
    for name, linear in [*model.named_modules()]:
        if name.endswith(tuple(cfg.targets)):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, LoRAMoELinear(linear, arm, cfg))
    return model


def litgpt_model(base, arm, cfg):
    """litgpt's LoRA of rank E*r, on all or none of the FFN's projections; in the dtype of the base."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    c, weights, on = base.config, {}, cfg.targets.__contains__
    model = GPT(Config(
        block_size=cfg.max_length, vocab_size=c.vocab_size, padded_vocab_size=c.vocab_size,
        n_layer=arm.layers, n_head=c.num_attention_heads, n_query_groups=c.num_key_value_heads,
        head_size=c.head_dim, n_embd=c.hidden_size, intermediate_size=c.intermediate_size,
        rope_base=int(c.rope_theta), bias=False,
        rotary_percentage=1.0, parallel_residual=False, norm_class_name="RMSNorm", norm_eps=c.rms_norm_eps,
        mlp_class_name="LLaMAMLP", lora_r=arm.n_experts * arm.rank, lora_alpha=arm.n_experts * cfg.alpha,
        lora_dropout=cfg.dropout, lora_query=on("q_proj"), lora_key=on("k_proj"), lora_value=on("v_proj"),
        lora_projection=on("o_proj"), lora_mlp=on("gate_proj"))).to(base.lm_head.weight)
    model.max_seq_length = cfg.max_length        # the rotary tables, on the device
    copy_weights_hf_llama(model.config, {}, weights, base.state_dict())
    model.load_state_dict(weights, strict=False, assign=True)
    mark_only_lora_as_trainable(model)
    return model


def litgpt_loss(model, x, y, mask):
    """Its mean loss on tokens and targets (B, T)."""
    from litgpt.utils import chunked_cross_entropy
    x, y = (queued(t, next(model.parameters()).device) for t in (x, y.where(y >= 0, -100)))
    return chunked_cross_entropy(model(x, lm_head_chunk_size=128), y)


# peer: (how the table calls it, its model of (base, arm, cfg), its loss of (model, tokens, targets, mask))
PEERS = {"peft": ("PEFT's LoRA", peft_model, transformers_loss),
         "litgpt": ("litgpt's LoRA", litgpt_model, litgpt_loss),
         "moe_peft": ("MoE-PEFT's LoRAMoE", moe_peft_model, transformers_loss)}
