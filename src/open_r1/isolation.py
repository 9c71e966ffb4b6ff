"""Whether packed documents see each other, tried on the model that trains before it does."""

import math
import statistics
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from open_r1.attention import HALF, keeps_documents
from open_r1.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from open_r1.trainer import OrderedTrainer

DOCUMENTS, TOKENS = 4, 24  # tried, and the tokens of the first
BEGINNING = 4  # tokens at which another document would be seen most: they have seen nothing of their own
SMALL = 64  # sliding windows up to which documents are made longer than they
# Relative differences that may be rounding, in float32 and in less. In less it may be up to MORE times that of the
# first document, which nothing is before, but never more than MOST.
ROUNDING, ROUNDING_HALF, MORE, MOST = 1e-4, 0.02, 5.0, 0.2


def require_isolation(trainer: "OrderedTrainer") -> None:
    """Refuse a packed or padding-free run whose documents are not what each of them is alone, to rounding.

    A few short documents go through the model together and one by one, as TRL's collator lays them out, without
    dropout and gradients; every process takes part, also where weights are sharded. Mode and random numbers are left
    as they were. Raises `UserError`.
    """
    args = trainer.args
    if not keeps_documents(args):
        return
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    # Only what wraps a sharded model gathers its weights; a compiled one would be compiled for this.
    whole = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
    model = trainer.model_wrapped if sharded else whole

    def logits(examples: list[dict[str, Any]]) -> torch.Tensor:
        inputs = trainer._prepare_inputs(trainer.data_collator(examples))
        inputs.pop("labels")
        with trainer.compute_loss_context_manager():
            return model(**inputs, use_cache=False).logits[0].float()

    tried = documents(trainer.train_dataset, trainer.model.config)
    remedy = "set attn_implementation: auto where it says another, else packing: false and padding_free: false"
    try:
        with undisturbed(model, args.device):
            first, others, behind = differences(logits, tried, packed=args.packing)
    except ValueError as error:  # so say the layers of transformers that lack a kernel for several documents
        raise UserError(
            f"packing: {model_name(trainer)} refuses several documents in a row: {error}; {remedy}"
        ) from error
    found = torch.tensor([sees(first, others, behind, exact(trainer))], dtype=torch.int32, device=args.device)
    mixed, ahead = trainer.accelerator.gather(found).any(dim=0).tolist()
    if mixed:
        raise UserError(
            f"packing: documents in one row see each other in {model_name(trainer)}: what it says of them "
            f"{in_words(max(first, others))} what it says of each alone; {remedy}"
        )
    if ahead:
        raise UserError(
            f"packing: tokens see those behind them in {model_name(trainer)}: what it says of a document's beginning "
            f"{in_words(behind)} what it says of that alone; {remedy}"
        )


def model_name(trainer: "OrderedTrainer") -> str:
    """The model's type and its attention, in words."""
    config = trainer.model.config
    return f"{config.model_type} with attn_implementation: {config._attn_implementation}"


def in_words(difference: float) -> str:
    """A difference (see `differences`) in a sentence."""
    return f"differs by {difference:.2%} from" if math.isfinite(difference) else "is no number, unlike"


def exact(trainer: "OrderedTrainer") -> bool:
    """Whether the model computes in float32, and not in less."""
    half = trainer.args.bf16 or trainer.args.fp16 or getattr(trainer.model, "dtype", None) in HALF
    backends = torch.backends  # torch.get_float32_matmul_precision() raises once `tf32: true` has set one of these
    said = {backends.fp32_precision, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision}
    return not half and said <= {"none", "ieee"}


def sees(first: float, others: float, behind: float, exact: bool) -> tuple[bool, bool]:
    """Whether these differences (see `differences`) are more than rounding: of documents, and of what is behind."""
    rounding = ROUNDING if exact else max(ROUNDING_HALF, min(MORE * first, MOST))
    return max(first, others) > rounding, behind > rounding


def documents(rows: Any, config: Any) -> list[list[int]]:
    """Documents of different lengths, drawn from the tokens of the first rows.

    Drawn, since documents that are alike would not tell. Longer than a sliding window that is small.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) or 0
    least = window + 8 if 0 < window <= SMALL else TOKENS
    tokens = np.unique(np.concatenate([rows[at]["input_ids"] for at in range(min(8, len(rows)))]))
    draw = np.random.default_rng(0)
    return [draw.choice(tokens, max(BEGINNING, least + 3 * number)).tolist() for number in range(DOCUMENTS)]


def differences(
    logits: Callable[[list[dict[str, Any]]], torch.Tensor], tried: list[list[int]], packed: bool
) -> tuple[float, float, float]:
    """How far what is said of documents in one row is from what is said of each alone, as shares of the latter.

    Of the first document, and the median of the others; and how far what is said of a document's beginning is from
    what is said of that alone. `logits` gives those of TRL's examples, `(tokens, vocabulary)` at least; `packed` lays
    the row out as packing does, else as padding-free batches.
    """
    together = logits([example(tried)] if packed else [example([each], packed) for each in tried])
    found, start = [], 0
    for each in tried:
        alone = logits([example([each], packed)])[: len(each)]
        here = together[start : start + len(each)]
        start += len(each)
        # The beginning, which a short convolution alone would leak into, and the whole of it.
        found.append(max(difference(here[:end], alone[:end]) for end in (BEGINNING, None)))
    half = len(each) // 2
    behind = difference(alone[:half], logits([example([each[:half]], packed)])[:half])
    return found[0], statistics.median(found[1:]), behind


def difference(said: torch.Tensor, alone: torch.Tensor) -> float:
    """The norm of the difference as a share of that of `alone`; infinite where `said` alone is no number."""
    if not torch.isfinite(alone).all():
        return 0.0  # of any row, which training stops over
    share = float((said - alone).norm() / alone.norm().clamp(min=torch.finfo(alone.dtype).tiny))
    return share if math.isfinite(share) else math.inf


def example(tried: list[list[int]], packed: bool = True) -> dict[str, Any]:
    """Documents as one row of the data, with their lengths where rows are packed."""
    tokens = [token for each in tried for token in each]
    row: dict[str, Any] = {"input_ids": tokens, "labels": tokens}
    return {**row, "seq_lengths": [len(each) for each in tried]} if packed else row


@contextmanager
def undisturbed(model: torch.nn.Module, device: torch.device) -> "Iterator[None]":
    """Evaluation mode without gradients, and afterwards modes, random numbers and shards as before."""
    modes: Iterable[tuple[torch.nn.Module, bool]] = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
                if isinstance(module, FSDPModule):  # the outermost one keeps what it gathered for a backward pass
                    module.reshard()
