"""Every launch config trains what one process trains, and launches that would not are refused.

accelerate takes FSDP for GPUs alone: for these tests `planted/sitecustomize.py` has it take fsdp2 on CPU and gloo. The
first launch of zero3_offload builds DeepSpeed's CPUAdam (some minutes, cached in TORCH_EXTENSIONS_DIR).
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, losses, settings
from test_launch import command, environment
from transformers import AutoModelForCausalLM

CONFIGS = ("ddp", "zero2", "zero3", "zero3_offload", "fsdp2")
STEPS, CLOSE = 20, 1e-4
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these are launches without a GPU")


def planted(config):
    """The environment of a launch, in which fsdp2 works without a GPU."""
    found = environment()
    if config == "fsdp2":
        found["FAULTS"] = json.dumps([{"do": "fsdp on cpu"}])
        found["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests/slow/planted"), os.environ.get("PYTHONPATH", "")])
    return found


@pytest.fixture
def inputs(tiny_model, chat_file):
    """Settings of a run of 20 steps of 4 rows, of which a launch config's two processes take 2 each."""

    def of(config, out, packing=False, peft=False, **values):
        adapter = {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.0} if peft else {}
        return settings(
            model_name_or_path=tiny_model,
            output_dir=out,
            packing=packing,
            dtype="float32",
            per_device_train_batch_size=4 if config is None else 2,
            learning_rate=3e-3,
            **{"dataset_name": chat_file, "max_steps": STEPS, "save_strategy": "no", **adapter, **values},
        )

    return of


def run(config, argv):
    done = subprocess.run(command(config, argv), cwd=ROOT, env=planted(config), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone():
    """Losses of one process, once for each way to train."""
    return {}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("packing", [False, True], ids=["unpacked", "packed"])
def test_every_config_has_the_losses_of_one_process(config, peft, packing, inputs, alone, tmp_path):
    if (peft, packing) not in alone:
        run(None, inputs(None, tmp_path / "alone", packing, peft))
        alone[peft, packing] = losses(tmp_path / "alone")
    expected = alone[peft, packing]
    run(config, inputs(config, tmp_path / "run", packing, peft))
    assert len(expected) == STEPS
    assert expected[-1] < expected[0] - 100 * CLOSE  # something was learnt
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=CLOSE)
    launched = {"ddp": "ddp", "zero2": "zero2", "fsdp2": "fsdp"}.get(config, "zero3")
    assert json.loads((tmp_path / "run" / "run_state.json").read_text())["launch"] == launched


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_activations_that_are_computed_again_change_no_loss(config, peft, inputs, alone, tmp_path):
    if (peft, False) not in alone:
        run(None, inputs(None, tmp_path / "alone", peft=peft))
        alone[peft, False] = losses(tmp_path / "alone")
    run(config, inputs(config, tmp_path / "run", peft=peft, activation_checkpointing=True))
    assert losses(tmp_path / "run") == pytest.approx(alone[peft, False], abs=CLOSE)


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3", "fsdp2"])
def test_answers_to_sample_prompts_change_nothing(config, inputs, tmp_path):
    """All processes answer together under ZeRO-3, else the first alone; what it costs is no loss and no time-out."""
    values = {"max_steps": 6, "sample_steps": 2, "sample_tokens": 8, "activation_checkpointing": True}
    values["activation_checkpointing_kwargs"] = {"every_n_layers": 2}
    prompts = ["What does it do?", "What is abc for?"]
    run(None, inputs(None, tmp_path / "one", sample_prompts=prompts, **values))
    said = run(config, inputs(config, tmp_path / "asked", sample_prompts=prompts, **values))
    run(config, inputs(config, tmp_path / "not", **values))
    assert losses(tmp_path / "asked") == losses(tmp_path / "not")
    one, asked = (tmp_path / name / "samples.jsonl" for name in ("one", "asked"))
    if config == "fsdp2":
        assert "sample_prompts: left out: under FSDP" in said and not asked.exists()
    else:
        assert [json.loads(line)["step"] for line in asked.read_text().splitlines()] == [0, 0, 2, 2, 4, 4, 6, 6]
        assert asked.read_text().splitlines()[:2] == one.read_text().splitlines()[:2]


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("config", ["zero3_offload", "fsdp2"])  # test_launch.py kills the others
def test_a_checkpoint_of_it_goes_on_and_what_is_saved_can_be_loaded(config, peft, inputs, tmp_path):
    def argv(out):
        return inputs(config, out, peft=peft, save_strategy="steps", save_steps=10)

    whole, later = tmp_path / "whole", tmp_path / "later"
    run(config, argv(whole))
    later.mkdir()
    shutil.copytree(whole / "checkpoint-10", later / "checkpoint-10")
    output = run(config, argv(later))
    assert f"resuming from {later / 'checkpoint-10'}" in output
    assert losses(later) == losses(whole)
    states = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (whole, later)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    weights = "adapter_model.safetensors" if peft else "model.safetensors"
    assert (whole / "checkpoint-10" / weights).exists() and (whole / weights).exists()


