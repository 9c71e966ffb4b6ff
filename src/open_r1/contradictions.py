"""Settings that are each fine and cannot be meant together, or that are missing; and what none of them may do.

That is: hold secrets, say what the launch config says, or let code in past `trust_remote_code`.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from open_r1.schema import SCHEMA, looks_secret, meant, texts_in

if TYPE_CHECKING:
    from open_r1.recipe import Recipe

# What model_init_kwargs may not hold, and why.
NOT_INIT = {
    "trust_remote_code": "set trust_remote_code of the recipe instead",
    "code_revision": "pin the model and its code with model_revision",
    "allow_all_kernels": "it runs code of anyone; kernels of known publishers need no leave",
    "use_safetensors": "weights are read from safetensors alone",
    "weights_only": "weights are read from safetensors alone",
    "adapter_kwargs": "name the adapter's directory in model_name_or_path",
    "cache_dir": "set HF_HOME in the environment",
    "offload_folder": "a model that is offloaded to disk cannot be trained",
    **dict.fromkeys(("tp_plan", "tp_size", "distributed_config"), "processes that share rows are not supported"),
}


def contradictions(recipe: "Recipe") -> list[str]:
    """What is wrong with the settings of a recipe taken together; what is only odd goes into its notes."""
    finders = (secrets, code, devices, of_data, of_model, of_run, of_going_on, of_batches)
    return [text for find in finders for text in find(recipe)]


def secrets(recipe: "Recipe") -> Iterator[str]:
    """Tokens and passwords, at any depth."""
    for key, value in recipe.values.items():
        for name, text in texts_in(key, value):
            if looks_secret(name, text):
                yield (
                    f"{recipe.origin[key]}: {name} holds a token or a password, which would be saved with the run; "
                    "take it out, and run `hf auth login` or set it in the environment (HF_TOKEN, WANDB_API_KEY)"
                )


def code(recipe: "Recipe") -> Iterator[str]:
    """Ways around `trust_remote_code` and around what is read and uploaded."""
    given = recipe.values.get("model_init_kwargs")
    for name in given if isinstance(given, dict) else ():
        if name in NOT_INIT:
            yield f"{recipe.origin['model_init_kwargs']}: model_init_kwargs.{name} cannot be set: {NOT_INIT[name]}"
    if (strategy := recipe.values.get("hub_strategy")) in ("checkpoint", "all_checkpoints"):
        yield (
            f"{recipe.origin['hub_strategy']}: {strategy} would upload the optimizer's state and pickles, which never "
            "leave this machine; use every_save"
        )


def devices(recipe: "Recipe") -> Iterator[str]:
    """How a run is spread over devices, which the launch config says, and says alone."""
    for key, config in (("deepspeed", "zero3"), ("fsdp", "fsdp2"), ("fsdp_config", "fsdp2")):
        if recipe.values.get(key):
            file = " (deepspeed_config_file there can name a file)" if key == "deepspeed" else ""
            yield (
                f"{recipe.origin[key]}: {key}: how a run is spread over devices is said in the launch config alone; "
                f"take it out and launch with --config_file recipes/accelerate_configs/{config}.yaml{file}"
            )


def of_data(recipe: "Recipe") -> Iterator[str]:
    """What to train and evaluate on, and how rows are cut and packed."""
    values, origin = recipe.values, recipe.origin
    name, mixture = values.get("dataset_name"), values.get("dataset_mixture")
    if name and mixture:
        yield (f"{origin['dataset_mixture']}: dataset_name ({origin['dataset_name']}) is set too; keep one of them")
    files = values.get("dataset_data_files")
    if files and mixture:
        yield (f"{origin['dataset_data_files']}: each source of dataset_mixture has its own data_files; move them")
    if not name and not mixture and not files:
        yield "no dataset: set dataset_name (hub id, directory or file) or dataset_mixture"
    if values.get("dataset_streaming"):
        yield (
            f"{origin['dataset_streaming']}: dataset_streaming cannot be resumed exactly and is not supported; "
            "leave it out, prepared data is memory-mapped and needs no memory either"
        )
    evaluated = values.get("do_eval") or values.get("eval_strategy", "no") != "no"
    for key in ("eval_dataset_name", "eval_datasets"):
        if values.get(key) and not evaluated:
            yield f"{origin[key]}: nothing evaluates on it; set eval_strategy, or do_eval: true"
    if values.get("eval_datasets") == []:
        yield f"{origin['eval_datasets']}: eval_datasets is empty; name a dataset, or leave it out"
    if values.get("eval_datasets") and values.get("eval_dataset_name"):
        yield f"{origin['eval_dataset_name']}: eval_datasets is set too; make this one of its datasets"
    inside = mixture.get("test_split_size") if isinstance(mixture, dict) else None
    if (values.get("test_split_size") or inside) and not evaluated:
        key = "dataset_mixture" if inside else "test_split_size"
        recipe.notes.append(
            f"{origin[key]}: test_split_size holds rows out that nothing evaluates on; set eval_strategy"
        )
    spread = values.get("packing") and values.get("packing_strategy", "bfd") != "bfd"
    for key in ("on_long_row", "max_truncated_answers"):
        if spread and values.get(key) is not None:
            yield (
                f"{origin[key]}: {key} says nothing with packing_strategy {values['packing_strategy']}, which spreads "
                "a long row over packs; use bfd, or leave it out"
            )
    if mixture and values.get("test_split_size"):
        yield f"{origin['test_split_size']}: with a mixture, set test_split_size inside dataset_mixture"
    if values.get("packing") and values.get("max_length", 1) is None:
        yield f"{origin['max_length']}: packing needs max_length, the number of tokens in a packed row"
    if values.get("packing") and values.get("packing_strategy") == "wrapped" and values.get("padding_free"):
        yield (
            f"{origin['padding_free']}: padding_free lays rows end to end by the lengths of their documents, which "
            "packing_strategy wrapped does not keep; leave padding_free out, or set packing_strategy: bfd"
        )
    if values.get("eval_packing") and not values.get("packing"):
        yield f"{origin['eval_packing']}: eval_packing without packing; set both, or neither"
    if values.get("assistant_only_loss") and values.get("supervision") == "full":
        yield f"{origin['assistant_only_loss']}: assistant_only_loss and supervision: full; keep supervision"


def of_model(recipe: "Recipe") -> Iterator[str]:
    """The model, its precision and its adapter."""
    values, origin = recipe.values, recipe.origin
    if not values.get("model_name_or_path"):
        yield "no model: set model_name_or_path (hub id or directory)"
    if values.get("fp16") and values.get("bf16"):
        yield f"{origin['fp16']}: fp16 and bf16 exclude each other; keep one"
    if (values.get("load_in_4bit") or values.get("load_in_8bit")) and not values.get("use_peft"):
        yield ("a quantised model cannot be trained in full: set use_peft: true, or drop load_in_4bit/load_in_8bit")
    adapter = next((key for key in values if key.startswith("lora_") or key == "use_rslora"), None)
    if adapter and "use_peft" not in values:
        yield f"{origin[adapter]}: {adapter} says nothing without an adapter: set use_peft: true, or remove it"
    if values.get("load_in_4bit") and values.get("load_in_8bit"):
        yield f"{origin['load_in_8bit']}: load_in_4bit and load_in_8bit exclude each other; keep one"


def of_run(recipe: "Recipe") -> Iterator[str]:
    """What the run does, and how its learning rate goes."""
    values, origin = recipe.values, recipe.origin
    if values.get("do_train") is False:
        yield f"{origin['do_train']}: do_train: false leaves nothing to do here; remove it"
    if values.get("ignore_bias_buffers"):
        yield f"{origin['ignore_bias_buffers']}: ignore_bias_buffers has no effect on supervised fine-tuning"
    schedule = values.get("lr_scheduler_type", "linear")
    allowed = SCHEMA["properties"]["lr_scheduler_kwargs"]["x-keys"].get(schedule)
    given = values.get("lr_scheduler_kwargs")
    for name in given if isinstance(given, dict) and allowed is not None else ():
        if name not in allowed:
            takes = ", ".join(allowed) or "none"
            where = origin["lr_scheduler_kwargs"]
            yield f"{where}: lr_scheduler_kwargs.{name} is no setting of {schedule}; it takes {takes}"
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in (given or {}):
        yield f"{origin['lr_scheduler_type']}: {schedule} needs lr_scheduler_kwargs: {{num_decay_steps: ...}}"
    steps, warm = values.get("max_steps", -1), values.get("warmup_steps", 0)
    if all(isinstance(number, (int, float)) for number in (steps, warm)) and 0 < steps <= warm:
        recipe.notes.append(f"{origin['warmup_steps']}: all of max_steps {steps} is warm-up (warmup_steps {warm})")
    for key in ("sample_steps", "sample_tokens"):
        if values.get(key) is not None and not values.get("sample_prompts"):
            recipe.notes.append(f"{origin[key]}: {key} has no effect without sample_prompts")
    if "push_to_hub_revision" in (values.get("callbacks") or []) and not values.get("hub_model_id"):
        yield f"{origin['callbacks']}: push_to_hub_revision needs hub_model_id, the repository to push to"


def of_going_on(recipe: "Recipe") -> Iterator[str]:
    """What is saved, what of it is the best, and how a run goes on from it."""
    values, origin = recipe.values, recipe.origin
    saves, evaluates = values.get("save_strategy", "steps"), values.get("eval_strategy", "no")
    if values.get("load_best_model_at_end") and saves != "best" and saves != evaluates:
        yield (
            f"{origin['load_best_model_at_end']}: load_best_model_at_end compares what was saved and evaluated: make "
            f"save_strategy ({saves}) and eval_strategy ({evaluates}) the same"
        )
    if values.get("ignore_data_skip"):
        yield (
            f"{origin['ignore_data_skip']}: ignore_data_skip would read rows again after a restart; leave it out, "
            "skipping takes no time here"
        )
    if values.get("save_on_each_node"):
        yield (
            f"{origin['save_on_each_node']}: save_on_each_node leaves each node with a part of a checkpoint; leave it "
            "out, and put output_dir on a file system that all nodes share"
        )
    if values.get("save_total_limit") in (0, 1):
        recipe.notes.append(
            f"{origin['save_total_limit']}: save_total_limit: {values['save_total_limit']} is raised to 2: a "
            "checkpoint that turns out to be damaged must leave an older one to go on from"
        )
        values["save_total_limit"] = 2
    early = next((key for key in values if key.startswith("early_stopping") and values[key] is not None), None)
    if early and (values.get("early_stopping_patience") is None or not values.get("metric_for_best_model")):
        yield (
            f"{origin[early]}: {early} needs early_stopping_patience (evaluations) and metric_for_best_model, such as "
            "eval_loss"
        )
    elif early and evaluates == "no":
        yield f"{origin[early]}: {early} says nothing without evaluations; set eval_strategy"
    unknown = [key for key in values.get("allow_changes") or () if key not in {*SCHEMA["properties"], "data"}]
    for key in unknown:
        yield (
            f"{origin['allow_changes']}: allow_changes names keys of a recipe, and data; {key!r} is none"
            f"{meant(key, SCHEMA['properties']) or ''}"
        )
    every, saved = values.get("eval_steps") or values.get("logging_steps", 10), values.get("save_steps", 500)
    numbers = all(isinstance(number, (int, float)) for number in (every, saved))
    if values.get("load_best_model_at_end") and saves == evaluates == "steps" and numbers and every != saved:
        yield (
            f"{origin['load_best_model_at_end']}: the best model can only be one that was saved: make eval_steps "
            f"({every:g}) and save_steps ({saved:g}) the same"
        )
    out, name = (os.path.realpath(str(values.get(key))) for key in ("output_dir", "model_name_or_path"))
    if out == name and os.path.isdir(name):
        yield f"{origin['output_dir']}: output_dir is the model's directory and would be written over; choose another"


def of_batches(recipe: "Recipe") -> Iterator[str]:
    """Which rows make a step."""
    values, origin = recipe.values, recipe.origin
    size, steps = values.get("global_batch_size"), values.get("gradient_accumulation_steps")
    each = values.get("per_device_train_batch_size", SCHEMA["properties"]["per_device_train_batch_size"]["default"])
    processes = values.get("plan_processes") or int(os.environ.get("WORLD_SIZE", "1"))
    if all(isinstance(number, int) for number in (size, steps, each, processes)) and size != steps * each * processes:
        yield (
            f"{origin['global_batch_size']}: global_batch_size {size} is not gradient_accumulation_steps {steps} "
            f"({origin['gradient_accumulation_steps']}) x per_device_train_batch_size {each} x {processes} processes; "
            "keep global_batch_size, from which gradient_accumulation_steps follows"
        )
    if values.get("plan_processes") is not None and values.get("dry_run") in (None, False):
        yield (
            f"{origin['plan_processes']}: plan_processes is what dry_run plans for; to train with as many, start "
            "them: accelerate launch --num_processes"
        )
    if values.get("auto_find_batch_size"):
        yield (
            f"{origin['auto_find_batch_size']}: auto_find_batch_size changes the rows of a step, and trains some "
            "twice; leave it out: --dry_run says what fits"
        )
    if values.get("dataloader_prefetch_factor") is not None and not values.get("dataloader_num_workers"):
        yield (
            f"{origin['dataloader_prefetch_factor']}: dataloader_prefetch_factor is what each worker reads ahead; set "
            "dataloader_num_workers, too"
        )
    if values.get("train_sampling_strategy") == "batch_rebalance":
        yield (
            f"{origin['train_sampling_strategy']}: batch_rebalance makes the order of rows depend on the number of "
            "processes; use group_by_length"
        )
    shared = values.get("accelerator_config")
    if isinstance(shared, dict) and shared.get("split_batches"):
        yield (
            f"{origin['accelerator_config']}: split_batches deals a batch out to all processes; leave it out and set "
            "global_batch_size"
        )
