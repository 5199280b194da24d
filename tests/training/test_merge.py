from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MixtralForCausalLM

import training.merge
from server.checkpoints.manifest import read_manifest, sha256
from training.adapters import Adapter
from training.errors import Refused
from training.fingerprint import base_fingerprint
from training.merge import merge_adapter
from training.mixtral import ADAPTED, load

IDS = torch.randint(3, 6000, (2, 24), generator=torch.Generator().manual_seed(1))
WEIGHTS = "adapter_model.safetensors"


def randomised(model: Any, directory: Path) -> PeftModel:
    """`model` with an adapter that does something, saved in `directory`."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    model.save_pretrained(directory)
    adapted: PeftModel = model.eval()
    return adapted


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(ADAPTED), "task_type": "CAUSAL_LM", **changes})


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    randomised(get_peft_model(load(base, dtype=torch.float32), lora()), directory)
    return directory


@torch.inference_mode()
def assert_same_logits(directory: Path, model: Any) -> None:
    """Up to the rounding of weights to bf16."""
    merged = MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected, found = model(IDS).logits, merged(IDS).logits
    error = (expected - found).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.median()) < 0.02
    unadapted = MixtralForCausalLM.from_pretrained(model.name_or_path, dtype=torch.float32)(IDS).logits
    assert float(((expected - unadapted).norm(dim=-1) / expected.norm(dim=-1)).median()) > 0.1


def test_the_result_is_the_base_with_the_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    summary = merge_adapter(adapter, tmp_path / "merged")
    model = PeftModel.from_pretrained(load(base, dtype=torch.float32), adapter).eval()
    assert_same_logits(tmp_path / "merged", model)
    assert 0 < summary["layer_error"] < 0.01
    unmerged = load_file(base / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert unmerged.keys() == merged.keys()
    exact = model.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name


def test_the_directory_is_a_checkpoint_with_a_manifest(base: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    summary = merge_adapter(adapter, output, directives={"ar": "أجب بالعربية."})
    manifest = read_manifest(output)
    assert manifest is not None
    assert manifest.id == summary["id"]
    assert manifest.adapter == sha256(adapter / WEIGHTS)
    assert manifest.directives == {"ar": "أجب بالعربية."}
    assert manifest.languages == ("en", "ar")
    assert manifest.files == {path.name: sha256(path) for path in output.iterdir() if path.name != "bimedix.json"}
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith(
        "USER: Hi ASSISTANT:"
    )
    assert json.loads((output / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja"} <= manifest.files.keys()


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": list(ADAPTED)},
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight"],
        },
        {"target_modules": ["q_proj", "o_proj"]},
    ],
    ids=["renamed by PEFT", "fused parameters", "attention only"],
)
def test_an_adapter_on_the_fused_model_merges(base: Path, tmp_path: Path, targets: dict[str, Any]) -> None:
    fused = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = randomised(get_peft_model(fused, lora(**targets)), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert_same_logits(tmp_path / "merged", model)


def test_shards_are_kept(base: Path, adapter: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    MixtralForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="500KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, sharded / name)
    assert base_fingerprint(sharded) == base_fingerprint(base)
    merge_adapter(adapter, tmp_path / "one")
    merge_adapter(adapter, tmp_path / "many", base=str(sharded))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (MixtralForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def edited(adapter: Path, tmp_path: Path, change: Any = None, **config: Any) -> Path:
    """A copy of `adapter` with `change` made to its tensors and `config` to its configuration."""
    copy = tmp_path / "edited"
    shutil.copytree(adapter, copy)
    if change:
        tensors = load_file(copy / WEIGHTS)
        change(tensors)
        save_file(tensors, copy / WEIGHTS)
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return copy


A = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w1.lora_A.weight"
B = A.replace("lora_A", "lora_B")


def drop_both(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[A], tensors[B]


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (lambda t: t.pop(B), {}, "has lora_A only"),
        (drop_both, {}, "lacks model.layers.1.block_sparse_moe.experts.2.w1.weight"),
        (lambda t: t[B].fill_(float("nan")), {}, "experts.2.w1.lora_B.weight holds NaN"),
        (lambda t: t.update({A: torch.zeros(4, 32)}), {}, r"is \(96, 32\), the base's \(96, 64\)"),
        (lambda t: t.update({A: torch.zeros(5, 64)}), {}, "do not fit rank 4"),
        (
            lambda t: t.update({A.replace("1.block", "7.block"): t.pop(A), B.replace("1.block", "7.block"): t.pop(B)}),
            {},
            "no model.layers.7",
        ),
        (lambda t: t.update({"../../etc/passwd": torch.zeros(1)}), {}, "not the name of a LoRA matrix"),
        (lambda t: t.update({"../x.lora_A.weight": torch.zeros(4, 4)}), {}, "not the name of a LoRA matrix"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(4, 4)}), {}, "not the name of a LoRA matrix"),
        (None, {"peft_type": "IA3"}, "not a LoRA adapter"),
        (None, {"use_dora": True}, "uses use_dora"),
        (None, {"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        (None, {"bias": "all"}, "uses bias"),
        (None, {"r": "4"}, "gives no rank"),
        (None, {"base_model_name_or_path": None}, "does not name its base"),
        (None, {"base_model_name_or_path": "/no/such/base"}, "does not exist"),
    ],
)
def test_a_bad_adapter_is_refused(
    adapter: Path, tmp_path: Path, change: Any, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Refused, match=reason):
        merge_adapter(edited(adapter, tmp_path, change, **config), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edited"]


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    copy = edited(adapter, tmp_path)
    (copy / "bimedix_adapter.json").write_text(json.dumps({"base": "another", "base_fingerprint": "0" * 64}))
    with pytest.raises(Refused, match="trained on another base"):
        merge_adapter(copy, tmp_path / "merged")


def test_pickles_are_refused(adapter: Path, tmp_path: Path) -> None:
    copy = edited(adapter, tmp_path)
    (copy / WEIGHTS).unlink()
    torch.save({}, copy / "adapter_model.bin")
    with pytest.raises(Refused, match=r"adapter_model.bin is a pickle"):
        merge_adapter(copy, tmp_path / "merged")


def test_what_is_no_safetensors_file_is_refused(adapter: Path, tmp_path: Path) -> None:
    copy = edited(adapter, tmp_path)
    for content in (b"", b"not safetensors at all", b"\xff" * 64):
        (copy / WEIGHTS).write_bytes(content)
        with pytest.raises(Refused, match="is not a safetensors file"):
            merge_adapter(copy, tmp_path / "merged")


def test_links_out_of_the_adapter_are_refused(adapter: Path, tmp_path: Path) -> None:
    copy = edited(adapter, tmp_path)
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).symlink_to(adapter / WEIGHTS)
    with pytest.raises(Refused, match="points outside"):
        merge_adapter(copy, tmp_path / "merged")


def test_an_index_that_names_files_elsewhere_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "../x.safetensors"}})
    )
    with pytest.raises(Refused, match="outside its directory"):
        merge_adapter(adapter, tmp_path / "merged", base=str(copy))


def test_a_base_that_lacks_a_tensor_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refused, match="model.norm.weight"):
        merge_adapter(adapter, tmp_path / "merged", base=str(copy))
    assert not (tmp_path / "merged").exists()


def test_an_existing_output_is_left_alone(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(FileExistsError):
        merge_adapter(adapter, tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_an_interrupted_merge_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.merge, "_write_rest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(adapter, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_wrong_merge_is_noticed(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.adapters.Adapter.delta", lambda self, name: torch.zeros(self.shape_of(name)))
    with pytest.raises(Refused, match="differs from the adapted one"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_one_wrong_expert_is_noticed(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Adapter.delta

    def wrong(self: Adapter, name: str) -> torch.Tensor:
        return right(self, name) * (-1 if ".1.block_sparse_moe.experts.1.w2" in name else 1)

    monkeypatch.setattr(Adapter, "delta", wrong)
    with pytest.raises(Refused, match="layer 1 of the merged checkpoint differs"):
        merge_adapter(adapter, tmp_path / "merged")
