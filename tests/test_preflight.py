"""The check before training: each thing that can be known is found, and a healthy run is told nothing."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from conftest import ROOT, settings, write_jsonl
from peft import LoraConfig, get_peft_model
from plan import main as plan_main
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MambaConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from open_r1 import memory
from open_r1.memory import device_memory
from open_r1.sft import main

THOUGHTS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nEins."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nZwei."},
]


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model to change."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def checked(tiny_model, chat_file, tmp_path, capsys):
    """Check a recipe; returns the exit code, findings as (level, text, remedy) and the plan."""

    def checked(**values):
        common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "output_dir": tmp_path / "run"}
        code = main(settings(**{**common, "max_length": 512, **values}, dry_run="json"))
        said = capsys.readouterr()
        if code == 2:
            return code, said.err, None
        found = json.loads(said.out)
        return code, [tuple(finding.values()) for finding in found["findings"]], found["plan"]

    return checked


def test_a_healthy_run_is_told_nothing(checked, tmp_path, conversations):
    code, findings, plan = checked(num_train_epochs=2, max_steps=-1, eval_strategy="epoch", test_split_size=60)
    assert (code, findings) == (0, [])
    assert (plan["rows"], plan["eval_rows"], plan["steps_per_epoch"], plan["steps"]) == (540, 60, 270, 540)
    assert plan["tokens"] > plan["supervised_tokens"] > 0
    assert not (tmp_path / "run" / "run_state.json").exists()


def test_people_and_machines_are_told_the_same(tiny_model, chat_file, tmp_path, capsys):
    argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=tmp_path / "run")
    assert main([*argv, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "steps               2\n" in out and "checked: this recipe can be run" in out
    assert main([*argv, "--dry_run", "--eos_token", "<|endoftext|>"]) == 1
    out = capsys.readouterr().out
    assert "error   the chat template ends a turn with <|im_end|>, but EOS is <|endoftext|>" in out
    assert "this recipe cannot be run" in out


def test_a_run_stops_before_weights(tiny_model, chat_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("open_r1.model.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=tmp_path / "run")
    assert main([*argv, "--eos_token", "<|endoftext|>"]) == 2
    assert "but EOS is <|endoftext|>" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run_state.json").exists()


def found(findings, level, text):
    (finding,) = [each for each in findings if text in each[1]]
    assert finding[0] == level and finding[2]
    return finding


def test_eos_that_nothing_learns(checked, tmp_path, tokenizer):
    ids = tokenizer("one and two")["input_ids"]
    rows = [{"input_ids": [*ids, tokenizer.convert_tokens_to_ids("<|im_end|>")], "labels": [*ids, -100]}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows * 9)
    code, findings, _ = checked(dataset_name=path)
    assert code == 0
    found(findings, "warning", "EOS (<|im_end|>) is in the labels of none of 9 rows")
    long = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 99}]}] * 9
    code, findings, _ = checked(dataset_name=write_jsonl(tmp_path / "long.jsonl", long), max_length=48)
    assert code == 1
    assert any("EOS (<|im_end|>) is in the labels of none of 9 rows" in text for _, text, _ in findings)
    rows[0]["labels"] = rows[0]["input_ids"]
    assert checked(dataset_name=write_jsonl(path, rows * 9))[:2] == (0, [])


def test_two_bos(checked, model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.save_pretrained(model)
    end, bos = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": [bos, bos, 5, 6, end]}] * 3)
    code, findings, _ = checked(model_name_or_path=model, dataset_name=path)
    assert code == 1
    found(findings, "error", "rows begin with two BOS tokens")
    write_jsonl(path, [{"input_ids": [bos, 5, 6, end]}] * 3)
    assert checked(model_name_or_path=model, dataset_name=path)[:2] == (0, [])


def test_reasoning_that_the_template_strips(checked, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": THOUGHTS}] * 3)
    code, findings, _ = checked(dataset_name=path, chat_template="qwen3")
    assert code == 0
    found(findings, "note", "the chat template rewrites earlier turns")
    assert checked(dataset_name=path)[:2] == (0, [])  # ChatML leaves it


def test_answers_that_lose_their_end(checked):
    code, findings, _ = checked(max_length=48)
    assert code == 0
    found(findings, "warning", "answers lose their end to max_length 48")


def test_everything_supervised(checked, tmp_path):
    rows = [{"prompt": "", "completion": "four"}] * 3
    _, findings, _ = checked(dataset_name=write_jsonl(tmp_path / "rows.jsonl", rows))
    found(findings, "warning", "every token is learnt, prompts too")
    rows = [{"prompt": "two and two is ", "completion": "four"}] * 3
    assert checked(dataset_name=write_jsonl(tmp_path / "rows.jsonl", rows))[1] == []


def test_a_context_that_is_too_short(checked, model):
    config = AutoConfig.from_pretrained(model)
    config.max_position_embeddings = 64
    config.save_pretrained(model)
    code, findings, _ = checked(model_name_or_path=model)
    assert code == 1
    found(findings, "error", "tokens are longer than the 64 positions of")
    assert checked(model_name_or_path=model, max_length=64)[0] == 0
    assert checked(model_name_or_path=model, model_init_kwargs={"max_position_embeddings": 512})[0] == 0
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
    }
    config.save_pretrained(model)
    assert checked(model_name_or_path=model)[0] == 0


def test_a_generation_config_that_cannot_be_saved(checked, model):
    path = model / "generation_config.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**said, "return_dict_in_generate": False, "output_scores": True}))
    code, findings, _ = checked(model_name_or_path=model)
    assert code == 1
    found(findings, "error", "generation_config.json cannot be saved again")
    path.write_text(json.dumps({**said, "temperature": 0.5}))  # which is mended
    assert checked(model_name_or_path=model)[:2] == (0, [])


def test_lora_targets_that_are_not_there(checked):
    code, findings, _ = checked(use_peft=True, lora_target_modules=["q_proj", "nothing"])
    assert code == 0  # peft is content with one that matches
    code, findings, _ = checked(use_peft=True, lora_target_modules=["nothing"])
    assert code == 1
    assert "q_proj" in found(findings, "error", "lora_target_modules: ")[2]


def test_a_stop_token_that_looks_untrained(checked, model):
    weights = load_file(model / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    end = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<|im_end|>")
    weights[name][end] *= 0.01
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    code, findings, _ = checked(model_name_or_path=model, use_peft=True)
    assert code == 0
    found(findings, "warning", "the embedding of <|im_end|> looks untrained")
    assert checked(model_name_or_path=model)[1] == []  # trained in full, it learns
    assert checked(use_peft=True)[1] == []


def test_new_tokens_that_an_adapter_does_not_train(checked, tmp_path, pairs):
    from make_docstrings import write_model

    texts = [text for pair in pairs[:50] for text in pair]
    write_model(tmp_path / "bare", texts, 400, 32, 1, special=["<|endoftext|>"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "bare")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(tmp_path / "bare").save_pretrained(tmp_path / "adapter")
    code, findings, _ = checked(model_name_or_path=tmp_path / "adapter", use_peft=True)
    assert code == 1
    found(findings, "error", "are new to the vocabulary, and the adapter")
    assert checked(model_name_or_path=tmp_path / "bare", use_peft=True)[0] == 0


def test_packing_where_documents_leak(checked, model):
    config = MambaConfig(vocab_size=600, hidden_size=32, num_hidden_layers=1, state_size=4)
    config.save_pretrained(model)
    code, findings, _ = checked(model_name_or_path=model, packing=True)
    assert code == 1
    found(findings, "error", "packing: the layers of mamba carry a state")
    assert checked(model_name_or_path=model, plan_gpu="X-1GB")[0] == 0
    assert checked(packing=True)[:2] == (0, [])


def test_evaluation_without_data_and_a_source_without_rows(checked, tmp_path, chat_file):
    code, said, _ = checked(eval_strategy="epoch")
    assert code == 2 and "set dataset_test_split, test_split_size or eval_dataset_name" in said
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    mixture = {"datasets": [{"id": chat_file}, {"id": str(empty)}]}
    code, said, _ = checked(dataset_name=None, dataset_mixture=mixture)
    assert code == 2 and "empty.jsonl: holds no rows" in said


def test_too_little_disk(checked, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("open_r1.preflight.shutil.disk_usage", lambda path: usage(2**30, 0, 2**18))
    code, findings, _ = checked()
    assert code == 1
    found(findings, "error", "checkpoints and the model take")
    assert checked(save_strategy="no", save_only_model=True)[0] == 0


def test_packages_that_are_not_there(checked):
    code, findings, _ = checked(optim="galore_adamw", optim_target_modules="all-linear")
    assert code == 1
    found(findings, "error", "optim: ")
    assert checked(optim="adamw_torch")[0] == 0


def test_a_gpu_that_is_too_small(checked, monkeypatch):
    monkeypatch.setattr("open_r1.preflight.HEADROOM", 0.1)
    common = {"plan_gpu": "X-1GB", "activation_checkpointing": True}
    code, findings, plan = checked(**common, per_device_train_batch_size=256)
    assert code == 1
    remedy = found(findings, "error", "a device would need")[2]
    assert remedy.startswith("set per_device_train_batch_size: ")
    assert plan["memory_bytes"]["total"] > 0.1 * plan["gpu_bytes"] == 0.1 * 2**30
    batch = int(remedy.removeprefix("set per_device_train_batch_size: ").partition(",")[0])
    assert f"gradient_accumulation_steps: {256 // batch}" in remedy
    more = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 256 // batch}
    assert checked(**common, **more)[0] == 0
    code, findings, _ = checked(plan_gpu="nothing")
    assert code == 1 and "plan_gpu: 'nothing' is none of" in findings[0][1]


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"memory.max": "max\n"}, None),
        ("0::/", {"memory.max": "1073741824\n"}, 2**30),
        ("0::/slurm/job_7/task", {"slurm/job_7/memory.max": str(2**31), "slurm/memory.max": "max"}, 2**31),
        ("5:cpu:/x\n6:memory:/docker/ab\n0::/", {"memory/memory.limit_in_bytes": str(2**31)}, 2**31),
        ("5:cpu:/x\n6:memory:/", {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, None),
        ("", {}, None),
    ],
)
def test_memory_is_what_a_container_may_take(groups, files, expected, tmp_path, monkeypatch):
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "cgroup")
    assert memory.main_memory() == (expected or memory.psutil.virtual_memory().total)


# Prints the faults of pages that ten tensors of 64 MiB, 16,384 pages each, cost one behind the other.
FAULTS = """
import resource, sys, torch
if sys.argv[1:]:
    from open_r1.memory import keep_freed_memory
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.empty(2**24).zero_()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_is_kept():
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS, *kept], stdout=subprocess.PIPE, check=True).stdout)
        for kept in ([], ["kept"])
    ]
    assert faults[0] >= 10 * 16384 > 3 * faults[1]  # other memory can lie in between at first


