"""Mistakes that people make in recipes: each is named with its line and what was meant, all at once, in no time."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from open_r1.errors import UserError
from open_r1.recipe import load_recipe

ENOUGH = "model_name_or_path: m\n"
SOURCE = "dataset_mixture:\n  datasets:\n  - id: a\n"
# What is written (the mistake stands in the last line), the key that is named, and what is said of it.
MISSPELT = {
    "learning_rat: 1e-5": ("learning_rat", "learning_rate"),
    "lr: 1e-5": ("lr", ""),
    "num_train_epoch: 1": ("num_train_epoch", "num_train_epochs"),
    "max_sequence_length: 5": ("max_sequence_length", "max_seq_length"),
    "per_device_batch_size: 4": ("per_device_batch_size", "per_device_train_batch_size"),
    "gradient_acumulation_steps: 4": ("gradient_acumulation_steps", "gradient_accumulation_steps"),
    "warmup: 0.1": ("warmup", "warmup_steps"),
    "weight_decy: 0.1": ("weight_decy", "weight_decay"),
    "save_step: 5": ("save_step", "save_steps"),
    "model_name: m": ("model_name", "model_name_or_path"),
    "Padding_free: true": ("Padding_free", "padding_free"),
    "lora_rank: 8": ("lora_rank", "lora_r"),
    "bf_16: true": ("bf_16", "bf16"),
    "attn_implementation: flash_atention": ("attn_implementation", "flash_attention_2"),
    "attn_implementation: spda": ("attn_implementation", "sdpa"),
    "lr_scheduler_type: cosin": ("lr_scheduler_type", "cosine"),
    "lr_scheduler_type: cosine_with_minlr": ("lr_scheduler_type", "cosine_with_min_lr"),
    "optim: adamw": ("optim", "adamw_torch"),
    "optim: adamw_8bits": ("optim", "adamw_8bit"),
    "packing_strategy: bdf": ("packing_strategy", "bfd"),
    "dtype: bfloat": ("dtype", "bfloat16"),
    "eval_strategy: step": ("eval_strategy", "steps"),
    "supervision: asistant": ("supervision", "assistant"),
    "on_bad_row: dropp": ("on_bad_row", "drop"),
    "report_to: wandb, tensorboard": ("report_to.0", "[wandb, tensorboard]"),
    "report_to: [wanbd]": ("report_to.0", "wandb"),
    "benchmarks: [gpqa, math500]": ("benchmarks.1", "math_500"),
    "callbacks: [push_to_hub]": ("callbacks.0", "push_to_hub_revision"),
    "dataset_mapping: {promt: q, response: a}": ("dataset_mapping.promt", "prompt"),
    "lr_scheduler_kwargs: {num_cycle: 2}": ("lr_scheduler_kwargs.num_cycle", "num_cycles"),
    "activation_checkpointing_kwargs: {use_reentrent: true}": (
        "activation_checkpointing_kwargs.use_reentrent",
        "use_reentrant",
    ),
    "accelerator_config: {split_batch: true}": ("accelerator_config.split_batch", "split_batches"),
    "liger_kernel_config: {rope_: true}": ("liger_kernel_config.rope_", "rope"),
    "env: {NCCL_DEBG: INFO}": ("env.NCCL_DEBG", "NCCL_DEBUG"),
    f"{SOURCE}    wieght: 1": ("dataset_mixture.datasets.0.wieght", "weight"),
    f"{SOURCE}    mapping:\n      respons: a": ("dataset_mixture.datasets.0.mapping.respons", "response"),
    f"{SOURCE}  sed: 1": ("dataset_mixture.sed", "seed"),
    f"{SOURCE}  stopping_strategy: all_exausted": ("dataset_mixture.stopping_strategy", "all_exhausted"),
}
OTHERS = {
    "max_steps: 10.5": "max_steps is integer; found 10.5",
    "max_steps: ten": "max_steps is integer; found 'ten'",
    "learning_rate: fast": "learning_rate is number; found 'fast'",
    "learning_rate: -1e-5": "learning_rate must be at least 0; found -1e-05",
    "packing: perhaps": "packing is boolean; found 'perhaps'",
    "dtype: 16": "dtype is one of auto, bfloat16, float16, float32; found",
    "per_device_train_batch_size: 0": "per_device_train_batch_size must be at least 1; found 0",
    "seed: [1, 2]": "seed is integer; found [1, 2]",
    "save_steps: 5\nsave_steps: 6": "save_steps is said twice, first in line",
    "lr_scheduler_kwargs: {min_lr: 1e-6}\nlr_scheduler_type: cosine": "min_lr is no setting of cosine; it takes num_",
    "lr_scheduler_type: warmup_stable_decay": "warmup_stable_decay needs lr_scheduler_kwargs: {num_decay_steps: ...}",
    "plan_processes: 8": "plan_processes is what dry_run plans for; to train with as many, start them: accelerate",
    "lora_r: 8": "lora_r says nothing without an adapter: set use_peft: true",
    "load_in_4bit: true\nuse_peft: true\nload_in_8bit: true": "load_in_4bit and load_in_8bit exclude each other",
    "fp16: true\nbf16: true": "fp16 and bf16 exclude each other",
    "load_best_model_at_end: true": "save_strategy (steps) and eval_strategy (no) the same",
    "packing: true\nmax_length: null": "packing needs max_length",
    "packing: true\npacking_strategy: wrapped\npadding_free: true": "leave padding_free out, or",
    "eval_packing: true": "eval_packing without packing",
    "dataloader_prefetch_factor: 4": "set dataloader_num_workers, too",
    "supervision: full\nassistant_only_loss: true": "keep supervision",
    "callbacks: [push_to_hub_revision]": "push_to_hub_revision needs hub_model_id",
    "env: {LD_PRELOAD: evil.so}": "env.LD_PRELOAD is not a setting",
    "env: {PATH: /tmp}": "env.PATH is not a setting",
    "env: {HTTPS_PROXY: evil}": "env.HTTPS_PROXY is not a setting",
    "hub_token: hf_abcdefghijklmnopABCDEFGHIJKLMN0123": "hub_token holds a token or a password",
    "run_name: hf_abcdefghijklmnopABCDEFGHIJKLMN0123": "run_name holds a token or a password",
    "model_init_kwargs: {token: abc}": "model_init_kwargs.token holds a token or a password",
}


@pytest.fixture
def mistakes(tmp_path):
    def mistakes(text):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        with pytest.raises(UserError) as error:
            load_recipe(["--config", str(path)])
        return str(error.value).replace(f"{tmp_path}/", "").splitlines()

    return mistakes


def with_data(text):
    return ENOUGH + ("" if "dataset_mixture" in text else "dataset_name: d\n") + text + "\n"


@pytest.mark.parametrize(("text", "expected"), MISSPELT.items())
def test_a_misspelling_is_named_with_what_was_meant(mistakes, text, expected):
    key, meant = expected
    (said,) = mistakes(with_data(text))
    line = len(with_data(text).splitlines())
    assert said.startswith(f"r.yaml:{line}: {key} is ")
    hint = said.rpartition("; ")[2]
    assert meant in hint.removeprefix("did you mean ").removesuffix("?").split(" or ") if meant else "--help" in hint


@pytest.mark.parametrize(("text", "expected"), OTHERS.items())
def test_a_mistake_is_named_with_its_line(mistakes, text, expected):
    said = [message for message in mistakes(with_data(text)) if expected in message]
    assert len(said) == 1
    last = len(with_data(text).splitlines())
    assert said[0].startswith(tuple(f"r.yaml:{line}: " for line in range(last - text.count("\n"), last + 1)))
    assert "hf_abc" not in said[0] and "'abc'" not in said[0]


def test_there_are_forty():
    assert len(MISSPELT) + len(OTHERS) >= 40


def everything():
    """One file with a mistake in every line of its own that can stand beside the others."""
    alone = [text for text in (*MISSPELT, *OTHERS) if "\n" not in text]
    keys = {}
    for text in alone:
        keys.setdefault(text.partition(":")[0], text)
    return with_data("\n".join(keys.values())), keys


def test_all_mistakes_of_a_file_come_at_once(mistakes):
    text, keys = everything()
    said = mistakes(text)
    for number, line in enumerate(text.splitlines(), 1):
        if line.partition(":")[0] in keys and line != "eval_packing: true":  # packing is a mistake itself
            assert any(message.startswith(f"r.yaml:{number}: ") for message in said), line
    assert len(said) >= len(keys) - 1


def test_they_come_twenty_times_faster_than_from_trl(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(everything()[0])

    def seconds(*argv):
        started = time.perf_counter()
        done = subprocess.run([*map(str, argv)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0
        return time.perf_counter() - started

    ours = statistics.median(seconds(sys.executable, "src/open_r1/sft.py", "--config", path) for _ in range(5))
    assert ours < 0.5
    assert seconds(Path(sys.executable).parent / "trl", "sft", "--config", path) > 20 * ours


def test_a_command_line_is_told_what_was_meant_beside_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text(ENOUGH + "dataset_name: d\nmax_step: 3\n")
    with pytest.raises(UserError) as error:
        load_recipe(["--config", str(tmp_path / "r.yaml"), "--learning_rat", "1e-5", "--sed=3", "stray.yaml"])
    assert str(error.value).replace(f"{tmp_path}/", "").splitlines() == [
        "command line: --learning_rat is not a setting; did you mean learning_rate?",
        "command line: --sed is not a setting; did you mean seed?",
        "command line: a recipe is given with --config; found stray.yaml",
        "r.yaml:3: max_step is not a setting (found 3); did you mean max_steps?",
    ]
