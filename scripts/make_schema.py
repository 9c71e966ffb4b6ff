"""Write src/open_r1/schema.json: the JSON schema of every recipe key, from our configs and TRL's dataclasses.

The recipe parser, --help and editors read it, so that none of them needs torch. Run it (`make schema`) after a change
of configs.py or of TRL; a test fails when the committed file is out of date.
"""

import dataclasses
import enum
import json
import types
import typing
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from open_r1.benchmarks import KNOWN, PATTERN
from open_r1.configs import ModelConfig, ScriptArguments, SFTConfig

SCHEMA = Path(__file__).parents[1] / "src" / "open_r1" / "schema.json"
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}

# Old spellings, which the parser renames, and what only a launcher may set.
LEFT_OUT = {"gradient_checkpointing", "gradient_checkpointing_kwargs", "local_rank", "parallelism_config"}
LEFT_OUT |= {"resume_from_checkpoint", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint"}

# A text, or a row of a dataset up to what the model is to say.
PROMPT = {
    "type": ["string", "object"],
    "properties": {
        "messages": {"type": ["array"], "items": {"type": ["object"]}, "description": "a list of role and content"},
        "tools": {"type": ["array", "null"], "items": {"type": ["object"]}, "description": "schemas of tools"},
        "chat_template_kwargs": {"type": ["object", "null"], "description": "arguments for the chat template"},
    },
    "required": ["messages"],
    "additionalProperties": False,
}
ATTENTION = ["auto", "varlen", "eager", "sdpa", "flex_attention"]
ATTENTION += ["flash_attention_2", "flash_attention_3", "flash_attention_4"]
# Upstream declares these as plain strings and finds a misspelling late or never.
NARROWED: dict[str, dict[str, Any]] = {
    "attn_implementation": {
        "pattern": "^(" + "|".join(ATTENTION) + "|[^/ ]+/[^ ]+)$",
        "examples": [*ATTENTION, "owner/name of a hub kernel"],
    },
    "benchmarks": {"items": {"type": "string", "pattern": PATTERN, "examples": KNOWN}},
    "sample_prompts": {"items": PROMPT},
    "report_to": {"items": {"type": "string", "enum": ["all", "none", *sorted(INTEGRATION_TO_CALLBACK)]}},
    "include_num_input_tokens_seen": {"enum": ["all", "non_padding", "no", True, False]},
}


def closed(**properties: str) -> dict[str, Any]:
    """A mapping of known keys, each of one or several JSON types."""
    fields = {name: {"type": types.split()} for name, types in properties.items()}
    return {"properties": fields, "additionalProperties": False}


# What the schedules of transformers take, and torch's ReduceLROnPlateau; a key of another one is an error.
SCHEDULES = {
    "linear": [],
    "cosine": ["num_cycles"],
    "cosine_with_restarts": ["num_cycles"],
    "polynomial": ["lr_end", "power"],
    "constant": [],
    "constant_with_warmup": [],
    "inverse_sqrt": ["timescale"],
    "reduce_lr_on_plateau": ["mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps"],
    "cosine_with_min_lr": ["num_cycles", "min_lr", "min_lr_rate"],
    "cosine_warmup_with_min_lr": ["num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"],
    "warmup_stable_decay": [
        *("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles")
    ],
}
WORDS = {"mode", "threshold_mode", "warmup_type", "decay_type"}
COUNTS = {"num_decay_steps", "num_stable_steps", "patience", "cooldown", "timescale"}
SCHEDULE_TYPES = {
    key: "string" if key in WORDS else "integer null" if key in COUNTS else "number null"
    for keys in SCHEDULES.values()
    for key in keys
}
FLAGS = dict.fromkeys(("rope", "swiglu", "geglu", "rms_norm", "layer_norm", "cross_entropy"), "boolean")
NARROWED |= {
    "lr_scheduler_kwargs": {**closed(**SCHEDULE_TYPES), "x-keys": SCHEDULES},
    "activation_checkpointing_kwargs": closed(
        use_reentrant="boolean",
        preserve_rng_state="boolean",
        determinism_check="string",
        debug="boolean",
        early_stop="boolean",
        every_n_layers="integer",
    ),
    "dataset_kwargs": closed(skip_prepare_dataset="boolean"),
    "liger_kernel_config": closed(**FLAGS, fused_linear_cross_entropy="boolean"),
    "accelerator_config": closed(
        split_batches="boolean",
        dispatch_batches="boolean null",
        even_batches="boolean",
        use_seedable_sampler="boolean",
        non_blocking="boolean",
        gradient_accumulation_kwargs="object null",
        use_configured_state="boolean",
    ),
}
# What a recipe may set in the environment: nothing that says where code, files or credentials come from, where files
# or requests (which carry tokens) go, or that uploads checkpoints as a whole (WANDB_LOG_MODEL).
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "how many queues a GPU has",
    "HF_HUB_DOWNLOAD_TIMEOUT": "seconds until a download counts as stalled",
    "HF_HUB_OFFLINE": "1: take models and data from the cache alone",
    "HF_XET_HIGH_PERFORMANCE": "1: download with all of the bandwidth",
    "MLFLOW_EXPERIMENT_NAME": "MLflow's experiment",
    "NCCL_DEBUG": "what NCCL logs, INFO or WARN",
    "NCCL_IB_DISABLE": "1: no InfiniBand",
    "NCCL_IB_HCA": "InfiniBand adapters to use",
    "NCCL_P2P_DISABLE": "1: no direct copies between GPUs",
    "NCCL_SOCKET_IFNAME": "network interface between nodes",
    "OMP_NUM_THREADS": "CPU threads of a process",
    "PYTORCH_ALLOC_CONF": "how torch allocates memory, e.g. expandable_segments:True",
    "PYTORCH_CUDA_ALLOC_CONF": "the same under its name before torch 2.9",
    "TOKENIZERS_PARALLELISM": "false: one thread a tokenizer",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "how NCCL's errors end a process",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "collectives that NCCL's flight recorder keeps",
    "WANDB_MODE": "online, offline or disabled",
    "WANDB_NOTES": "W&B's notes on the run",
    "WANDB_TAGS": "W&B's tags of the run",
}
# Values below these cannot be meant, and upstream finds out with the weights in memory.
AT_LEAST = {
    **dict.fromkeys(("max_length", "per_device_train_batch_size", "per_device_eval_batch_size", "lora_r"), 1),
    **dict.fromkeys(("gradient_accumulation_steps", "global_batch_size", "dataset_num_proc"), 1),
    **dict.fromkeys(("learning_rate", "seed", "data_seed", "warmup_steps", "max_grad_norm", "num_train_epochs"), 0),
}


