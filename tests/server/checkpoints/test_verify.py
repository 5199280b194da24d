from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from server.checkpoints import shards
from server.checkpoints.architecture import expected_tensors
from server.checkpoints.documents import parse_object
from server.checkpoints.errors import InvalidCheckpoint
from server.checkpoints.manifest import FILE
from server.checkpoints.registry import Checkpoint, read_checkpoint
from server.checkpoints.shards import all_finite, read_header, read_through
from server.checkpoints.verify import inspect, verify
from server.settings import EMBEDDED_CHECKPOINT
from tests.server.checkpoints.small import (
    INDEX,
    SHARD,
    change,
    make_checkpoint,
    raw_shard,
    read,
    read_shard,
    sign,
    write,
    write_shard,
)

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
NORM = "model.norm.weight"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "small")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "sharded", shards=3)


def problems(directory: Path, serving: Path | None = None) -> list[str]:
    with pytest.raises(InvalidCheckpoint) as caught:
        verify(read_checkpoint(directory), serving)
    assert str(caught.value).endswith("; ".join(caught.value.problems))
    return caught.value.problems


def only_problem(directory: Path, serving: Path | None = None) -> str:
    (problem,) = problems(directory, serving)
    return problem


def test_the_embedded_checkpoint_passes() -> None:
    embedded = read_checkpoint(EMBEDDED_CHECKPOINT)
    verify(embedded, EMBEDDED_CHECKPOINT)
    seen: list[tuple[str, int, int]] = []
    verify(embedded, None, lambda *step: seen.append(step))
    size = embedded.size - (EMBEDDED_CHECKPOINT / FILE).stat().st_size
    assert seen[-1] == ("verifying", size, size)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("count", [1, 3])
def test_small_checkpoints_pass(tmp_path: Path, dtype: str, count: int) -> None:
    made = make_checkpoint(tmp_path / "made", dtype=dtype, shards=count)
    verify(read_checkpoint(made), made)


def test_the_tensors_of_mixtral_8x7b_are_those_that_were_published() -> None:
    """46,702,792,704 parameters in 995 tensors."""
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "vocab_size": 32000,
    }
    tensors = expected_tensors(config)
    assert (len(tensors), sum(map(prod, tensors.values()))) == (995, 46_702_792_704)
    assert tensors["model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)
    assert "lm_head.weight" not in expected_tensors({**config, "tie_word_embeddings": True})


# Bytes that are not those of the manifest.


def test_a_corrupt_shard(small: Path) -> None:
    content = bytearray((small / SHARD).read_bytes())
    content[-2] ^= 1
    (small / SHARD).write_bytes(content)
    assert only_problem(small) == f"{SHARD} is not the file that its manifest names: copy it again"


def test_a_truncated_shard(small: Path) -> None:
    os.truncate(small / SHARD, (small / SHARD).stat().st_size - 64)
    found = problems(small)
    assert re.match(r"model.safetensors cannot be read: its header describes [\d,]+ bytes and it has", found[0])
    assert found[1] == f"{SHARD} is not the file that its manifest names: copy it again"


def test_an_empty_and_a_missing_shard(sharded: Path) -> None:
    os.truncate(sharded / "model-00001-of-00003.safetensors", 0)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    found = " | ".join(problems(sharded))
    assert "'model-00002-of-00003.safetensors' is missing" in found
    assert "model-00001-of-00003.safetensors cannot be read: it ends within its header" in found
    assert "missing tensors" not in found, "a shard that cannot be read says nothing about its tensors"


def test_everything_is_found_at_once(small: Path) -> None:
    (small / "extra.bin").write_bytes(b"")
    (small / "chat_template.jinja").unlink()
    (small / "tokenizer.json").write_text("{}")
    assert len(problems(small)) == 4


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81])
@pytest.mark.parametrize("place", [0, -1])
def test_one_value_that_is_not_finite(small: Path, bits: int, place: int) -> None:
    tensors = read_shard(small / SHARD)
    dtype, shape, data = tensors[EXPERT]
    values = np.frombuffer(data, "<u2").copy()
    values[place] = bits
    write_shard(small / SHARD, {**tensors, EXPERT: (dtype, shape, values.tobytes())})
    assert only_problem(sign(small)) == f"tensors with NaN or infinity in {SHARD} (1): {EXPERT}"


def floats(data: bytes, dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype])


