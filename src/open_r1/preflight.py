"""Everything that can be known before weights are loaded: what would go wrong, and what the run comes to."""

import copy
import importlib.util
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftConfig, get_peft_model
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from open_r1.attention import keeps_documents
from open_r1.cache import cost_of
from open_r1.chat import end_of_turn
from open_r1.defaults import FITS
from open_r1.errors import UserError
from open_r1.findings import LEVELS, Finding, as_text, has_errors
from open_r1.memory import device_memory, plan_memory, state_bytes
from open_r1.model import adapter_base, adapter_config, planned_dtype, settle_generation, skeleton
from open_r1.preparation import Part, Prepared

if TYPE_CHECKING:
    from open_r1.configs import ModelConfig, SFTConfig

logger = logging.getLogger(__name__)
COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}
BUSY = 8192  # tokens of a batch: of half as many an H200 waits 29 % of the time in LoRA of an 8B (docs/performance.md)
HEADROOM = 0.92  # of a GPU's memory that a run may plan with: the rest is CUDA's and fragmentation
LOOKED_AT = 200  # rows of each part
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Models whose layers carry a state from token to token. In the first nothing keeps packed documents apart, in the
# others causal_conv1d does (transformers 5.23, which refuses them without it); `isolation.py` tries it with any model.
STATEFUL = re.compile(r"(falcon_)?mamba2?|rwkv|recurrent_gemma|jamba|zamba|minimax|xlstm|lfm3|deepseek_v4")
CONVOLVED = re.compile(r"lfm2.*|bamba|zamba2|qwen3_(next|5.*)|kimi_linear|nemotron_h|falcon_h1|.*_?hybrid")
# What an optimizer needs beside torch, by how its name begins or ends.
OPTIMIZERS = {
    r"adamw_torch_[48]bit": "torchao",
    r".*bnb.*|.*8bit|paged_.*|lion_.*|ademamix": "bitsandbytes",
    r"galore.*": "galore_torch",
    r"apollo.*": "apollo_torch",
    r"a?d?a?lomo": "lomo_optim",
    r"grokadamw": "grokadamw",
    r"schedule_free.*": "schedulefree",
    r"stable_adamw": "optimi",
}


def check(
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
) -> tuple[list[Finding], dict[str, Any]]:
    """What is wrong or worth knowing about a run, and its plan. Loads no weights."""
    unset_hf_deepspeed_config()  # else transformers builds every model in shards
    try:
        return look(training_args, model_args, config, tokenizer, prepared)
    finally:
        if training_args.deepspeed_plugin is not None:
            training_args.deepspeed_plugin.set_deepspeed_weakref()


def look(
    training_args: "SFTConfig",
    model_args: "ModelConfig",
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
) -> tuple[list[Finding], dict[str, Any]]:
    """Findings, errors first, and the plan."""
    model = trained_model(config, model_args, training_args, tokenizer)
    plan = plan_of(model, config, training_args, model_args, prepared)
    findings = [
        *stop_token(tokenizer, prepared),
        *generation(model_args),
        *data(prepared, training_args),
        *best_metric(prepared, training_args),
        *context(config, model_args, prepared),
        *isolation(config, training_args),
        *adapter(model, model_args, tokenizer),
        *stack(model_args, training_args),
        *disk(plan, training_args),
    ]
    if training_args.dry_run and not has_errors(findings):
        findings += memory(plan, config, tokenizer, model_args, training_args, prepared)
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level)), plan