def type_schema(hint: Any) -> dict[str, Any]:
    """JSON schema of a type hint: `type`, and `enum` or `items` where the hint says which values it takes."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    found: list[str] = []
    spec: dict[str, Any] = {}
    for member in members:
        base = typing.get_origin(member) or member
        if isinstance(base, type) and issubclass(base, enum.Enum):
            found.append("string")
            spec["enum"] = [choice.value for choice in base]
        elif base is typing.Literal:
            found.append("boolean")
        elif base is types.NoneType:
            found.append("null")
        else:
            found.append(JSON_TYPES[base])
        if base is list:
            inner = typing.get_args(member)[0]
            spec["items"] = object_schema(inner) if dataclasses.is_dataclass(inner) else {"type": "string"}
    return {"type": list(dict.fromkeys(found)), **spec}


def field_schema(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """JSON schema of one dataclass field, its default and its help included."""
    spec = type_schema(hint)
    if nested := field.metadata.get("nested"):
        many = "items" in spec
        spec = (
            {**spec, "items": object_schema(nested)} if many else {**object_schema(nested), "type": ["object", "null"]}
        )
    if choices := field.metadata.get("choices"):
        allowed = {"enum": [*choices]}
        spec.update({"items": {"type": "string", **allowed}} if "items" in spec else allowed)
    if (above := field.metadata.get("above")) is not None:
        spec["exclusiveMinimum"] = above
    if field.name in AT_LEAST:
        spec["minimum"] = AT_LEAST[field.name]
    spec.update(NARROWED.get(field.name, {}))
    if text := field.metadata.get("help"):
        spec["description"] = " ".join(text.replace("%%", "%").split())
    if field.default is not dataclasses.MISSING:
        spec["default"] = field.default.value if isinstance(field.default, enum.Enum) else field.default
    return spec


def object_schema(config: type) -> dict[str, Any]:
    """JSON schema of a dataclass: closed, so that an unknown key is an error."""
    hints = typing.get_type_hints(config)
    fields = [field for field in dataclasses.fields(config) if field.name not in LEFT_OUT]
    required = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return {
        "type": ["object"],
        "properties": {field.name: field_schema(field, hints[field.name]) for field in fields},
        "required": required,
        "additionalProperties": False,
    }


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe; `x-config` names the config that each top-level key belongs to."""
    properties: dict[str, Any] = {}
    for config in (ScriptArguments, SFTConfig, ModelConfig):
        for name, spec in object_schema(config)["properties"].items():
            properties[name] = {"x-config": config.__name__, **spec}
    names = {name: {"type": ["string"], "description": text} for name, text in ENVIRONMENT.items()}
    properties["env"] = {
        "x-config": "Recipe",
        "type": ["object", "null"],
        "description": "Environment variables to set where they are not set, before anything that reads them.",
        "properties": names,
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe",
        "type": ["object"],
        "properties": properties,
        "additionalProperties": False,
    }


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(recipe_schema(), indent=1) + "\n")
    print(f"wrote {SCHEMA.name}")
