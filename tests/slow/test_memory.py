"""The memory that is planned is what torch's allocator hands out in a real run, within 15 %, on a CPU and on a GPU."""

import gc
import itertools
import json

import pytest
from bench_gpu import METHODS, write_shape
from conftest import ROOT, settings
from datasets import Dataset
from make_docstrings import docstrings, write_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config
from trl import SFTTrainer

from open_r1.chat import get_tokenizer
from open_r1.configs import ModelConfig, SFTConfig
from open_r1.memory import plan_memory
from open_r1.model import adapter_config, adapters_at_work, get_model, weights_dtype
from open_r1.recipe import load_recipe
from open_r1.sft import build_configs
from open_r1.trainer import trainer_arguments

CASES = {
    "full": (2, 256, {}),
    "longer": (1, 1024, {}),
    "checkpointed": (2, 256, {"activation_checkpointing": True}),
    "packed": (2, 256, {"packing": True}),
    "accumulated": (2, 256, {"gradient_accumulation_steps": 2}),
    "lora": (2, 512, {"use_peft": True, "lora_r": 16}),
    "lora, checkpointed": (2, 512, {"use_peft": True, "activation_checkpointing": True}),
    "more rows": (4, 128, {}),
    "deeper": (2, 128, {"layers": 16}),
}

MEASURED = json.loads((ROOT / "docs/performance/gpu.json").read_text())["gpu"]["runs"]
ON_A_GPU = [run for run in MEASURED if run["side"] == "ours" and run["outcome"] == "done"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Qwen3 of 22M parameters and more, by layers."""

    def write(layers):
        path = tmp_path_factory.mktemp("model")
        write_model(path, itertools.chain.from_iterable(itertools.islice(docstrings(), 200)), 1000, 32, 1)
        config = Qwen3Config(
            vocab_size=32000,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        return path

    return {layers: write(layers) for layers in (6, 16)}


@pytest.mark.parametrize(("rows", "length", "values"), CASES.values(), ids=CASES)
def test_a_run_takes_what_was_planned(models, tmp_path, rows, length, values):
    path = models[values.pop("layers", 6)]
    argv = settings(
        model_name_or_path=path,
        dataset_name="unused",
        output_dir=tmp_path,
        max_length=length,
        per_device_train_batch_size=rows,
        save_strategy="no",
        **values,
    )
    _, args, model_args = build_configs(load_recipe(argv))
    tokenizer = get_tokenizer(model_args, args)
    dtype = weights_dtype(model_args, args)
    planned = plan_memory(AutoConfig.from_pretrained(path), dtype, model_args, args, length, len(tokenizer))["total"]
    lengths = {"seq_lengths": [length // 2, length - length // 2]} if args.packing else {}
    data = Dataset.from_list([{"input_ids": [5] * length, "labels": [5] * length, **lengths}] * 8)
    model = get_model(model_args, args, tokenizer)
    assert sum(parameter.numel() for parameter in model.parameters()) > 30e6
    gc.collect()  # of an earlier run, which would be taken off this one
    there = sum(parameter.nbytes for parameter in model.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = SFTTrainer(
            model=model,
            args=trainer_arguments(args),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=adapter_config(model_args, model, tokenizer),
        )
        with adapters_at_work(trainer.model, autocast=args.bf16):
            trainer.train()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    measured = there + max(now)
    print(f"{planned / 2**20:.0f} MiB planned, {measured / 2**20:.0f} measured, {planned / measured:.3f}")
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("run", [run for run in ON_A_GPU if "lora_dropout" not in run], ids=str)
def test_a_run_on_a_gpu_took_what_is_planned(run, tmp_path):
    """Of the figures that `bench.py gpu` has measured; those with `lora_dropout` cast what adapters are given."""
    write_shape(tmp_path, run["shape"])
    config, told = AutoConfig.from_pretrained(tmp_path / run["shape"]), run["settled"]
    args = SFTConfig(
        output_dir="unused",
        plan_processes=1,
        plan_gpu="H200",
        bf16=True,
        packing=True,
        max_length=run["context"],
        per_device_train_batch_size=told["per_device_train_batch_size"],
        gradient_accumulation_steps=2,
        activation_checkpointing=told["activation_checkpointing"],
        activation_checkpointing_kwargs=told.get("activation_checkpointing_kwargs"),
        use_liger_kernel=told["use_liger_kernel"],
    )
    lora = {key: value for key, value in METHODS[run["method"]].items() if "lora" in key or "peft" in key}
    model_args = ModelConfig(model_name_or_path="unused", attn_implementation=run["attention"], **lora)
    planned = plan_memory(config, told["dtype"], model_args, args, run["context"], config.vocab_size)["total"] / 2**30
    print(f"| {run['shape']}, {run['method']} | {run['context']:,} | {planned:.1f} | {run['allocated_gib']:.1f} |")
    assert planned == pytest.approx(run["allocated_gib"], rel=0.02)
