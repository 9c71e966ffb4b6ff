"""What a model computes to learn from a row, and what a device could: the two sides of a model FLOPs utilisation.

Model FLOPs as PaLM counts them (Chowdhery et al., 2022, appendix B), over what the mathematics needs: forward and
backward, attention included, nothing that is computed twice to save memory, and no look-up of embeddings.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

# FLOPs of a weight for each token: a multiplication and an addition in the forward pass. The gradient of what goes in
# takes as many, if anything before it is trained, and so does that of the weight, if it is trained itself.
PRODUCT = 2
ATTENTION = {"full_attention": None, "attention": None, "sliding_attention": "sliding_window"}
ATTENTION |= {"chunked_attention": "attention_chunk_size"}
NO_ATTENTION = ("linear_attention", "mamba", "recurrent", "conv", "moe", "mlp")  # kinds of layers that have none
# Names, by config, of how many experts there are and through how many of them a token goes.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVE = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
# Dense TFLOP/s of matrix units in bfloat16, float16, TF32 and of float32, by the name that the driver gives a device.
# From the data sheets of NVIDIA (A100, A30, A10, A40, H100, H200, GH200, HGX B200, L4, L40, L40S, T4, V100; halved
# where they count sparsity) and of AMD (MI210, MI250, MI300X, MI325X; an MI250 is two devices), and for GeForce from
# NVIDIA's papers on GA102, Ada and RTX Blackwell (products of halves summed up in float32).
PEAKS: dict[str, tuple[float | None, float | None, float | None, float | None]] = {
    r"(NVIDIA )?A100[- ].*": (312, 312, 156, 19.5),
    r"NVIDIA A30": (165, 165, 82, 10.3),
    r"NVIDIA A10": (125, 125, 62.5, 31.2),
    r"NVIDIA A40": (149.7, 149.7, 74.8, 37.4),
    r"NVIDIA H100 PCIe": (756, 756, 378, 51),
    r"NVIDIA H100 NVL|NVIDIA H200 NVL": (835.5, 835.5, 417.5, 60),
    r"NVIDIA H100 80GB HBM3|NVIDIA H200|NVIDIA GH200.*": (989.5, 989.5, 494.7, 67),
    r"NVIDIA B200": (2250, 2250, 1100, 75),
    r"NVIDIA L4": (121, 121, 60, 30.3),
    r"NVIDIA L40": (181.05, 181.05, 90.5, 90.5),
    r"NVIDIA L40S": (362.05, 362.05, 183, 91.6),
    r"NVIDIA GeForce RTX 3090": (71, 71, 35.6, 35.6),
    r"NVIDIA GeForce RTX 4090": (165.2, 165.2, 82.6, 82.6),
    r"NVIDIA GeForce RTX 5090": (209.5, 209.5, 104.8, 104.8),
    r"(NVIDIA )?Tesla T4|NVIDIA T4": (None, 65, None, 8.1),
    r"Tesla V100-SXM2.*": (None, 125, None, 15.7),
    r"Tesla V100-PCIE.*": (None, 112, None, 14),
    r"AMD Instinct MI210": (181, 181, None, 22.6),
    r"AMD Instinct MI250X.*": (191.5, 191.5, None, 23.95),
    r"AMD Instinct MI250": (181, 181, None, 22.6),
    r"AMD Instinct MI300X.*|AMD Instinct MI325X.*": (1307.4, 1307.4, 653.7, 163.4),
}
KINDS = ("bf16", "fp16", "tf32", "fp32")


@dataclass(frozen=True)
class Work:
    """FLOPs of forward and backward of a model: for each token, for each label that enters the loss, and for each pair
    of tokens of which one attends to the other, by the window that they must be in (None: none).

    The LM head is counted where there is a label, since the loss needs nothing else of it. What layers without
    attention compute beside products with weights, norms, activations and the optimiser are not counted.
    """

    token: float
    label: float
    pair: dict[int | None, float]

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """FLOPs of documents of so many tokens, without those of their labels."""
        return self.token * lengths + sum(each * pairs(lengths, window) for window, each in self.pair.items())


def pairs(lengths: np.ndarray, window: int | None = None) -> np.ndarray:
    """How often a token attends to one of its document, itself included: to all before it, or those in a window."""
    lengths = np.asarray(lengths, dtype=np.float64)
    near = lengths if window is None else np.minimum(lengths, window)
    return near * (near + 1) / 2 + (lengths - near) * near


def work_of(model: PreTrainedModel) -> Work:
    """What a model computes on text, an adapter included.

    Frozen weights have no gradient of their own; below the first layer that is trained nothing has any. Not a number
    where there is no list of all layers (some models go through theirs again), where a text model has towers in it,
    and where `products` and `attention` give none.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    decoder = model if config is model.config else model.get_decoder()
    models = (module for module in decoder.modules() if isinstance(module, PreTrainedModel))
    layers = layers_of(decoder, getattr(config, "num_hidden_layers", 0))
    if not layers or any(type(each.config) is not type(config) for each in models):
        return Work(math.nan, math.nan, {None: math.nan})
    heads = set(head.modules()) if head is not None else set()
    text = set(decoder.modules()) | heads  # not the towers, nor what fits in what comes from them
    lowest = first_trained(text - heads, layers)
    token = label = 0.0
    for module, shape, trained, share in products(model, text, layers):
        gradients = (layers.get(module, lowest) >= lowest) + trained
        flops = share * math.prod(shape) * PRODUCT * (1 + gradients)
        if module in heads:
            label += flops
        else:
            token += flops
    return Work(token, label, attention(config, lowest))


