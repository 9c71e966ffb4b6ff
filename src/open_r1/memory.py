"""What a training step takes of a device's memory, found by taking two steps with tensors that hold nothing.

Model, adapter, loss and optimizer are the ones that train; only their tensors are fake, so what torch's allocator
would have to hand out is counted without any of it. Deep models are measured at two depths and continued.
"""

import contextlib
import copy
import ctypes
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl import get_peft_config
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from open_r1.attention import keeps_documents
from open_r1.model import adapters_at_work, skeleton

if TYPE_CHECKING:
    from open_r1.configs import ModelConfig, SFTConfig

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LENGTHS = "lengths"  # attention without a mask of all pairs
DEPTHS = (6, 12)  # layers that deeper models are measured with
LIGER = ("llama", "mistral", "qwen2", "qwen3")  # models on whose layers liger-kernel's norms and gates are the same
OUTPUTS = ("log_probs", "entropy", "is_top1")  # what TRL's trainer asks of the loss
IN_PLACE = ("_forward_tile", "_backward_tile", "_addmm_fp32")  # what its loss does to a tile of logits
QUANTISED = {4: 0.55, 8: 1.05}  # bytes of a weight in bits, its scales included
# Bytes of optimizer state for a trained parameter, by what the optimizer's name holds; AdamW keeps 8.
STATE = {"8bit": 2, "4bit": 1, "adafactor": 0, "sgd": 0, "lion": 4, "rmsprop": 4, "adagrad": 4}
KEEPING = {-1: -1, -4: 0}  # of glibc's mallopt: M_TRIM_THRESHOLD, never; M_MMAP_MAX, none
# Memory of GPUs in GiB, as sold; any other is said as NAME-24GB.
GPUS = {"T4": 16, "L4": 24, "A10": 24, "L40S": 48, "V100": 32, "A100": 80, "H100": 80, "H200": 141, "B200": 180}


def plan_memory(
    config: PretrainedConfig, dtype: str, model_args: "ModelConfig", args: "SFTConfig", length: int, vocabulary: int
) -> dict[str, int]:
    """Bytes that a device needs at most: `weights`, `gradients`, `optimizer`, `activations` (loss too), `exchanged`,
    `total`; and of main memory `host` and `host_first` (see `shared_out`).

    `length` is that of the longest row in tokens, `vocabulary` the number of tokens after those that are added.
    """
    if args.processes > 1 or (args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage >= 2):
        args = copy.copy(args)
        args.gradient_accumulation_steps = max(2, args.gradient_accumulation_steps)  # tells gradients from activations
    if is_fsdp(args) and not model_args.use_peft:
        dtype = half_of(args) or dtype  # weights are gathered in it, so that none is cast
    layers = config.get_text_config().num_hidden_layers
    if layers <= DEPTHS[1]:
        found = measure(config, layers, dtype, model_args, args, length, vocabulary)
    else:
        low, high = (measure(config, depth, dtype, model_args, args, length, vocabulary) for depth in DEPTHS)
        more = (layers - DEPTHS[1]) / (DEPTHS[1] - DEPTHS[0])
        found = {part: high[part] + (high[part] - low[part]) * more for part in high}
    return {part: int(value) for part, value in shared_out(found, model_args, args).items()}


