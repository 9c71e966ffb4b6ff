"""Recipes of 2024-25 (Open-R1, alignment-handbook, tutorials) read under today's names, with one note for each."""

from typing import Any

CLI = "command line"

# Names that older recipes, handbooks and tutorials use, and what they are called today.
RENAMED = {
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "model_max_length": "max_length",
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "use_liger": "use_liger_kernel",
    "group_by_length": "train_sampling_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "train_data_path": "dataset_name",
    "eval_data_path": "eval_dataset_name",
    "dataset_mixer": "dataset_mixture",
    "file_name": "dataset_data_files",
    "preprocessing_num_workers": "dataset_num_proc",
    "use_flash_attention_2": "attn_implementation",
    "resume_from_checkpoint": "resume",
}
# ROLL's names for the columns of a flat table, and the part of dataset_mapping that each is.
COLUMN_KEYS = {
    "prompt_key": "prompt",
    "query_key": "query",
    "response_key": "response",
    "system_key": "system",
    "history_key": "history",
}
# Names that are gone, and what became of what they asked for.
GONE = {
    "overwrite_output_dir": "nothing is overwritten: a run goes on from the last checkpoint in output_dir",
    "enable_jit_checkpoint": "a signal always makes all processes save and stop, at the same step",
    "restore_callback_states_from_checkpoint": "what a run goes on with is always restored",
    "save_safetensors": "weights are always saved as safetensors",
    "logging_dir": "TensorBoard writes to output_dir/runs, or to $TENSORBOARD_LOGGING_DIR",
    "include_tokens_per_second": "the trainer no longer measures it",
    "tpu_num_cores": "the launcher sets it",
    "tpu_metrics_debug": "the trainer no longer has it",
    "dataset_splits": "it is read together with dataset_mixer",
}
OLD_VALUES = {
    "packing_strategy": {"ffd": "bfd", "bfd-requeue": "bfd_split"},
    "attn_implementation": {True: "flash_attention_2", False: None},
    "train_sampling_strategy": {True: "group_by_length", False: "random"},
    "resume": {True: "must", False: "never"},
}
# Preparation switches of the older stack: the chat template now says which tokens are added.
OLD_DATASET_KWARGS = {"add_special_tokens", "append_concat_token"}


def modernise(values: dict[str, Any], places: dict[str, str], notes: list[str], problems: list[str]) -> dict[str, Any]:
    """Read old names as today's, with one note each. Where both are said, that is an error."""
    new: dict[str, Any] = {}
    mapping = {part: values[key] for key, part in COLUMN_KEYS.items() if values.get(key) is not None}
    if mapping and "dataset_mapping" in values:
        said = next(key for key in COLUMN_KEYS if key in values)
        problems.append(f"{places.get(said, CLI)}: {said} is part of dataset_mapping, which is said too; keep that")
    for key, value in values.items():
        where = places.get(key, CLI)
        if key in COLUMN_KEYS:
            if mapping and "dataset_mapping" not in values:
                places.setdefault("dataset_mapping", where)
                notes.append(f"{where}: {key} is now called dataset_mapping.{COLUMN_KEYS[key]}; read as such")
                new["dataset_mapping"] = mapping
            continue
        if key == "train_data_path" and isinstance(value, list):
            key = "file_name"
        today = RENAMED.get(key, key)
        if key in GONE:
            notes.append(f"{where}: {key} no longer exists; {GONE[key]}")
            continue
        if today != key:
            if today in values:
                problems.append(f"{where}: {key} is the old name of {today}, which is said too; keep {today}")
                continue
            if key == "dataset_mixer":
                value = mixture_of_mixer(value, values.get("dataset_splits"))
            notes.append(f"{where}: {key} is now called {today}; read as such")
            places.setdefault(today, where)
        if key == "dataset_kwargs" and isinstance(value, dict) and set(value) & OLD_DATASET_KWARGS:
            notes.append(
                f"{where}: {', '.join(sorted(set(value) & OLD_DATASET_KWARGS))}: the chat template decides this now"
            )
            value = {name: item for name, item in value.items() if name not in OLD_DATASET_KWARGS} or None
        renamed = OLD_VALUES.get(today, {})
        value = (
            {"true": True, "false": False}.get(value, value) if isinstance(value, str) and True in renamed else value
        )
        if isinstance(value, (str, bool)) and value in renamed:
            if today == key:
                notes.append(f"{where}: {key}: {value} is now called {renamed[value]}; read as such")
            value = renamed[value]
        new[today] = value
    return new


def mixture_of_mixer(mixer: Any, splits: Any) -> Any:
    """alignment-handbook's `dataset_mixer: {id: weight}` and `dataset_splits: [train, test]` as a dataset_mixture."""
    if not isinstance(mixer, dict):
        return mixer
    splits = splits if isinstance(splits, list) else ["train"]
    train = next((split for split in splits if "train" in split), splits[0])
    test = next((split for split in splits if "test" in split), None)
    return {
        "datasets": [
            {"id": name, "weight": weight, "split": train, "test_split": test} for name, weight in mixer.items()
        ]
    }