def layers_of(decoder: nn.Module, count: int) -> dict[nn.Module, int]:
    """The modules in the layers of a decoder, with the number of their layer; none where no list is so long."""
    lists = (each for each in decoder.modules() if isinstance(each, nn.ModuleList) and len(each) == count)
    return {module: number for number, layer in enumerate(next(lists, ())) for module in layer.modules()}


def first_trained(modules: set[nn.Module], layers: dict[nn.Module, int]) -> int:
    """The first layer with weights that are trained, 0 where embeddings are; as many as there are where none is."""
    found = [max(layers.values()) + 1]
    for module in modules:
        for weight in module.parameters(recurse=False):
            if weight.requires_grad and (module in layers or len(shape_of(weight)) > 1):  # not a norm behind them
                found.append(layers.get(module, 0))
    return min(found)


def products(
    model: PreTrainedModel, text: set[nn.Module], layers: dict[nn.Module, int]
) -> Iterator[tuple[nn.Module, tuple[int, ...], bool, float]]:
    """Weights in `text` that tokens are multiplied with: module, shape, whether it is trained, the share of tokens.

    A token goes through some of the experts; how many is not a number where the config does not say it. Shapes are
    those of the whole weight, where DeepSpeed has cut it up or bitsandbytes has packed it.
    """
    counts = [experts_of(layer) for layer in model.config.get_text_config().per_layer_config]
    for name, module in model.named_modules():
        if module not in text or isinstance(module, nn.Embedding):
            continue
        if "original_module" in name.split("."):  # PEFT's, of one trained in full
            continue
        for own, weight in module.named_parameters(recurse=False):
            shape = shape_of(weight)
            if isinstance(module, nn.Linear) and own == "weight":
                shape = (module.out_features, module.in_features)
            if len(shape) < 2 or own.endswith("bias"):
                continue
            experts, active = counts[layers[module]] if module in layers else (math.nan, math.nan)
            routed = "experts" in name.split(".") or (len(shape) == 3 and shape[0] == experts)
            yield module, shape, weight.requires_grad, active / experts if routed else 1.0


def shape_of(weight: nn.Parameter) -> tuple[int, ...]:
    """The shape of a whole weight, of which DeepSpeed may have left a part here."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def experts_of(config: PretrainedConfig) -> tuple[float, float]:
    """How many experts there are in a layer, and through how many of them a token goes; not a number if unknown."""
    found = []
    for names in (EXPERTS, ACTIVE):
        said = [getattr(each, name, None) for each in (config, getattr(config, "ffn_config", None)) for name in names]
        counts = {count for each in said if each for count in (each if isinstance(each, list) else [each])}
        found.append(counts.pop() if len(counts) == 1 else math.nan)
    return found[0], found[1]


def attention(config: PretrainedConfig, lowest: int = 0) -> dict[int | None, float]:
    """FLOPs of a pair of tokens in all layers, by window: scores and weighted values, once forward, and from layer
    `lowest` on twice backward.

    Not a number where the config does not say how many heads there are, or where layers attend in some other way.
    """
    window = getattr(config, "sliding_window", None)
    alike = "full_attention" if window is None else "sliding_attention"
    types = getattr(config, "layer_types", None) or [alike] * config.num_hidden_layers
    found: Counter = Counter()
    for number, kind in enumerate(types):
        layer = config.per_layer_config[number]  # of Gemma 4, heads of some layers are wider
        if kind in ATTENTION:
            found[window_of(kind, layer)] += of_layer(layer) / (1 if number >= lowest else 3)
        elif kind not in NO_ATTENTION:
            found[None] = math.nan
    return dict(found)


def of_layer(config: PretrainedConfig) -> float:
    """FLOPs of a pair of tokens in a layer, forward and backward."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return math.nan
    size = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    values = getattr(config, "v_head_dim", None) or size
    return float(3 * 2 * heads * (size + values))


def window_of(kind: str, config: PretrainedConfig) -> int | None:
    """How far back a kind of layer attends, in tokens; None for everything."""
    key = ATTENTION[kind]
    return key and getattr(config, key, None)


def flops_of_rows(work: Work, rows: Dataset, lengths: np.ndarray) -> np.ndarray:
    """FLOPs of each row without its labels: of its documents, where they are packed and do not see each other.

    `lengths` are the rows' tokens. Documents of packs without `seq_lengths` (`wrapped`) attend to one another.
    """
    if "seq_lengths" not in rows.column_names:
        return work.of(lengths)
    documents = rows.data.column("seq_lengths").combine_chunks()
    counts = pc.list_value_length(documents).to_numpy()
    return np.add.reduceat(work.of(documents.flatten().to_numpy()), np.cumsum(counts) - counts)


def peak_flops(name: str, kind: str) -> float | None:
    """FLOP/s that a device reaches at most in a kind of numbers of `KINDS`; None where it is not known.

    `name` is what the driver calls it. A part of a device (MIG) is none that is known.
    """
    for pattern, peaks in PEAKS.items():
        if re.fullmatch(pattern, name) and "MIG" not in name:
            found = peaks[KINDS.index(kind)]
            return None if found is None else found * 1e12
    return None


def peak_here(device: torch.device, half: str | None, dtype: torch.dtype) -> float | None:
    """The peak of this process's device for numbers of mixed precision `half`, or of the weights' dtype.

    None on a CPU, whose peak depends on its clock, cores and BLAS.
    """
    if device.type != "cuda":
        return None
    kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    fast = "tf32" if "tf32" in (torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision) else "fp32"
    return peak_flops(torch.cuda.get_device_name(device), half or kinds.get(dtype, fast))
