"""What a run measures of itself: tokens, seconds, FLOPs, memory, and the loss of each source.

Sums stay on the device until a log, and processes are asked then, once. What is logged is in `metrics.jsonl` of
output_dir and in the trackers; docs/metrics.md has every key. The loss that is learnt from is TRL's, untouched.
"""

import json
import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import FusedCausalLMOutput, pad

from open_r1.checkpoints import write_whole
from open_r1.flops import Work, flops_of_rows
from open_r1.order import cut_back

if TYPE_CHECKING:
    from open_r1.preparation import Part

METRICS = "metrics.jsonl"
STEP = ("data", "compute", "other")  # what a step's time goes into; the rest is none of it
KINDS = (*STEP, "evaluation", "saving")
COUNTS = ("padded", "real", "flops")
LONGEST = 200  # characters of a source's name in a key; MLflow takes 250 in all


class Collator(DataCollatorForLanguageModeling):
    """TRL's collator, which also says of which source each token is: `sources`, int32, shaped as `input_ids`.

    TRL refuses another collator than its own where rows are flattened, so it takes the place of that one later.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows, each with its `source`, or packed with those of its documents and their `lengths`."""
        batch = super().torch_call(examples)
        if "source" in examples[0]:
            rows = [np.repeat(row["source"], row.get("lengths", len(row["input_ids"]))) for row in examples]
            rows = [torch.from_numpy(each.astype(np.int32)) for each in rows]
            rows = [torch.cat(rows)] if self.padding_free else rows
            batch["sources"] = pad(rows, 0, "right", self.pad_to_multiple_of)
        return batch