@pytest.mark.parametrize(("name", "gib"), [("H100", 80), ("a100-40GB", 40), ("RTX4090-24gb", 24)])
def test_gpus_by_name(name, gib):
    assert device_memory(name) == gib * 2**30
    assert device_memory(None) is None or torch.cuda.is_available()


@pytest.mark.parametrize("values", [{}, {"use_peft": True}], ids=["full", "lora"])
def test_checkpoints_are_as_large_as_planned(checked, tiny_model, chat_file, tmp_path, values):
    _, _, plan = checked(**values)
    argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=tmp_path / "real", **values)
    assert main(argv) == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "real" / "checkpoint-2").iterdir()}
    written = sum(size for name, size in sizes.items() if name.endswith("safetensors") or name == "optimizer.pt")
    assert written == pytest.approx(plan["checkpoint_bytes"], rel=0.25, abs=30_000)


def test_time_is_known_from_an_earlier_run(checked, tiny_model, chat_file, tmp_path, capsys):
    assert checked()[2]["seconds"] is None
    argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=tmp_path / "run", max_length=512)
    assert main(argv) == 0
    capsys.readouterr()  # the summary of the run
    rate = json.loads((tmp_path / "run" / "manifest.json").read_text())["results"]["tokens_per_second"]
    _, _, plan = checked(max_steps=900)
    assert plan["seconds"] == pytest.approx(plan["tokens"] * 900 / plan["steps_per_epoch"] / rate, abs=1)


