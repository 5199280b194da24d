"""How fast a decoder can generate at best: bytes moved and operations done in one step, over what the GPU can do.

The roofline model is Williams, Waterman and Patterson (CACM 52(4), 2009). All counts are per whole model; all times
are lower bounds, since kernel launches, sampling and scheduling are not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.latency.shapes import WEIGHT_BITS, DType, Gpu, Shape, peak_tflops

KV_BYTES = 2  # bf16 keys and values, vLLM's default whatever the weights are
ACTIVATION_BYTES = 2


def attention_weights(shape: Shape) -> int:
    """Weights of one layer's q, k, v and output projections; grouped-query attention shrinks k and v."""
    return shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)


def expert_weights(shape: Shape) -> int:
    """Weights of one expert (or of the dense block): gate, up and down, or two matrices without a gate."""
    return (3 if shape.gated else 2) * shape.hidden * shape.ffn


def router_weights(shape: Shape) -> int:
    """Weights of one layer's router; none in a dense model."""
    return shape.hidden * shape.experts if shape.experts > 1 else 0


def layer_weights(shape: Shape, experts: float) -> float:
    """Weights of one layer when `experts` of its experts count, with its two norms."""
    return attention_weights(shape) + experts * expert_weights(shape) + router_weights(shape) + 2 * shape.hidden


def total_weights(shape: Shape) -> int:
    """All parameters. Mixtral-8x7B: 46,702,792,704."""
    embeddings = (1 if shape.tied else 2) * shape.vocab * shape.hidden
    return round(shape.layers * layer_weights(shape, shape.experts)) + embeddings + shape.hidden


def active_weights(shape: Shape) -> int:
    """Parameters that one token uses, input embedding included. Mixtral-8x7B: 12.88e9."""
    return total_weights(shape) - shape.layers * (shape.experts - shape.top_k) * expert_weights(shape)


def distinct_experts(shape: Shape, batch: int) -> float:
    """Expected experts that at least one of `batch` tokens is routed to, in one layer: E (1 - (1 - k/E)^B).

    Each token picks k of E; an expert is missed by all B with probability (1 - k/E)^B when routing is uniform and
    tokens are independent. Real routing is a little more concentrated, which reads less.
    """
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** batch)


def streamed_weights(shape: Shape, batch: int) -> float:
    """Weights read from memory in one decode step of `batch` sequences.

    The input embedding is a lookup of `batch` rows and not counted; the output head is read whole. Mixtral-8x7B at
    batch 1: 12.75e9.
    """
    head = shape.vocab * shape.hidden
    return shape.layers * layer_weights(shape, distinct_experts(shape, batch)) + head + shape.hidden


def kv_bytes_per_token(shape: Shape, element_bytes: float = KV_BYTES) -> float:
    """Key and value bytes that one token keeps over all layers. Mixtral-8x7B in bf16: 131,072."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * element_bytes


def decode_flops(shape: Shape, context: float) -> float:
    """Operations for one new token that attends to `context` tokens.

    2 N for N weights used (Kaplan et al., arXiv 2001.08361, section 2.1), plus 4 per layer, head width and context
    token for QK^T and the weighted sum (PaLM, arXiv 2204.02311, appendix B).
    """
    attention = 4 * shape.layers * shape.heads * shape.head_dim * context
    return 2 * streamed_weights(shape, 1) + attention


def allreduce_bytes(shape: Shape, batch: int, count: int) -> float:
    """Bytes each GPU sends in one step under tensor parallelism over `count` GPUs.

    Two ring all-reduces a layer (Megatron-LM, arXiv 1909.08053, section 3), 2 (n-1)/n of the activations each.
    """
    return shape.layers * 2 * (2 * (count - 1) / count) * batch * shape.hidden * ACTIVATION_BYTES


@dataclass(frozen=True)
class Step:
    """Lower bounds for one decode step, in seconds."""

    memory_s: float
    compute_s: float
    link_s: float

    @property
    def seconds(self) -> float:
        """Memory traffic and arithmetic overlap perfectly; the all-reduces wait for both."""
        return max(self.memory_s, self.compute_s) + self.link_s


def decode_step(shape: Shape, gpu: Gpu, count: int, dtype: DType, *, batch: int, context: float) -> Step:
    """One step of `batch` sequences with `context` tokens each, on `count` GPUs in tensor parallel, at full rates."""
    weight_bytes = streamed_weights(shape, batch) * WEIGHT_BITS[dtype] / 8
    kv_bytes = batch * context * kv_bytes_per_token(shape)
    return Step(
        memory_s=(weight_bytes + kv_bytes) / (count * gpu.bandwidth_gbs * 1e9),
        compute_s=batch * decode_flops(shape, context) / (count * peak_tflops(gpu, dtype) * 1e12),
        link_s=allreduce_bytes(shape, batch, count) / (gpu.link_gbs * 1e9),
    )
