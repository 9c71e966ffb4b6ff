"""Defaults that make a run fast, settled when model, data and machine are known. What a recipe says stands.

Each is logged with its reason. The first process settles for all of a run; the same machine settles the same again.
"""

import copy
import importlib
import logging
import math
import os
import platform
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import is_liger_kernel_available

from open_r1.formats import brief
from open_r1.memory import LIGER, device_memory, main_memory, on_cpu, plan_memory
from open_r1.model import planned_dtype
from open_r1.processes import cores_here

if TYPE_CHECKING:
    from open_r1.configs import ModelConfig, SFTConfig
    from open_r1.preparation import Part

logger = logging.getLogger(__name__)
FITS = 0.8  # of a device's memory: plans are within 15 % of what a run takes, and something stays free
SURELY = 0.4  # of it, by a bound that takes no measuring
TILE = (4096, 8192)  # tokens and vocabulary of which the fused head makes logits at once (trl 1.16), or all of it
# Of so many layers one is computed again: divisors of the depths that plans are made of (`memory.DEPTHS`).
SELECTIVE = (6, 3, 2)
WORKERS, CORES = 2, 4  # for a GPU, where each has so many cores


def settle(
    args: "SFTConfig",
    model_args: "ModelConfig",
    config: PreTrainedConfig,
    train: "Part",
    vocabulary: int,
    why_not: str,
) -> None:
    """Settle what the recipe leaves open (`args.unsettled`, which is empty then), in `args`.

    `why_not` says why attention does not tell rows laid end to end apart at no cost (`attention.Choice`), empty where
    it does; `vocabulary` is the number of the model's tokens.
    """
    asked = set(args.unsettled) if args.process_index == 0 else set()
    shares = gather_object([(platform.node(), cores_here())]) if "dataloader_num_workers" in args.unsettled else []
    found: dict[str, tuple[Any, str]] = {}  # values, and why: empty for what only goes with another
    if "padding_free" in asked:
        found["padding_free"] = padding_free(args, train, why_not)
        args.padding_free = found["padding_free"][0]  # which memory depends on
        args.unsettled.discard("padding_free")
    if "use_liger_kernel" in asked:
        found["use_liger_kernel"] = liger(args, model_args, config)
        args.use_liger_kernel = found["use_liger_kernel"][0]  # so it does on this
    if "activation_checkpointing" in asked:
        value, how, why = checkpointing(args, model_args, config, train, vocabulary)
        found["activation_checkpointing"] = value, why
        found["activation_checkpointing_kwargs"] = how, ""
        found |= {  # upstream keeps the old names, too, and reads both
            "gradient_checkpointing": (value, ""),
            "gradient_checkpointing_kwargs": (how, ""),
        }
    if "dataloader_num_workers" in asked:
        found["dataloader_num_workers"] = workers(args, shares)
    [found] = broadcast_object_list([found])
    for name, (value, why) in sorted(found.items()):
        setattr(args, name, value)
        if why:
            logger.info("%s: %s by default: %s", name, str(value).lower(), why)
    args.unsettled = set()


def padding_free(args: "SFTConfig", train: "Part", why_not: str) -> tuple[bool, str]:
    """Whether rows are laid end to end, and why."""
    total = train.ledger["total"]
    if args.packing:
        return False, "rows are packed"
    if args.per_device_train_batch_size == 1:
        return False, "a batch is one row, which needs no padding"
    if why_not:
        return False, why_not
    return True, f"without it {total['padding_share']:.1%} of a batch of {total['batch']} rows would be padding"


