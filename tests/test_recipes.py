"""Every recipe in the repository parses, says only what it must, and trains two steps on tiny stand-ins."""

import json

import pytest
import yaml
from conftest import ROOT, losses, settings, write_jsonl
from datasets import Dataset, DatasetDict

from open_r1.recipe import SCHEMA, load_recipe
from open_r1.sft import main

RECIPES = sorted((ROOT / "recipes").glob("*/sft/*.yaml"))
NAMES = [str(path.relative_to(ROOT / "recipes")) for path in RECIPES]
SECTIONS = ["# Model", "# Data", "# Training", "# Evaluation", "# Saving and logging"]


def test_no_recipe_is_missed():
    assert len(RECIPES) == 9
    launch_configs = list((ROOT / "recipes" / "accelerate_configs").glob("*.yaml"))
    assert len(list((ROOT / "recipes").rglob("*.yaml"))) == len(RECIPES) + len(launch_configs)
    assert {path.stem for path in launch_configs} == {"ddp", "zero2", "zero3", "zero3_offload", "fsdp2"}


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


# As they were written in 2024 and 2025: the keys of Open-R1's and the handbook's recipes, today's stand-ins aside.
OF_THEIR_TIME = {
    "open-r1": r"""
model_name_or_path: {model}
model_revision: main
torch_dtype: bfloat16
attn_implementation: sdpa
chat_template: "{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\n' + message['content']
  + '<|im_end|>' + '\n' }}}}{{% endfor %}}\
  {{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
dataset_name: {data}
dataset_num_proc: 1
eos_token: <|im_end|>
bf16: true
do_eval: false
eval_strategy: 'no'
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
hub_strategy: every_save
learning_rate: 4.0e-05
log_level: info
logging_steps: 1
logging_strategy: steps
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
packing: false
max_grad_norm: 0.2
max_length: 512
max_steps: 2
num_train_epochs: 5
output_dir: {out}
overwrite_output_dir: true
per_device_eval_batch_size: 1
per_device_train_batch_size: 2
push_to_hub: false
benchmarks: [aime24, math_500, gpqa, lcb]
report_to:
- none
save_strategy: epoch
save_total_limit: 1
seed: 42
use_liger_kernel: false
warmup_ratio: 0.03
use_cpu: true
""",
    "handbook": """
model_name_or_path: {model}
torch_dtype: auto
use_flash_attention_2: false
dataset_mixer:
  {data}: 0.5
dataset_splits: [train_sft, test_sft]
preprocessing_num_workers: 1
dataset_kwargs:
  add_special_tokens: false
  append_concat_token: false
bf16: false
do_eval: true
evaluation_strategy: epoch
gradient_accumulation_steps: 1
gradient_checkpointing: true
gradient_checkpointing_kwargs: {{use_reentrant: false}}
hub_model_id: me/model
learning_rate: 2.0e-05
logging_steps: 1
lr_scheduler_type: cosine
max_seq_length: 512
max_steps: 2
output_dir: {out}
per_device_eval_batch_size: 2
per_device_train_batch_size: 2
push_to_hub: false
remove_unused_columns: true
report_to: [none]
save_strategy: "no"
save_steps: 0.05
seed: 42
warmup_ratio: 0.1
group_by_length: true
no_cuda: true
""",
}


@pytest.mark.parametrize("kind", OF_THEIR_TIME)
def test_a_recipe_of_its_time_is_read_checked_and_trains(kind, tiny_model, chat_file, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    rows = Dataset.from_json(chat_file, cache_dir=str(tmp_path / "cache"))
    DatasetDict(train_sft=rows, test_sft=rows.select(range(20))).save_to_disk(tmp_path / "saved")
    data = tmp_path / "saved" if kind == "handbook" else chat_file
    text = OF_THEIR_TIME[kind].format(model=tiny_model, data=data, out=tmp_path / "run")
    (tmp_path / "old.yaml").write_text(text)
    assert main(["--config", str(tmp_path / "old.yaml"), "--dry_run"]) == 0
    assert "this recipe can be run" in capsys.readouterr().out
    assert main(["--config", str(tmp_path / "old.yaml")]) == 0
    assert len(losses(tmp_path / "run")) == 2
    shown = f"slurm/evaluate.slurm --model {tmp_path}/run --benchmarks aime24 math_500 gpqa lcb"
    assert (shown in capsys.readouterr().err) == (kind == "open-r1")
