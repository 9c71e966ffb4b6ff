"""The model on the dtype, attention and quantisation that fit how it is trained, and its adapter."""

import contextlib
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import get_peft_config, get_quantization_config

from open_r1.attention import AUTO, FLASH, asked_for
from open_r1.errors import UserError
from open_r1.tables import looks_local

if TYPE_CHECKING:
    from peft import PeftConfig

    from open_r1.configs import ModelConfig, SFTConfig

logger = logging.getLogger(__name__)
SAMPLE = 1 << 20


def check_model(model_args: "ModelConfig", training_args: "SFTConfig") -> PreTrainedConfig:
    """The model's config, with the keys of `model_init_kwargs` that belong to it, when nothing is wrong with it.

    What can be known of it without its weights is checked. Raises `UserError`.
    Where `plan_processes` plans for other machines, what is not installed on this one is only told.
    """
    for lack in not_installed(model_args, training_args):
        if training_args.plan_processes is None:
            raise UserError(lack)
        logger.warning("on this machine: %s", lack)
    adapter = adapter_base(model_args.model_name_or_path)
    if adapter is not None and not model_args.use_peft:
        raise UserError(
            f"{model_args.model_name_or_path} is a LoRA adapter of {adapter}: set use_peft: true to train it on, "
            "or merge it into its base first"
        )
    if looks_local(model_args.model_name_or_path) and not Path(model_args.model_name_or_path).is_dir():
        raise UserError(f"model_name_or_path: no such directory: {model_args.model_name_or_path}")
    require_safetensors(model_args.model_name_or_path, adapter)
    try:
        config = AutoConfig.from_pretrained(
            adapter or model_args.model_name_or_path,
            revision=None if adapter else model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model_name_or_path: {adapter or model_args.model_name_or_path} comes with code of its own, which "
                "runs with trust_remote_code: true alone; read it first, and pin it with model_revision"
            ) from error
        text = " ".join(str(error).split())[:300]
        raise UserError(f"model_name_or_path: {model_args.model_name_or_path!r} cannot be read: {text}") from error
    for key, value in (training_args.model_init_kwargs or {}).items():
        if hasattr(config, key) and key not in ("dtype", "torch_dtype"):
            setattr(config, key, value)
    return config


def not_installed(model_args: "ModelConfig", training_args: "SFTConfig") -> Iterator[str]:
    """What a recipe needs that this machine does not have, each with its remedy."""
    attention = asked_for(model_args, training_args)
    if isinstance(attention, str) and attention in FLASH and not FLASH[attention]():
        yield f"attn_implementation: {attention} is not installed or finds no GPU here; use sdpa, or install it"
    here = training_args.plan_processes is None
    if attention == "flex_attention" and here and training_args.device.type == "cpu":
        yield "attn_implementation: flex_attention has no gradients on a CPU; use auto"
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not importlib.util.find_spec("bitsandbytes"):
        yield "load_in_4bit and load_in_8bit need bitsandbytes: pip install 'open-r1[quant]'"
    for tracker in set(training_args.report_to) & {"wandb", "tensorboard", "mlflow", "trackio", "comet_ml", "clearml"}:
        if not importlib.util.find_spec(tracker) and not (
            tracker == "tensorboard" and importlib.util.find_spec("tensorboardX")
        ):
            yield f"report_to: {tracker} is not installed; pip install {tracker}, or drop it"


@contextlib.contextmanager
def adapters_at_work(model: torch.nn.Module, autocast: bool) -> Iterator[None]:
    """Have adapters compute as they do in training, with or without autocast, in a block."""
    with adapters_cast(model, cast=not autocast), adapters_fused(model):
        yield


@contextlib.contextmanager
def adapters_cast(model: torch.nn.Module, cast: bool) -> Iterator[None]:
    """Have adapters cast what they are given to their weights' dtype, or not, in a block.

    Under autocast that is in vain: float32 copies of bfloat16 states are made to be rounded back to the same numbers
    (with dropout between them, what is dropped is drawn otherwise). PEFT leaves it out itself there where the base is
    quantised (peft 0.21, `lora/bnb.py`). DoRA computes with them.
    """
    layers = [layer for layer in model.modules() if hasattr(layer, "cast_input_dtype_enabled")]
    layers = [layer for layer in layers if cast or not any(getattr(layer, "use_dora", {}).values())]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = cast
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