def test_batches_that_could_be_larger(checked, monkeypatch):
    common = {"plan_gpu": "X-1GB", "packing": True, "max_length": 512, "gradient_accumulation_steps": 12}
    small = {**common, "per_device_train_batch_size": 2, "activation_checkpointing": False}
    code, findings, plan = checked(**small)
    assert code == 0
    remedy = found(findings, "note", "batches of 1,024 tokens leave a GPU waiting")[2]
    assert remedy == "per_device_train_batch_size: 8 with global_batch_size: 24, same steps"  # 12 can be halved twice
    code, findings, larger = checked(**{**small, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3})
    assert findings == [] and larger["global_batch_size"] == plan["global_batch_size"] == 24
    needs = plan["memory_bytes"]
    told_by = needs["total"] + 3 * needs["activations"]
    assert larger["memory_bytes"]["total"] == pytest.approx(told_by, rel=0.01)

    monkeypatch.setattr("open_r1.preflight.FITS", (needs["total"] + 1.5 * needs["activations"]) / plan["gpu_bytes"])
    assert "per_device_train_batch_size: 4 " in found(checked(**small)[1], "note", "batches of 1,024")[2]
    monkeypatch.setattr("open_r1.preflight.FITS", needs["total"] / plan["gpu_bytes"])
    assert checked(**small)[1] == []
    monkeypatch.undo()
    monkeypatch.setattr("open_r1.preflight.BUSY", 1024)
    assert checked(**small)[1] == []
    monkeypatch.undo()
    assert checked(**{**small, "packing": False, "padding_free": False})[1] == []
    assert checked(**{**small, "activation_checkpointing": True})[1] == []


