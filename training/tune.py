"""`bimedix-train tune`: QLoRA on q, k, v, every expert and the router, as in the paper's sections 3.2 and 4.1."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from training import proofs
from training.adapters import PROVENANCE
from training.fingerprint import base_fingerprint
from training.mixtral import ADAPTED, UNQUANTISED, UnfusedMixtral, load
from training.progress import Journal
from training.recipe import Recipe
from training.router import Balance
from training.rows import IGNORED, Prepared, prepare, vicuna_tokenizer

ADAPTER = "adapter"


def run(recipe: Recipe, *, resume: bool = False) -> dict[str, Any]:
    """Tunes and writes `output/adapter`; returns the summary that `--json` prints.

    Raises Refused for inputs that do not fit, ProofFailed when the run would not do what the recipe says, and
    FileExistsError when `output` holds another run and `resume` was not asked for.
    """
    logging.set_verbosity_error()
    recipe.check_inputs()
    state = join(recipe)
    tokenizer = vicuna_tokenizer(recipe.base, recipe.revision)
    # One process of all, then one of each node: whether nodes share the output or not, nobody writes what is written.
    with state.main_process_first(), state.local_main_process_first():
        if state.is_main_process:
            claim_output(recipe, resume=resume)
        train, held_out, prepared = prepare(recipe, tokenizer, recipe.output / "data")
    arguments = training_arguments(recipe, processes=state.num_processes)
    dtype = precision(sharded=bool(recipe.zero) and state.num_processes > 1)
    base = base_model(recipe, dtype)
    model = adapt(base, recipe)
    trainable = proofs.adapter_is_complete(model, base.config, recipe.lora.rank)
    quantised = proofs.experts_are_4bit(model) if recipe.quantization == "nf4" else 0
    journal = Journal(recipe.output / "metrics.jsonl", main=state.is_main_process)
    trainer = Tuner(model, arguments, train, held_out, tokenizer, journal)
    if state.is_main_process:
        _announce(recipe, prepared, trainable, quantised, len(train), state.num_processes)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=last_checkpoint(recipe.output) if resume else None)
    if len(held_out) and journal.step_of("eval_loss") != trainer.state.global_step:
        trainer.evaluate()
    save(trainer, recipe)
    journal.draw(recipe.output / "loss.png")
    return {
        "adapter": str(recipe.output / ADAPTER),
        "trainable_parameters": trainable,
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - started, 1),
        "tokens": prepared.tokens,
        "rejected": prepared.rejected,
        "loss": journal.last("loss"),
        "held_out_loss": journal.last("eval_loss"),
    }


def join(recipe: Recipe) -> PartialState:
    """This process's place among those that `torchrun` or `deepspeed` started; one by itself otherwise."""
    on_gpu = torch.cuda.is_available()
    state = PartialState() if on_gpu else PartialState(cpu=True)
    if recipe.zero and state.num_processes > 1:
        import deepspeed

        # Before the model loads: under ZeRO-3 it is partitioned while it does.
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
    return state


def claim_output(recipe: Recipe, *, resume: bool) -> None:
    """Marks `output` as this recipe's. Raises FileExistsError where it is another's, or unfinished without `resume`."""
    claim = recipe.output / "recipe.json"
    started = claim.exists() and last_checkpoint(recipe.output) is not None
    if claim.exists() and json.loads(claim.read_text())["digest"] != recipe.digest and (started or resume):
        raise FileExistsError(f"{recipe.output} holds a run of another recipe: choose another output, or remove it")
    if started and not resume:
        raise FileExistsError(f"{recipe.output} holds a run: add --resume to go on with it, or remove it")
    recipe.output.mkdir(parents=True, exist_ok=True)
    claim.write_text(json.dumps({"digest": recipe.digest, "recipe": recipe.model_dump(mode="json")}, indent=2) + "\n")


def last_checkpoint(output: Path) -> str | None:
    """The newest complete checkpoint. One that was cut short while it was written is removed."""
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in found:
        try:
            # The trainer writes its state last.
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                shutil.rmtree(path, ignore_errors=True)
    return None


def precision(*, sharded: bool = False) -> torch.dtype:
    """bf16 but on a CPU, whose bf16 kernels are compiled anew for each number of tokens an expert gets."""
    return torch.bfloat16 if sharded or torch.cuda.is_available() else torch.float32


def base_model(recipe: Recipe, dtype: torch.dtype) -> UnfusedMixtral:
    """The frozen base in `dtype`, its matrices in NF4 where the recipe says so."""
    # ZeRO-3 can only partition parameters of a floating type.
    storage = dtype if recipe.zero == 3 else torch.uint8
    quantization = nf4(dtype, storage) if recipe.quantization == "nf4" else None
    place = {"device_map": {"": PartialState().local_process_index}} if torch.cuda.is_available() else {}
    return load(recipe.base, dtype=dtype, quantization=quantization, revision=recipe.revision, **place)


def nf4(compute: torch.dtype, storage: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantisation (QLoRA), but for the head and the router."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=UNQUANTISED,
    )


def adapt(model: UnfusedMixtral, recipe: Recipe) -> PeftModel:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lora = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        target_modules=list(ADAPTED),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(recipe.seed)
    return get_peft_model(model, lora)


