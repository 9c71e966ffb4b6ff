"""Every recipe in the repository parses, says only what it must, and trains two steps on tiny stand-ins."""

import json

import pytest
import yaml
from conftest import ROOT, losses, settings, write_jsonl

from open_r1.recipe import SCHEMA, load_recipe
from open_r1.sft import main

RECIPES = sorted((ROOT / "recipes").glob("*/sft/*.yaml"))
NAMES = [str(path.relative_to(ROOT / "recipes")) for path in RECIPES]
SECTIONS = ["# Model", "# Data", "# Training", "# Evaluation", "# Saving and logging"]


def test_no_recipe_is_missed():
    assert len(RECIPES) == 9
    launch_configs = list((ROOT / "recipes" / "accelerate_configs").glob("*.yaml"))
    assert len(list((ROOT / "recipes").rglob("*.yaml"))) == len(RECIPES) + len(launch_configs)
    assert {path.stem for path in launch_configs} == {"ddp", "zero2", "zero3", "fsdp2"}


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_is_strict_and_tidy(path):
    recipe = load_recipe(["--config", str(path)])
    assert recipe.notes == []  # today's keys only
    for key, value in recipe.values.items():
        assert value != SCHEMA["properties"][key].get("default"), f"{key} is the default; leave it out"
    lines = path.read_text().splitlines()
    assert (path.parent / lines[0].partition("$schema=")[2]).resolve() == ROOT / "src/open_r1/schema.json"
    found = [line for line in lines if line in SECTIONS]
    assert found == [section for section in SECTIONS if section in found]
    assert len(found) >= 4
    for word in ("# Launch", "# Override", "# Hardware", "# Expected", "# Not"):
        assert any(line.startswith(word) for line in lines), f"the header lacks {word}"


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_the_index_lists_the_recipe(path):
    assert str(path.relative_to(ROOT / "recipes")) in (ROOT / "recipes" / "README.md").read_text()


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory, conversations):
    """A file with every column that a recipe's sources name."""
    folder = tmp_path_factory.mktemp("stand-in")

    def write(columns):
        extra = (
            {"chat_template_kwargs": {"enable_thinking": False}} if "chat_template_kwargs" in (columns or []) else {}
        )
        return write_jsonl(
            folder / f"{'-'.join(columns or ['messages'])}.jsonl", [{**row, **extra} for row in conversations]
        )

    return write


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_trains_two_steps(path, tiny_model, stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes name their templates from here
    values = load_recipe(["--config", str(path)]).values
    replaced = {
        "model_name_or_path": tiny_model,
        "model_revision": "main",
        "output_dir": tmp_path / "run",
        "max_length": 2048,  # the longest system prompt of a template takes more than 512 of the stand-in's tokens
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "dataset_num_proc": 1,
        "report_to": "none",
        "attn_implementation": "sdpa",
    }
    if "optim" in values:
        replaced["optim"] = "adamw_torch"
    if "load_in_4bit" in values:
        replaced["load_in_4bit"] = False
    if mixture := values.get("dataset_mixture"):
        sources = [
            {key: source[key] for key in ("columns", "weight") if key in source}
            | {"id": stand_in(source.get("columns"))}
            for source in mixture["datasets"]
        ]
        replaced["dataset_mixture"] = {**mixture, "datasets": sources}
    else:
        replaced |= {"dataset_name": stand_in(None), "dataset_config": "none", "dataset_train_split": "train"}
        replaced["dataset_test_split"] = "train[:20]"
    assert main(["--config", str(path), *settings(**replaced)]) == 0
    assert len(losses(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run" / "run_state.json").read_text())["global_step"] == 2
    if values.get("eval_strategy"):
        assert losses(tmp_path / "run", "eval_loss")


def test_launch_configs_leave_precision_to_the_recipe():
    for path in (ROOT / "recipes" / "accelerate_configs").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"