@contextlib.contextmanager
def adapters_fused(model: torch.nn.Module) -> Iterator[None]:
    """Have LoRA layers scale what they learnt and add it to the base's within their second product, in a block.

    PEFT (0.21) makes three tensors as wide as the output on the way, and a scaled gradient as wide on the way back.
    Plain LoRA on plain linear layers alone: the others (DoRA, biases, quantised) compute as PEFT has it.
    """
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A") and fuses(layer)]
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(fused, layer, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def fuses(layer: Any) -> bool:
    """Whether a LoRA layer is a plain one on a plain linear layer, whose output nobody else looks at."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or layer.lora_variant or layer.base_layer._forward_hooks:
        return False
    return type(layer.base_layer) is torch.nn.Linear and all(each.bias is None for each in layer.lora_B.values())


def fused(layer: Any, plain: Callable[..., torch.Tensor], x: torch.Tensor, **told: Any) -> torch.Tensor:
    """What a LoRA layer makes of states `x`, of shape (..., width): what PEFT's (`plain`) does, but for rounding.

    PEFT's where not just one adapter is at work, its weights are in shards (ZeRO-3 and FSDP's first version gather
    those of what they see called), or there are several dtypes without autocast, which are to be cast.
    """
    active = layer.active_adapters
    name = active[0] if len(active) == 1 else None
    if told or name not in layer.lora_A or layer.disable_adapters or layer.merged or x.dim() < 2:
        return plain(x, **told)
    second, base = layer.lora_B[name], layer.base_layer
    if type(second) is not torch.nn.Linear or type(base) is not torch.nn.Linear or hasattr(second.weight, "ds_id"):
        return plain(x)
    if not torch.is_autocast_enabled(x.device.type) and not x.dtype == second.weight.dtype == base.weight.dtype:
        return plain(x)
    flat = x.flatten(0, -2)
    result = base(flat)  # of two dimensions, so that it is no view and can be added to in place
    inner = layer.lora_A[name](layer.lora_dropout[name](flat))
    result.addmm_(inner, second.weight.to(result.dtype).t(), alpha=layer.scaling[name])
    return result.unflatten(0, x.shape[:-1])


def get_model(
    model_args: "ModelConfig",
    training_args: "SFTConfig",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Load the model, its vocabulary grown to the tokenizer's where one is given.

    Where `model_name_or_path` is an adapter, its base with the adapter on it, trainable. Raises `UserError` when the
    weights cannot be loaded.
    """
    dtype = weights_dtype(model_args, training_args)
    quantization = get_quantization_config(replace(model_args, dtype=dtype))
    name = model_args.model_name_or_path
    base = adapter_base(name)
    require_safetensors(name, base)
    kwargs: dict[str, Any] = {
        "revision": None if base else model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": None if model_args.attn_implementation == AUTO else model_args.attn_implementation,
        "dtype": dtype,
        "quantization_config": quantization,
        **(training_args.model_init_kwargs or {}),
        "use_safetensors": True,
    }
    zero3 = training_args.deepspeed_plugin is not None and training_args.deepspeed_plugin.zero_stage == 3
    if quantization is not None and torch.cuda.is_available() and not zero3:  # ZeRO-3 places the weights itself
        kwargs["device_map"] = {"": training_args.local_process_index}
    try:
        model = AutoModelForCausalLM.from_pretrained(base or name, **kwargs)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{base or name}: the weights cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    settle_generation(getattr(model, "generation_config", None))
    if tokenizer is not None:
        fit_vocabulary(model, tokenizer)
    if base is None:
        return model

    from peft import PeftModel

    model = PeftModel.from_pretrained(model, name, is_trainable=True)
    settings = model.peft_config["default"]
    logger.info("training goes on from the adapter %s on %s; its own r=%d and targets hold", name, base, settings.r)
    return model


