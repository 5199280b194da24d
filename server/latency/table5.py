"""Table 5 of the paper: printed, reproduced with its method, corrected, and measured where a results file is given.

The method is llm-analysis (https://github.com/cli99/llm-analysis, commit 9932ff4), rewritten here as the few terms
that matter on one GPU at batch 1; the tests hold it against the original's output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from server.latency import roofline
from server.latency.shapes import Gpu, Shape, Strict, gpus, models, pick, read_yaml

FP32_BYTES = 4  # llm-analysis charges norms at its default, whatever the activations are
Bits = Literal[4, 8, 16]


class Assumptions(Strict):
    """Everything the method needs besides the shape. Efficiencies are fractions of the GPU's peak."""

    gpu: str
    weight_bits: Bits
    activation_bits: Bits
    kv_bits: Bits
    embedding_bits: Bits
    memory_efficiency: float = Field(gt=0, le=1)
    flops_efficiency: float = Field(gt=0, le=1)
    prompt_tokens: int = Field(ge=1)
    generated_tokens: int = Field(ge=1)


class Row(Strict):
    """One printed row: latency in seconds, throughput in tokens a second."""

    name: str
    model: str
    active: str
    latency_s: float
    tokens_per_s: float


class Estimate(Strict):
    """What the method says of one row."""

    latency_s: float
    tokens_per_s: float


class Method:
    """llm-analysis for one shape on one GPU at batch 1; all methods return seconds."""

    def __init__(self, shape: Shape, gpu: Gpu, assumed: Assumptions) -> None:
        self.shape, self.assumed = shape, assumed
        wide = max(assumed.weight_bits, assumed.activation_bits)
        peak = gpu.tflops.bf16 if wide == 16 else (gpu.tflops.int8 or gpu.tflops.bf16)
        self.flops = peak * 1e12 * assumed.flops_efficiency
        self.bandwidth = gpu.bandwidth_gbs * 1e9 * assumed.memory_efficiency
        self.link = gpu.link_gbs * 1e9

    def attention(self, tokens: int) -> float:
        """One layer's attention for `tokens` new tokens (get_latency_fwd_per_layer_attn)."""
        shape, width = self.shape, self.assumed.activation_bits / 8
        group = shape.heads / shape.kv_heads
        flops = 4 * tokens * shape.hidden**2 * (1 + 1 / group) + 4 * tokens**2 * shape.hidden
        activations = max(3 * shape.hidden, 2 * shape.hidden + 4 * shape.heads) * tokens * width
        weights = roofline.attention_weights(shape) * self.assumed.weight_bits / 8
        return max(flops / self.flops, (weights + activations) / self.bandwidth)

    def feed_forward(self, tokens: int) -> float:
        """One layer's top-k experts for `tokens` new tokens (get_latency_fwd_per_layer_mlp).

        Its operation count knows neither the gate nor the second expert; kept, since this is the paper's method.
        """
        shape, width = self.shape, self.assumed.activation_bits / 8
        flops = 4 * tokens * shape.hidden * shape.ffn
        activations = width * max(shape.hidden, shape.ffn) * tokens * shape.top_k
        weights = shape.top_k * roofline.expert_weights(shape) * self.assumed.weight_bits / 8
        exchanged = 2 * shape.top_k * tokens * shape.hidden * width if shape.experts > 1 else 0.0
        return max(flops / self.flops, (weights + activations) / self.bandwidth) + exchanged / self.link

    def forward(self, tokens: int) -> float:
        """The whole model for `tokens` new tokens, KV cache aside (get_latency_fwd)."""
        shape = self.shape
        norms = 2 * tokens * shape.hidden * FP32_BYTES / self.bandwidth
        embedding = shape.vocab * shape.hidden * self.assumed.embedding_bits / 8 / self.bandwidth
        head = 2 * tokens * shape.vocab * shape.hidden / self.flops
        return shape.layers * (self.attention(tokens) + self.feed_forward(tokens) + norms) + embedding + head

    def cache(self) -> float:
        """The KV cache of the full sequence, loaded and stored once per generated token."""
        length = self.assumed.prompt_tokens + self.assumed.generated_tokens
        return 2 * length * roofline.kv_bytes_per_token(self.shape, self.assumed.kv_bits / 8) / self.bandwidth

    def estimate(self) -> Estimate:
        """Prefill plus every decode step."""
        generated = self.assumed.generated_tokens
        latency = self.forward(self.assumed.prompt_tokens) + generated * (self.forward(1) + self.cache())
        return Estimate(latency_s=latency, tokens_per_s=generated / latency)


