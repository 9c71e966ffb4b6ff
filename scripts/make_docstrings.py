"""Make real text where no hub can be reached: the standard library's docstrings as conversations, and a tiny model.

    python scripts/make_docstrings.py [OUT]      (default: data/docstrings)

Writes OUT/docstrings.jsonl, some 8,000 rows {"messages": [...]} of natural length, and OUT/model, a randomly
initialised Qwen3 with a byte-level BPE tokenizer trained on the same text. Any Python has the data: no network.
"""

import argparse
import ast
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

QUESTIONS = {
    ast.Module: "What is the Python module {name} for?",
    ast.ClassDef: "What does the class {name} represent?",
    ast.FunctionDef: "What does {name} do?",
    ast.AsyncFunctionDef: "What does the coroutine {name} do?",
}


def docstrings() -> Iterator[tuple[str, str]]:
    """(question, docstring) of the standard library's documented modules, classes, functions, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if {"site-packages", "test", "tests", "idle_test", "lib2to3"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few files of the library are broken on purpose, to test Python itself
        module = ".".join(part for part in parts if part != "__init__")
        for node in ast.walk(tree):
            question = QUESTIONS.get(type(node))
            text = ast.get_docstring(node) if question else None
            if text and len(text) > 20:
                yield question.format(name=f"{module}.{node.name}" if hasattr(node, "name") else module), text


def write_rows(path: Path) -> int:
    """Write every docstring as a conversation, one JSON line each; returns how many."""
    rows = list(dict.fromkeys(docstrings()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for question, text in rows:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return len(rows)


def write_model(
    path: Path,
    texts: Iterable[str],
    vocabulary: int = 4096,
    hidden: int = 128,
    layers: int = 4,
    special: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
) -> None:
    """Write a tiny Qwen3 and a byte-level BPE tokenizer of `texts` (EOS and PAD `<|endoftext|>`, no chat template)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def main() -> int:
    """Write data and model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", nargs="?", default="data/docstrings", type=Path)
    out = parser.parse_args().out
    print(f"{out}/docstrings.jsonl: {write_rows(out / 'docstrings.jsonl')} rows")
    write_model(out / "model", (text for pair in docstrings() for text in pair))
    print(f"{out}/model: a tiny Qwen3, randomly initialised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