class Clock:
    """Wall time by what it goes into; every moment is of one of `KINDS`, so that they add up.

    On CUDA the host runs ahead. There `compute` ends when the device has finished the step: events that are recorded
    beside the kernels tell how long that took, and are read where the host has waited for the device anyway. What
    kernels wait for meanwhile is in it, too.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.kind, self.since = "other", time.perf_counter()
        self.begun = self.ended = self.since
        self.marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []

    def turn(self, kind: str) -> str:
        """Count what comes as `kind`; returns what it was before."""
        now, before = time.perf_counter(), self.kind
        self.seconds[before] += now - self.since
        self.kind, self.since = kind, now
        return before

    @contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """Count what is done inside as `kind`."""
        before = self.turn(kind)
        try:
            yield
        finally:
            self.turn(before)

    def waited(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Batches; the time until each is there is `data`: reading, collating and the copy to the device."""
        batches = iter(batches)
        while True:
            with self.spent_on("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def begin(self) -> None:
        """The forward pass of a step's first batch begins."""
        self.turn("compute")
        self.begun = self.since
        if self.marks:
            self.marks[0].record()

    def end(self) -> None:
        """The optimiser has stepped, as far as the host knows."""
        self.turn("other")
        self.ended = self.since
        if self.marks:
            self.marks[1].record()

    def settle(self) -> None:
        """The host has waited for the device: what that took beyond what the host saw is `compute`, too."""
        if self.marks:
            late = self.marks[0].elapsed_time(self.marks[1]) / 1000 - (self.ended - self.begun)
            late = min(max(late, 0.0), time.perf_counter() - self.ended)
            self.seconds["compute"] += late
            self.seconds["other"] -= late

    def lap(self) -> dict[str, float]:
        """The seconds since the last lap, by kind."""
        self.turn(self.kind)
        lap, self.seconds = self.seconds, dict.fromkeys(KINDS, 0.0)
        return lap


@dataclass
class Tally:
    """What all processes together did in some steps: `counts` of `COUNTS`; `sums`, (2, sources + 1), the negative
    log-likelihood and the number of labels of each source, the last of none that is known now; `seconds` by kind;
    `memory`, the highest peak of a process in bytes."""

    counts: np.ndarray
    sums: np.ndarray
    seconds: dict[str, float]
    steps: int = 0
    memory: float = 0.0

    def add(self, other: "Tally") -> None:
        """Add what was done in more steps."""
        self.counts, self.sums = self.counts + other.counts, self.sums + other.sums
        self.seconds = {kind: seconds + other.seconds[kind] for kind, seconds in self.seconds.items()}
        self.steps, self.memory = self.steps + other.steps, max(self.memory, other.memory)

    def tokens(self) -> dict[str, int]:
        """Tokens counted in three ways: positions that were computed on, tokens of rows, labels in the loss."""
        padded, real, _ = self.counts
        return {"padded_tokens": int(padded), "real_tokens": int(real), "supervised_tokens": int(self.sums[1].sum())}

    def losses(self, names: list[str]) -> dict[str, float | int]:
        """Mean loss and number of labels of each source that had any."""
        found: dict[str, float | int] = {}
        for name, loss, labels in zip(names, *self.sums.tolist(), strict=False):
            if labels:
                found |= {f"loss/{name}": loss / labels, f"loss_tokens/{name}": int(labels)}
        return found


class Meter:
    """Counts what a run does, and says it at a log.

    `part` is trained on, `tested`, where there is any, evaluated on; `lengths` are the tokens of each row of `part`.
    `work` says what the model computes, `peak` the FLOP/s of a device where they are known. `gather` stacks a tensor
    of each process.
    """

    def __init__(
        self,
        part: "Part",
        tested: "Part | None",
        work: Work,
        peak: float | None,
        device: torch.device,
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.names = [entry["metric"] for entry in part.ledger["sources"]]
        self.tested = [entry["metric"] for entry in tested.ledger["sources"]] if tested is not None else []
        self.lengths, self.flops = part.lengths, flops_of_rows(work, part.rows, part.lengths)
        self.work, self.peak, self.device, self.gather = work, peak, device, gather
        self.exact = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs have not
        self.processes = 1
        self.clock = Clock(device)
        self.total = Tally(np.zeros(len(COUNTS)), np.zeros((2, len(self.names) + 1)), dict.fromkeys(KINDS, 0.0))
        self.begin_window()
        self.begin_evaluation()

    # Counting, in each process

    def begin_window(self) -> None:
        """Count anew what the next log says."""
        self.counts, self.steps = np.zeros(len(COUNTS)), 0
        self.sums = torch.zeros(2, len(self.names) + 1, dtype=self.exact, device=self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def begin_evaluation(self) -> None:
        """Count anew what an evaluation says: by source, and entropy and right guesses of all."""
        self.evaluated = torch.zeros(2, len(self.tested) + 1, dtype=self.exact, device=self.device)
        self.guesses = torch.zeros(2, dtype=self.exact, device=self.device)

    def read(self, batches: list[dict[str, Any]], rows: np.ndarray) -> None:
        """Count the batches of a step, which hold these rows."""
        padded = sum(batch["input_ids"].numel() for batch in batches)
        self.counts += (padded, self.lengths[rows].sum(), self.flops[rows].sum())
        self.steps += 1

    def hear(self, outputs: FusedCausalLMOutput, sources: torch.Tensor, training: bool) -> None:
        """Add up what the fused head says of each label of a batch, shaped (rows, length - 1): 0 where there is none.

        In an evaluation rows that only fill a batch are of the source behind the last one, which nobody reads.
        """
        sources, labels = sources[:, 1:].flatten(), outputs.label_mask.flatten().to(self.exact)
        sums = self.sums if training else self.evaluated
        sums[0].index_add_(0, sources, -outputs.log_probs.detach().flatten().to(self.exact))
        sums[1].index_add_(0, sources, labels)
        if not training:
            counted = sources < len(self.tested)
            each = torch.stack([outputs.entropy.detach().flatten(), outputs.is_top1.flatten()])
            self.guesses += (each.to(self.exact) * counted).sum(dim=1)

    def memory(self) -> float:
        """The most bytes of the device that were taken in this window; of a CPU's memory by the process, ever."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

    # Saying, all processes together

    def close_window(self) -> Tally:
        """What was done since the last log, by all processes; it is added to what was done in all."""
        mine = [*self.counts.tolist(), self.memory()]
        mine = torch.cat([torch.tensor(mine, dtype=self.exact, device=self.device), self.sums.flatten()])
        each = self.gather(mine[None]).cpu().numpy()
        self.processes, size = len(each), len(COUNTS)
        counts, sums = each[:, :size].sum(axis=0), each[:, size + 1 :].sum(axis=0).reshape(2, -1)
        counts[COUNTS.index("flops")] += self.work.label * sums[1].sum()
        window = Tally(counts, sums, self.clock.lap(), self.steps, each[:, size].max())
        self.total.add(window)
        self.begin_window()
        return window

    def of_window(self) -> dict[str, Any]:
        """What a log in training says of the steps since the last one. Tokens are those of the whole run so far."""
        window = self.close_window()
        seconds = {f"{kind}_seconds": window.seconds[kind] / max(window.steps, 1) for kind in STEP}
        return {
            **self.total.tokens(),
            **self.rates(window),
            "step_seconds": sum(seconds.values()),
            **seconds,
            "loss_tokens": window.tokens()["supervised_tokens"],
            **window.losses(self.names),
        }

    def of_run(self) -> dict[str, Any]:
        """What the last log says of the whole run: the same of all steps, and seconds in all."""
        self.close_window()
        seconds = {f"{kind}_seconds": self.total.seconds[kind] for kind in KINDS}
        found = {**self.total.tokens(), **self.rates(self.total), **seconds, **self.total.losses(self.names)}
        return {f"train_{key}": value for key, value in found.items()}

    def rates(self, tally: Tally) -> dict[str, float | int | None]:
        """Tokens and FLOPs for each second and device, without the time of evaluations and saves; padding, memory."""
        seconds = self.processes * sum(tally.seconds[kind] for kind in STEP)
        tokens, (padded, real, flops) = tally.tokens(), tally.counts
        speed = flops / seconds if seconds else 0.0
        return {
            **{f"{key}_per_second": count / seconds if seconds else 0.0 for key, count in tokens.items()},
            "padding_share": 1 - real / padded if padded else 0.0,
            "tflops": speed / 1e12 if math.isfinite(speed) else None,
            "mfu": speed / self.peak if self.peak and math.isfinite(speed) else None,
            "peak_memory_bytes": int(tally.memory),
        }

    def of_evaluation(self, prefix: str) -> tuple[dict[str, float | int], dict[str, list[float]]]:
        """Means over all labels that were evaluated: losses, of all and by source; and entropy and accuracy."""
        mine = torch.cat([self.evaluated.flatten(), self.guesses])
        found = self.gather(mine[None]).cpu().numpy().sum(axis=0)
        sums = found[:-2].reshape(2, -1)[:, : len(self.tested)]
        loss, labels = sums.sum(axis=1).tolist()
        tally = Tally(np.zeros(len(COUNTS)), sums, {})
        losses = {"loss": loss / labels if labels else math.nan, "loss_tokens": int(labels)}
        losses |= tally.losses(self.tested)
        entropy, right = (found[-2:] / max(labels, 1)).tolist()
        means = {"entropy": [entropy], "mean_token_accuracy": [right]}
        return {f"{prefix}_{key}": value for key, value in losses.items()}, means

    # Stopping and going on

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: this process's window and the totals of all. JSON keeps every bit."""
        self.clock.turn(self.clock.kind)
        total = {**vars(self.total), "counts": self.total.counts.tolist(), "sums": self.total.sums.tolist()}
        window = {"counts": self.counts.tolist(), "sums": self.sums.tolist(), "seconds": self.clock.seconds}
        return {"names": self.names, "total": total, **window, "steps": self.steps}

    def restore(self, saved: list[dict[str, Any]], process: int, processes: int) -> None:
        """Go on with what a checkpoint's processes had counted; the first one takes it all, if they are others."""
        one = saved[process % len(saved)]
        mine = [one] if len(saved) == processes else saved if process == 0 else []
        self.begin_window()
        for each in mine:
            self.counts += each["counts"]
            self.sums += torch.from_numpy(self.placed(each["sums"], one["names"])).to(self.device, self.exact)
        self.steps, total = one["steps"], one["total"]
        self.total = Tally(**{**total, "counts": np.array(total["counts"])})
        self.total.sums = self.placed(total["sums"], one["names"])
        since = self.clock.lap()  # this start began: the trial of the model, and reading the checkpoint
        self.clock.seconds = {kind: one["seconds"][kind] + since[kind] for kind in KINDS}

    def placed(self, sums: list[list[float]], names: list[str]) -> np.ndarray:
        """Sums by source, where sources are now; what is of none of them comes last."""
        placed = np.zeros((2, len(self.names) + 1))
        for number, name in enumerate([*names, ""]):
            place = self.names.index(name) if name in self.names else -1
            placed[:, place] += [sums[0][number], sums[1][number]]
        return placed


def metric_names(sources: list[str]) -> list[str]:
    """What stands in keys for each of the sources of all parts; equal names are one source, others get others.

    Trackers read `/` as folders, and MLflow takes letters, digits and `_-. :/` alone, no empty folder and no `..`: any
    other character becomes `_`. Names that come to the same are numbered, also where a tracker has no folders.
    """
    names: dict[str, str] = {}
    seen: set[str] = set()
    for source in dict.fromkeys(sources):
        text = re.sub(r"[^0-9A-Za-z_.\- :/]", "_", source.replace(" #", " "))[-LONGEST:]
        bare = name = "/".join(part for part in text.split("/") if part.strip(" .")) or "_"
        number = 1
        while name.replace("/", ".").lower() in seen:
            number += 1
            name = f"{bare} {number}"
        seen.add(name.replace("/", ".").lower())
        names[source] = name
    return [names[source] for source in sources]


def evened(tested: "Part", batch: int) -> Dataset:
    """The rows to evaluate on, and as many short ones of no source as whole batches of all processes take.

    accelerate would fill the last batches with rows from the beginning, which nothing tells from the others.
    """
    rows, more = tested.rows, -len(tested.rows) % batch
    if not more:
        return rows
    row, nowhere = rows[int(tested.lengths.argmin())], len(tested.sources)
    row["source"] = [nowhere] * len(row["source"]) if isinstance(row["source"], list) else nowhere
    filling = Dataset.from_dict({key: [value] * more for key, value in row.items()}, features=rows.features)
    return concatenate_datasets([rows, filling])


def write_line(path: Path, entry: dict[str, Any], unknown: Iterable[str]) -> None:
    """Append a log to `metrics.jsonl`: with the time, and null for what is not known or is no finite number."""
    line = {**finite(entry), **dict.fromkeys(unknown), "time": time.time()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def finite(entry: dict[str, Any]) -> dict[str, Any]:
    """A log without numbers that JSON has none for."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in entry.items()
    }


def cut_back_metrics(path: Path, step: int, history: list[dict[str, Any]]) -> None:
    """Make a `metrics.jsonl` that of a checkpoint: a line for each log that it knows of.

    A log of its own step may have come behind the save, and is done again. Lines that are not there, as in another
    output_dir, are those of `history`, without a time.
    """
    lines = cut_back(path, step)
    pairs = zip_longest(map(finite, history), lines[: len(history)])
    kept = [line if line and entry.items() <= line.items() else entry for entry, line in pairs]
    if kept != lines:
        write_whole(path, "".join(json.dumps(each) + "\n" for each in kept))
