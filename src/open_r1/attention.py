"""Attention that keeps packed documents apart and needs no build: which backend a run takes, and `varlen`, our own.

`varlen` computes what `sdpa` does with the mask that transformers makes, to rounding. Where that mask only says that
each document of a packed row sees itself (`DocumentMask`), it is never made: the documents go through PyTorch's
variable-length flash kernel, or one by one through scaled_dot_product_attention where that kernel does not run (CPU,
float32, old GPUs, ROCm, wide heads, attention dropout). Everything else, padded batches and generation with a cache
too, is handed to transformers' `sdpa`, mask and all.
"""

import inspect
import itertools
import logging
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from open_r1.errors import UserError

if TYPE_CHECKING:
    from open_r1.configs import ModelConfig, SFTConfig

logger = logging.getLogger(__name__)
AUTO, VARLEN = "auto", "varlen"
FLASH = {
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_4": is_flash_attn_4_available,
}
HALF = (torch.bfloat16, torch.float16)
WIDEST = 256  # head that flash kernels take
AMPERE, HOPPER = 8, 9  # NVIDIA's compute capabilities
BEFORE = "on a GPU before Ampere"
SHORT, CROWDED = 8, 512  # documents shorter than so, in a row of at most so many tokens, cost more one by one
# Models that work on the mask they are given, and one whose layers keep lengths to themselves (transformers 5.23).
NO_LENGTHS = ("doge", "nemotron")
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # names of one thing in configs


class Choice(NamedTuple):
    """A backend by name (None leaves it to transformers), why it, and why it does not work document by document.

    `why_not` is empty where it does: packed and padding-free documents are kept apart at a cost that is the sum of
    theirs, not through a mask of all pairs of tokens in the row.
    """

    name: str | None
    reason: str
    why_not: str


def settle_attention(model_args: "ModelConfig", training_args: "SFTConfig", config: PretrainedConfig) -> Choice:
    """Choose the attention of a run, say it in one line and set `attn_implementation` to it. Needs no weights.

    It is taken out of `model_init_kwargs`, which would override it. Raises `UserError` when the recipe asks for
    `varlen` and the model cannot have it.
    """
    choice = choose(model_args, training_args, config)
    logger.info("attention: %s, %s", choice.name or "left to transformers", choice.reason)
    model_args.attn_implementation = choice.name
    given = training_args.model_init_kwargs or {}
    training_args.model_init_kwargs = {key: given[key] for key in given if key != "attn_implementation"}
    return choice


def asked_for(model_args: "ModelConfig", training_args: "SFTConfig") -> Any:
    """What the recipe says of attention: a backend (in `model_init_kwargs` also one for each part of a model)."""
    given = (training_args.model_init_kwargs or {}).get("attn_implementation")
    return given or model_args.attn_implementation or AUTO


def choose(model_args: "ModelConfig", training_args: "SFTConfig", config: PretrainedConfig) -> Choice:
    """The recipe's backend; for `auto` the best of those that are there, keep documents apart and fit the model.

    That is FlashAttention 3, 2, `varlen`, `sdpa` or `eager`, in this order; FlashAttention 4 is young and only taken
    where the recipe says so. Of a GPU elsewhere (`plan_processes`) it is not known what is installed. On a CPU
    `varlen` gains nothing where rows are padded. Raises `UserError` as `settle_attention` does.
    """
    said = asked_for(model_args, training_args)
    kind, elsewhere = model_class(config), training_args.plan_processes is not None
    lack = not_for_varlen(config, kind)

    def choice(name: str | None, reason: str) -> Choice:
        return Choice(name, reason, not_by_document(name, config, kind))

    if said == VARLEN and lack:
        raise UserError(f"attn_implementation: varlen cannot be had: {lack}; use auto")
    if said != AUTO:
        return choice(said, "as the recipe says")
    if kind is None:
        return choice(None, f"since {lack}")
    device, half = training_args.device, computes_in_half(model_args, training_args, config)
    for name in ("flash_attention_3", "flash_attention_2") if device.type == "cuda" and half else ():
        if not not_for_flash(name, config, kind):
            return choice(name, "the best that is installed and fits the model")
    if lack:
        plain = kind._supports_sdpa and not softcap(config)
        return choice("sdpa" if plain else "eager", f"since {lack}")
    if device.type == "cuda" or elsewhere:
        return choice(VARLEN, how_documents_go(config, half, None if elsewhere else device))
    if keeps_documents(training_args):
        return choice(VARLEN, "documents of packed rows one by one")
    where = {"cpu": "a CPU"}.get(device.type, device.type.upper())
    return choice("sdpa", f"no row has documents to keep apart, on {where}")