def test_fsdp2_cuts_the_model_up(inputs, tmp_path):
    """So that the proof above is one: the planted launch shards weights and optimizer."""
    script = tmp_path / "looking.py"
    script.write_text(
        "from open_r1 import sft, trainer\n"
        "from torch.distributed.tensor import DTensor\n"
        "step = trainer.OrderedTrainer.training_step\n"
        "def look(self, model, *args, **kwargs):\n"
        "    local = sum(each.to_local().numel() for each in model.parameters() if isinstance(each, DTensor))\n"
        "    print('SHARDED', local / sum(each.numel() for each in model.parameters()), flush=True)\n"
        "    return step(self, model, *args, **kwargs)\n"
        "trainer.OrderedTrainer.training_step = look\nsft.leave(sft.main())\n"
    )
    words = command("fsdp2", inputs("fsdp2", tmp_path / "run", max_steps=1))
    words[words.index("src/open_r1/sft.py")] = str(script)
    done = subprocess.run(words, cwd=ROOT, env=planted("fsdp2"), capture_output=True, text=True)
    shares = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("SHARDED")]
    assert len(shares) == 2 and all(0.45 < share < 0.55 for share in shares), done.stderr[-3000:]


# Launches that are not what they say


def refused(words, says, tmp_path, **variables):
    """Launch, and see that it ends soon with one message and without a model."""
    done = subprocess.run(
        words, cwd=ROOT, env={**environment(), **variables}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert done.stderr.count(says) == 1, done.stderr[-5000:]
    assert "goes on" not in done.stderr.partition(says)[0]
    assert not list(tmp_path.glob("run*/*.safetensors"))
    assert "  loss " not in done.stderr


def launch_config(path, base, **values):
    """A launch config like one of ours, with other values."""
    config = yaml.safe_load((ROOT / f"recipes/accelerate_configs/{base}.yaml").read_text())
    for name, value in values.items():
        config[name] = {**config[name], **value} if isinstance(config.get(name), dict) else value
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.mark.parametrize(
    ("base", "launcher", "script", "says"),
    [
        ("ddp", {"distributed_type": "MULTI_CPU"}, {}, "asked for several processes and started one"),
        ("ddp", ["--cpu"], {}, "asked for several processes and started one"),
        ("fsdp2", {}, {}, "says FSDP, which accelerate takes for GPUs alone"),
        ("fsdp2", ["--mixed_precision", "bf16"], {"bf16": False}, "mixed_precision: bf16, the recipe says no"),
        ("zero2", ["--mixed_precision", "bf16"], {"bf16": False}, "mixed_precision: bf16, the recipe says no"),
        ("ddp", ["--max_restarts", "2"], {}, "again up to 2 times"),
        ("zero2", {"deepspeed_config": {"gradient_accumulation_steps": 4}}, {}, "gradient_accumulation_steps: 4, and"),
        ("zero2", {"deepspeed_config": {"gradient_clipping": 0.5}}, {}, "gradient_clipping: 0.5, and the recipe"),
        ("zero2", {"deepspeed_config": {"zero_stage": 0}}, {}, "zero_stage: 0, which is DDP"),
        ("zero3", {"deepspeed_config": {"zero3_save_16bit_model": False}}, {}, "without zero3_save_16bit_model: true"),
        ("zero3_offload", {}, {"optim": "sgd"}, "optim: sgd would be replaced by DeepSpeedCPUAdam"),
        ("ddp", {}, {"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed: how a run is spread"),
        (
            "zero3",
            {"parallelism_config": {"parallelism_config_sp_size": 2}},
            {},
            "parallelism_config_sp_size: 2: sequence parallelism is not supported",
        ),
        (
            "fsdp2",
            {"parallelism_config": {"parallelism_config_cp_size": 2}},
            {},
            "parallelism_config_cp_size: 2: context parallelism is not supported",
        ),
    ],
)
def test_wrong_launches(base, launcher, script, says, inputs, tmp_path):
    more = launcher if isinstance(launcher, list) else []
    config = launch_config(tmp_path / "config.yaml", base, **({} if more else launcher))
    words = command(base, inputs(base, tmp_path / "run", **script))
    words[words.index("--config_file") + 1] = config
    refused([*words[:2], *more, *words[2:]], says, tmp_path)


def test_a_deepspeed_config_file_with_a_precision_of_its_own(inputs, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    config = {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = command("zero2", inputs("zero2", tmp_path / "run"))
    words[words.index("--config_file") + 1] = str(tmp_path / "config.yaml")
    refused(words, "bf16.enabled: True, and the recipe comes to False", tmp_path)


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_nobody_told_of_each_other(variable, inputs, tmp_path):
    refused(command(None, inputs(None, tmp_path / "run")), "2 processes", tmp_path, **{variable: "2"})


# Processes that are not of one mind. A script stands for machines: each process has a name and a folder of its own.

MACHINE = """
import os, platform, sys
rank = os.environ["RANK"]
platform.node = lambda: f"node{rank}"
os.environ["GROUP_RANK"] = rank
from open_r1 import processes, sft
processes.SEEN_WITHIN = 2
"""


def on_machines(code, argv, tmp_path, config="ddp"):
    script = tmp_path / "machine.py"
    script.write_text(MACHINE + code + "\nsft.leave(sft.main())\n")
    words = command(config, argv)
    words[words.index("src/open_r1/sft.py")] = str(script)
    return words


def test_processes_with_different_settings(inputs, tmp_path):
    code = 'if rank == "1":\n    sys.argv += ["--learning_rate", "1e-4"]\n'
    words = on_machines(code, inputs("ddp", tmp_path / "run"), tmp_path)
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    said = "learning_rate: 0.003 on node0 (process 0); 0.0001 on node1 (process 1)"
    assert done.stderr.count(said) == 2  # on every machine once
    assert not (tmp_path / "run").exists()


def test_processes_with_different_data(inputs, chat_file, tmp_path):
    other = tmp_path / "chat.jsonl"
    lines = Path(chat_file).read_text().splitlines(keepends=True)
    other.write_text("".join(lines[1:]))
    code = f'os.makedirs(f"{tmp_path}/{{rank}}")\nos.chdir(f"{tmp_path}/{{rank}}")\n'
    code += f'os.symlink({str(chat_file)!r} if rank == "0" else {str(other)!r}, "chat.jsonl")\n'
    argv = inputs("ddp", tmp_path / "run", dataset_name="chat.jsonl")
    words = on_machines(code, argv, tmp_path)
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("would train different things:\n  data: ") == 2
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_an_output_dir_of_each_machine(inputs, tmp_path):
    code = f'os.makedirs(f"{tmp_path}/{{rank}}")\nos.chdir(f"{tmp_path}/{{rank}}")\n'
    words = on_machines(code, inputs("ddp", "run"), tmp_path)
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    said = "output_dir: run on node1 (process 1) is not the directory of that name on node0"
    assert done.stderr.count(said) == 2
    assert not list(tmp_path.glob("*/run/*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_cannot_go_on_says_why(rank, inputs, tmp_path):
    """Also when it is not the first, and the launcher ends the others: that is no preemption."""
    code = "import time\nfrom open_r1 import preparation\nfrom open_r1.errors import UserError\n"
    code += "def prepare(*args):\n"
    code += f"    if rank == '{rank}':\n        raise UserError('row 7 is broken')\n    time.sleep(60)\n"
    code += "preparation.prepare = prepare\nos.environ['GROUP_RANK'] = '0'"
    refused(on_machines(code, inputs("ddp", tmp_path / "run"), tmp_path), "row 7 is broken", tmp_path)
    assert not (tmp_path / "run").exists()
