"""Merge a LoRA adapter into its base: one full model that any server loads, with tokenizer and generation config.

    python scripts/merge.py ADAPTER OUT [--dtype bfloat16]

Weights are merged in float32 (4 bytes a parameter of memory) and saved in the base's dtype. Before OUT appears, the
merged model and then what was written of it have to give the adapter's logits, up to `TOLERANCE` of the largest logit.
An adapter trained on a quantised base (the run's recipe.yaml beside it says so) is merged into that base, dequantised:
this needs bitsandbytes. Exit code 0: merged; 1: the logits differ, nothing was written; 2: something to mend.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_r1.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Largest difference of logits, as a share of the largest logit: of the merge itself, and of what is saved in a dtype.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
QUESTION = "What is the capital of France, and why?"


def main(argv: list[str] | None = None) -> int:
    """Merge as `argv` (default: the command line) says; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("adapter", type=Path, help="directory of a LoRA adapter")
    parser.add_argument("out", type=Path, help="new directory for the merged model")
    parser.add_argument("--dtype", choices=list(TOLERANCE), help="of the saved weights (that of the base)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base")
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise UserError(f"{args.out}: exists already; name a new directory")
        return merge(args.adapter, args.out, args.dtype, args.trust_remote_code)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2


def merge(path: Path, out: Path, dtype: str | None, trust_remote_code: bool) -> int:
    """Merge the adapter at `path` into a new directory `out`; returns the exit code. Raises `UserError`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from open_r1.handover import quiet, with_adapter
    from open_r1.model import adapter_base, require_safetensors

    name = adapter_base(str(path))
    if name is None:
        raise UserError(f"{path}: is no adapter: it has no adapter_config.json")
    require_safetensors(path, name)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            base, saved_dtype = load_base(path, name, trust_remote_code)
            adapted = with_adapter(base, path, tokenizer).eval()
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{path}: it cannot be loaded on its base {name}: {reason}") from error
        dtype = dtype or saved_dtype
        ids = prompt_ids(tokenizer)
        wanted = logits(adapted, ids)
        with adapted.disable_adapter():
            effect = (logits(adapted, ids) - wanted).abs().max().item()
        merged = adapted.merge_and_unload()
        if not same("merged", wanted, logits(merged, ids), "float32"):
            return 1
        settle(merged, tokenizer)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            written = Path(scratch) / "model"
            merged.to(getattr(torch, dtype)).save_pretrained(written)
            tokenizer.save_pretrained(written)
            again = AutoModelForCausalLM.from_pretrained(
                written, use_safetensors=True, trust_remote_code=trust_remote_code
            )
            if not same(f"saved in {dtype}", wanted, logits(again.eval(), ids), dtype):
                return 1
            written.rename(out)
    print(f"{out}: {path} merged into {name}; the adapter moves logits by up to {effect:.2g}")
    return 0


def load_base(path: Path, name: str, trust_remote_code: bool) -> "tuple[PreTrainedModel, str]":
    """The base in float32, dequantised where the adapter was trained on a quantised one, and its own dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    quantization = quantization_of(path)
    how = {"quantization_config": quantization, "trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", use_safetensors=True, **how)
    dtype = str(model.dtype).removeprefix("torch.")
    if getattr(model, "is_quantized", False):
        print(f"{name} is quantised as in training, and dequantised")
        model = model.dequantize()
    return model.to(torch.float32), dtype if dtype in TOLERANCE else "bfloat16"


def quantization_of(path: Path) -> Any:
    """The quantisation of the base in the run that made an adapter, None without; known from its recipe.yaml alone.

    PEFT does not write it into the adapter: one that was moved away from its recipe.yaml is merged into full weights.
    """
    import yaml
    from trl import ModelConfig, get_quantization_config

    recipe = next((p / "recipe.yaml" for p in (path, path.parent) if (p / "recipe.yaml").is_file()), None)
    if recipe is None:
        return None
    try:
        values = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
        keys = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "dtype")
        return get_quantization_config(ModelConfig(**{key: values[key] for key in keys if key in values}))
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{recipe}: says no quantisation that can be read: {error}") from error


def settle(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make configs say what the merged weights and the tokenizer are."""
    import torch

    from open_r1.handover import as_set
    from open_r1.model import settle_generation

    settle_generation(getattr(model, "generation_config", None))
    head = model.get_output_embeddings()
    if head is not None and not torch.equal(head.weight, model.get_input_embeddings().weight):
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    eos, stops = tokenizer.eos_token_id, as_set(model.generation_config.eos_token_id)
    model.config.eos_token_id = eos
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = [eos, *sorted(stops - {eos})]


def prompt_ids(tokenizer: "PreTrainedTokenizerBase") -> "torch.Tensor":
    """Token ids [1, length] of a question, by the chat template where there is one."""
    if not tokenizer.chat_template:
        return tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    messages = [{"role": "user", "content": QUESTION}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")[
        "input_ids"
    ]


def logits(model: "PreTrainedModel", ids: "torch.Tensor") -> "torch.Tensor":
    """Logits [1, length, vocabulary] in float32."""
    import torch

    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def same(what: str, wanted: "torch.Tensor", found: "torch.Tensor", dtype: str) -> bool:
    """Whether logits are those of the adapter within the tolerance of a dtype; says how far they are from them."""
    difference, limit = (wanted - found).abs().max().item(), TOLERANCE[dtype] * wanted.abs().max().item()
    equal = difference <= limit  # false for NaN
    verdict = "" if equal else ": this is another model; nothing was written"
    print(f"{what}: logits differ from the adapter's by {difference:.2g} at most, {limit:.2g} is allowed{verdict}")
    return equal


if __name__ == "__main__":
    sys.exit(main())