def checkpointing(
    args: "SFTConfig", model_args: "ModelConfig", config: PreTrainedConfig, train: "Part", vocabulary: int
) -> tuple[bool, dict[str, Any] | None, str]:
    """Whether activations are computed again, with which arguments, and why."""
    given, capacity = args.activation_checkpointing_kwargs, capacity_of(args)
    if given:
        return True, given, "activation_checkpointing_kwargs are set"
    if capacity is None:
        return True, None, "the device is not known; plan_gpu says which it will be"
    longest = args.max_length if args.packing else int(train.lengths.max())
    dtype = planned_dtype(config, model_args, args)  # once: it may warn

    def needed(recompute: bool, every: int = 1) -> dict[str, int]:
        tried = copy.copy(args)
        tried.activation_checkpointing = recompute
        tried.activation_checkpointing_kwargs = {"every_n_layers": every}
        return plan_memory(config, dtype, model_args, tried, longest, vocabulary)

    unset_hf_deepspeed_config()  # else transformers builds every model in shards
    try:
        if bound(args, config, longest, vocabulary) < SURELY * capacity:
            return False, None, f"all of it takes less than {SURELY:.0%} of {capacity / 2**30:,.0f} GiB"
        plan = needed(False)
        kept, layers = plan["total"], config.get_text_config().num_hidden_layers
        how = f"keeping them takes {kept / 2**30:,.1f} GiB of {capacity / 2**30:,.0f} GiB by the plan"
        if kept < FITS * capacity:
            return False, None, how
        for every in SELECTIVE:
            spared = plan["activations"] * math.ceil(layers / every) / layers  # at most, and plans take seconds
            if kept - spared < FITS * capacity and needed(True, every)["total"] < FITS * capacity:
                return True, {"every_n_layers": every}, f"{how}; those of one layer in {every} are not kept"
        return True, None, how
    except Exception as error:  # an operation that knows no tensors without memory is no fault of the run
        return True, None, f"memory cannot be planned for this model ({type(error).__name__})"
    finally:
        if args.deepspeed_plugin is not None:
            args.deepspeed_plugin.set_deepspeed_weakref()


def liger(args: "SFTConfig", model_args: "ModelConfig", config: PreTrainedConfig) -> tuple[bool, str]:
    """Whether norms, rotations and gates are liger-kernel's, and why: nothing is to be said where there is no GPU."""
    if args.plan_processes is not None or (args.dry_run and args.plan_gpu):
        return False, "whether liger-kernel is installed elsewhere is not known; the run settles it, and takes less"
    if args.device.type != "cuda":
        return False, ""
    if args.torch_compile:
        return False, "torch_compile fuses the same"
    if config.model_type not in LIGER or getattr(config, "auto_map", None) or model_args.lora_target_parameters:
        return False, f"it is tried with the dense models of {', '.join(LIGER)} alone"
    if not is_liger_kernel_available():
        return False, "liger-kernel is not installed, which would make it faster: pip install liger-kernel"
    try:
        importlib.import_module("liger_kernel.transformers")
    except Exception as error:  # it imports Triton and models of transformers, of which it may not fit the version
        return False, f"liger-kernel does not load here ({type(error).__name__}: {brief(str(error))})"
    return True, "its norms, rotations and gates take less time and memory"


def capacity_of(args: "SFTConfig") -> int | None:
    """Bytes of the memory that a process has to itself: of its GPU, or its share of the machine's; None unknown."""
    if on_cpu(args):
        return main_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        return device_memory(args.plan_gpu)
    except ValueError:  # preflight says so
        return None


def bound(args: "SFTConfig", config: PreTrainedConfig, longest: int, vocabulary: int) -> int:
    """Bytes that a step stays below: 128 a number of each layer's states, 32 a score, 64 a logit, 16 a parameter."""
    text = config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    inner = max(4 * hidden, np.max(getattr(text, "intermediate_size", None) or 0).item())  # Gemma 3n: one a layer
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    parameters = layers * (8 * hidden**2 + 3 * hidden * inner * experts) + 2 * vocabulary * hidden
    tokens = args.per_device_train_batch_size * longest
    scores = (getattr(text, "num_attention_heads", None) or 1) * longest
    logits = (tokens if args.label_smoothing_factor else min(tokens, TILE[0])) * max(vocabulary, TILE[1])
    return tokens * layers * (128 * (hidden + inner) + 32 * scores) + 64 * logits + 16 * parameters


def workers(args: "SFTConfig", shares: list[tuple[str, set[int]]]) -> tuple[int, str]:
    """How many processes make batches, and why. `shares` are the host and the cores of every process."""
    if args.plan_processes is not None:
        return 0, "of machines elsewhere it is not known how many cores they have; the run settles it"
    if args.device.type == "cpu":
        return 0, "they would take the cores that train"
    cores = min(
        len(mine) // sum(host == other and not mine.isdisjoint(theirs) for other, theirs in shares)
        for host, mine in shares
    )
    if cores < CORES:
        return 0, f"{cores} of the cores for each GPU leave none to spare"
    return WORKERS, "the GPU waits for no batch"
