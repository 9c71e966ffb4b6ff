"""Score a saved model on held-out problems: exact match, and how many generations stopped by themselves.

Usage: python scripts/score_demo.py MODEL_DIR [--problems data/demo/held_out.jsonl] [--limit 200] [--samples N]

The answer is the text after </think>. Decoding is greedy. The prompt comes from the chat template saved beside the
model, or is plain ChatML where there is none, as before training.
"""

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import NamedTuple

# Importing torch and transformers may warn about hardware that this script does not use.
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402


class Sample(NamedTuple):
    """What the model wrote for a problem."""

    problem: str
    expected: str
    text: str
    stopped: bool

    @property
    def correct(self) -> bool:
        """Whether the text after the trace is the expected answer."""
        _, closed, answer = self.text.rpartition("</think>")
        return bool(closed) and answer.strip() == self.expected


def render(tokenizer: PreTrainedTokenizerBase, problem: str) -> str:
    """Return the prompt of a problem."""
    if tokenizer.chat_template is None:
        return f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    messages = [{"role": "user", "content": problem}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@torch.inference_mode()
def answer_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], max_new_tokens: int
) -> list[Sample]:
    """Generate greedily for a batch of problems."""
    prompts = [render(tokenizer, row["problem"]) for row in rows]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    inputs.pop("token_type_ids", None)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    eos = model.generation_config.eos_token_id
    stops = set(eos) if isinstance(eos, list) else {eos}
    samples = []
    for row, new in zip(rows, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        length = next((i for i, token in enumerate(new) if token in stops), None)
        text = tokenizer.decode(new[:length], skip_special_tokens=False)
        samples.append(Sample(row["problem"], row["answer"], text, length is not None))
    return samples


def main() -> None:
    """Print the scores of a saved model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder saved by save_pretrained")
    parser.add_argument("--problems", type=Path, default=Path("data/demo/held_out.jsonl"), help="rows to answer")
    parser.add_argument("--limit", type=int, default=200, help="how many problems (200)")
    parser.add_argument("--batch-size", type=int, default=200, help="problems a batch (200)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="limit of a generation (128)")
    parser.add_argument("--samples", type=int, default=0, help="print this many answers in full (0)")
    args = parser.parse_args()
    disable_progress_bar()
    rows = [json.loads(line) for line in args.problems.read_text(encoding="utf-8").splitlines()[: args.limit]]
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, use_safetensors=True).eval()
    samples: list[Sample] = []
    for start in range(0, len(rows), args.batch_size):
        batch = rows[start : start + args.batch_size]
        samples += answer_batch(model, tokenizer, batch, args.max_new_tokens)
    for sample in samples[: args.samples]:
        verdict = "right" if sample.correct else "wrong"
        print(f"{sample.problem}\n{sample.text}\n[expected {sample.expected}: {verdict}]\n")
    correct, stopped = sum(sample.correct for sample in samples), sum(sample.stopped for sample in samples)
    print(f"exact match: {correct / len(samples):6.1%} ({correct} of {len(samples)})")
    print(f"stopped:     {stopped / len(samples):6.1%} ({stopped} of {len(samples)})")


if __name__ == "__main__":
    main()