def skeleton(config: PreTrainedConfig, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
    """The architecture without weights, on the meta device; `kwargs` are those of `from_config`."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **kwargs)


def settle_generation(settings: GenerationConfig | None) -> None:
    """Make a generation config valid whose temperature and the like came without `do_sample`, which they mean.

    transformers refuses to save such a model, and would only do so after training. Raises `UserError` for any other
    generation config that cannot be saved.
    """
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError as error:
        sampled, settings.do_sample = settings.do_sample, True
        try:
            settings.validate(strict=True)
        except ValueError:
            settings.do_sample = sampled
            text = " ".join(str(error).split())[:300]
            raise UserError(f"the model's generation_config.json cannot be saved again: {text}; mend it") from error
        logger.warning("the model's generation_config.json samples without do_sample: true, which is saved with it")


def require_safetensors(*names: str | Path | None) -> None:
    """Refuse local models and adapters whose weights are pickles alone, which run code when they are read.

    Of a model on the hub `use_safetensors` refuses them. Raises `UserError`.
    """
    for path in (Path(name) for name in names if name is not None):
        adapter = (path / "adapter_config.json").is_file()
        safe, pickled = ("adapter_model", "adapter_model") if adapter else ("model", "pytorch_model")
        found = sorted(each.name for each in path.glob(f"{pickled}*.bin"))
        if found and not any(path.glob(f"{safe}*.safetensors")):
            raise UserError(
                f"{path / found[0]}: these weights are a pickle, which can run code when it is read, and there are no "
                "safetensors beside it; take a revision that has them, or convert it where you trust its origin: load "
                "it there and save_pretrained it again"
            )


def adapter_base(name: str) -> str | None:
    """The base model of a local LoRA adapter's directory, None for anything that is no adapter. Raises `UserError`.

    Other kinds of adapters name files and tokenizers of their own, which PEFT would load.
    """
    config = Path(name) / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        settings = json.loads(config.read_text())
        base, kind = settings["base_model_name_or_path"], settings.get("peft_type", "LORA")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config}: names no base model: {error!r}") from error
    if kind != "LORA":
        raise UserError(f"{config}: peft_type is {kind}; only LoRA adapters are read here")
    return base


def contents_of_base(model_args: "ModelConfig") -> str | None:
    """What tells the weights under an adapter from others: the commit of a hub model, or a digest of samples of files.

    Of each file the size and a MiB of its beginning, middle and end: other weights differ everywhere.
    """
    name = adapter_base(model_args.model_name_or_path) or model_args.model_name_or_path
    if not Path(name).is_dir():
        config = try_to_load_from_cache(name, "config.json", revision=model_args.model_revision)
        return Path(config).parent.name if isinstance(config, str) else None
    found = hashlib.sha256()
    for path in sorted(Path(name).glob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, size - SAMPLE):
                file.seek(max(0, start))
                found.update(file.read(SAMPLE))
    return found.hexdigest()[:32]


def weights_dtype(model_args: "ModelConfig", training_args: "SFTConfig") -> str:
    """The recipe's dtype, else the one that trains well.

    float32 for full fine-tuning: AdamW on pure bfloat16 weights rounds most small updates away. bfloat16 where the
    weights are frozen, or where ZeRO keeps float32 masters of them. float32 whenever training itself runs in it.
    """
    if model_args.dtype is not None:
        if model_args.dtype == "bfloat16" and not model_args.use_peft and training_args.deepspeed_plugin is None:
            logger.warning(
                "dtype: bfloat16 trains bfloat16 weights: at small learning rates AdamW leaves most of them "
                "unchanged; remove dtype to train float32 weights in bf16 mixed precision"
            )
        return model_args.dtype
    if training_args.fp16 and model_args.use_peft:
        return "float16"
    if not training_args.bf16:
        return "float32"
    return "bfloat16" if model_args.use_peft or training_args.deepspeed_plugin is not None else "float32"


def planned_dtype(config: PreTrainedConfig, model_args: "ModelConfig", training_args: "SFTConfig") -> str:
    """`weights_dtype`, and for `auto` that of the checkpoint."""
    dtype = weights_dtype(model_args, training_args)
    return str(config.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow the embeddings to the tokenizer's length, new rows around the mean of the old; never shrink them."""
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        # On ranks that FSDP gives no weights yet there is no mean; they receive those of the first rank.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=model.device.type != "meta")
        logger.info("embeddings resized to %d tokens", len(tokenizer))


def adapter_config(
    model_args: "ModelConfig", model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> "PeftConfig | None":
    """The LoRA config, None without PEFT or when the model carries an adapter already.

    Tokens that were added for the chat template get trained and saved through `modules_to_save`, as two matrices even
    where the model ties them: trainable token rows crash the trainer's fused LM head on tied models.
    """
    config = get_peft_config(model_args)
    if config is None or hasattr(model, "peft_config"):
        return None
    if added := getattr(tokenizer, "added_for_chat", []):
        matrices = {model.get_input_embeddings(): "input", model.get_output_embeddings(): "output"}
        names = [name.rpartition(".")[2] for name, module in model.named_modules() if module in matrices]
        config.modules_to_save = sorted({*(config.modules_to_save or []), *names})
        cost = sum(module.weight.numel() for module in matrices)
        logger.warning(
            "%s are new to the vocabulary, so %s are trained and saved whole, untied: %.0fM parameters more",
            " and ".join(added),
            " and ".join(names),
            cost / 1e6,
        )
    return config
