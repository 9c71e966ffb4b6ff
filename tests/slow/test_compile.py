"""`torch_compile` (on a CPU it needs a C++ compiler): layer by layer, the same losses, resumed, under plain names."""

import json
import os

import pytest
from conftest import losses, settings
from safetensors import safe_open

from open_r1.sft import main


def test_a_compiled_run_is_the_same_run(tiny_model, chat_file, tmp_path, monkeypatch):
    for name in ("BACKEND", "MODE", "USE_REGIONAL_COMPILATION"):  # which the run sets for accelerate
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "packing": True, "max_length": 256}
    common |= {"lr_scheduler_type": "constant", "sample_prompts": ["What is a list?"]}
    common |= {"test_split_size": 4, "eval_strategy": "steps", "eval_steps": 2}
    assert main(settings(**common, output_dir=tmp_path / "plain", max_steps=6)) == 0
    compiled = {**common, "output_dir": tmp_path / "compiled", "torch_compile": True}
    assert main(settings(**compiled, max_steps=3, save_steps=3)) == 0
    assert os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] == "true"
    assert main(settings(**compiled, max_steps=6, save_steps=3, allow_changes=["max_steps"])) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    plain, told = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "compiled")
    )
    for counted in ("supervised_tokens", "loss_tokens", "padded_tokens", "num_tokens"):
        values = [[line[counted] for line in lines if "loss" in line] for lines in (plain, told)]
        assert values[0] == values[1] and all(values[0]), counted
    evaluated = [{line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line} for lines in (plain, told)]
    assert evaluated[0].keys() >= {2, 4, 6} and evaluated[1].keys() >= {2, 4, 6}
    assert [evaluated[1][step] for step in (2, 4, 6)] == pytest.approx(
        [evaluated[0][step] for step in (2, 4, 6)], abs=1e-4
    )
    with safe_open(tmp_path / "compiled/model.safetensors", "pt") as saved:
        assert not [name for name in saved.keys() if "_orig_mod" in name]  # noqa: SIM118