def trained_model(
    config: PretrainedConfig, model_args: "ModelConfig", training_args: "SFTConfig", tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | Finding:
    """The model that will be trained without its weights, adapter included; a finding where none can be built."""
    try:
        model = skeleton(config, training_args.trust_remote_code)
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{model_args.model_name_or_path} is no causal language model: {reason}") from error
    with torch.device("meta"):
        if len(tokenizer) > config.get_text_config().vocab_size:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        try:
            if adapter_base(model_args.model_name_or_path) and model_args.use_peft:  # whose own settings hold
                lora = PeftConfig.from_pretrained(model_args.model_name_or_path)
                lora.inference_mode = False
            else:
                lora = adapter_config(model_args, model, tokenizer)
            return model if lora is None else get_peft_model(model, lora)
        except ValueError as error:
            linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
            reason = " ".join(str(error).split())[:200]
            return Finding(
                "error", f"lora_target_modules: {reason}", f"linear modules are {', '.join(sorted(linear))}"
            )


def stop_token(tokenizer: PreTrainedTokenizerBase, prepared: Prepared) -> Iterator[Finding]:
    """The contract that makes a model stop: the template's end of turn is EOS, one token, known, and learnt."""
    eos, ends, chats = tokenizer.eos_token, end_of_turn(tokenizer), conversations(prepared.train)
    if ends is None:
        yield Finding(
            "warning",
            f"the chat template ends the assistant's turn with no token; EOS is {eos}",
            "set chat_template to one that does (chatml), or the model may never stop",
        )
    elif ends != eos:
        yield Finding(
            "error" if chats else "warning",
            f"the chat template ends a turn with {ends}, but EOS is {eos}: the model would stop where nobody looks",
            "remove eos_token from the recipe",
        )
    if tokenizer.encode(eos, add_special_tokens=False) != [tokenizer.eos_token_id]:
        yield Finding("error", f"EOS {eos!r} is not one token", "add it to the vocabulary as a special token")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Finding("note", f"padding is EOS ({eos}): labels are masked, so nothing is learnt of it")
    rows = sample(prepared.train)
    learnt = [tokenizer.eos_token_id in labels for _, labels in rows]
    if not any(learnt):
        yield Finding(
            "error" if chats else "warning",  # of texts and tokens somebody may have settled the end
            f"EOS ({eos}) is in the labels of none of {len(rows)} rows: the model would not learn to stop",
            "check chat_template and max_length (make preview shows the labels)",
        )
    elif sum(learnt) < 0.5 * len(learnt):
        yield Finding(
            "warning",
            f"EOS ({eos}) is in the labels of {sum(learnt)} of {len(rows)} rows only",
            "raise max_length, or set on_long_row: drop",
        )
    bos = tokenizer.bos_token_id
    if bos is not None and any(list(ids[:2]) == [bos, bos] for ids, _ in rows):
        yield Finding(
            "error",
            f"rows begin with two BOS tokens ({tokenizer.bos_token})",
            "take it out of the data or the template",
        )


def sample(part: Part) -> list[tuple[np.ndarray, np.ndarray]]:
    """`input_ids` and `labels` of some rows before packing, evenly from all of them."""
    count = len(part.unpacked)
    places = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int))
    rows = part.unpacked.select(places).select_columns(["input_ids", "labels"]).with_format("numpy")
    return [(row["input_ids"], row["labels"]) for row in rows]


def generation(model_args: "ModelConfig") -> Iterator[Finding]:
    """Whether the generation config can be saved at the end: transformers refuses contradictions only then."""
    name = model_args.model_name_or_path
    try:
        settle_generation(GenerationConfig.from_pretrained(adapter_base(name) or name))
    except OSError:
        return  # it has none
    except UserError as error:
        yield Finding("error", str(error), "or take another model")


def data(prepared: Prepared, args: "SFTConfig") -> Iterator[Finding]:
    """What the ledger says that nobody should find out after training."""
    for name, part in prepared.parts.items():
        total = part.ledger["total"]
        share = total["supervised_share"]
        if total["lost_end"]:
            yield Finding(
                "warning",
                f"{name}: {total['lost_end']:,} of {total['answers']:,} answers lose their end to max_length "
                f"{args.max_length}",
                "raise it, or set on_long_row: drop",
            )
        if total["masked_turns"] or total["expanded"]:
            yield Finding(
                "note",
                f"{name}: the chat template rewrites earlier turns (reasoning?): {total['expanded']:,} rows are "
                f"added to train them as they are said, {total['masked_turns']:,} turns are not learnt",
                "on_rewritten_turn decides; make preview shows them",
            )
        everything = total["supervised"] >= total["tokens"] - total["trained"]  # a row's first token is never learnt
        if everything and args.supervision != "full" and conversations(part):
            yield Finding("warning", f"{name}: every token is learnt, prompts too", "check the labels or the columns")
        elif share < 0.01:
            yield Finding("warning", f"{name}: only {share:.2%} of the tokens are supervised", "check the columns")
        if dropped := sum(total["dropped"].values()):
            share = dropped / (total["trained"] + dropped)
            yield Finding("warning", f"{name}: {dropped:,} rows ({share:.1%}) are dropped", "rejected.jsonl says why")
    if prepared.train.ledger.get("asked_in_eval"):
        yield Finding(
            "warning",
            f"{prepared.train.ledger['asked_in_eval']:,} rows to train on ask what the evaluation data asks",
            "dedup: true drops them",
        )


