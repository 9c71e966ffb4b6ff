"""Real launches: ZeRO on two processes, processes killed with SIGKILL, and the demo's own command.

The first ZeRO launch builds one DeepSpeed op (about two minutes, cached in TORCH_EXTENSIONS_DIR).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from conftest import ROOT, losses, settings
from kill_harness import TOKEN, kill
from test_trackers import notes, write_wandb
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPE = "recipes/demo/sft/config_docstrings.yaml"


def environment():
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def command(config, argv):
    """Plain Python without a launch config, else `accelerate launch` on two processes."""
    if config is None:
        return [sys.executable, "src/open_r1/sft.py", *map(str, argv)]
    launcher = ["accelerate", "launch", "--config_file", f"recipes/accelerate_configs/{config}.yaml"]
    return [*launcher, "--num_processes", "2", "--main_process_port", "0", "src/open_r1/sft.py", *map(str, argv)]


def run(config, argv):
    done = subprocess.run(command(config, argv), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


class TestDocstringRecipe:
    """The second real input: some 8,000 conversations of natural length, 50 steps, launched four ways."""

    @pytest.fixture(scope="class")
    def history(self, docstrings, tmp_path_factory):
        found = {}
        for config in (None, "ddp", "zero2", "zero3"):
            out = tmp_path_factory.mktemp("runs") / str(config)
            argv = ["--config", RECIPE, "--use_cpu", "--disable_tqdm", "--output_dir", out]
            argv += ["--model_name_or_path", docstrings / "model", "--dataset_name", docstrings / "docstrings.jsonl"]
            argv += ["--per_device_train_batch_size", 4 if config else 8]
            output = run(config, argv)
            assert "train, rows" in output
            assert "of 2 answers stopped within 64 tokens" in output  # verified from disk, whoever held the weights
            found[config] = losses(out)
        return found

    def test_the_loss_falls(self, history):
        for values in history.values():
            assert len(values) == 50
            assert values[-1] < values[0] - 1

    @pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
    def test_every_launch_gives_the_losses_of_one_process(self, history, config):
        assert history[config] == pytest.approx(history[None], abs=1e-3)


@pytest.mark.parametrize("config", [None, "ddp", "zero2", "zero3"])
@pytest.mark.parametrize("packing", [False, True], ids=["unpacked", "packed"])
def test_killed_and_started_again_it_is_the_same_run(config, packing, tiny_model, chat_file, tmp_path):
    def argv(out):
        return settings(
            model_name_or_path=tiny_model,
            dataset_name=chat_file,
            output_dir=out,
            packing=packing,
            dataset_max_samples=50,  # several epochs, so that most kills are in a later one
            max_steps=40,
            save_steps=5,
            save_total_limit=3,
        )

    run(config, argv(tmp_path / "whole"))
    torn = tmp_path / "torn"
    target = random.Random(f"{config}{packing}").randint(6, 30)
    token = uuid.uuid4().hex
    with subprocess.Popen(
        command(config, argv(torn)),
        cwd=ROOT,
        env={**environment(), TOKEN: token},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        seen = 0
        for line in process.stdout:
            seen += "  loss " in line
            if seen == target:
                break
        kill(token, [process.pid])  # workers, too: they are in sessions of their own
    assert json.loads((torn / "run_state.json").read_text())["status"] == "running"
    assert "resuming from" in run(config, argv(torn))
    assert losses(torn) == losses(tmp_path / "whole")
    assert len(losses(torn)) == 40
    assert (torn / "order.jsonl").read_text() == (tmp_path / "whole" / "order.jsonl").read_text()
    one, two = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "whole", torn))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_preempted_and_started_again_it_is_one_run_in_wandb(tiny_model, chat_file, tmp_path):
    write_wandb(tmp_path)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    told = {**environment(), "PYTHONPATH": path, "NOTES": str(tmp_path / "notes"), "PACE": "0.2"}
    data = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "dataset_max_samples": 50}
    words = command("ddp", settings(**data, output_dir=tmp_path / "run", max_steps=20, report_to="wandb"))
    with subprocess.Popen(words, cwd=ROOT, env=told, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not ((tmp_path / "notes").exists() and notes(tmp_path / "notes", "log")[2:]):
            time.sleep(0.02)
        process.terminate()
    assert json.loads((tmp_path / "run" / "run_state.json").read_text())["status"] == "preempted"
    assert subprocess.run(words, cwd=ROOT, env=told, capture_output=True).returncode == 0
    assert [note["RANK"] for note in notes(tmp_path / "notes", "init")] == ["0", "0"]
    begun = notes(tmp_path / "notes", "setup")
    assert sorted(note["RANK"] for note in begun) == ["0", "0", "1", "1"]
    known = json.loads((tmp_path / "run" / "run_state.json").read_text())["run_id"]
    assert {(note["WANDB_RUN_ID"], note["WANDB_RESUME"]) for note in begun} == {(known, "allow")}
    steps = [note["step"] for note in notes(tmp_path / "notes", "log")]
    assert sorted({*steps}) == [*range(1, 21)]
    assert steps == sorted(steps)


@pytest.mark.parametrize("config", [None, "zero3"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_added_chat_tokens_survive_sharding(config, peft, tmp_path, pairs, chat_file):
    from make_docstrings import write_model

    texts = [text for pair in pairs[:50] for text in pair]
    write_model(tmp_path / "bare", texts, 400, 32, 1, special=["<|endoftext|>"])
    run(
        config,
        settings(
            model_name_or_path=tmp_path / "bare",
            dataset_name=chat_file,
            output_dir=tmp_path / "run",
            use_peft=peft,
            lora_target_modules="all-linear" if peft else None,
            learning_rate=1e-2,
        ),
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert (len(tokenizer), tokenizer.eos_token) == (402, "<|im_end|>")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "bare").get_input_embeddings().weight
    if peft:
        from safetensors.torch import load_file

        saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
        end = next(value for name, value in saved.items() if "embed_tokens" in name)
        assert any("lm_head" in name for name in saved)
    else:
        end = AutoModelForCausalLM.from_pretrained(tmp_path / "run").get_input_embeddings().weight
    assert end.shape == (402, 32)
    assert torch.isfinite(end.float()).all()
    # Old rows moved a little from where they were, new rows lie among them: nothing was scrambled by the shards.
    assert (end[:400].float() - start).abs().max() < 0.1
    assert 0 < (end[400:].float() - start.mean(0)).norm(dim=1).max() < 2 * start.norm(dim=1).max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the processes find each other")
def test_processes_that_would_train_alone_are_refused(tiny_model, chat_file, tmp_path):
    argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=tmp_path / "run", use_cpu=None)
    done = subprocess.run(command("ddp", argv), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert "2 processes were launched, but each would train alone" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_second_start_while_the_first_prepares_does_the_work_once(tiny_model, docstrings, tmp_path):
    def argv(out):
        return settings(
            model_name_or_path=tiny_model, dataset_name=docstrings / "docstrings.jsonl", output_dir=out, max_length=96
        )

    started = [
        subprocess.Popen(command(None, argv(tmp_path / str(n))), cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
        for n in range(2)
    ]
    outputs = [process.communicate()[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum("Tokenizing" in output for output in outputs) <= 1
    assert losses(tmp_path / "0") == losses(tmp_path / "1")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "train_results.json", "README.md"])
def test_killed_during_the_final_save_the_next_start_finishes_it(file, tiny_model, chat_file, tmp_path):
    def argv(out):
        return settings(
            model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=out, max_steps=6, save_steps=3
        )

    run(None, argv(tmp_path / "whole"))
    torn = tmp_path / "torn"
    token = uuid.uuid4().hex
    with subprocess.Popen(
        command(None, argv(torn)),
        cwd=ROOT,
        env={**environment(), TOKEN: token},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not (torn / file).exists() and process.poll() is None:
            pass
        kill(token, [process.pid])  # workers, too: they are in sessions of their own
    assert process.returncode == -signal.SIGKILL
    run(None, argv(torn))
    assert json.loads((torn / "run_state.json").read_text())["status"] == "complete"
    one, two = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "whole", torn))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (torn / "checkpoint-6" / "optimizer.pt").exists()
    assert losses(torn) == losses(tmp_path / "whole")


def test_an_evaluation_that_fails_on_one_process_ends_all(tiny_model, chat_file, tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(
        "import os\nfrom open_r1 import sft\nfrom open_r1.trainer import OrderedTrainer\n"
        "evaluate = OrderedTrainer.evaluate\n"
        "def planted(self, *args, **kwargs):\n"
        "    if self.args.process_index == 1 and not self.is_in_train:\n"
        "        raise RuntimeError('a planted fault')\n"
        "    return evaluate(self, *args, **kwargs)\n"
        "OrderedTrainer.evaluate = planted\nsft.leave(sft.main())\n"
    )
    argv = settings(
        model_name_or_path=tiny_model,
        dataset_name=chat_file,
        output_dir=tmp_path / "run",
        test_split_size=8,
        do_eval=True,
    )
    words = [str(script) if word == "src/open_r1/sft.py" else word for word in command("ddp", argv)]
    assert subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, timeout=150).returncode == 1
    state = json.loads((tmp_path / "run" / "run_state.json").read_text())
    assert (state["status"], state["reason"]) == ("failed", "process 1: RuntimeError: a planted fault")
    assert (tmp_path / "run" / "model.safetensors").exists()
