"""Two processes measure what one does: the same tokens, the same losses of each source, each row evaluated once."""

import json
import subprocess

import pytest
import torch
from conftest import ROOT, settings, write_jsonl
from test_launch import command, environment

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these are launches without a GPU")
STEPS = 8
COUNTS = ("padded_tokens", "real_tokens", "supervised_tokens")


@pytest.fixture(scope="module")
def argv(tiny_model, conversations, pairs, tmp_path_factory):
    """Settings of a run on two sources, evaluated on two sets of 13 and 6 rows: no whole number of any batches."""
    folder = tmp_path_factory.mktemp("two")
    write_jsonl(folder / "chat.jsonl", conversations[:40])
    write_jsonl(folder / "texts.jsonl", [{"text": text[:300]} for _, text in pairs[40:64]])
    write_jsonl(folder / "held.jsonl", conversations[100:113])
    write_jsonl(folder / "other.jsonl", [{"text": text} for _, text in pairs[120:126]])

    def argv(config, out, **values):
        sources = [{"id": str(folder / f"{name}.jsonl"), "name": name} for name in ("chat", "texts")]
        return settings(
            **{
                **{"model_name_or_path": tiny_model, "output_dir": out, "max_steps": STEPS, "dtype": "float32"},
                **{"dataset_mixture": {"datasets": sources}, "learning_rate": 3e-3, "logging_steps": 2},
                **{"per_device_train_batch_size": 4 if config is None else 2, "per_device_eval_batch_size": 3},
                "eval_datasets": [
                    json.dumps({"id": str(folder / f"{n}.jsonl"), "name": n}) for n in ("held", "other")
                ],
                **{"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no", **values},
            }
        )

    return argv


def run(config, words):
    done = subprocess.run(command(config, words), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def compared(line):
    """What a line says of tokens and losses, whoever computed it."""
    return {key: value for key, value in line.items() if "loss" in key or key.removeprefix("train_") in COUNTS}


@pytest.mark.parametrize("values", [{}, {"packing": True}, {"use_peft": True, "lora_target_modules": "all-linear"}])
def test_counts_and_losses_are_those_of_one_process(argv, tmp_path, values):
    values = {"lora_dropout": 0.0, **values} if "use_peft" in values else values
    run(None, argv(None, tmp_path / "alone", **values))
    expected = [compared(line) for line in lines_of(tmp_path / "alone")]
    assert len(expected) == STEPS // 2 + 2 + 1 + 1
    for config in ("ddp", "zero2", "zero3"):
        run(config, argv(config, tmp_path / config, **values))
        lines = lines_of(tmp_path / config)
        for line, one in zip(lines, expected, strict=True):
            found = compared(line)
            assert found.keys() == one.keys()
            for key, value in one.items():
                if "loss" in key and "tokens" not in key:
                    assert found[key] == pytest.approx(value, abs=1e-4), (config, key)
                elif key.removeprefix("train_") == "padded_tokens" and not values.get("packing"):
                    assert found[key] <= value  # a row is padded to the longest of its own process's
                else:
                    assert found[key] == value, (config, key)
        for line in lines:
            if "real_tokens_per_second" in line:  # of one device: half of what both do
                seconds = 2 * line["step_seconds"]
                assert line["supervised_tokens_per_second"] == pytest.approx(line["loss_tokens"] / (2 * seconds))


def test_a_window_goes_on_in_every_process(argv, tmp_path):
    values = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 4, "packing": True}
    run("zero3", argv("zero3", tmp_path / "whole", **values))
    (tmp_path / "torn").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "torn" / "checkpoint-3")
    run("zero3", argv("zero3", tmp_path / "torn", **values))
    whole, torn = ([compared(line) for line in lines_of(tmp_path / name)] for name in ("whole", "torn"))
    assert torn == whole