class Column(Strict):
    """One computed column: the assumptions and, by model, the fields of the shape that differ from the true one."""

    assumptions: Assumptions
    shapes: dict[str, dict[str, int | bool]]

    def estimate(self, model: str) -> Estimate:
        """The method's result for one of the bundled models. Raises ValueError for an unknown GPU or shape field."""
        true = pick(models(), model, "model")
        shape = Shape(**{**true.model_dump(), **self.shapes.get(model, {})})
        return Method(shape, pick(gpus(), self.assumptions.gpu, "GPU"), self.assumptions).estimate()


class Table5(Strict):
    """The content of data/table5.yaml."""

    rows: list[Row]
    reproduced: Column
    corrected: Column
    notes: list[str]

    def assume(self, changes: list[str]) -> Table5:
        """A copy with `key=value` changed in both columns, or `reproduced.key=value` in one. Raises ValueError."""
        columns = {"reproduced": self.reproduced, "corrected": self.corrected}
        for change in changes:
            target, equals, value = change.partition("=")
            column, _, key = target.rpartition(".")
            if not equals or (column and column not in columns) or key not in Assumptions.model_fields:
                raise ValueError(
                    f"cannot assume {change!r}: expected [reproduced.|corrected.]KEY=VALUE with KEY one of "
                    f"{', '.join(Assumptions.model_fields)}"
                )
            for name in [column] if column else list(columns):
                columns[name] = _with(columns[name], key, value)
        return self.model_copy(update=columns)


def _with(column: Column, key: str, value: str) -> Column:
    fields = {**column.assumptions.model_dump(), key: _number(value)}
    return column.model_copy(update={"assumptions": Assumptions(**fields)})


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def load() -> Table5:
    """The bundled table."""
    return Table5(**read_yaml("table5.yaml"))


class Line(Strict):
    """One row of the result. Residuals are (computed - printed) / printed."""

    row: Row
    active_weights: int
    reproduced: Estimate
    residual: float
    corrected: Estimate
    ceiling_tokens_per_s: float
    measured: Estimate | None


def lines(table: Table5, measured: Estimate | None = None) -> list[Line]:
    """All rows; `measured` is this project's own model and fills the BiMediX row."""
    return [_line(table, row, measured if row.model == "mixtral-8x7b" else None) for row in table.rows]


def _line(table: Table5, row: Row, measured: Estimate | None) -> Line:
    reproduced = table.reproduced.estimate(row.model)
    return Line(
        row=row,
        active_weights=roofline.active_weights(models()[row.model]),
        reproduced=reproduced,
        residual=reproduced.tokens_per_s / row.tokens_per_s - 1,
        corrected=table.corrected.estimate(row.model),
        ceiling_tokens_per_s=ceiling(models()[row.model], table.corrected.assumptions),
        measured=measured,
    )


def ceiling(shape: Shape, assumed: Assumptions) -> float:
    """Tokens a second when reading the weights at full bandwidth is all there is to do."""
    weight_bytes = roofline.streamed_weights(shape, 1) * assumed.weight_bits / 8
    return pick(gpus(), assumed.gpu, "GPU").bandwidth_gbs * 1e9 / weight_bytes


def measured(path: Path) -> Estimate:
    """The median reply of a results file of `run --mode table5`. Raises ValueError when it holds something else."""
    from server.latency import results

    found = results.read(path)
    stage = found.stages[0] if found.stages and found.settings.get("mode") == "table5" else None
    if stage is None or stage.total.latency_ms is None:
        raise ValueError(f"{path} holds no successful `run --mode table5`")
    latency = stage.total.latency_ms.p50 / 1e3
    return Estimate(latency_s=latency, tokens_per_s=float(str(found.settings["reply_tokens"])) / latency)


def advantage(rows: list[Line], pick_rate: str) -> float:
    """How many times faster BiMediX is than the 70B models in one column ("printed", "reproduced", "corrected")."""

    def rate(line: Line) -> float:
        source = line.row if pick_rate == "printed" else getattr(line, pick_rate)
        return float(source.tokens_per_s)

    by_model = {line.row.model: rate(line) for line in rows}
    return by_model["mixtral-8x7b"] / by_model["llama-2-70b"]
