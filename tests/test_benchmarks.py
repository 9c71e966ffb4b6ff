"""What lighteval is told of a saved model, and how its job is submitted."""

import json
import os
import shlex
from types import SimpleNamespace

import pytest
from conftest import ROOT, settings

from open_r1 import benchmarks, finish
from open_r1.benchmarks import BENCHMARKS, model_parameters, submit
from open_r1.errors import UserError
from open_r1.run_state import read_state
from open_r1.schema import SCHEMA
from open_r1.sft import main

QWEN = {"num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072}


def write(folder, config=QWEN, **others):
    folder.mkdir(exist_ok=True)
    for name, content in {"config": config, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


class TestWhatLightevalIsTold:
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "gpus", "split"),
        [(28, 4, 8, 4), (32, 8, 8, 8), (12, 2, 8, 2), (14, 2, 3, 1), (64, None, 4, 4)],
    )
    def test_as_many_gpus_as_divide_the_heads(self, tmp_path, heads, kv_heads, gpus, split):
        config = {**QWEN, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
        assert model_parameters(write(tmp_path, config), gpus, False)["tensor_parallel_size"] == split

    @pytest.mark.parametrize(
        ("positions", "length", "answer"), [(131072, 34816, 32768), (32768, 32768, 30720), (2048, 2048, 1536)]
    )
    def test_answers_leave_room_for_the_question(self, tmp_path, positions, length, answer):
        told = model_parameters(write(tmp_path, {**QWEN, "max_position_embeddings": positions}), 1, False)
        assert told["max_model_length"] == length
        assert told["generation_parameters"] == {"max_new_tokens": answer}

    def test_the_text_part_of_a_model_with_several(self, tmp_path):
        assert model_parameters(write(tmp_path, {"text_config": QWEN}), 8, False)["tensor_parallel_size"] == 4

    def test_the_sampling_of_the_model_itself(self, tmp_path):
        own = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": None, "eos_token_id": [1, 2]}
        told = model_parameters(write(tmp_path, generation_config=own), 1, False)["generation_parameters"]
        assert told == {"max_new_tokens": 32768, "temperature": 0.6, "top_p": 0.95}
        told = model_parameters(write(tmp_path, generation_config={**own, "do_sample": False}), 1, False)
        assert told["generation_parameters"] == {"max_new_tokens": 32768}

    def test_system_prompt_and_seed_that_it_was_trained_with(self, tmp_path):
        said = {"recipe": {"system_prompt": {"value": "Think, then say."}}, "settings": {"seed": 7}}
        told = model_parameters(write(tmp_path, manifest=said), 1, True)
        assert (told["system_prompt"], told["seed"], told["trust_remote_code"]) == ("Think, then say.", 7, True)

    def test_other_weights_in_the_same_place_are_asked_again(self, tmp_path):
        # lighteval keeps answers by what the model is told, not by its weights
        write(tmp_path)
        (tmp_path / "model.safetensors").touch()
        first = model_parameters(tmp_path, 1, False)
        assert first == model_parameters(tmp_path, 1, False)
        os.utime(tmp_path / "model.safetensors", (1, 1))
        assert first != model_parameters(tmp_path, 1, False)


class TestSubmission:
    @pytest.fixture
    def start(self, tmp_path, monkeypatch, caplog):
        """Submit a saved model's benchmarks; returns what sbatch was called with, and the log."""
        script, seen = tmp_path / "sbatch", tmp_path / "seen"
        script.write_text(f'#!/bin/sh\nprintf "%s\\0" "$PWD" "$@" >{seen}\nexit ${{CODE:-0}}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        for name in ("JOB_ID", "JOB_PARTITION", "JOB_ACCOUNT", "JOB_QOS"):
            monkeypatch.delenv(f"SLURM_{name}", raising=False)
        monkeypatch.setattr(benchmarks.logger, "propagate", True)
        caplog.set_level("INFO")

        def start(trust_remote_code=False, name="run", **files):
            out = write(tmp_path / name, **files)
            args = SimpleNamespace(output_dir=str(out), benchmarks=["aime24", "gsm8k|5"])
            args.trust_remote_code = trust_remote_code
            submit(args)
            return seen.read_text().split("\0")[:-1] if seen.exists() else None, caplog.messages

        return start

    def test_behind_the_job_that_trains(self, start, tmp_path, monkeypatch):
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
        called, _ = start(trust_remote_code=True, name="100% it's")
        out = f"{tmp_path}/100% it's"
        assert called == [
            *(str(ROOT), "--dependency=afterok:17", "--kill-on-invalid-dep=yes"),
            *(f"--output={tmp_path}/100%% it's/evaluation/%x-%j.out", "--partition=gpu", "slurm/evaluate.slurm"),
            *("--model", out, "--trust_remote_code", "--benchmarks", "aime24", "gsm8k|5"),
        ]
        assert (tmp_path / "100% it's" / "evaluation").is_dir()

    def test_not_behind_a_run_that_fails(self, start, tiny_model, chat_file, tmp_path, monkeypatch):
        def fails(*_):
            raise UserError("answers do not stop")

        monkeypatch.setattr(finish, "verification", fails)
        monkeypatch.setattr(finish, "submit", lambda args: pytest.fail("submitted"))
        data = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "dataset_max_samples": 40}
        out = tmp_path / "out"
        assert main(settings(**data, output_dir=out, max_steps=1, benchmarks="aime24")) == 1
        assert read_state(str(out))["reason"] == "the model is saved, but failed: verification"

    def test_outside_of_slurm_the_command_is_shown(self, start, tmp_path):
        called, messages = start()
        assert called is None
        words = ["bash", "slurm/evaluate.slurm", "--model", f"{tmp_path}/run", "--benchmarks", "aime24", "gsm8k|5"]
        assert messages == [f"benchmarks: cd {ROOT} && {shlex.join(words)}"]
        assert not (tmp_path / "run" / "evaluation").exists()

    def test_an_adapter_is_to_be_merged_first(self, start, tmp_path, monkeypatch):
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        called, [message] = start(adapter_config={})
        assert called is None
        assert f"&& python scripts/merge.py {tmp_path}/run {tmp_path}/run-merged && sbatch slurm/evaluate" in message
        assert f"--model {tmp_path}/run-merged --benchmarks aime24" in message

    def test_a_refusal_says_how_to_submit_it_by_hand(self, start, monkeypatch):
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        monkeypatch.setenv("CODE", "1")
        with pytest.raises(
            UserError, match="sbatch says why .* by hand: cd .* && sbatch slurm/evaluate.slurm --model"
        ):
            start()


def test_the_help_names_all():
    spec = SCHEMA["properties"]["benchmarks"]
    assert ", ".join([*BENCHMARKS, "all"]) in spec["description"]
    assert spec["items"]["examples"][:-1] == [*BENCHMARKS, "all"]
