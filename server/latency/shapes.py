"""Model shapes and GPUs as checked, frozen data (`data/models.yaml`, `data/gpus.yaml`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

T = TypeVar("T")
DATA = Path(__file__).parent / "data"


class Strict(BaseModel):
    """Frozen; unknown keys and silently converted types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shape(Strict):
    """A decoder-only transformer. Widths in elements; `ffn` is the width of one expert, or of the dense block."""

    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_width: int | None = Field(default=None, ge=1, description="hidden / heads when absent.")
    ffn: int = Field(ge=1)
    gated: bool = Field(description="SwiGLU: three matrices in the feed-forward block instead of two.")
    experts: int = Field(default=1, ge=1)
    top_k: int = Field(default=1, ge=1)
    vocab: int = Field(ge=1)
    tied: bool = Field(default=False, description="Input and output embeddings are one matrix.")
    source: str

    @model_validator(mode="after")
    def _consistent(self) -> Shape:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) is not a multiple of kv_heads ({self.kv_heads})")
        if self.top_k > self.experts:
            raise ValueError(f"top_k ({self.top_k}) exceeds experts ({self.experts})")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.hidden // self.heads


class Rates(Strict):
    """Peak dense arithmetic in 1e12 operations a second; None where the GPU has no such units."""

    bf16: float
    fp8: float | None
    int8: float | None


class Gpu(Strict):
    """One GPU: memory in 1e9 bytes, bandwidths in 1e9 bytes a second."""

    memory_gb: float = Field(gt=0)
    bandwidth_gbs: float = Field(gt=0)
    tflops: Rates
    link_gbs: float = Field(gt=0, description="One direction of the GPU-to-GPU link.")
    source: str


DType = Literal["bf16", "fp8", "int8", "int4"]
WEIGHT_BITS: dict[DType, int] = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4}


def checked_dtype(name: str) -> DType:
    """`name` as a weight width. Raises ValueError that lists the known ones."""
    known: dict[str, DType] = {dtype: dtype for dtype in WEIGHT_BITS}
    return pick(known, name, "dtype")


def peak_tflops(gpu: Gpu, dtype: DType) -> float:
    """Arithmetic peak for weights of `dtype`: bf16 units where the GPU has none (weight-only quantisation, int4)."""
    narrow = {"fp8": gpu.tflops.fp8, "int8": gpu.tflops.int8}.get(dtype)
    return narrow or gpu.tflops.bf16


def read_yaml(name: str) -> Any:
    """The parsed content of one file in `data/`."""
    return yaml.safe_load((DATA / name).read_text(encoding="utf-8"))


def models() -> dict[str, Shape]:
    """All bundled model shapes by name."""
    return {name: Shape(**fields) for name, fields in read_yaml("models.yaml")["models"].items()}


def gpus() -> dict[str, Gpu]:
    """All bundled GPUs by name."""
    return {name: Gpu(**fields) for name, fields in read_yaml("gpus.yaml")["gpus"].items()}


def pick(table: dict[str, T], name: str, kind: str) -> T:
    """The entry called `name`. Raises ValueError that lists the known names."""
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(sorted(table))}")
    return table[name]


class _CheckpointConfig(BaseModel):
    """What config.json of a Mixtral, Mistral or Llama checkpoint says about its shape; the rest is ignored."""

    model_type: Literal["mixtral", "mistral", "llama"]
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int
    num_local_experts: int = 1
    num_experts_per_tok: int = 1
    vocab_size: int
    tie_word_embeddings: bool = False


def shape_of(checkpoint: Path) -> Shape:
    """The shape in a checkpoint directory's config.json. Raises ValueError that names the file and what is wrong."""
    path = checkpoint / "config.json"
    try:
        config = _CheckpointConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_width=config.head_dim,
        ffn=config.intermediate_size,
        gated=True,
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        source=str(path),
    )
