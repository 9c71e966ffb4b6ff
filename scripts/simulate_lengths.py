"""Make a table as large as Mixture-of-Thoughts where it cannot be fetched: its rows, with simulated lengths.

    python scripts/simulate_lengths.py OUT [--rows 349317] [--tokens] [--scale 1.0]

Three files, OUT/math, code and science, in the proportions of the dataset's card (93,733, 83,070 and 172,514 rows), as
JSON lines of conversations (real text: sources of Python's standard library, cut to length) or with `--tokens` as
parquet of `input_ids` and `labels`, which cost nothing to tokenise. Lengths of answers are lognormal, an assumption:
medians and spreads below, in tokens, longest 131,072. `--scale` shrinks them. Also writes OUT/model, as
make_docstrings.py does, whose tokenizer made the lengths.
"""

import argparse
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Rows of the dataset's configs; median and sigma of the lognormal lengths of their answers, in tokens.
SOURCES = {"math": (93_733, 5_500, 0.65), "code": (83_070, 10_500, 0.6), "science": (172_514, 3_000, 0.65)}
LONGEST = 131_072


def lengths_of(rows: int, median: float, sigma: float, seed: int) -> np.ndarray:
    """Simulated lengths in tokens, int64."""
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, rows)
    return np.clip(drawn, 16, LONGEST).astype(np.int64)


def library() -> str:
    """Sources of the standard library, one behind the other, some 10 MB."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(folder.rglob("*.py")) if "site-packages" not in path.parts]
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)[:10_000_000]


def conversations(name: str, lengths: np.ndarray, text: str, per_token: float) -> Iterator[str]:
    """Lines of JSON."""
    for number, length in enumerate(lengths):
        size = int(length * per_token)
        start = number * 7919 * 31 % (len(text) - 1)
        answer = (text * (2 + size // len(text)))[start : start + size] if start + size > len(text) else ""
        messages = [
            {"role": "user", "content": f"Problem {number} of {name}: what does this do?"},
            {"role": "assistant", "content": answer or text[start : start + size]},
        ]
        yield json.dumps({"messages": messages}) + "\n"


def write_tokens(path: Path, lengths: np.ndarray, vocabulary: int, end: int) -> None:
    """Write parquet of `input_ids` and `labels`, half a GiB at once at most."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random, schema = np.random.default_rng(1), pa.schema([(name, pa.list_(pa.int32())) for name in TOKENS])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as file:
        for part in np.array_split(lengths, 1 + int(lengths.sum()) // 2**25):
            ids = random.integers(3, vocabulary, part.sum(), dtype=np.int32)
            offsets = np.cumsum([0, *part], dtype=np.int32)
            ids[offsets[1:] - 1] = end
            labels = ids.copy()
            labels[np.concatenate([offsets[:-1] + place for place in range(8)])] = -100
            columns = [pa.ListArray.from_arrays(offsets, values) for values in (ids, labels)]
            file.write_table(pa.table(dict(zip(TOKENS, columns, strict=True)), schema=schema))


TOKENS = ("input_ids", "labels")


def main() -> int:
    """Write sources and model."""
    from make_docstrings import docstrings, write_model
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=sum(rows for rows, *_ in SOURCES.values()))
    parser.add_argument("--tokens", action="store_true", help="input_ids and labels instead of conversations")
    parser.add_argument("--scale", type=float, default=1.0, help="of the lengths")
    args = parser.parse_args()
    write_model(args.out / "model", (text for pair in docstrings() for text in pair), 16000, 32, 1)
    tokenizer, text = AutoTokenizer.from_pretrained(args.out / "model"), library()
    slices = [text[start : start + 50_000] for start in range(0, len(text), len(text) // 20)]
    per_token = sum(map(len, slices)) / sum(map(len, tokenizer(slices)["input_ids"]))
    everything = sum(rows for rows, *_ in SOURCES.values())
    for seed, (name, (rows, median, sigma)) in enumerate(SOURCES.items()):
        lengths = lengths_of(round(rows * args.rows / everything), median * args.scale, sigma, seed)
        if args.tokens:
            write_tokens(
                args.out / f"{name}.parquet", lengths, len(tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>")
            )
        else:
            with (args.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(conversations(name, lengths, text, per_token))
        told = f"{len(lengths):,} rows, {lengths.sum():,} tokens, mean {lengths.mean():,.0f}"
        print(f"{name}: {told}, longer than 32,768: {(lengths > 32768).mean():.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
