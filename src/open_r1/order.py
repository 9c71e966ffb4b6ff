"""In which order a run reads its rows, and what proves that it did.

The order follows from the rows, the seed and the global batch size alone.
"""

import hashlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from open_r1.checkpoints import write_whole
from open_r1.errors import Stopped, UserError

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig
    from open_r1.preparation import Part

BLOCK = 50  # global batches within which group_by_length sorts rows; as upstream, at most a quarter of them all


class Order(Sampler[int]):
    """The rows of an epoch, in the order that all ranks together take them.

    The rows of a run are one stream: permutation 0 of all rows, permutation 1, and so on, each drawn from the seed and
    its number. Optimiser step k (from 0) takes `stream[k * batch : (k + 1) * batch]`, whatever the number of ranks and
    the accumulation: accelerate deals batches out in turn. An epoch of the trainer is `steps` whole steps, so what is
    left of a permutation is the beginning of the next epoch, and no row is read twice to fill a batch.

    `lengths` are the tokens of each row, `batch` the rows of a step, `epoch` the one that is read next. `offset` is
    where the stream begins for a run that was begun with another batch, so that no row is left out. A step is dealt
    out in batches of `each` rows (0: of all), of like lengths, or with `padding_free` of even sums.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        seed: int,
        batch: int,
        strategy: str,
        longest_first: bool,
        each: int = 0,
        padding_free: bool = False,
    ) -> None:
        self.lengths, self.seed, self.batch = lengths, seed, batch
        self.strategy, self.longest_first = strategy, longest_first
        self.each, self.padding_free = each or batch, padding_free
        self.epoch = self.offset = 0
        self.known: dict[tuple[int, int], np.ndarray] = {}

    @property
    def steps(self) -> int:
        """Optimiser steps in an epoch."""
        return len(self.lengths) // self.batch

    def __len__(self) -> int:
        return self.steps * self.batch

    def __iter__(self) -> Iterator[int]:
        start = self.offset + self.epoch * len(self)
        for at in range(start, start + len(self), self.batch):
            yield from [0] * min(self.batch, -at)  # before the beginning: steps that are only skipped
            if at + self.batch > 0:
                yield from self.dealt(self.rows(max(at, 0), at + self.batch)).tolist()

    def of_step(self, step: int) -> np.ndarray:
        """The rows of an optimiser step, counted from 1, in the order of the stream."""
        return self.rows(self.read(step - 1), self.read(step))

    def batches_of(self, step: int) -> np.ndarray:
        """The rows of an optimiser step as they are dealt out, (batches, `each`): a process's turn, the next one's."""
        return self.dealt(self.of_step(step)).reshape(-1, self.each)

    def dealt(self, rows: np.ndarray) -> np.ndarray:
        """The rows of a step, int64, batch after batch: which of them a step takes is not changed by it.

        Padded, the longest make a batch, then the next ones, so that little is padded and processes that wait for
        each other have like lengths. Without padding each row, from the longest, goes to the batch with the fewest
        tokens (Graham's LPT rule), so that all have nearly as many.
        """
        batches = len(rows) // self.each
        if batches < 2 or len(rows) < self.batch:
            return rows
        rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
        if not self.padding_free:
            return rows
        deals: list[list[int]] = [[] for _ in range(batches)]
        room = [(0, number) for number in range(batches)]  # tokens of the batches that are not full
        for row in rows.tolist():
            tokens, number = heapq.heappop(room)
            deals[number].append(row)
            if len(deals[number]) < self.each:
                heapq.heappush(room, (tokens + int(self.lengths[row]), number))
        return np.array(deals).ravel()

    def read(self, step: int) -> int:
        """How many rows of the stream have been read when a step ends."""
        return self.offset + step * self.batch

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The stream from one position to another, int64."""
        size = len(self.lengths)
        numbers = range(start // size, (stop - 1) // size + 1)
        return np.concatenate([self.permuted(k)[max(start - k * size, 0) : stop - k * size] for k in numbers])

    def permuted(self, number: int) -> np.ndarray:
        """`permutation`, the last two of them remembered."""
        if (number, self.batch) not in self.known:
            self.known = {key: rows for key, rows in self.known.items() if key == (number - 1, self.batch)}
            self.known[number, self.batch] = self.permutation(number)
        return self.known[number, self.batch]

    @property
    def facts(self) -> dict[str, Any]:
        """What it follows from, beside the rows and the batch."""
        return {"seed": self.seed, "strategy": self.strategy, "longest_first": self.longest_first}

    def permutation(self, number: int) -> np.ndarray:
        """Each row once, int64: the part of the stream with this number."""
        rows = np.arange(len(self.lengths))
        if self.strategy != "sequential":
            random = np.random.default_rng([self.seed, number])
            rows = random.permutation(rows)
            if self.strategy == "group_by_length":
                # The first rows complete the last batch of the permutation before; the last begin one, too.
                head = -number * len(rows) % self.batch
                whole = slice(head, head + (len(rows) - head) // self.batch * self.batch)
                rows[whole] = self.grouped(rows[whole], random)
        return self.with_longest_first(rows) if self.longest_first and number == 0 else rows

    def grouped(self, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Whole global batches of rows of like length, in a random order; others in every epoch."""
        size = max(1, min(BLOCK, len(rows) // self.batch // 4)) * self.batch
        blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
        blocks = [block[np.argsort(-self.lengths[block], kind="stable")] for block in blocks]
        return random.permutation(np.concatenate([rows[:0], *blocks]).reshape(-1, self.batch)).ravel()

    def with_longest_first(self, rows: np.ndarray) -> np.ndarray:
        """The first permutation with the longest global batch in step two, in exchange for the one that was there.

        In step two the optimiser's state is there, so nothing later needs more memory. A longest row that would only
        come with the next epoch changes places with the longest of this one.
        """
        lengths = self.lengths[rows]
        if (longest := lengths.argmax()) >= len(self):
            here = lengths[: len(self)].argmax()
            rows[[here, longest]] = rows[[longest, here]]
        batches = rows[: len(self)].reshape(self.steps, self.batch)
        sizes = self.lengths[batches]
        longest = np.lexsort((sizes.sum(axis=1), sizes.max(axis=1)))[-1]
        second = min(1, self.steps - 1)
        batches[[second, longest]] = batches[[longest, second]]
        return rows


def order_of(part: "Part", args: "SFTConfig") -> Order:
    """The order of a run's rows. Raises `UserError` when there are fewer rows than an optimiser step takes."""
    processes, rows = args.processes, len(part.rows)
    batch = args.train_batch_size * args.gradient_accumulation_steps * processes
    if rows < batch:
        most = rows // processes * processes
        fits = f"set per_device_train_batch_size: 1 and global_batch_size: {most}" if most else "start fewer processes"
        raise UserError(
            f"{rows} {'packs' if args.packing else 'rows'} cannot fill one optimiser step, which takes {batch}: "
            f"per_device_train_batch_size {args.train_batch_size} x gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} x {processes} process{'es' if processes > 1 else ''}; {fits}, "
            f"{'leave packing out, ' if args.packing else ''}or bring more data"
        )
    first = args.longest_first
    if first is None:
        first = not args.packing and args.train_sampling_strategy != "sequential"
    seed = args.seed if args.data_seed is None else args.data_seed
    return Order(
        *(part.lengths, seed, batch, args.train_sampling_strategy, first),
        each=args.train_batch_size,
        padding_free=args.padding_free,
    )


def fingerprint(rows: np.ndarray) -> str:
    """What `order.jsonl` says of the rows of a step: of the SHA-256 of their numbers as int64, 16 hex digits."""
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16]


def line_of(order: Order, step: int, data: str) -> str:
    """The line of a step in `order.jsonl`: `step`, `epoch` (the permutation in which it starts), `rows`, `data`."""
    epoch = order.read(step - 1) // len(order.lengths)
    line = {"step": step, "epoch": epoch, "rows": fingerprint(order.of_step(step)), "data": data}
    return json.dumps(line) + "\n"


def cut_back(path: Path, step: int, needs: str = "step") -> list[dict[str, Any]]:
    """Keep the lines of a file up to a step, and return them; a line that is broken goes, and what is behind it."""
    kept = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            said = json.loads(line)
            if said["step"] > step or needs not in said:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(said)
    if path.exists():
        write_whole(path, "".join(json.dumps(said) + "\n" for said in kept))
    return kept


def cut_back_order(path: Path, step: int, order: Order, data: str, same: bool) -> None:
    """Make an `order.jsonl` that of the steps up to a checkpoint's.

    Where the order is the `same` as then, its lines must be what it gives now (raises `Stopped`), and those that a
    crash took are written again.
    """
    lines = cut_back(path, step, "rows")
    if same:
        require_same_order(lines, order)
        have = {line["step"]: json.dumps(line) + "\n" for line in lines}
        write_whole(path, "".join(have.get(each) or line_of(order, each, data) for each in range(1, step + 1)))


def require_same_order(lines: list[dict[str, Any]], order: Order) -> None:
    """Raise `Stopped` where the lines of an `order.jsonl` are not what the order gives now."""
    for line in lines:
        if line["rows"] != fingerprint(order.of_step(line["step"])):
            raise Stopped(
                f"order.jsonl: step {line['step']} took other rows than the order now says for it, though data, seed "
                "and batch are the same: the code that orders them has changed; go on with the code of "
                "the checkpoint, or choose another output_dir"
            )


def require_rows(
    batches: list[dict[str, Any]], rows: Dataset, order: Order, step: int, rank: int, ranks: int
) -> np.ndarray:
    """The rows of the batches that a process was given for a step. Raises `Stopped` when they are not the order's.

    Compared are the tokens themselves, (batch, length) padded or (1, length) flattened: what upstream skips on a
    resume, and how it deals batches out to processes, is nothing that a count could prove.
    """
    expected = order.batches_of(step)[rank::ranks] if batches else order.of_step(step)[:0]
    stored = rows.with_format("arrow")  # which takes longer than to read a row
    for micro, (batch, numbers) in enumerate(zip(batches, expected, strict=True)):
        tokens = stored[numbers.tolist()].column("input_ids").combine_chunks()
        tokens = tokens.flatten().to_numpy()
        given = batch["input_ids"].detach().cpu().numpy()
        mask = batch.get("attention_mask")
        given = given.ravel()[: len(tokens)] if mask is None else given[mask.cpu().numpy().astype(bool)]
        if not np.array_equal(given, tokens):
            raise Stopped(
                f"step {step}: process {rank} was given other rows than the order says (batch {micro + 1}, "
                f"rows {', '.join(map(str, numbers[:8]))} of the prepared data were due): the run would no longer be "
                "the one that was begun"
            )
    return expected.ravel()
