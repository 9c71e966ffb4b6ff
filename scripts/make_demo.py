"""Build the CPU demo: a tiny untrained Qwen3 model, its tokenizer, three training sources and held-out problems.

Usage: python scripts/make_demo.py [data/demo] [--seed 0]

Writes OUT/model, OUT/addition.jsonl, OUT/subtraction.jsonl, OUT/word_problems.jsonl and OUT/held_out.jsonl. The task
is column arithmetic: the assistant works column by column inside <think> ... </think>, then states the number. No
problem in held_out.jsonl occurs in a training source, whatever the order of its summands or the words around its
numbers.
"""

import argparse
import itertools
import json
import logging
import pydoc
import random
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

COLUMNS = ("ones", "tens", "hundreds")
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")
THINGS = ("apples", "books", "cards", "coins", "pears", "shells", "stamps", "stones")
ROWS = {"addition": 10000, "subtraction": 8000, "word_problems": 3000}
HELD_OUT_PER_KIND = 100
VOCAB_SIZE = 768

Problem = tuple[tuple[int, ...], str, str, int]
"""A key that is equal for problems that give each other away, then question, trace and answer."""


def add_columns(a: int, b: int) -> list[str]:
    """Return the steps of a written addition of two numbers of the same length, from the ones to the left.

    Every step names every part, zeros too, and the carry before the digit: such traces are learned much faster.
    """
    steps, carry = [], 0
    for place, (x, y) in enumerate(zip(reversed(str(a)), reversed(str(b)), strict=True)):
        total = int(x) + int(y) + carry
        steps.append(f"{COLUMNS[place]} {x}+{y}+{carry}: carry {total // 10}, write {total % 10}")
        carry = total // 10
    return [*steps, f"gives {a + b}"]


def subtract_columns(a: int, b: int) -> list[str]:
    """Return the steps of a written subtraction of two numbers of the same length, from the ones to the left."""
    steps, borrow = [], 0
    for place, (x, y) in enumerate(zip(reversed(str(a)), reversed(str(b)), strict=True)):
        left = int(x) - int(y) - borrow
        steps.append(f"{COLUMNS[place]} {x}-{y}-{borrow}: borrow {int(left < 0)}, write {left % 10}")
        borrow = int(left < 0)
    return [*steps, f"gives {a - b}"]


def addition(rng: random.Random) -> Problem:
    """Draw a sum of two three-digit numbers."""
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    return tuple(sorted((a, b))), f"What is {a} + {b}?", "\n".join(add_columns(a, b)), a + b


def subtraction(rng: random.Random) -> Problem:
    """Draw a difference of two three-digit numbers that is not negative."""
    b, a = sorted((rng.randint(100, 999), rng.randint(100, 999)))
    return (a, b), f"What is {a} - {b}?", "\n".join(subtract_columns(a, b)), a - b


def word_problem(rng: random.Random) -> Problem:
    """Draw a story of two steps with two-digit numbers: some things are given away, then more are found."""
    a, b, c = rng.randint(20, 99), rng.randint(10, 89), rng.randint(10, 99)
    if a - b < 10:
        return word_problem(rng)
    question = f"{rng.choice(NAMES)} has {a} {rng.choice(THINGS)}, gives away {b} and finds {c}. How many now?"
    steps = [f"first {a} - {b}", *subtract_columns(a, b), f"then {a - b} + {c}", *add_columns(a - b, c)]
    return (a, b, c), question, "\n".join(steps), a - b + c


KINDS: dict[str, Callable[[random.Random], Problem]] = {
    "addition": addition,
    "subtraction": subtraction,
    "word_problems": word_problem,
}


def draw_distinct(draw: Callable[[random.Random], Problem], count: int, rng: random.Random) -> list[Problem]:
    """Draw `count` problems with different keys."""
    problems: dict[tuple[int, ...], Problem] = {}
    while len(problems) < count:
        problem = draw(rng)
        problems.setdefault(problem[0], problem)
    return list(problems.values())


def conversation(problem: Problem) -> dict[str, list[dict[str, str]]]:
    """Return the training row of a problem."""
    _, question, trace, answer = problem
    reply = f"<think>\n{trace}\n</think>\n{answer}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(out: Path, seed: int) -> list[str]:
    """Write the three sources and the held-out problems; return the training text."""
    text, held_out = [], []
    for kind, draw in KINDS.items():
        problems = draw_distinct(draw, ROWS[kind] + HELD_OUT_PER_KIND, random.Random(f"{kind} {seed}"))
        rows = [conversation(problem) for problem in problems[HELD_OUT_PER_KIND:]]
        write_jsonl(out / f"{kind}.jsonl", rows)
        text += [message["content"] for row in rows for message in row["messages"]]
        held_out.append([{"problem": p[1], "answer": str(p[3])} for p in problems[:HELD_OUT_PER_KIND]])
    # Kinds take turns, so that the first N problems cover all of them.
    write_jsonl(out / "held_out.jsonl", list(itertools.chain.from_iterable(zip(*held_out, strict=True))))
    return text


def library_text() -> Iterator[str]:
    """Yield docstrings of the standard library: English beside the task's few words."""
    for module in (argparse, itertools, json, pydoc, random, textwrap):
        for value in (module, *vars(module).values()):
            if isinstance(doc := getattr(value, "__doc__", None), str):
                yield doc


def build_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that keeps digits apart; it has no chat template, as base models have none."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    chat_tokens = ["system\n", "user\n", "assistant\n"] * 1000
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain(text, chat_tokens, library_text()), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Return a Qwen3 model of about one million random parameters."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        # The usual range of 0.02 suits wide layers; at this width it delays learning by hundreds of steps.
        initializer_range=0.08,
    )
    return Qwen3ForCausalLM(config)


def main() -> None:
    """Write the demo's model and data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("data/demo"), help="folder to write (data/demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems and the weights (0)")
    args = parser.parse_args()
    # Saving a model may load DeepSpeed where it is installed, which warns that there is no GPU.
    logging.disable(logging.WARNING)
    disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(write_data(args.out, args.seed))
    model = build_model(tokenizer, args.seed)
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    rows = ", ".join(f"{count} {kind}" for kind, count in ROWS.items())
    print(
        f"{args.out}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens; rows: {rows}; "
        f"{HELD_OUT_PER_KIND * len(KINDS)} held out"
    )


if __name__ == "__main__":
    main()