def measure(
    config: PretrainedConfig,
    layers: int,
    dtype: str,
    model_args: "ModelConfig",
    args: "SFTConfig",
    length: int,
    vocabulary: int,
) -> dict[str, float]:
    """Bytes at the peak of the second step on one device, for a model of so many layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size = layers, max(vocabulary, text.vocab_size)
    if isinstance(vars(text).get("layer_types"), list):
        text.layer_types = text.layer_types[:layers]
    rows = args.per_device_train_batch_size
    flat = keeps_documents(args)
    shape = (1, rows * length) if flat else (rows, length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attention = model_args.attn_implementation or "sdpa"  # as transformers does where it is left to it
        if attention not in ("eager", "sdpa"):  # kernels that take lengths
            attention = LENGTHS
            AttentionInterface.register(LENGTHS, sdpa_attention_forward)
            AttentionMaskInterface.register(LENGTHS, lambda *args, **kwargs: None)
        model = skeleton(config, dtype=getattr(torch, dtype), attn_implementation=attention)
        add_fused_lm_head(model, outputs=OUTPUTS)
        if (lora := get_peft_config(model_args)) is not None:
            with torch.device("meta"):
                model = get_peft_model(model, lora)  # in float32, as peft keeps what it trains
    if args.use_liger_kernel and text.model_type in LIGER and not args.liger_kernel_config:
        keep_less(model)
    half = half_of(args)
    loss = contextlib.nullcontext() if on_cpu(args) else kernels_of_the_loss()
    with FakeTensorMode(), warnings.catch_warnings(), adapters_at_work(model, autocast=bool(half)), loss:
        warnings.simplefilter("ignore")
        fill(model)
        if args.activation_checkpointing:
            how = {"use_reentrant": False, **(args.activation_checkpointing_kwargs or {})}
            every = how.pop("every_n_layers", 1)
            model.activation_checkpointing_enable(how, every_n_layers=every)
            if lora is not None:
                model.enable_input_require_grads()
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        tracker = Peak([*model.parameters(), *model.buffers()])
        cast = torch.autocast("cpu", getattr(torch, half)) if half else contextlib.nullcontext()
        # For eager and sdpa the mask of a row of several documents is one of all pairs.
        masked = (1, 1, *shape[1:] * 2) if flat and attention != LENGTHS else shape
        with tracker:
            for number in range(2 * min(2, args.gradient_accumulation_steps)):
                step(model, shape, masked, cast)
                if args.gradient_accumulation_steps == 1 or number % 2:
                    torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
        states = [value for state in optimizer.state.values() for value in state.values()]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    blocks = max((each for each in model.modules() if isinstance(each, torch.nn.ModuleList)), key=len, default=model)
    inside = sum(parameter.numel() for parameter in blocks.parameters())
    return {
        "weights": size_of([*model.parameters(), *model.buffers()]),
        "gradients": size_of(trained),
        "optimizer": size_of(states),
        "total": tracker.peak,
        "trained": sum(parameter.numel() for parameter in trained),
        "parameters": parameters,
        "gathered": parameters - inside + 2 * inside / layers,  # what is in no layer, a layer, and the next one
    }


class Peak(TorchDispatchMode):
    """The most bytes that lived at once, counted by storages as `torch.distributed._tools.mem_tracker` does.

    That one hooks every parameter, which those that are frozen refuse.
    """

    def __init__(self, there: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        for tensor in there:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor while it lives."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        """Count a storage no more."""
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what an operation makes."""
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, made)
        return made