def keeps_documents(args: "SFTConfig") -> bool:
    """Whether rows hold several documents that are to be kept apart, or will, where the recipe leaves that open."""
    if args.packing:
        return args.packing_strategy != "wrapped"  # which do not keep them apart
    to_be = "padding_free" in args.unsettled and args.per_device_train_batch_size > 1
    return bool(args.padding_free or to_be)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that transformers makes a causal model of this config with; None where its code comes with it."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, (list, tuple)) else found


def computes_in_half(model_args: "ModelConfig", args: "SFTConfig", config: PretrainedConfig) -> bool:
    """Whether attention is computed in bfloat16 or float16, without which there is no flash kernel."""
    dtype = config.dtype if model_args.dtype == "auto" else getattr(torch, model_args.dtype or "float32")
    return bool(args.bf16 or args.fp16) or dtype in HALF


def softcap(config: PretrainedConfig) -> float | None:
    """What attention scores are capped at (Gemma 2)."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def head_widths(config: PretrainedConfig) -> set[int]:
    """Widths of a head's queries in the layers, in numbers; none where the config does not say."""
    text = config.get_text_config()
    if text.is_heterogeneous:
        return set().union(*map(head_widths, text.per_layer_config))
    if latent := getattr(text, "qk_nope_head_dim", None):
        return {latent + (getattr(text, "qk_rope_head_dim", None) or 0)}
    hidden, heads = getattr(text, "hidden_size", 0), getattr(text, "num_attention_heads", 0)
    width = getattr(text, "head_dim", None) or (hidden // heads if hidden and heads else 0)
    return {width} if width else set()


def drops(config: PretrainedConfig) -> bool:
    """Whether attention drops out."""
    return any(getattr(config.get_text_config(), name, None) for name in DROPOUTS)


def not_for_flash(name: str, config: PretrainedConfig, kind: type[PreTrainedModel]) -> str:
    """Why a FlashAttention is not for this machine or model, empty where it is.

    What transformers checks (`_flash_attn_can_dispatch`, 5.23) and what it only warns of or leaves to the kernel:
    of NVIDIA's GPUs FlashAttention 2 is made for Ampere and later ones, and FlashAttention 3 for Hopper alone; it has
    no dropout.
    """
    fitting = getattr(kind, "_compatible_flash_implementations", None)
    if not FLASH[name]():
        return "not installed"
    if not kind._supports_flash_attn or (fitting is not None and name not in fitting):
        return "the model does not support it"
    if max(head_widths(config), default=0) > WIDEST:
        return f"heads are wider than {WIDEST}"
    rocm, capability = torch.version.hip is not None, torch.cuda.get_device_capability()[0]
    if name == "flash_attention_2" and not rocm and capability < AMPERE:
        return BEFORE
    if name == "flash_attention_3" and (rocm or capability != HOPPER):
        return "no Hopper GPU"
    if name == "flash_attention_3" and drops(config):
        return "no attention dropout"
    return ""


def mixes(config: PretrainedConfig, kind: type[PreTrainedModel] | None) -> str:
    """Why no attention alone keeps documents of a model apart, empty where one may."""
    text = config.get_text_config()
    if others := {*(getattr(text, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}:
        return f"{text.model_type} has layers of {' and '.join(sorted(others))}"
    if getattr(kind, "_is_stateful", False):
        return f"layers of {text.model_type} carry a state from token to token"
    return ""


def not_for_varlen(config: PretrainedConfig, kind: type[PreTrainedModel] | None) -> str:
    """Why `varlen` is not for a model, empty where it is.

    It is for causal attention to whole documents or a sliding window of them, as `sdpa` can express it, in models that
    hand the lengths of documents down to their attention.
    """
    name = config.get_text_config().model_type
    if kind is None:
        return f"{name} comes with code of its own"
    if mixed := mixes(config, kind):
        return mixed
    if config.is_encoder_decoder or not getattr(config.get_text_config(), "is_causal", True):
        return f"{name} does not only look back"
    if softcap(config) or not kind._supports_sdpa:
        return f"{name} has attention (caps, sinks, biases) that scaled_dot_product_attention cannot express"
    if name in NO_LENGTHS or not (kind._supports_attention_backend and kind._can_set_attn_implementation()):
        return f"{name} hands no lengths of documents to its attention"
    return ""


def not_by_document(name: Any, config: PretrainedConfig, kind: type[PreTrainedModel] | None) -> str:
    """Why a backend does not work document by document in a model (see `Choice`), empty where it does."""
    model = config.get_text_config().model_type
    if kind is None:
        return f"{model} comes with code of its own"
    if mixed := mixes(config, kind):
        return f"{mixed}, where attention alone keeps no documents apart"
    if name == VARLEN or ("flash" in name and kind._supports_attention_backend):
        return ""
    if "flash" in name:
        return f"{model} hands no lengths of documents to its attention"
    if name == "flex_attention":
        return "flex_attention goes by blocks of tokens, with a mask of each batch"
    if name in ("sdpa", "eager"):
        return f"{name} would compare all pairs of tokens of a batch that is one long row"
    return f"it is not known whether {name} goes document by document"


def how_documents_go(config: PretrainedConfig, half: bool, device: torch.device | None) -> str:
    """Whether `varlen` takes the documents of a row by PyTorch's kernel or one by one, and why, in words.

    `device` is None where it is elsewhere: the kernel is taken to run there.
    """
    kernel, alone = "PyTorch's flash kernel for documents of any length", "documents one by one"
    if half and drops(config):
        return f"{alone}, with attention dropout"
    dtype = torch.bfloat16 if half else torch.float32  # the kernel takes both halves alike
    lacks = {no_kernel(device, dtype, width) for width in head_widths(config) or {64}}
    lack = " and ".join(sorted(lacks - {""}))
    if not lack:
        return kernel
    return f"{kernel}, and one by one {lack}" if "" in lacks else f"{alone}, {lack}"


# The backend


@dataclass
class DocumentMask:
    """The mask of a row in which a token sees its own document up to itself, the last `window` tokens of it at most.

    It is not made unless asked for; `arguments` are those of `sdpa_mask`. All layers of a kind share one.
    """

    arguments: dict[str, Any]
    window: int | None
    known: list[int] = field(default_factory=list)

    @cached_property
    def all_pairs(self) -> torch.Tensor | None:
        """Transformers' mask for `sdpa`, `(batch, 1, tokens, tokens)`; None where plain causal attention is meant."""
        return sdpa_mask(**self.arguments)

    def lengths(self, starts: torch.Tensor) -> list[int]:
        """Lengths of the documents that begin at `starts` (and the end), read from the device once for all layers."""
        self.known = self.known or starts.diff().tolist()
        return self.known


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    **more: Any,
) -> DocumentMask | torch.Tensor | None:
    """`AttentionMaskInterface`: a `DocumentMask` where nothing but documents and a window can shape the mask, else
    what `sdpa_mask` gives.

    So with padding, a cache that holds something, or mask functions of the model's own. The interface is told neither
    of `cu_seq_lens` nor whether positions begin anew: `varlen` is told the former, and asks for `all_pairs`, which
    holds the latter, where there are none.
    """
    arguments = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, **more}
    own = more.get("use_vmap") or getattr(more.get("mask_function"), "__name__", "") == "or_mask"
    begins = isinstance(q_offset, int) and q_offset == kv_offset == 0
    padded, causal = more.get("attention_mask") is not None, "allow_is_bidirectional_skip" not in more
    if begins and causal and q_length == kv_length > 1 and not padded and not own:
        return DocumentMask(arguments, more.get("local_size"))
    return sdpa_mask(q_offset=q_offset, kv_offset=kv_offset, **arguments)


def varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: DocumentMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """`AttentionInterface`: `query` is `(1, heads, tokens, width)`, the output `(1, tokens, heads, width)`.

    A mask that is there is obeyed, whatever lengths say. Where a layer's window is not that of its mask, the mask is
    right, as it is for `sdpa`. Raises `ValueError` for caps and sinks, which would be ignored in silence.
    """
    for name in ("softcap", "s_aux"):
        if more.get(name) is not None:
            raise ValueError(f"varlen attention has no {name}; set attn_implementation: eager")
    mask = attention_mask if isinstance(attention_mask, DocumentMask) else None
    window = mask.window if mask else sliding_window
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    documents = cu_seq_lens_q is not None and causal and query.shape[0] == 1 and query.shape[2] == key.shape[2]
    unbiased = more.get("position_bias") is None and (mask is not None or attention_mask is None)
    if documents and unbiased and window == sliding_window:
        dtype = working_dtype(query, value)
        if not dropout and kernel_runs(query.device, dtype, query.shape[-1]):
            longest = max_length_q or int(cu_seq_lens_q.diff().max())
            states = (each.to(dtype) for each in (query, key, value))
            return by_kernel(*states, cu_seq_lens_q, longest, window, scaling), None
        lengths = mask.lengths(cu_seq_lens_q) if mask else cu_seq_lens_q.diff().tolist()
        tokens = query.shape[2]
        if mask is None or tokens > CROWDED or tokens >= SHORT * len(lengths):
            return one_by_one(query, key, value, lengths, window, scaling, dropout), None
    made = mask.all_pairs if mask else attention_mask
    return sdpa_attention_forward(module, query, key, value, made, dropout, scaling, is_causal, **more)


def working_dtype(query: torch.Tensor, value: torch.Tensor) -> torch.dtype:
    """What attention is computed in: norms and rotations leave queries in float32 where autocast does not."""
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return value.dtype


@lru_cache
@torch.compiler.assume_constant_result  # else a compiled graph would break here in every layer
def kernel_runs(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether PyTorch's flash kernel is to be had, with its gradient, for heads so wide."""
    return not no_kernel(device, dtype, width)


def no_kernel(device: torch.device | None, dtype: torch.dtype, width: int) -> str:
    """Why PyTorch's flash kernel is not to be had for heads so wide, empty where it is, as on no device in particular.

    In words that go on from "documents one by one".
    """
    if dtype not in HALF:
        return "in float32"
    if width % 8 or width > WIDEST:
        return f"with heads of {width}"
    if device is None:
        return ""
    if device.type != "cuda":
        return "without a GPU of NVIDIA's"
    if torch.version.hip is not None:  # whose kernel is another, tried nowhere
        return "on ROCm"
    if takes(device, dtype, width):
        return ""
    return BEFORE if torch.cuda.get_device_capability(device)[0] < AMPERE else f"with heads of {width} on this GPU"


def takes(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether PyTorch takes a flash kernel for causal attention with heads so wide and its gradient."""
    head = torch.empty(1, 1, 8, width, device=device, dtype=dtype, requires_grad=True)
    return can_use_flash_attention(SDPAParams(head, head, head, None, 0.0, True, False))


def by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    """All documents at once, by `torch.nn.attention.varlen` (the FlashAttention-2 that PyTorch is built with).

    Its window counts the tokens to the left, transformers' the token itself too.
    """
    from torch.nn.attention.varlen import varlen_attn

    width = value.shape[-1]
    # torch 2.11 takes groups of heads without being told.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    if width != query.shape[-1]:  # latent attention has narrower values; padding by nothing would copy them
        value = F.pad(value, (0, query.shape[-1] - width))
    states = (each[0].transpose(0, 1) for each in (query, key, value))
    starts = starts.to(query.device, torch.int32)
    left = -1 if window is None or window >= longest else window - 1
    output = varlen_attn(*states, starts, starts, longest, longest, scale=scaling, window_size=(left, 0), **grouped)
    return output[None, ..., :width]


@torch.compiler.disable  # it loops over numbers that a compiled graph would be made for anew each time
def one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    window: int | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Each document by scaled_dot_product_attention, those in a row that are equally long together."""
    groups = query.shape[1] // key.shape[1]
    states = (query, repeat_kv(key, groups), repeat_kv(value, groups))  # not every kernel takes groups of heads
    runs = [(length, len([*same])) for length, same in itertools.groupby(lengths)]
    parts = zip(*(each.split([length * count for length, count in runs], 2) for each in states), strict=True)
    outputs = []
    for (length, count), part in zip(runs, parts, strict=True):
        q, k, v = (each[0].unflatten(1, (count, length)).transpose(0, 1) for each in part)
        seen = None
        if window is not None and length > window:
            seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        out = F.scaled_dot_product_attention(q, k, v, seen, dropout, is_causal=seen is None, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


# Without a mask function transformers makes no mask at all, and rows without lengths would leak.
AttentionInterface.register(VARLEN, varlen)
AttentionMaskInterface.register(VARLEN, varlen_mask)
