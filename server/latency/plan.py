"""Does a model fit some GPUs, how many conversations do they hold, and how fast can they answer at best."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from server.latency import roofline
from server.latency.fertility import Fertility, Language
from server.latency.shapes import WEIGHT_BITS, DType, Gpu, Shape, Strict

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Budget(Strict):
    """How much of each GPU's memory the engine may use."""

    utilization: float = Field(default=0.92, gt=0, le=1, description="vLLM's --gpu-memory-utilization.")
    reserve_gb: float = Field(default=3.0, ge=0, description="Activations, CUDA graphs, NCCL buffers; per GPU.")


class Speed(Strict):
    """Best case at one batch size; rates are over the whole batch, per second."""

    batch: int
    tokens_per_s: float
    words_per_s: dict[Language, float]
    limit: str = Field(description="What bounds it: memory, compute.")
    fits: bool = Field(description="The KV cache holds this many conversations of the planned length.")


class Plan(Strict):
    """The answer. Bytes are totals over all GPUs."""

    fits: bool
    weight_bytes: float
    memory_bytes: float = Field(description="What the engine may use, over all GPUs.")
    kv_bytes_per_token: float
    kv_tokens: int
    conversations: dict[int, int] = Field(description="Conversation length in tokens: how many fit at once.")
    speeds: list[Speed] = Field(description="Empty when the weights do not fit.")


@dataclass(frozen=True)
class Deployment:
    """A model of one weight width in tensor parallel over `count` GPUs."""

    shape: Shape
    gpu: Gpu
    count: int
    dtype: DType

    def check(self) -> None:
        """Raises ValueError when the attention heads cannot be split."""
        heads, kv_heads, count = self.shape.heads, self.shape.kv_heads, self.count
        if count < 1 or heads % count or (kv_heads % count and count % kv_heads):
            raise ValueError(f"{heads} heads and {kv_heads} KV heads do not split over {count} GPUs")

    @property
    def weight_bytes(self) -> float:
        return roofline.total_weights(self.shape) * WEIGHT_BITS[self.dtype] / 8

    @property
    def kv_bytes_per_token(self) -> float:
        """Over all GPUs; with more GPUs than KV heads, vLLM keeps copies of each head."""
        return roofline.kv_bytes_per_token(self.shape) * max(1, self.count / self.shape.kv_heads)

    def rate(self, batch: int, context: float) -> tuple[float, str]:
        """Best tokens a second over the whole batch, and what bounds it."""
        step = roofline.decode_step(self.shape, self.gpu, self.count, self.dtype, batch=batch, context=context)
        return batch / step.seconds, "memory" if step.memory_s >= step.compute_s else "compute"


def make_plan(deployment: Deployment, lengths: list[int], fertility: dict[Language, Fertility], budget: Budget) -> Plan:
    """The plan for conversations of `lengths` tokens; speeds are computed at the first of them.

    Raises ValueError when the deployment is impossible.
    """
    deployment.check()
    gpu, weights = deployment.gpu, deployment.weight_bytes
    memory = deployment.count * (gpu.memory_gb * budget.utilization - budget.reserve_gb) * 1e9
    kv_tokens = max(0, int((memory - weights) / deployment.kv_bytes_per_token))
    speeds = [_speed(deployment, batch, lengths[0], kv_tokens, fertility) for batch in BATCHES]
    return Plan(
        fits=memory > weights,
        weight_bytes=weights,
        memory_bytes=memory,
        kv_bytes_per_token=deployment.kv_bytes_per_token,
        kv_tokens=kv_tokens,
        conversations={length: kv_tokens // length for length in lengths},
        speeds=speeds if memory > weights else [],
    )


def _speed(
    deployment: Deployment, batch: int, length: int, kv_tokens: int, fertility: dict[Language, Fertility]
) -> Speed:
    # Conversations in flight are spread over their growth, so half the final length is the mean context.
    rate, limit = deployment.rate(batch, length / 2)
    return Speed(
        batch=batch,
        tokens_per_s=rate,
        words_per_s={language: rate / value.tokens_per_word for language, value in fertility.items()},
        limit=limit,
        fits=batch * length <= kv_tokens,
    )