def size_of(tensors: list[torch.Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def fill(model: torch.nn.Module) -> None:
    """Give a model without memory tensors that count as memory; what is tied stays tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                made[id(tensor)] = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
            module._parameters[name] = made.get(id(tensor))
        for name, tensor in module._buffers.items():
            module._buffers[name] = tensor if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype)


def keep_less(model: torch.nn.Module) -> None:
    """Have norms and gates keep for the backward pass what liger-kernel's keep, which run nowhere but on a GPU.

    Norms what they are given, gates both of their operands; all else is computed again.
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(again, module.forward)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            module.forward = partial(gated, module, again)


def gated(block: Any, again: Callable[..., torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """What a gated block makes of states, of shape (rows, tokens, width); `again` runs what is not kept."""
    inner = again(lambda gate, up: block.act_fn(gate) * up, block.gate_proj(states), block.up_proj(states))
    return block.down_proj(inner)


@contextlib.contextmanager
def kernels_of_the_loss() -> Iterator[None]:
    """Within, tiles of logits are worked on in place, as TRL's kernels do on a GPU.

    PyTorch's operations, which do the same where there is no Triton, hold some seven copies of a tile: 3.5 GiB.
    """
    kept = {name: getattr(chunked_logprob, name) for name in IN_PLACE}
    vars(chunked_logprob).update(dict.fromkeys(IN_PLACE, lambda *args, **kwargs: None))
    try:
        yield
    finally:
        vars(chunked_logprob).update(kept)


def step(model: Any, shape: tuple[int, int], masked: tuple[int, ...], cast: Any) -> None:
    """Forward and backward of one micro-batch, as TRL's trainer does them."""
    ids = torch.zeros(shape, dtype=torch.long)
    with cast:
        mask = torch.ones(masked, dtype=torch.long if len(masked) == 2 else torch.bool)
        made = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
        loss = -made.log_probs.sum() / ids.numel()
    loss.backward()


def shared_out(found: dict[str, float], model_args: "ModelConfig", args: "SFTConfig") -> dict[str, float]:
    """The parts on one device of those that share the model, quantised where the recipe says so.

    `exchanged` is what sharding gathers and reduces at once. Of main memory, `host` is what each process takes to load
    the weights or to keep what is offloaded, `host_first` what the first takes to load or to save for all.
    """
    weights, gradients, optimizer = (found[part] for part in ("weights", "gradients", "optimizer"))
    trained, frozen = found["trained"], found["parameters"] - found["trained"]
    each = weights / found["parameters"]
    activations = max(
        0.0, found["total"] - weights - optimizer - (gradients if args.gradient_accumulation_steps > 1 else 0)
    )
    if bits := 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 0:
        weights -= frozen * (each - QUANTISED[bits])
    optimizer = optimizer * state_bytes(args) / 8
    world, plugin = args.processes, args.deepspeed_plugin
    stage = plugin.zero_stage if plugin is not None else 0
    exchanged = host_first = 0.0
    host = 0.0 if bits else weights  # every process loads all of them, quantised ones straight onto the device
    if stage:
        settings = plugin.deepspeed_config["zero_optimization"]
        optimizer = (state_bytes(args) + 4) * trained / world  # in float32, and master weights too
        bucket = number_in(settings, "reduce_bucket_size", 5e8) * gradients / trained
        exchanged = bucket * (2 if settings.get("overlap_comm", stage == 3) else 1)
        gradients = gradients / world if stage >= 2 else gradients
        if stage == 3:
            exchanged += min(weights, number_in(settings, "stage3_max_live_parameters", 1e9) * each)
            weights = weights / world
            host = 0.0 if plugin.zero3_init_flag else host
            host_first = 2 * found["parameters"] if plugin.zero3_save_16bit_model else 0.0
        kept = 0.0
        if (settings.get("offload_optimizer") or {}).get("device", "none") != "none":
            kept = optimizer + gradients + 4 * trained / world  # gradients once more in float32, for the step
            optimizer = gradients = 0.0
        if stage == 3 and (settings.get("offload_param") or {}).get("device", "none") != "none":
            kept, weights = kept + weights, 0.0
        host = max(host, kept)
    elif is_fsdp(args):
        exchanged = 2 * found["gathered"] * each  # with their gradients
        if half_of(args):  # it keeps in float32 what it computes with in half of it
            weights, gradients, optimizer = (size * trained for size in (4, 4, state_bytes(args)))
            weights += frozen * each
        whole = weights + (optimizer if os.environ.get("FSDP_STATE_DICT_TYPE") == "FULL_STATE_DICT" else 0)
        efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true"
        host, host_first = (0.0 if efficient else weights), max(whole, weights if efficient else 0)
        weights, gradients, optimizer = weights / world, gradients / world, optimizer / world
        if os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true":
            host = max(host, weights + gradients + optimizer)
            weights = gradients = optimizer = 0.0
    elif world > 1:
        gradients *= 2  # DDP's buckets
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "exchanged": exchanged,
        "total": weights
        + optimizer
        + activations
        + exchanged
        + (gradients if stage or world > 1 or args.gradient_accumulation_steps > 1 else 0),
        "host": host,
        "host_first": host_first,
    }


def on_cpu(args: "SFTConfig") -> bool:
    """Whether this machine's processor is what trains; a check is often for GPUs elsewhere."""
    return args.plan_processes is None and (args.use_cpu or (args.device.type == "cpu" and not args.dry_run))


def is_fsdp(args: "SFTConfig") -> bool:
    """Whether PyTorch shards the model: accelerate's environment says so, which it heeds on GPUs alone."""
    return args.processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def half_of(args: "SFTConfig") -> str:
    """The half precision that is computed in, empty where it is none."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else ""


def number_in(settings: dict[str, Any], key: str, default: float) -> float:
    """A number of DeepSpeed's config, its default where there is none (`auto`)."""
    value = settings.get(key)
    return value if isinstance(value, (int, float)) else default


def state_bytes(args: "SFTConfig") -> int:
    """Bytes of optimizer state for a trained parameter in float32."""
    name = str(getattr(args.optim, "value", args.optim))
    return next((size for part, size in STATE.items() if part in name), 8)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is asked for next, where it is the C library.

    By default every block above 32 MiB is mapped anew and given back at once, so that each of a step's tensors of that
    size, its tiles of logits first, costs faults of all of its pages.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in KEEPING.items():
            libc.mallopt(option, value)


def main_memory() -> int:
    """Bytes of this machine's memory, or what the control groups that this process is in may take of it."""
    limits = [psutil.virtual_memory().total]
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else ():
        _, kinds, place = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, name = (CGROUPS / "memory", "memory.limit_in_bytes") if kinds else (CGROUPS, "memory.max")
        group = root / place.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # not there, as seen from a container, or `max`
                limits.append(int((folder / name).read_text()))
    return min(limits)


def device_memory(named: str | None) -> int | None:
    """Bytes of a GPU: of the one named (`H100`, `A100-40GB`), else of the first that is here, else None.

    Raises `ValueError` for a name that says nothing.
    """
    if named is None:
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    name, _, size = named.upper().partition("-")
    if size.removesuffix("GB").isdigit():
        return int(size.removesuffix("GB")) * 2**30
    if not size and name in GPUS:
        return GPUS[name] * 2**30
    raise ValueError(f"plan_gpu: {named!r} is none of {', '.join(GPUS)}; say its memory: {named}-80GB")