def test_a_plan_for_more_processes_than_are_here(checked):
    common = {"per_device_train_batch_size": 4, "max_steps": -1, "num_train_epochs": 3}
    _, _, here = checked(**common)
    assert (here["processes"], here["accumulation_steps"], here["global_batch_size"]) == (1, 1, 4)
    _, findings, plan = checked(**common, plan_processes=8, global_batch_size=64)
    assert (plan["processes"], plan["accumulation_steps"], plan["global_batch_size"]) == (8, 2, 64)
    assert findings == [] and plan["steps_per_epoch"] == plan["rows"] // 64 == 9 and plan["steps"] == 27
    code, said, _ = checked(**common, plan_processes=8, global_batch_size=48)
    assert code == 2 and "48 rows cannot be dealt out to 8 processes in batches of 4" in said
    more = {"gradient_accumulation_steps": 3, "global_batch_size": 64}
    code, said, _ = checked(**common, **more, plan_processes=8)
    assert code == 2 and "per_device_train_batch_size 4 x 8 processes" in said
    code, said, _ = checked(**common, plan_processes=256)
    assert code == 2 and "rows cannot fill one optimiser step, which takes 1024: " in said


def test_gpus_elsewhere_are_planned_for_and_not_this_machine(checked, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("open_r1.preflight.shutil.disk_usage", lambda path: usage(2**30, 0, 2**18))
    lacking = {"attn_implementation": "flash_attention_2", "report_to": "mlflow"}
    code, findings, plan = checked(plan_processes=2, save_total_limit=2, optim="galore_adamw", **lacking)
    assert code == 0 and [level for level, *_ in findings] == ["warning"] * 2
    assert "galore_torch, which is not installed" in findings[0][1] and "checkpoints" in findings[1][1]
    assert plan["memory_bytes"]["total"] > 0
    code, said, _ = checked(**lacking)
    assert code == 2 and "flash_attention_2 is not installed" in said
    # In bfloat16, which such GPUs have, and with less for it than in float32.
    totals = [checked(plan_processes=2, **more)[2]["memory_bytes"] for more in ({}, {"bf16": False})]
    assert totals[0]["activations"] < 0.95 * totals[1]["activations"]
    old = checked(plan_processes=2, plan_gpu="V100")[2]["memory_bytes"]
    assert old == totals[1]


def test_what_preparing_the_data_cost_is_told_again(checked):
    common = {"packing": True, "max_length": 137}
    first, second = checked(**common)[2], checked(**common)[2]
    told = ("preparation_seconds", "preparation_resident_bytes", "prepared_bytes")
    assert [first[key] for key in told] == [second[key] for key in told]
    assert 0 < first["preparation_seconds"] < 60 and first["preparation_resident_bytes"] > 2**27
    assert first["prepared_bytes"] > 8 * (2 * first["tokens"])  # ids and labels of rows, and of packs
    full = first["tokens"] / (first["packed_rows"] * 137)
    assert first["packing_efficiency"] == pytest.approx(full, abs=1e-4) and first["cut_tokens"] > 0


def test_plan_processes_are_for_a_dry_run(tiny_model, chat_file, tmp_path, capsys):
    argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=tmp_path / "run")
    assert main([*argv, "--plan_processes", "8"]) == 2
    assert "plan_processes is what dry_run plans for" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("launch", "shared", "whole"),
    [
        ("ddp", [], ["weights", "gradients", "optimizer"]),
        ("zero2", ["gradients", "optimizer"], ["weights"]),
        ("zero3", ["weights", "gradients", "optimizer"], []),
        ("fsdp2", ["weights", "gradients", "optimizer"], []),
    ],
)
def test_what_a_launch_config_shares_out(tiny_model, chat_file, tmp_path, capsys, monkeypatch, launch, shared, whole):
    if launch.startswith("zero"):
        pytest.importorskip("deepspeed")

    def planned(processes):
        monkeypatch.setattr(os, "environ", dict(os.environ))
        common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "output_dir": tmp_path / "run"}
        argv = ["--config_file", ROOT / f"recipes/accelerate_configs/{launch}.yaml", "--num_processes", processes]
        argv += [ROOT / "src/open_r1/sft.py", *settings(**common, bf16=True, dry_run="json")]
        assert plan_main([*map(str, argv)]) == 0
        unset_hf_deepspeed_config()
        return json.loads(capsys.readouterr().out)["plan"]

    few, many = planned(2), planned(32)
    assert (few["processes"], many["processes"]) == (2, 32)
    for part in shared:
        assert few["memory_bytes"][part] == pytest.approx(16 * many["memory_bytes"][part], rel=0.01)
    for part in whole:
        assert few["memory_bytes"][part] == many["memory_bytes"][part] > 0
    assert few["memory_bytes"]["activations"] == many["memory_bytes"]["activations"]
    each = many["parameters"] * (2 if launch.startswith("zero") else 4)
    assert many["memory_bytes"]["weights"] == pytest.approx(each / (32 if "weights" in shared else 1), rel=0.01)