def training_arguments(recipe: Recipe, processes: int) -> TrainingArguments:
    """The recipe in the trainer's terms. What the paper does not give is the library's default."""
    evaluates = "steps" if recipe.data.held_out else "no"
    sharded = bool(recipe.zero) and processes > 1
    return TrainingArguments(
        output_dir=str(recipe.output),
        num_train_epochs=recipe.optimiser.epochs,
        per_device_train_batch_size=recipe.optimiser.per_device_batch,
        per_device_eval_batch_size=recipe.optimiser.per_device_batch,
        gradient_accumulation_steps=recipe.accumulation(processes),
        learning_rate=recipe.optimiser.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.optimiser.warmup_steps,
        optim="adamw_torch",
        bf16=precision(sharded=sharded) == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=recipe.gradient_checkpointing,
        deepspeed=zero_settings(recipe.zero) if sharded else None,
        gradient_checkpointing_kwargs={"use_reentrant": recipe.zero == 3},
        remove_unused_columns=False,
        eval_strategy=evaluates,
        eval_steps=recipe.run.eval_steps,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=recipe.run.save_steps,
        save_total_limit=recipe.run.keep_checkpoints,
        logging_steps=recipe.run.log_steps,
        logging_first_step=True,
        report_to="tensorboard",
        seed=recipe.seed,
        data_seed=recipe.seed,
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def zero_settings(stage: int) -> dict[str, Any]:
    """ZeRO `stage`: 2 partitions gradients and optimiser states over the processes, 3 the parameters as well."""
    return {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }


class Tuner(Trainer):
    """The trainer over packed rows, which proves its first step and logs speed and routing.

    Not TRL's SFTTrainer: its fused language-model head halves the speed on a CPU, and it casts a quantised model's
    adapter to bf16, in which AdamW loses small updates. TRL packs the rows and collates them.
    """

    def __init__(
        self,
        model: PeftModel,
        arguments: TrainingArguments,
        train: Dataset,
        held_out: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        journal: Journal,
    ) -> None:
        if arguments.gradient_checkpointing:
            model.enable_input_require_grads()
        if arguments.deepspeed:
            # DeepSpeed keeps fp32 master weights of its own, and ZeRO-3 needs one dtype throughout.
            cast_adapter(model, torch.bfloat16)
        self.balance = Balance(model, tokenizer)
        self.first_step = proofs.FirstStep(model, int(tokenizer.eos_token_id), self.balance)
        self.seen = (0, time.monotonic())
        self.tokens = 0
        super().__init__(
            model=model,
            args=arguments,
            data_collator=DataCollatorForLanguageModeling(int(tokenizer.pad_token_id), padding_free=True),
            train_dataset=train,
            eval_dataset=held_out if len(held_out) else None,
            processing_class=tokenizer,
            callbacks=[self.first_step, journal],
        )
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the trained positions of the whole optimiser step, of all processes."""
        if model.training:
            self.tokens += inputs["input_ids"].numel() * self.args.world_size
        loss = summed_loss(model, inputs)
        self.first_step.check_loss(model, inputs, loss)
        if num_items_in_batch is None:
            loss = loss / (inputs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
        else:
            # The processes' gradients are averaged, the count is of all of them.
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            before, then = self.seen
            self.seen = (self.tokens, time.monotonic())
            logs["tokens_per_second"] = round((self.tokens - before) / (time.monotonic() - then), 1)
            logs.update(self.balance.take())
        super().log(logs, start_time)


def summed_loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The cross-entropy of a packed row (1, tokens), summed over its trained positions. Logits are computed at those
    only, and without a key-value cache: with one, attention would cross from record to record."""
    row = {name: value for name, value in inputs.items() if name != "labels"}
    following = inputs["labels"][0, 1:]
    trained = (following != IGNORED).nonzero().flatten()
    logits = model(**row, use_cache=False, logits_to_keep=trained).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), following[trained], reduction="sum")


def cast_adapter(model: PeftModel, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def save(trainer: Tuner, recipe: Recipe) -> None:
    """Writes `output/adapter`: the adapter, the recipe it came from and the base it belongs to."""
    adapter = recipe.output / ADAPTER
    trainer.save_model(str(adapter))
    if not trainer.is_world_process_zero():
        return
    for unneeded in ("training_args.bin", "README.md"):
        (adapter / unneeded).unlink(missing_ok=True)
    provenance = {
        "base": recipe.base,
        "base_fingerprint": base_fingerprint(recipe.base, recipe.revision),
        "training": recipe.digest,
        "recipe": recipe.model_dump(mode="json"),
    }
    (adapter / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")


def _announce(recipe: Recipe, prepared: Prepared, trainable: int, quantised: int, rows: int, processes: int) -> None:
    print(
        f"{prepared.records:,} records ({prepared.rejected} rejected, {prepared.cut} cut), {prepared.tokens:,} tokens, "
        f"{prepared.trained_tokens:,} of them trained on, in {rows:,} rows; {prepared.held_out} records held out\n"
        f"{trainable:,} trainable parameters, as the formula says; "
        + (f"{quantised} expert matrices in NF4" if quantised else "base not quantised")
        + f"; {processes} process(es) x {recipe.optimiser.per_device_batch} rows x "
        f"{recipe.accumulation(processes)} accumulated",
        file=sys.stderr,
        flush=True,
    )