@given(st.binary(max_size=64), st.sampled_from(["BF16", "F16", "F32"]))
def test_finite_is_what_numpy_says(data: bytes, dtype: str) -> None:
    data = data[: len(data) // 4 * 4]
    assert all_finite(memoryview(data), dtype) == bool(np.isfinite(floats(data, dtype)).all())


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 6))
def test_reading_in_pieces_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], pieces: int
) -> None:
    """The digest is that of the file, and a value is found wherever pieces end."""
    parts = [part[: len(part) // 4 * 4] for part in parts]
    path = tmp_path_factory.mktemp("pieces") / SHARD
    write_shard(path, {f"t{i}": ("F32", (len(part) // 4,), part) for i, part in enumerate(parts)})
    read_bytes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "PIECE", 4 * pieces)
        digest, faulty = read_through(path, read_header(path), read_bytes.append)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(faulty) == {f"t{i}" for i, part in enumerate(parts) if not np.isfinite(floats(part, "F32")).all()}
    assert sum(read_bytes) == path.stat().st_size
    assert max(read_bytes) <= 4 * pieces


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    """A sparse file of 4 GiB begins to be read, and one piece is held of it."""
    path = tmp_path / SHARD
    size = 4 << 30
    raw_shard(path, json.dumps({"t": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode(), b"")
    os.truncate(path, path.stat().st_size + size)
    seen: list[int] = []

    class Enough(Exception):
        pass

    def advance(count: int) -> None:
        seen.append(count)
        if sum(seen) > 8 << 20:
            raise Enough

    with pytest.raises(Enough):
        read_through(path, read_header(path), advance)
    assert max(seen) == 1 << 20


def test_progress_that_raises_ends_it(sharded: Path) -> None:
    """As an activation does that is called off; no thread goes on."""
    before = threading.active_count()

    def progress(step: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(read_checkpoint(sharded), None, progress)
    assert threading.active_count() == before


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT as a terminal's commands have it: what a shell starts with & ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_does_not_wait_for_the_rest(small: Path) -> None:
    (small / "README.md").touch()
    sign(small)
    os.truncate(small / "README.md", 16 << 30)
    seen: list[int] = []

    def progress(step: str, done: int, total: int) -> None:
        if not seen:
            os.kill(os.getpid(), signal.SIGINT)
        seen.append(done)
        assert total > 16 << 30

    with pytest.raises(KeyboardInterrupt):
        verify(read_checkpoint(small), None, progress)
    assert seen[-1] < 16 << 30


# Tensors that are not those of the configuration.


def drop(name: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        tensors = read_shard(directory / SHARD)
        del tensors[name]
        write_shard(directory / SHARD, tensors)

    return spoil


def put(name: str, dtype: str = "BF16", *shape: int) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        data = bytes(prod(shape) * (4 if dtype == "F32" else 2))
        write_shard(directory / SHARD, {**read_shard(directory / SHARD), name: (dtype, shape, data)})

    return spoil


def test_names_are_shown_so_that_they_can_be(small: Path) -> None:
    """A tensor's name may hold what clears a terminal, or what no encoding has."""
    tensors = read_shard(small / SHARD)
    write_shard(small / SHARD, {**tensors, "\x1b[2J": ("BF16", (0,), b""), "\ud800": ("BF16", (0,), b"")})
    assert only_problem(sign(small)) == r"tensors too many (2): '\x1b[2J', '\ud800'"


def set_key(file: str, **values: Any) -> Callable[[Path], None]:
    return lambda directory: change(directory / file, **values)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (drop(EXPERT), f"missing tensors (1): {EXPERT}"),
        (put("lm_head.weight", "BF16", 64, 16), "tensors too many (1): lm_head.weight"),
        (put(EXPERT, "BF16", 16, 24), f"another shape than config.json gives them (1): {EXPERT} [16, 24] for [24, 16]"),
        (put(EXPERT, "F32", 24, 16), f"tensors that are not BF16 (1): {EXPERT}"),
        (set_key("config.json", num_hidden_layers=3), "missing tensors (19): model.layers.2."),
        (set_key("config.json", num_local_experts=2), "tensors too many (12): model.layers.0.block_sparse_moe.experts"),
        (set_key("config.json", model_type="llama"), "only MixtralForCausalLM of type 'mixtral' is served"),
        (set_key("config.json", architectures=["Other"]), "only MixtralForCausalLM of type 'mixtral' is served"),
        (set_key("config.json", quantization_config={}), "it describes quantised weights"),
        (set_key("config.json", hidden_size=0), "hidden_size is 0"),
        (set_key("config.json", hidden_size="16"), "hidden_size is '16'"),
        (set_key("config.json", hidden_size=True), "hidden_size is True"),
        (set_key("config.json", num_hidden_layers=10**9), "it describes more than 1,000,000 tensors"),
        (set_key("config.json", vocab_size=10**30), "vocab_size is 10000"),
    ],
)
def test_tensors_that_the_configuration_does_not_describe(
    small: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(small)
    found = problems(sign(small))
    assert any(reason in problem for problem in found), found
    assert all("tensors" in problem or "config.json" in problem for problem in found)


# Headers that lie.


def entry(begin: int, end: int, *shape: int, dtype: str = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


@pytest.mark.parametrize(
    ("header", "size", "reason"),
    [
        ({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, 12, "'b' overlaps the tensor before it"),
        ({"a": entry(0, 8, 2), "b": entry(0, 8, 2)}, 8, "'b' overlaps the tensor before it"),
        ({"a": entry(0, 8, 2), "b": entry(12, 20, 2)}, 20, "'b' follows a gap"),
        ({"a": entry(4, 12, 2)}, 12, "'a' follows a gap"),
        ({"a": entry(0, 8, 2)}, 4, "describes"),
        ({"a": entry(0, 8, 2)}, 9, "describes"),
        ({"a": entry(0, 8, 3)}, 8, "'a' has offsets that do not fit its shape"),
        ({"a": entry(8, 0, 2)}, 8, "'a' has offsets that do not fit its shape"),
        ({"a": entry(-8, 0, 2)}, 8, "'a' has offsets that are not two numbers"),
        ({"a": entry(0, 8, -2)}, 8, "'a' has a shape"),
        ({"a": entry(0, 8, 1 << 62, 1 << 62)}, 8, "'a' has offsets that do not fit"),
        ({"a": entry(0, 4, True)}, 4, "'a' has a shape"),
        ({"a": entry(0, 8, 2, dtype="I64")}, 8, "'a' is of type 'I64'"),
        ({"a": entry(0, 8, 2, dtype=["F32"])}, 8, "'a' is of type"),
        ({"a": entry(0, 8, 2, code="import os")}, 8, "'a' has no dtype, shape and data_offsets"),
        ({"a": [0, 8]}, 8, "'a' has no dtype, shape and data_offsets"),
        ([], 0, "it is not a JSON object"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: Any, size: int, reason: str) -> None:
    raw_shard(tmp_path / SHARD, json.dumps(header).encode(), bytes(size))
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_header(tmp_path / SHARD)


def test_a_lying_header_is_a_problem_of_the_checkpoint(small: Path) -> None:
    write_shard(small / SHARD, read_shard(small / SHARD), extra=entry(0, 8, 2))
    assert re.fullmatch(f"{SHARD} cannot be read: '.*' overlaps the tensor before it", only_problem(sign(small)))


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40])
def test_a_header_longer_than_its_file(tmp_path: Path, length: int) -> None:
    (tmp_path / SHARD).write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="ends within its header"):
        read_header(tmp_path / SHARD)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    (tmp_path / SHARD).write_bytes((1 << 30).to_bytes(8, "little"))
    os.truncate(tmp_path / SHARD, 1 << 31)
    with pytest.raises(ValueError, match="its header claims 1,073,741,824 bytes, of 16,777,216 at most"):
        read_header(tmp_path / SHARD)


def test_keys_that_repeat(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 4, 1))
    raw_shard(tmp_path / SHARD, f'{{"a": {one}, "a": {one}}}'.encode(), bytes(4))
    with pytest.raises(ValueError, match="the key 'a' is repeated"):
        read_header(tmp_path / SHARD)


numbers = st.one_of(st.integers(-2, 20), st.integers(), st.none(), st.booleans(), st.text(max_size=2))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I8", 3]),
        "shape": st.lists(st.one_of(st.integers(-1, 4), numbers), max_size=3),
        "data_offsets": st.lists(st.one_of(st.integers(-1, 16), numbers), min_size=1, max_size=3),
    }
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
headers = st.one_of(
    st.dictionaries(st.text(max_size=3), st.one_of(entries, json_values), max_size=4).map(json.dumps).map(str.encode),
    st.binary(max_size=40),
)


@given(headers, st.integers(0, 24), st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_wild_headers_are_refused_or_cover_their_file(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, size: int, length: int | None
) -> None:
    path = tmp_path_factory.mktemp("wild") / SHARD
    prefix = (len(header) if length is None else length).to_bytes(8, "little")
    path.write_bytes(prefix + header + bytes(size))
    try:
        tensors = read_header(path)
    except ValueError:
        return
    assert all(one.end == other.begin for one, other in pairwise(tensors))
    if tensors:
        assert tensors[-1].end == path.stat().st_size


@given(
    st.lists(st.tuples(st.sampled_from(["F32", "BF16", "F16"]), st.lists(st.integers(0, 5), max_size=2)), max_size=5)
)
def test_honest_headers_are_read_as_the_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("honest") / SHARD
    width = {"F32": 4, "BF16": 2, "F16": 2}
    write_shard(path, {f"t{i}": (d, tuple(s), bytes(prod(s) * width[d])) for i, (d, s) in enumerate(parts)})
    with safe_open(path, "np") as file:
        expected = {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in read_header(path)} == expected


# Files that have no business in a checkpoint.


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pkl", "modeling.py", "params.json", "consolidated.safetensors"]
)
def test_files_that_could_run_or_be_loaded_instead(small: Path, name: str) -> None:
    (small / name).write_bytes(b"\x80\x04.")
    assert f"'{name}' is not in its manifest" in problems(small)
    assert f"'{name}' is nothing that a checkpoint may hold" in only_problem(sign(small))


def test_files_that_the_manifest_does_not_know(small: Path) -> None:
    (small / "added_tokens.json").write_text("{}")
    assert only_problem(small) == "'added_tokens.json' is not in its manifest"


def test_a_note_for_people_is_welcome(small: Path) -> None:
    (small / "README.md").write_text("# Small")
    verify(read_checkpoint(sign(small)), None)


@pytest.mark.parametrize("inside", [True, False])
def test_symbolic_links(small: Path, tmp_path: Path, inside: bool) -> None:
    target = (small if inside else tmp_path) / "README.md"
    target.write_text("the same bytes")
    (small / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (small / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    (small / SHARD).rename(small / "README.md")
    (small / SHARD).symlink_to("README.md" if inside else tmp_path / "README.md")
    found = problems(small)
    for name in ("tokenizer.json", SHARD):
        assert f"'{name}' is a link or a directory: put the file itself there" in found


def test_directories_and_pipes(small: Path) -> None:
    (small / "nested").mkdir()
    os.mkfifo(small / "README.md")
    assert [problem.split(" is ")[0] for problem in problems(small)] == ["'README.md'", "'nested'"]


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd", "..", "nested/config.json", "a\x00b", "~/x"])
def test_names_that_lead_elsewhere(small: Path, name: str) -> None:
    (small.parent / "outside.json").write_text("{}")
    manifest = read(small / FILE)
    change(small / FILE, files={**manifest["files"], name: "0" * 64})
    assert f"{name!r} is nothing that a checkpoint may hold" in " | ".join(problems(small))


# JSON that nobody can rely on.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "Expecting"),
        (b"[]", "it is not a JSON object"),
        (b'{"a": 1, "a": 2}', "the key 'a' is repeated"),
        (b'{"b": {"a": 1, "a": 1}}', "the key 'a' is repeated"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "integer string conversion"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_malformed_json(small: Path, name: str, text: bytes, reason: str) -> None:
    (small / name).write_bytes(text)
    problem = only_problem(sign(small))
    assert problem.startswith(f"{name} cannot be read: ")
    assert reason in problem


def test_json_that_is_nested_as_deeply_as_can_be_read(small: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other")
    deep = '{"a": ' * 400 + "1" + "}" * 400
    for directory in (small, other):
        (directory / "tokenizer_config.json").write_text(deep + " " * (directory == other))
        sign(directory)
    verify(read_checkpoint(other), small)


def test_a_manifest_whose_keys_repeat(small: Path) -> None:
    text = (small / FILE).read_text()
    (small / FILE).write_text(f'{{"id": "other", {text[1:]}')
    assert only_problem(small) == f"{FILE} cannot be read: the key 'id' is repeated"


@given(st.binary(max_size=60))
def test_wild_json_is_refused_or_is_an_object(text: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse_object(text), dict)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling.Model"}}),
        ("config.json", {"text_config": {"auto_map": {}}}),
        ("config.json", {"configuration_files": ["config.4.0.0.json"]}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}),
    ],
)
def test_remote_code_and_redirections(small: Path, name: str, values: dict[str, Any]) -> None:
    change(small / name, **values)
    assert "points at code or at files that are not checked" in only_problem(sign(small))


def test_a_checkpoint_without_a_tokenizer(small: Path) -> None:
    (small / "tokenizer.json").unlink()
    assert only_problem(sign(small)) == "it has no tokenizer"


def test_a_directory_that_has_gone(small: Path) -> None:
    checkpoint = read_checkpoint(small)
    small.rename(small.parent / "elsewhere")
    assert "it cannot be read" in inspect(checkpoint, None)[0]


# The index.


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            lambda places: {**places, NORM: "../model.safetensors"},
            "that are no shard's name (1): '../model.safetensors'",
        ),
        (lambda places: {**places, NORM: "/etc/passwd"}, "that are no shard's name (1): '/etc/passwd'"),
        (
            lambda places: {**places, NORM: "model-00009-of-00003.safetensors"},
            f"are not where {INDEX} says (1): {NORM}",
        ),
        (lambda places: {**places, "other": "model-00001-of-00003.safetensors"}, "says (1): other"),
        (lambda places: {name: place for name, place in places.items() if name != NORM}, f"says (1): {NORM}"),
        (list, "has no weight_map"),
        (lambda places: {NORM: 7}, "has no weight_map"),
        (lambda places: {NORM: [7]}, "has no weight_map"),
    ],
)
def test_an_index_that_points_elsewhere(sharded: Path, edit: Callable[[Any], Any], reason: str) -> None:
    change(sharded / INDEX, weight_map=edit(read(sharded / INDEX)["weight_map"]))
    assert reason in " | ".join(problems(sign(sharded)))


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert "there has to be model.safetensors and no other shard" in only_problem(sign(sharded))


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    tensors = read_shard(sharded / "model-00001-of-00003.safetensors")
    other = sharded / "model-00002-of-00003.safetensors"
    write_shard(other, {**read_shard(other), **tensors})
    assert f"are not where {INDEX} says" in only_problem(sign(sharded))


# Beside the checkpoint in service.


def test_other_weights_can_replace_those_in_service(small: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "small-2", seed=2, shards=2)
    config = read(other / "config.json")
    write(other / "config.json", {"transformers_version": "4.0.0", **dict(reversed(config.items()))})
    change(other / "config.json", transformers_version="4.0.0")
    verify(read_checkpoint(sign(other)), small)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("config.json", set_key("config.json", rms_norm_eps=1e-6)),
        ("tokenizer.json", set_key("tokenizer.json", version="2.0")),
        ("tokenizer_config.json", set_key("tokenizer_config.json", padding_side="left")),
        ("generation_config.json", set_key("generation_config.json", temperature=1.0)),
        ("chat_template.jinja", lambda directory: (directory / "chat_template.jinja").write_text("{{ messages }}")),
        ("chat_template.jinja", lambda directory: (directory / "chat_template.jinja").unlink()),
        ("added_tokens.json", lambda directory: write(directory / "added_tokens.json", {})),
    ],
)
def test_more_than_weights_needs_new_replicas(
    small: Path, tmp_path: Path, name: str, edit: Callable[[Path], Any]
) -> None:
    other = make_checkpoint(tmp_path / "other", "small-2", seed=2)
    edit(other)
    verify(read_checkpoint(sign(other)), None)
    problem = only_problem(other, small)
    assert problem.startswith(f"{name} differ from the checkpoint in service")
    assert "start new replicas with this checkpoint" in problem


def test_what_is_declared_is_what_is_checked(small: Path) -> None:
    """`inspect` finds what needs no weights, and nothing that does."""
    checkpoint: Checkpoint = read_checkpoint(small)
    assert inspect(checkpoint, small) == []
    (small / SHARD).write_bytes((small / SHARD).read_bytes()[:-2] + b"\x80\x7f")
    assert inspect(checkpoint, None) == []
    assert len(problems(small)) == 2