def test_a_launch_config_must_say_how_many(tmp_path, capsys):
    config = str(ROOT / "recipes/accelerate_configs/ddp.yaml")
    assert plan_main(["--config_file", config, "sft.py"]) == 2
    assert "num_processes: gpu says nothing of other machines" in capsys.readouterr().err
    assert plan_main(["--config_file", str(tmp_path / "none.yaml"), "sft.py"]) == 2
    assert "none.yaml` does not exist" in capsys.readouterr().err


FOLLOW = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


@pytest.fixture
def offloaded(tiny_model, chat_file, tmp_path, capsys, monkeypatch):
    """The memory that is planned for two processes under ZeRO-3, with `zero_optimization` as given."""
    pytest.importorskip("deepspeed")

    def planned(**zero):
        monkeypatch.setattr(os, "environ", dict(os.environ))
        config = {"stage": 3, "reduce_bucket_size": 1000, "stage3_max_live_parameters": 1000, **zero}
        config["stage3_gather_16bit_weights_on_model_save"] = True
        path = tmp_path / "zero.json"
        path.write_text(json.dumps({"zero_optimization": config, **dict.fromkeys(FOLLOW, "auto")}))
        common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "output_dir": tmp_path / "run"}
        argv = ["--use_deepspeed", "--deepspeed_config_file", path, "--num_processes", 2, "--num_machines", 1]
        argv += ["--dynamo_backend", "no", "--mixed_precision", "no"]
        argv += [ROOT / "src/open_r1/sft.py", *settings(**common, bf16=True, dry_run="json")]
        assert plan_main([*map(str, argv)]) == 0
        unset_hf_deepspeed_config()
        return json.loads(capsys.readouterr().out)["plan"]["memory_bytes"]

    return planned


def test_what_is_offloaded_lies_in_main_memory(offloaded):
    here = offloaded()
    assert here["host"] == 0 < min(here[part] for part in ("weights", "gradients", "optimizer"))
    state = offloaded(offload_optimizer={"device": "cpu"})
    assert state["gradients"] == state["optimizer"] == 0 and state["weights"] == here["weights"]
    assert state["host"] == pytest.approx(here["gradients"] + here["optimizer"] * 4 / 3, rel=0.01)  # 12 + 4 bytes
    both = offloaded(offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    assert both["weights"] == 0 and both["host"] == pytest.approx(state["host"] + here["weights"], rel=0.01)
    assert here["total"] - both["total"] == sum(here[part] for part in ("weights", "gradients", "optimizer"))


def test_time_for_more_processes_is_that_of_one_shared_by_all(checked, tmp_path):
    (tmp_path / "run").mkdir()
    manifest = {"results": {"tokens_per_second": 1000}, "hardware": {"processes": 4, "gpu": "H100"}}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    more = {"max_steps": 5000}
    one, many = checked(**more)[2], checked(**more, plan_processes=16)[2]
    read = many["tokens"] * 5000 / many["steps_per_epoch"]
    assert one["seconds"] == pytest.approx(one["tokens"] * 5000 / one["steps_per_epoch"] / 1000, abs=1)
    assert many["seconds"] == pytest.approx(read / 4000, abs=1)
    manifest["hardware"]["gpu"] = None
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    assert checked(**more, plan_processes=16)[2]["seconds"] is None


def test_only_kernels_that_take_lengths_need_no_mask_of_all_pairs(checked):
    common = {"plan_processes": 1, "packing": True, "max_length": 512, "activation_checkpointing": True}

    def activations(attention, rows):
        values = {**common, "attn_implementation": attention, "per_device_train_batch_size": rows}
        return checked(**values)[2]["memory_bytes"]["activations"]

    assert activations("sdpa", 80) > 3 * activations("flash_attention_2", 80)
