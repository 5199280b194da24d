"""Mixtral with one `nn.Linear` per expert matrix, so that 4-bit quantisation and LoRA reach every one of them.

transformers 5 keeps the experts of a layer in two 3-D parameters. `load_in_4bit` leaves those in bf16 without a word
(bitsandbytes#1849), and PEFT's wrappers for them get no gradient once they are quantised. Here the modules carry the
names of the published checkpoint (`block_sparse_moe.experts.N.w1`), so its tensors, and adapters made with
transformers 4, load as they are. The `model_type` is this project's own: under `mixtral`, PEFT would redirect w1, w2
and w3 to the fused parameters, find none, and train q, k and v only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralModel,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
)
from transformers.utils.output_capturing import OutputRecorder

from training.errors import Refused

MODEL_TYPE = "bimedix_mixtral"
ATTENTION_MATRICES = ("q_proj", "k_proj", "v_proj")
EXPERT_MATRICES = ("w1", "w2", "w3")
ROUTER = "gate"
ADAPTED = (*ATTENTION_MATRICES, *EXPERT_MATRICES, ROUTER)
"""What the paper adapts: q, k and v, the experts and the routing network (sections 3.2 and 4.1)."""

UNQUANTISED = ["lm_head", ROUTER]
"""The router decides which experts run: it is 0.002% of the weights and stays in 16 bits."""


class UnfusedMixtralConfig(MixtralConfig):
    model_type = MODEL_TYPE


class Expert(nn.Module):
    """SwiGLU: `w2(silu(w1 x) * w3 x)`, (tokens, hidden) to (tokens, hidden)."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.w2(self.act_fn(self.w1(hidden)) * self.w3(hidden))
        return output


class TopK(nn.Module):
    """Router logits (tokens, experts) to themselves, the chosen experts' weights and their indices (tokens, k).

    A module of its own so that hooks see the routing whatever wraps the router's matrix.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights, chosen = torch.topk(logits.float().softmax(dim=-1), self.k, dim=-1)
        return logits, weights / weights.sum(dim=-1, keepdim=True), chosen


class MixtralSparseMoeBlock(nn.Module):
    """The sparse layer. DeepSpeed gathers a module of this class name at once under ZeRO-3, as it must.

    Every expert is called, on no token if need be: all ranks then reach the same parameters in the same order.
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.top_k = TopK(config.num_experts_per_tok)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_local_experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) to the same shape."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, chosen = self.top_k(self.gate(hidden))
        by_expert = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        token = by_expert // chosen.shape[-1]
        parts = torch.split(hidden[token], counts)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        weighted = outputs * weights.flatten()[by_expert, None]
        summed = torch.zeros_like(hidden).index_add_(0, token, weighted.to(hidden.dtype))
        return summed.view_as(hidden_states)


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MixtralConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MixtralAttention(config, layer_idx)
        self.block_sparse_moe = MixtralSparseMoeBlock(config)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **attention: Any) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **attention)
        hidden_states = hidden_states + attended
        output: torch.Tensor = hidden_states + self.block_sparse_moe(self.post_attention_layernorm(hidden_states))
        return output


class UnfusedMixtralModel(MixtralModel):
    config_class = UnfusedMixtralConfig
    _no_split_modules: ClassVar = ["DecoderLayer"]
    _can_record_outputs: ClassVar = {
        "router_logits": OutputRecorder(TopK, index=0),
        "hidden_states": DecoderLayer,
        "attentions": MixtralAttention,
    }

    def __init__(self, config: MixtralConfig) -> None:
        # Not MixtralModel's own: it would allocate the fused experts first.
        MixtralPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class UnfusedMixtral(MixtralForCausalLM):
    """Causal language model; same logits as `MixtralForCausalLM` from the same checkpoint."""

    config_class = UnfusedMixtralConfig
    _no_split_modules: ClassVar = ["DecoderLayer"]

    def __init__(self, config: MixtralConfig) -> None:
        MixtralPreTrainedModel.__init__(self, config)
        self.model = UnfusedMixtralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()


def unfused_config(base: str | Path, revision: str | None = None) -> UnfusedMixtralConfig:
    """The configuration of a Mixtral checkpoint (directory or hub id). Raises Refused for any other architecture, and
    when it cannot be read."""
    try:
        found, _ = MixtralConfig.get_config_dict(str(base), revision=revision)
    except OSError as error:
        raise Refused(f"base: {base}: {' '.join(str(error).split())}") from None
    if found.get("model_type") not in ("mixtral", MODEL_TYPE):
        raise Refused(f"{base} is a {found.get('model_type')!r} checkpoint, not Mixtral")
    config = UnfusedMixtralConfig.from_dict({**found, "model_type": MODEL_TYPE})
    config.output_router_logits = False
    return config


def on_meta(config: UnfusedMixtralConfig) -> UnfusedMixtral:
    """The model's shapes without its weights."""
    with torch.device("meta"):
        return UnfusedMixtral(config)


def load(base: str | Path, *, dtype: torch.dtype, quantization: Any = None, **options: Any) -> UnfusedMixtral:
    """The model of the Mixtral checkpoint `base`. `quantization` is a BitsAndBytesConfig. Raises Refused when a
    tensor is missing, unexpected or of the wrong shape: transformers would only warn and train random weights."""
    config = unfused_config(base, options.get("revision"))
    if quantization is not None:
        options["quantization_config"] = quantization
    # With output_loading_info this returns a pair, which its annotation does not say.
    found: Any = UnfusedMixtral.from_pretrained(
        str(base), config=config, dtype=dtype, output_loading_info=True, **options
    )
    model, report = found
    faults = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if faults:
        listed = "; ".join(f"{kind}: {len(names)}, first {names[0]}" for kind, names in faults.items())
        raise Refused(f"{base} does not fit Mixtral: {listed}")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Evaluating on a CPU would repack the 4-bit weights in place, and fail for widths that 64 does not divide.
            module.support_avx512bf16_for_cpu = False
    loaded: UnfusedMixtral = model
    return loaded


def adapter_parameters(config: MixtralConfig, rank: int) -> int:
    """Trainable parameters of LoRA on q, k, v, every expert matrix and the router: rank x (inputs + outputs) each."""
    hidden, width, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    attention = (hidden + config.num_attention_heads * head) + 2 * (hidden + config.num_key_value_heads * head)
    return config.num_hidden_layers * rank * (attention + 3 * experts * (hidden + width) + (hidden + experts))
