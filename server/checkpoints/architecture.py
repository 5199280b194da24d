"""Which tensors a Mixtral checkpoint consists of, from its config.json alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Shape = tuple[int, ...]

MOST_TENSORS = 1_000_000
LARGEST = 1 << 32


def expected_tensors(config: dict[str, Any]) -> dict[str, Shape]:
    """Name to shape under the published names. Raises ValueError where the configuration is not a plain Mixtral's."""
    if config.get("model_type") != "mixtral" or config.get("architectures") != ["MixtralForCausalLM"]:
        raise ValueError(
            f"it describes {config.get('architectures')!a:.80} of type {config.get('model_type')!a:.80}, "
            "and only MixtralForCausalLM of type 'mixtral' is served"
        )
    if config.get("quantization_config") is not None:
        raise ValueError("it describes quantised weights: merge into an unquantised base")
    if _count(config, "num_hidden_layers") * _count(config, "num_local_experts") * 3 > MOST_TENSORS:
        raise ValueError(f"it describes more than {MOST_TENSORS:,} tensors")
    return dict(_tensors(config))


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, width, vocabulary = (_count(config, key) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, groups = _count(config, "num_attention_heads"), _count(config, "num_key_value_heads")
    head = hidden // heads if config.get("head_dim") is None else _count(config, "head_dim")
    experts = _count(config, "num_local_experts")
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings", False):
        yield "lm_head.weight", (vocabulary, hidden)
    for layer in range(_count(config, "num_hidden_layers")):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", (hidden,)
        yield f"{name}.post_attention_layernorm.weight", (hidden,)
        yield f"{name}.self_attn.q_proj.weight", (heads * head, hidden)
        yield f"{name}.self_attn.k_proj.weight", (groups * head, hidden)
        yield f"{name}.self_attn.v_proj.weight", (groups * head, hidden)
        yield f"{name}.self_attn.o_proj.weight", (hidden, heads * head)
        yield f"{name}.block_sparse_moe.gate.weight", (experts, hidden)
        for expert in range(experts):
            for matrix, shape in (("w1", (width, hidden)), ("w2", (hidden, width)), ("w3", (width, hidden))):
                yield f"{name}.block_sparse_moe.experts.{expert}.{matrix}.weight", shape


def _count(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value < LARGEST:
        raise ValueError(f"{key} is {value!a:.40}")
    return value