def conversations(part: Part) -> bool:
    """Whether a part has a source whose rows are not plain text or tokens."""
    return any(not {"input_ids", "text"} & set(table.source.to_row(row)) for table, row in first_rows(part))


def first_rows(part: Part) -> Iterator[tuple[Any, Any]]:
    """Each source's table with the first of its rows that is trained on."""
    for table in part.tables:
        kept = table.rows[table.counts["row"][table.trained]]
        if len(kept):
            yield table, table.source.rows[int(kept[0])]


def best_metric(prepared: Prepared, args: "SFTConfig") -> Iterator[Finding]:
    """A best model that is told by the loss on data that nothing evaluates on."""
    said = args.metric_for_best_model or ""
    known = [f"eval_loss/{entry['metric']}" for entry in prepared.eval.ledger["sources"]] if prepared.eval else []
    if said.removeprefix("eval_").startswith("loss/") and f"eval_{said.removeprefix('eval_')}" not in known:
        found = ", ".join(["eval_loss", *known]) if known else "nothing: set eval_strategy"
        yield Finding("error", f"metric_for_best_model: {said} is not measured", f"what is evaluated is {found}")


def context(config: PretrainedConfig, model_args: "ModelConfig", prepared: Prepared) -> Iterator[Finding]:
    """Rows longer than the positions that the model knows."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    longest = max(part.ledger["total"]["lengths"]["max"] for part in prepared.parts.values())
    rope = getattr(text, "rope_parameters", None) or {}
    if limit is not None and isinstance(rope.get("factor"), (int, float)):
        limit = max(limit, int(rope.get("original_max_position_embeddings", limit) * rope["factor"]))
    if limit is not None and longest > limit:
        yield Finding(
            "error",
            f"rows of up to {longest} tokens are longer than the {limit} positions of {model_args.model_name_or_path}",
            f"set max_length: {limit}, or extend the model's context (model_init_kwargs: {{max_position_embeddings: "
            "..., rope_parameters: ...}, which are saved with it)",
        )


def isolation(config: PretrainedConfig, args: "SFTConfig") -> Iterator[Finding]:
    """Packed documents that would see each other, where that is certain without weights."""
    if not (args.packing or args.padding_free):
        return
    kind = config.get_text_config().model_type
    if STATEFUL.fullmatch(kind):
        yield Finding(
            "error",
            f"packing: the layers of {kind} carry a state from one packed document into the next",
            "set packing: false",
        )
    if CONVOLVED.fullmatch(kind) and args.plan_processes is None and not importlib.util.find_spec("causal_conv1d"):
        yield Finding(
            "error",
            f"packing: the layers of {kind} keep packed documents apart with causal_conv1d, which is not installed",
            "pip install causal-conv1d, or set packing: false",
        )
    if args.packing and args.packing_strategy == "wrapped":
        yield Finding("note", "packing_strategy: wrapped lets the documents of a pack see each other")


def adapter(
    model: PreTrainedModel | Finding, model_args: "ModelConfig", tokenizer: PreTrainedTokenizerBase
) -> Iterator[Finding]:
    """LoRA targets that are not there, and tokens whose embeddings stay as they are."""
    if isinstance(model, Finding):
        yield model
        return
    if not model_args.use_peft:
        return
    name, added = model_args.model_name_or_path, getattr(tokenizer, "added_for_chat", [])
    if added and adapter_base(name):
        yield Finding(
            "error",
            f"{' and '.join(added)} are new to the vocabulary, and the adapter {name} goes on without training them",
            "set chat_template to one whose tokens the model knows",
        )
    trained = {part.rpartition(".")[2] for part in (model_args.lora_modules_to_save or [])}
    if not added and not trained & {"embed_tokens", "wte", "lm_head"}:
        row = embedding_norm(name, tokenizer.eos_token_id)
        if row is not None and row[0] < 0.25 * row[1]:
            yield Finding(
                "warning",
                f"the embedding of {tokenizer.eos_token} looks untrained (norm {row[0]:.2g}, median {row[1]:.2g}) and "
                "stays frozen under LoRA, so the model may not learn to stop",
                "set lora_modules_to_save: [embed_tokens, lm_head], or take a chat_template that ends turns otherwise",
            )


def embedding_norm(name: str, token: int) -> tuple[float, float] | None:
    """Norm of a token's input embedding and the median norm of 1,000 others; None unless the model is on this disk."""
    for path in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  it is no mapping
                    if key.endswith(("embed_tokens.weight", "wte.weight")):
                        matrix = tensors.get_slice(key)
                        rows = matrix.get_shape()[0]
                        step = max(1, rows // 1000)
                        others = torch.stack([matrix[row].float() for row in range(0, rows, step)]).norm(dim=1)
                        return float(matrix[token].float().norm()), float(others.median())
        except (OSError, SafetensorError, IndexError):
            return None
    return None


def stack(model_args: "ModelConfig", args: "SFTConfig") -> Iterator[Finding]:
    """Combinations that are known not to work, and packages that are not there."""
    zero = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin is not None else 0
    quantised = model_args.load_in_4bit or model_args.load_in_8bit
    if quantised and zero == 3:
        yield Finding("error", "quantised weights cannot be sharded by ZeRO-3", "launch with ddp or zero2")
    optimizer = str(getattr(args.optim, "value", args.optim))
    level = "error" if args.plan_processes is None else "warning"  # it will run on other machines
    package = next((package for pattern, package in OPTIMIZERS.items() if re.fullmatch(pattern, optimizer)), None)
    if package and not importlib.util.find_spec(package):
        name = {"optimi": "torch-optimi"}.get(package, package)
        yield Finding(level, f"optim: {optimizer} needs {package}, which is not installed", f"pip install {name}")
    if args.use_liger_kernel and not importlib.util.find_spec("liger_kernel"):
        yield Finding(level, "use_liger_kernel: liger-kernel is not installed", "pip install liger-kernel, or drop it")
    if args.plan_processes is not None:
        return
    if quantised and not torch.cuda.is_available():
        yield Finding("warning", "quantised weights need a GPU, and none is here", "check again where it will run")
    if args.bf16 and args.use_cpu:
        yield Finding("note", "bf16 on a CPU without bf16 units is 3 to 4 times slower than float32")


def plan_of(
    model: PreTrainedModel | Finding,
    config: PretrainedConfig,
    args: "SFTConfig",
    model_args: "ModelConfig",
    prepared: Prepared,
) -> dict[str, Any]:
    """What the run comes to: rows, tokens, steps, parameters, checkpoints and their size in bytes."""
    total, rows = prepared.train.ledger["total"], len(prepared.train.rows)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.processes
    per_epoch = max(1, rows // batch)  # what is left over begins the next epoch
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    plan: dict[str, Any] = {
        "rows": total["trained"],
        "packed_rows": rows if args.packing else None,
        "packing_efficiency": total.get("packing_efficiency"),
        "tokens": total["tokens"],
        "cut_tokens": total["cut"],
        "supervised_tokens": total["supervised"],
        "eval_rows": prepared.eval.ledger["total"]["trained"] if prepared.eval else None,
        **preparation(prepared),
        "processes": args.processes,
        "accumulation_steps": args.gradient_accumulation_steps,
        "global_batch_size": batch,
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "epochs": round(steps / per_epoch, 2),
        "warmup_steps": args.get_warmup_steps(steps),
    }
    if not isinstance(model, Finding):
        sizes = {name: (each.numel(), each.requires_grad) for name, each in model.named_parameters()}
        plan["parameters"] = sum(count for count, _ in sizes.values())
        plan["trained_parameters"] = sum(count for count, trained in sizes.values() if trained)
        plan["dtype"] = planned_dtype(config, model_args, args)
        plan["checkpoints"] = kept_checkpoints(args, steps, per_epoch)
        plan["checkpoint_bytes"] = checkpoint_bytes(plan, model_args, args)
        plan["disk_bytes"] = plan["checkpoint_bytes"] * plan["checkpoints"] + model_bytes(plan, model_args)
    out = Path(args.output_dir)
    rate = throughput(out, args)
    plan["seconds"] = round(total["tokens"] * steps / per_epoch / rate) if rate else None
    plan["free_disk_bytes"] = shutil.disk_usage(existing(out)).free + written(out)
    return plan


def preparation(prepared: Prepared) -> dict[str, Any]:
    """What making the prepared tables cost, now or when they were made, and what they take on disk."""
    parts = prepared.parts.values()
    cost = cost_of(
        [table for part in parts for table in (part.rows, part.unpacked)]
        + [rows for part in parts for table in part.tables for rows in (table.tokens, table.source.rows)]
    )
    return {
        "preparation_seconds": round(cost["seconds"], 1),
        "preparation_resident_bytes": cost["resident_bytes"],
        "prepared_bytes": cost["bytes"],
    }


def throughput(out: Path, args: "SFTConfig") -> float | None:
    """Tokens a second that an earlier run in this directory reached; None where there was none.

    For so many processes as `plan_processes` says, each of them as fast as one was then: what they exchange is not
    counted. Where that run was on a CPU nothing is known of them.
    """
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        rate, hardware = manifest["results"]["tokens_per_second"], manifest["hardware"]
        if args.plan_processes is None or rate is None:
            return rate
        return rate / hardware["processes"] * args.plan_processes if hardware["gpu"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def kept_checkpoints(args: "SFTConfig", steps: int, per_epoch: int) -> int:
    """How many checkpoints lie in output_dir at most at once, the one being written included."""
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    if strategy == "no":
        return 0
    every = per_epoch if strategy in ("epoch", "best") else args.save_steps
    every = max(1, int(every * steps) if every < 1 else int(every))
    made = max(1, math.ceil(steps / every))  # the last step is saved too
    return min(made, args.save_total_limit + 1) if args.save_total_limit else made


def model_bytes(plan: dict[str, Any], model_args: "ModelConfig") -> int:
    """Size of the saved model: with PEFT the adapter alone, which is in float32."""
    return 4 * plan["trained_parameters"] if model_args.use_peft else plan["parameters"] * BYTES[plan["dtype"]]


def checkpoint_bytes(plan: dict[str, Any], model_args: "ModelConfig", args: "SFTConfig") -> int:
    """Size of a checkpoint: model and optimizer state, with ZeRO's float32 master weights too.

    Unless weights are sharded, DeepSpeed writes them a second time.
    """
    model, plugin = model_bytes(plan, model_args), args.deepspeed_plugin
    if args.save_only_model:
        return model
    each = 4 if model_args.use_peft else BYTES[plan["dtype"]]
    state = state_bytes(args) * each // 4 if plugin is None else state_bytes(args) + 4
    twice = plugin is not None and plugin.zero_stage < 3
    return model * (2 if twice else 1) + state * plan["trained_parameters"]


def written(out: Path) -> int:
    """Bytes of the checkpoints that an earlier start has left, which count as those that are planned."""
    return sum(path.stat().st_size for path in out.glob("checkpoint-*/**/*") if path.is_file())


def disk(plan: dict[str, Any], args: "SFTConfig") -> Iterator[Finding]:
    """Whether the checkpoints fit on the disk."""
    needed, free = plan.get("disk_bytes", 0), plan["free_disk_bytes"]
    if needed > free and args.process_index == 0:  # which writes them
        yield Finding(
            "error" if args.plan_processes is None else "warning",  # which may not be the disk of those machines
            f"output_dir: {plan['checkpoints']} checkpoints and the model take {gib(needed)}; {gib(free)} are free",
            "set save_total_limit, save_only_model: true, or another output_dir",
        )


def memory(
    plan: dict[str, Any],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_args: "ModelConfig",
    args: "SFTConfig",
    prepared: Prepared,
) -> Iterator[Finding]:
    """What a device needs at most, added to the plan, and whether that fits the GPU that is here or named."""
    longest = args.max_length if args.packing else prepared.train.ledger["total"]["lengths"]["max"]

    def needed(**changes: Any) -> dict[str, int]:
        changed = copy.copy(args)
        vars(changed).update(changes)
        return plan_memory(config, plan["dtype"], model_args, changed, longest, len(tokenizer))

    try:
        capacity = device_memory(args.plan_gpu)
    except ValueError as error:
        yield Finding("error", str(error))
        return
    try:
        plan["memory_bytes"] = needed()
    except Exception as error:  # an operation that knows no tensors without memory is no fault of the run
        reason = " ".join(str(error).split())[:150]
        yield Finding("note", f"memory cannot be planned for this model: {type(error).__name__}: {reason}")
        return
    plan["gpu_bytes"] = capacity
    total = plan["memory_bytes"]["total"]
    if capacity is None:
        return
    if total <= HEADROOM * capacity:
        yield from spare(plan, args, longest, capacity)
        return
    batch, tried = args.per_device_train_batch_size, []
    if not args.activation_checkpointing:
        tried.append({"activation_checkpointing": True})
    while batch % 2 == 0:
        batch //= 2
        more = args.gradient_accumulation_steps * args.per_device_train_batch_size // batch
        tried.append({"per_device_train_batch_size": batch, "gradient_accumulation_steps": more})
    tried += [{**tried[-1], "activation_checkpointing": True}] if tried else []
    fits = next((change for change in tried if needed(**change)["total"] <= HEADROOM * capacity), None)
    remedy = "shard the model (zero3, fsdp2), train an adapter (use_peft: true), or lower max_length"
    if fits is not None:
        remedy = "set " + ", ".join(f"{key}: {str(value).lower()}" for key, value in fits.items())
    yield Finding("error", f"a device would need {gib(total)} and has {gib(capacity)}", remedy)


def spare(plan: dict[str, Any], args: "SFTConfig", longest: int, capacity: int) -> Iterator[Finding]:
    """Batches that could be larger, where they are small enough to leave a GPU waiting for the next kernel."""
    if args.activation_checkpointing or not keeps_documents(args):
        return
    needs, rows = plan["memory_bytes"], args.per_device_train_batch_size
    larger, steps = rows, args.gradient_accumulation_steps
    while steps % 2 == 0 and larger * longest < BUSY:
        if needs["total"] + needs["activations"] * (2 * larger / rows - 1) > FITS * capacity:
            break
        larger, steps = 2 * larger, steps // 2
    if larger > rows:
        yield Finding(
            "note",
            f"batches of {rows * longest:,} tokens leave a GPU waiting for what feeds it, and larger ones would fit",
            f"per_device_train_batch_size: {larger} with global_batch_size: {plan['global_batch_size']}, same steps",
        )


def existing(path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    return path if path.exists() else existing(path.absolute().parent)


def gib(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:,.1f} GiB" if count > 2**28 else f"{count / 2**20:,.1f} MiB"


def report(findings: list[Finding], plan: dict[str, Any], as_json: bool, shown: bool = True) -> int:
    """Show findings and plan, as JSON on stdout when asked; returns the exit code: 1 when there are errors."""
    failed = has_errors(findings)
    if not shown:
        return int(failed)
    if as_json:
        print(json.dumps({"findings": [finding._asdict() for finding in findings], "plan": plan}, indent=1))
    else:
        verdict = "this recipe cannot be run" if failed else "checked: this recipe can be run; nothing was trained"
        console = Console(soft_wrap=True, highlight=False, emoji=False, markup=False)
        console.print(f"\n{plan_text(plan)}\n")
        for finding in findings:
            console.print(as_text([finding]), style=COLOURS[finding.level])
        console.print(verdict, style="bold")
    return int(failed)


def require(findings: list[Finding]) -> None:
    """Log warnings. Raises `UserError` when there are errors."""
    for finding in findings:
        if finding.level == "warning":
            logger.warning("%s", as_text([finding]).removeprefix("warning "))
    if has_errors(findings):
        raise UserError(as_text([finding for finding in findings if finding.level == "error"]))


def plan_text(plan: dict[str, Any]) -> str:
    """The plan for people, aligned."""
    lines = []
    flat = {**plan, **{f"memory_{part}_bytes": size for part, size in plan.get("memory_bytes", {}).items()}}
    for key, value in flat.items():
        if value is None or isinstance(value, dict) or (key.startswith("memory_") and not value):
            continue
        shown = gib(value) if key.endswith("_bytes") else f"{value:,}" if isinstance(value, (int, float)) else value
        lines.append(f"{key.replace('_bytes', '').replace('_', ' '):18}  {shown}")
    return "\n".join(lines)
