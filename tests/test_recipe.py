"""Recipes and command lines: what is read, what is refused, and that none of it needs torch."""

import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from open_r1.errors import UserError
from open_r1.old_names import RENAMED
from open_r1.recipe import SCHEMA, load_recipe, set_environment, written_out

ENOUGH = "model_name_or_path: m\ndataset_name: d\n"


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and load it, with command-line overrides."""

    def load(text, *argv, complete=True):
        path = tmp_path / "r.yaml"
        path.write_text((ENOUGH if complete else "") + text)
        return load_recipe(["--config", str(path), *argv])

    return load


def refusal(load, *args, **kwargs):
    with pytest.raises(UserError) as error:
        load(*args, **kwargs)
    return str(error.value)


def test_values_are_typed_and_say_where_they_come_from(recipe):
    got = recipe("learning_rate: 1e-5\nmax_steps: '10'\npacking: yes\nreport_to: wandb\n", "--max_steps", "20")
    assert got.values["learning_rate"] == 1e-5
    assert got.values["packing"] is True
    assert got.values["report_to"] == ["wandb"]
    assert got.values["max_steps"] == 20
    assert got.origin["learning_rate"].endswith("r.yaml:3")
    assert got.origin["max_steps"] == "command line"
    assert set(got.of("ModelConfig")) == {"model_name_or_path"}


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--packing"], "packing", True),
        (["--packing", "false"], "packing", False),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--learning_rate=3e-4"], "learning_rate", 3e-4),
        (["--eos_token", "<|im_end|>"], "eos_token", "<|im_end|>"),
        (
            ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", "{min_lr_rate: 0.1}"],
            "lr_scheduler_kwargs",
            {"min_lr_rate": 0.1},
        ),
        (
            ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"],
            "lora_target_modules",
            ["q_proj", "v_proj"],
        ),
        (["--max_length", "none"], "max_length", None),
        (["--group_by_length", "true"], "train_sampling_strategy", "group_by_length"),
        (["--warmup_ratio", "0.1"], "warmup_steps", 0.1),
        (["--resume_from_checkpoint", "false"], "resume", "never"),
        (["--resume_from_checkpoint", "true"], "resume", "must"),
        (["--resume_from_checkpoint", "out/checkpoint-5"], "resume", "out/checkpoint-5"),
        (["--run_name", "7"], "run_name", "7"),
        (["--dataset_config", "none"], "dataset_config", None),
    ],
)
def test_command_line(recipe, argv, key, value):
    assert recipe("", *argv).values[key] == value


def test_unquoted_no_means_no(recipe):
    assert recipe("eval_strategy: no\n").values["eval_strategy"] == "no"


OLD = {
    "torch_dtype: bfloat16": ("dtype", "bfloat16"),
    "max_seq_length: 2048": ("max_length", 2048),
    "model_max_length: 2048": ("max_length", 2048),
    "warmup_ratio: 0.03": ("warmup_steps", 0.03),
    "evaluation_strategy: epoch": ("eval_strategy", "epoch"),
    "no_cuda: true": ("use_cpu", True),
    "use_liger: true": ("use_liger_kernel", True),
    "group_by_length: true": ("train_sampling_strategy", "group_by_length"),
    "gradient_checkpointing: false": ("activation_checkpointing", False),
    "gradient_checkpointing_kwargs: {use_reentrant: false}": (
        "activation_checkpointing_kwargs",
        {"use_reentrant": False},
    ),
    "packing_strategy: ffd": ("packing_strategy", "bfd"),
    "push_to_hub_model_id: me/m": ("hub_model_id", "me/m"),
    "dataset_kwargs: {add_special_tokens: false, append_concat_token: false}": ("dataset_kwargs", None),
}


@pytest.mark.parametrize(("line", "today"), OLD.items())
def test_an_old_name_is_read_with_one_note_that_names_the_new_one(recipe, line, today):
    got = recipe(line + "\n")
    assert got.values[today[0]] == today[1]
    assert len(got.notes) == 1
    assert "r.yaml:3" in got.notes[0]
    if line.split(":")[0] in RENAMED:
        assert today[0] in got.notes[0]


@pytest.mark.parametrize(
    "line",
    [
        "overwrite_output_dir: true",
        "logging_dir: x",
        "save_safetensors: true",
        "include_tokens_per_second: true",
        "tpu_num_cores: 8",
    ],
)
def test_a_name_without_successor_is_read_with_a_note(recipe, line):
    got = recipe(line + "\n")
    assert line.split(":")[0] not in got.values
    assert len(got.notes) == 1


def test_dataset_mixer_becomes_a_mixture(recipe):
    got = recipe(
        "model_name_or_path: m\ndataset_mixer:\n  a/b: 1.0\n  c/d: 0.5\ndataset_splits: [train_sft, test_sft]\n",
        complete=False,
    )
    first, second = got.values["dataset_mixture"]["datasets"]
    assert first == {"id": "a/b", "weight": 1.0, "split": "train_sft", "test_split": "test_sft"}
    assert second["weight"] == 0.5


def test_data_paths_of_tutorials(recipe):
    got = recipe(
        "model_name_or_path: m\ntrain_data_path: a.jsonl\neval_data_path: b.jsonl\ndo_eval: true\n", complete=False
    )
    assert (got.values["dataset_name"], got.values["eval_dataset_name"]) == ("a.jsonl", "b.jsonl")


WRONG = {
    "learning_rte: 1e-5": "r.yaml:3: learning_rte is not a setting",
    "max_steps: 10.5": "r.yaml:3: max_steps is integer; found 10.5",
    "max_steps: true": "r.yaml:3: max_steps is integer; found True",
    "packing: perhaps": "r.yaml:3: packing is boolean; found 'perhaps'",
    "packing_strategy: foo": "r.yaml:3: packing_strategy is one of bfd, bfd_split, wrapped; found 'foo'",
    "dtype: bf16x": "r.yaml:3: dtype is one of auto, bfloat16, float16, float32; found 'bf16x'",
    "attn_implementation: flash_atention": "r.yaml:3: attn_implementation is one of auto, varlen, eager",
    "lr_scheduler_type: cosin": "r.yaml:3: lr_scheduler_type is one of linear, cosine",
    "report_to: wandb, tensorboard": "r.yaml:3: report_to.0 is one of all, none",
    "learning_rate: .nan": "r.yaml:3: learning_rate must be a finite number",
    "packing: true\npacking: false": "r.yaml:4: packing is said twice",
    "max_length: 5\nmax_seq_length: 6": "r.yaml:4: max_seq_length is the old name of max_length, which is said too",
    "benchmarks: [aime24, math500]": "r.yaml:3: benchmarks.1 is one of math_500, aime24, aime25",
    "benchmarks: [lighteval|aime24|0|0]": "r.yaml:3: benchmarks.0 is one of math_500, aime24, aime25",
    "callbacks: [push_it]": "r.yaml:3: callbacks.0 is one of push_to_hub_revision; found 'push_it'",
    "dataset_streaming: true": "r.yaml:3: dataset_streaming cannot be resumed exactly",
    "max_length: 0": "max_length must be at least 1; found 0",
    "seed: -1": "seed must be at least 0; found -1",
    "lr_scheduler_kwargs: {a: 1, a: 2}": "lr_scheduler_kwargs.a is said twice",
    "? [a, b]\n: c": "a key is a word; found a sequence",
    "run_name: &x [*x]": "refers to itself",
    "do_train: false": "leaves nothing to do",
    "ignore_bias_buffers: true": "has no effect",
    "hub_token: hf_abc": "r.yaml:3: hub_token holds a token or a password",
    "load_in_4bit: true": "a quantised model cannot be trained in full",
    "- a list": "not valid YAML",
    "key: [unclosed": "not valid YAML",
}


@pytest.mark.parametrize(("line", "message"), WRONG.items())
def test_a_mistake_is_named_with_its_line(recipe, line, message):
    assert message in refusal(recipe, line + "\n")


MIXTURE = {
    "dataset_mixture: [a]": "dataset_mixture is object or null; found ['a']",
    "dataset_mixture: {seed: 1}": "r.yaml:2: dataset_mixture lacks datasets",
    "dataset_mixture: {datasets: [{id: a, mapping: {promt: q}}]}": "datasets.0.mapping.promt is not a setting",
    "dataset_mixture: {datasets: [{id: a}]}\ndataset_data_files: [b]": "each source of dataset_mixture has its own",
    "dataset_mixture: {datasets: [{id: a, weight: -1}]}": "datasets.0.weight must be above 0; found -1",
    "dataset_mixture: {datasets: [{id: a, weight: 0}]}": "datasets.0.weight must be above 0; found 0",
    "dataset_mixture: {datasets: [{id: a, weight: much}]}": "datasets.0.weight is number; found 'much'",
    "dataset_mixture: {datasets: [{id: a, weight: .inf}]}": "datasets.0.weight must be a finite number",
    "dataset_mixture:\n  datasets:\n  - id: a\n    wieght: 1": "r.yaml:5: dataset_mixture.datasets.0.wieght is not",
    "dataset_mixture: {datasets: [{id: a}], sede: 3}": "dataset_mixture.sede is not a setting",
    "dataset_mixture: {datasets: [{id: a}]}\ndataset_name: d": "dataset_name (",
    "seed: 1": "no dataset: set dataset_name",
}


@pytest.mark.parametrize(("text", "message"), MIXTURE.items())
def test_a_mistake_in_a_mixture_is_named(recipe, text, message):
    assert message in refusal(recipe, f"model_name_or_path: m\n{text}\n", complete=False)


def test_all_mistakes_of_a_recipe_come_at_once(recipe):
    lines = refusal(recipe, "max_steps: 10.5\nlearning_rte: 1\ndtype: bf16x\nbenchmarks: [a]\n").splitlines()
    assert len(lines) == 4


def test_a_recipe_that_cannot_be_read(tmp_path):
    assert "nowhere.yaml: cannot read this recipe: No such file" in refusal(load_recipe, ["--config", "nowhere.yaml"])
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9\n")
    assert "latin.yaml: cannot read" in refusal(load_recipe, ["--config", str(tmp_path / "latin.yaml")])
    (tmp_path / "empty.yaml").write_text("")
    assert "a recipe is a YAML mapping" in refusal(load_recipe, ["--config", str(tmp_path / "empty.yaml")])


def test_a_recipe_without_its_flag_is_pointed_to_it():
    assert "a recipe is given with --config" in refusal(load_recipe, ["recipe.yaml"])


def test_abbreviations_are_refused(recipe):
    said = refusal(recipe, "", "--per_device_train", "3")
    assert said == "command line: --per_device_train is not a setting; did you mean per_device_train_batch_size?"


def test_help_and_mistakes_come_without_torch(tmp_path):
    (tmp_path / "wrong.yaml").write_text("learning_rte: 1\n")
    code = (
        "import sys; from open_r1.sft import main\n"
        "try: print(main(sys.argv[1:]))\n"
        "except SystemExit as stop: print(stop.code)\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules])"
    )
    for argv, exit_code in ((["--help"], "0"), (["--config", str(tmp_path / "wrong.yaml")], "2")):
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert done.stdout.splitlines()[-2:] == [exit_code, "[]"]


def test_schema_is_up_to_date():
    from make_schema import recipe_schema

    assert recipe_schema() == SCHEMA, "run make schema"


def test_schema_holds_what_trl_holds():
    import dataclasses

    import trl
    from make_schema import LEFT_OUT

    for config in (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig):
        names = {field.name for field in dataclasses.fields(config)} - LEFT_OUT
        assert len(names) > 5
        assert names <= set(SCHEMA["properties"])


def test_the_environment_of_a_recipe_is_set_where_nothing_is_said(recipe, monkeypatch):
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    got = recipe("env: {NCCL_DEBUG: INFO, OMP_NUM_THREADS: 8}\n")
    set_environment(got)
    assert (os.environ["NCCL_DEBUG"], os.environ["OMP_NUM_THREADS"]) == ("INFO", "3")
    assert [note.rpartition("r.yaml")[2] for note in got.notes] == [
        ":3: env.OMP_NUM_THREADS: the environment says 3, which holds"
    ]
    monkeypatch.delenv("NCCL_DEBUG")


TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}  # not a comment: x\n"


def test_a_recipe_written_out_is_the_same_recipe(recipe, tmp_path, capsys):
    text = yaml.safe_dump(
        {
            "chat_template": TEMPLATE,
            "system_prompt": "é: 'four'\n",
            "learning_rate": 1e-05,
            "eval_strategy": "no",
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "report_to": ["wandb"],
            "max_length": None,
            "run_name": "true",
            "torch_dtype": "bfloat16",
        }
    )
    one = recipe(text, "--seed", "7", "--lora_target_modules", "q", "v", "--use_peft")
    (tmp_path / "again.yaml").write_text(written_out(one), encoding="utf-8")
    again = load_recipe(["--config", str(tmp_path / "again.yaml")])
    assert again.values == one.values
    assert again.notes == []
    lines = written_out(one).splitlines()
    assert "seed: 7  # command line" in lines
    (rate,) = (line for line in lines if line.startswith("learning_rate: "))
    where = text.splitlines().index(next(line for line in text.splitlines() if "learning_rate" in line))
    assert rate.startswith("learning_rate: 1.0e-05  # ") and rate.endswith(f"r.yaml:{where + 3}")
    assert "# max_grad_norm: 1.0" in lines
    with pytest.raises(SystemExit) as stop:
        recipe("seed: 3\n", "--show_recipe")
    assert stop.value.code == 0
    assert "seed: 3  # " in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["/models/hf_checkpoints/llama", "data/hf_finetune_run1", "org/sk-wikipedia-2024-instructions-v1"]
)
def test_names_are_no_secrets(recipe, name):
    assert recipe(f"output_dir: {name}\n").values["output_dir"] == name
