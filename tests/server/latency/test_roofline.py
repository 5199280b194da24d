"""Every expected number is worked out here from the published shapes, not copied from the code's output."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from server.latency import roofline
from server.latency.shapes import Shape, gpus, models, peak_tflops

MIXTRAL, LLAMA_70B = models()["mixtral-8x7b"], models()["llama-2-70b"]
A100 = gpus()["a100-80gb"]


def test_mixtral_has_the_published_number_of_parameters() -> None:
    expert = 3 * 4096 * 14336
    attention = 4096 * 4096 * 2 + 4096 * 1024 * 2
    layer = attention + 8 * expert + 8 * 4096 + 2 * 4096
    assert roofline.total_weights(MIXTRAL) == 32 * layer + 2 * 32000 * 4096 + 4096 == 46_702_792_704
    assert roofline.active_weights(MIXTRAL) == 46_702_792_704 - 32 * 6 * expert == 12_879_925_248


@pytest.mark.parametrize(
    ("model", "billions"), [("pmc-llama-13b", 13.016), ("llama-2-70b", 68.977), ("jais-30b", 30.2)]
)
def test_dense_models_have_their_published_sizes(model: str, billions: float) -> None:
    shape = models()[model]
    assert roofline.total_weights(shape) / 1e9 == pytest.approx(billions, abs=0.01)
    assert roofline.active_weights(shape) == roofline.total_weights(shape)


def test_one_token_streams_the_active_weights_without_the_input_embedding() -> None:
    assert roofline.streamed_weights(MIXTRAL, 1) == pytest.approx(12_879_925_248 - 32000 * 4096)
    assert roofline.streamed_weights(MIXTRAL, 1) == pytest.approx(12.75e9, rel=1e-3)


@pytest.mark.parametrize(("batch", "distinct"), [(1, 2), (2, 3.5), (4, 8 * (1 - 0.75**4)), (64, 8)])
def test_distinct_experts(batch: int, distinct: float) -> None:
    assert roofline.distinct_experts(MIXTRAL, batch) == pytest.approx(distinct, rel=1e-6)


@pytest.mark.parametrize(("batch", "times"), [(2, 1.66), (4, 2.53), (8, 3.30), (16, 3.62)])
def test_larger_batches_read_more_experts(batch: int, times: float) -> None:
    ratio = roofline.streamed_weights(MIXTRAL, batch) / roofline.streamed_weights(MIXTRAL, 1)
    assert ratio == pytest.approx(times, abs=0.005)


def test_a_dense_model_reads_the_same_at_every_batch() -> None:
    assert roofline.streamed_weights(LLAMA_70B, 64) == roofline.streamed_weights(LLAMA_70B, 1)


def test_kv_cache_of_grouped_query_attention() -> None:
    assert roofline.kv_bytes_per_token(MIXTRAL) == 2 * 32 * 8 * 128 * 2 == 131_072
    assert roofline.kv_bytes_per_token(LLAMA_70B, 1) == 2 * 80 * 8 * 128


def test_operations_are_two_for_each_weight_and_four_for_each_attended_element() -> None:
    assert roofline.decode_flops(MIXTRAL, 0) == pytest.approx(2 * 12.7488e9, rel=1e-4)
    assert roofline.decode_flops(MIXTRAL, 1000) - roofline.decode_flops(MIXTRAL, 0) == 4 * 32 * 4096 * 1000


def test_one_step_at_batch_one_is_bound_by_memory() -> None:
    step = roofline.decode_step(MIXTRAL, A100, 1, "int8", batch=1, context=0)
    assert 1 / step.seconds == pytest.approx(2039 / 12.7488, rel=1e-4)  # 159.9 tokens/s
    assert step.memory_s > step.compute_s
    assert step.link_s == 0


def test_a_large_batch_of_a_dense_model_is_bound_by_arithmetic() -> None:
    step = roofline.decode_step(LLAMA_70B, A100, 1, "bf16", batch=1024, context=0)
    assert step.compute_s == pytest.approx(1024 * 2 * 68.714e9 / 312e12, rel=1e-3)
    assert step.seconds == step.compute_s > step.memory_s


def test_tensor_parallel_halves_the_reading_and_adds_two_all_reduces_a_layer() -> None:
    one, two = (roofline.decode_step(MIXTRAL, A100, n, "bf16", batch=8, context=1000) for n in (1, 2))
    assert two.memory_s == pytest.approx(one.memory_s / 2)
    assert two.compute_s == pytest.approx(one.compute_s / 2)
    sent = 32 * 2 * (2 * 1 / 2) * 8 * 4096 * 2
    assert two.link_s == pytest.approx(sent / 300e9)


def test_narrow_weights_use_narrow_units_where_the_gpu_has_them() -> None:
    assert peak_tflops(A100, "int8") == 624
    assert peak_tflops(A100, "fp8") == 312
    assert peak_tflops(A100, "int4") == 312
    assert peak_tflops(gpus()["h100-80gb"], "fp8") == 1979


@pytest.mark.parametrize("change", [{"colour": "red"}, {"heads": 30}, {"top_k": 9}, {"layers": 32.0}, {"ffn": 0}])
def test_impossible_shapes_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Shape.model_validate({**MIXTRAL.model_dump(), **change})


def test_every_bundled_entry_names_its_source() -> None:
    assert all(model.source for model in models().values())
    assert all(gpu.source for gpu in gpus().values())
    assert {"a100-40gb", "a100-80gb", "h100-80gb", "h200", "l40s"} <= set(gpus())
