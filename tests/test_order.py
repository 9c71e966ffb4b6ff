"""The order of rows: a function of seed, epoch and global batch size, whatever the launch; what `order.jsonl` says."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import losses, settings
from datasets import Dataset
from torch.utils.data import BatchSampler

from open_r1.configs import accumulation_steps
from open_r1.errors import Stopped
from open_r1.order import Order, cut_back, require_rows, require_same_order
from open_r1.sft import main
from open_r1.trainer import OrderedTrainer

LENGTHS = np.random.default_rng(0).integers(5, 200, size=103)
ROWS = 26


def order_of(batch=8, lengths=LENGTHS, seed=3, strategy="random", longest_first=True, **dealt):
    return Order(lengths, seed, batch, strategy, longest_first, **dealt)


def epoch_of(order, epoch):
    order.epoch = epoch
    return list(order)


class TestTheStream:
    @pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
    @pytest.mark.parametrize("batch", [1, 8, 40, 103])
    def test_epochs_follow_each_other_and_every_permutation_is_complete(self, strategy, batch):
        order = order_of(batch, strategy=strategy)
        assert len(order) == 103 // batch * batch
        drawn = list(itertools.chain.from_iterable(epoch_of(order, epoch) for epoch in range(9)))
        assert drawn == order.rows(0, 9 * len(order)).tolist()
        assert len(drawn) == 9 * len(order)
        for start in range(0, len(drawn), 103):
            permutation = drawn[start : start + 103]
            assert len(set(permutation)) == len(permutation)
            if len(permutation) == 103:
                assert sorted(permutation) == list(range(103))

    def test_it_depends_on_the_seed_and_the_number_of_the_permutation(self):
        assert order_of().rows(0, 300).tolist() == order_of().rows(0, 300).tolist()
        assert order_of().rows(0, 103).tolist() != order_of(seed=4).rows(0, 103).tolist()
        assert order_of().rows(103, 206).tolist() != order_of().rows(206, 309).tolist()
        assert order_of(strategy="sequential", longest_first=False).rows(100, 106).tolist() == [
            *(100, 101, 102),
            *(0, 1, 2),
        ]

    @pytest.mark.parametrize("strategy", ["random", "group_by_length"])
    @pytest.mark.parametrize(("ranks", "each"), [(1, 24), (1, 4), (2, 12), (2, 3), (3, 2), (4, 6)])
    @pytest.mark.parametrize("flat", [False, True], ids=["padded", "flattened"])
    def test_accelerate_deals_the_same_rows_to_each_step_of_any_launch(self, strategy, ranks, each, flat):
        order = order_of(24, strategy=strategy, each=each, padding_free=flat)
        stream = order.rows(0, 3 * len(order)).reshape(-1, 24)
        for epoch in range(3):
            order.epoch = epoch
            dealt = [
                list(BatchSamplerShard(BatchSampler(order, each, False), num_processes=ranks, process_index=rank))
                for rank in range(ranks)
            ]
            accumulated = 24 // each // ranks
            for step in range(order.steps):
                taken = slice(step * accumulated, (step + 1) * accumulated)
                rows = [row for micro in zip(*(batches[taken] for batches in dealt), strict=True) for row in micro]
                number = epoch * order.steps + step
                assert rows == order.batches_of(number + 1).tolist()
                assert sorted(sum(rows, [])) == sorted(stream[number].tolist())
                assert order.of_step(number + 1).tolist() == stream[number].tolist()
            assert [len(batches) for batches in dealt] == [order.steps * accumulated] * ranks


class TestLengths:
    def test_group_by_length_pads_a_fraction_of_what_random_does(self):
        lengths = np.random.default_rng(1).integers(5, 2000, size=5003)

        def padding(strategy):
            order = order_of(16, lengths, strategy=strategy)
            sizes = lengths[order.rows(0, 2 * len(order))].reshape(-1, 16)
            return (sizes.max(axis=1, keepdims=True) - sizes).sum()

        assert padding("group_by_length") < 0.1 * padding("random")

    def test_group_by_length_does_not_go_from_long_to_short(self):
        lengths = np.arange(1000)
        order = order_of(10, lengths, strategy="group_by_length", longest_first=False)
        firsts = lengths[order.rows(0, 1000)].reshape(-1, 10)[:, 0]
        assert abs(np.corrcoef(firsts, np.arange(100))[0, 1]) < 0.3

    @pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
    def test_longest_first_puts_the_longest_batch_into_step_two(self, strategy):
        def batches(longest_first, lengths):
            order = order_of(8, lengths, strategy=strategy, longest_first=longest_first)
            return [tuple(rows) for rows in order.rows(0, len(order)).reshape(-1, 8).tolist()]

        lengths = LENGTHS.copy()
        lengths[order_of(8, strategy=strategy, longest_first=False).rows(0, 103)[-7:]] = 5  # none of what is carried
        with_it, without = batches(True, lengths), batches(False, lengths)
        assert sorted(with_it) == sorted(without)
        assert with_it[1] == max(without, key=lambda rows: (lengths[list(rows)].max(), lengths[list(rows)].sum()))
        assert sum(one != other for one, other in zip(with_it, without, strict=True)) <= 2

    @pytest.mark.parametrize("seed", range(20))
    def test_nothing_later_is_longer_than_step_two(self, seed):
        order = order_of(8, seed=seed)
        sizes = LENGTHS[order.rows(0, 5 * len(order))].reshape(-1, 8).max(axis=1)
        assert sizes[1] == sizes.max() == LENGTHS.max()

    def test_a_step_is_dealt_out_so_that_little_is_padded(self):
        lengths = np.minimum(np.random.default_rng(1).lognormal(4, 1, size=5003).astype(int) + 1, 512)

        def padding(each):
            order = order_of(128, lengths, each=each)
            sizes = lengths[np.stack([order.batches_of(step) for step in range(1, order.steps + 1)])]
            return 1 - sizes.sum() / (sizes.max(axis=-1).sum() * each)

        unsorted = lengths[order_of(128, lengths).rows(0, 4992)].reshape(-1, 8)
        assert padding(8) < 0.25 * (1 - unsorted.sum() / (unsorted.max(axis=1).sum() * 8))

    def test_without_padding_all_processes_have_as_many_tokens(self):
        lengths = np.minimum(np.random.default_rng(1).lognormal(4, 1, size=5003).astype(int) + 1, 512)

        def idle(order):
            """The share of time in which a process waits for the one that has the most tokens."""
            sums = lengths[np.stack([order.batches_of(step) for step in range(1, order.steps + 1)])].sum(axis=-1)
            turns = sums.reshape(order.steps, -1, 8)  # of eight processes
            return 1 - turns.mean() / turns.max(axis=-1).mean()

        even, as_drawn = order_of(256, lengths, each=8, padding_free=True), order_of(256, lengths, each=8)
        as_drawn.dealt = lambda rows: rows
        assert idle(even) < 0.01 < 0.3 < idle(as_drawn)

    def test_one_step_an_epoch(self):
        order = order_of(60)
        assert order.steps == 1
        assert LENGTHS[order.rows(0, 60)].max() == LENGTHS.max()


class TestGlobalBatchSize:
    @pytest.mark.parametrize(
        ("size", "each", "processes", "steps"), [(128, 2, 8, 8), (4, 4, 1, 1), (6, 1, 2, 3), (6, 2, 3, 1)]
    )
    def test_the_accumulation_follows(self, size, each, processes, steps):
        assert accumulation_steps(size, each, processes) == steps

    @pytest.mark.parametrize(
        ("size", "each", "processes", "sizes", "batches"),
        [
            (10, 4, 2, "8 or 16", "1 or 5"),
            (2, 4, 2, "8", "1"),
            (100, 8, 3, "96 or 120", None),
            (360, 7, 1, "357 or 364", "4 or 5 or 6 or 8 or 9 or 10"),
        ],
    )
    def test_what_does_not_divide_is_refused_with_numbers_that_work(self, size, each, processes, sizes, batches):
        with pytest.raises(ValueError, match="cannot be dealt out") as caught:
            accumulation_steps(size, each, processes)
        message = str(caught.value)
        assert f"set global_batch_size: {sizes}" in message
        for good in sizes.split(" or "):
            assert accumulation_steps(int(good), each, processes)
        assert ("or per_device_train_batch_size" in message) == (batches is not None)
        if batches:
            assert message.endswith(f"or per_device_train_batch_size: {batches}")
            for good in batches.split(" or "):
                assert accumulation_steps(size, int(good), processes)


def rows_of(order, steps):
    """What order.jsonl says of the first steps of an order."""
    drawn = order.rows(0, steps * order.batch).astype("<i8").reshape(steps, order.batch)
    return [hashlib.sha256(rows.tobytes()).hexdigest()[:16] for rows in drawn]


def lines(out):
    return [json.loads(line) for line in (out / "order.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tiny_model, chat_file, tmp_path):
    """Run a recipe of 26 rows, 4 a step and two epochs of 6 steps in a directory; returns what it read and lost."""

    def start(name, **values):
        common = {
            "model_name_or_path": tiny_model,
            "dataset_name": chat_file,
            "dataset_max_samples": ROWS,
            "output_dir": tmp_path / name,
            "max_steps": None,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
        }
        assert main(settings(**{**common, **values})) == 0
        return lines(tmp_path / name), losses(tmp_path / name)

    return start


@pytest.fixture
def seen(monkeypatch):
    """The input_ids of every row that reached a step of training, with the orders of the trainers."""
    found, training_step, init = {"rows": [], "order": []}, OrderedTrainer.training_step, OrderedTrainer.__init__

    def spy(self, model, inputs, *args, **kwargs):
        if "attention_mask" in inputs:
            rows = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        else:
            rows = inputs["input_ids"][0].split(inputs["cu_seq_lens_q"].diff().tolist())
        found["rows"] += [(self.state.global_step, tuple(row.tolist())) for row in rows]
        return training_step(self, model, inputs, *args, **kwargs)

    def keep(self, *args, order, **kwargs):
        found["order"].append(order)
        found["dataset"] = kwargs["train_dataset"]
        init(self, *args, order=order, **kwargs)

    monkeypatch.setattr(OrderedTrainer, "training_step", spy)
    monkeypatch.setattr(OrderedTrainer, "__init__", keep)
    return found


class TestARun:
    def test_each_step_trains_on_the_rows_that_the_stream_says(self, run, seen):
        told, _ = run("run", per_device_train_batch_size=2, gradient_accumulation_steps=2)
        order, ids = seen["order"][0], seen["dataset"]["input_ids"]
        assert order.lengths.tolist() == [len(row) for row in ids]
        dealt = np.concatenate([order.batches_of(step).ravel() for step in range(1, 13)]).tolist()
        assert [(step, list(row)) for step, row in seen["rows"]] == [
            (place // 4, ids[row]) for place, row in enumerate(dealt)
        ]
        assert np.sort(np.reshape(dealt, (12, 4))).tolist() == np.sort(order.rows(0, 48).reshape(12, 4)).tolist()
        assert [line["step"] for line in told] == list(range(1, 13))
        assert [line["epoch"] for line in told] == [0] * 7 + [1] * 5
        assert [line["rows"] for line in told] == rows_of(order, 12)
        sizes = order.lengths[order.rows(0, 48)].reshape(-1, 4).max(axis=1)
        assert sizes[1] == order.lengths.max()

    @pytest.mark.parametrize(
        "values",
        [{}, {"packing": True}, {"train_sampling_strategy": "group_by_length"}],
        ids=["", "packed", "grouped"],
    )
    def test_accumulation_changes_neither_the_order_nor_the_losses(self, run, values):
        told, lost = run("4x1", **values)
        assert len(lost) == len(told) > 6
        assert len({line["rows"] for line in told}) == len(told)
        for each in (2, 1):
            again = run(f"{each}", per_device_train_batch_size=each, gradient_accumulation_steps=4 // each, **values)
            assert again[0] == told
            assert again[1] == pytest.approx(lost, abs=1e-4)
        assert run("said", per_device_train_batch_size=1, global_batch_size=4, **values)[0] == told

    def test_seed_and_data_change_what_is_written(self, run):
        told, other, seed = run("a")[0], run("b", dataset_max_samples=25)[0], run("c", data_seed=7)[0]
        assert {line["data"] for line in told}.isdisjoint(line["data"] for line in other)
        assert [line["data"] for line in told] == [line["data"] for line in seed]
        assert [line["rows"] for line in told] != [line["rows"] for line in seed]

    @pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
    @pytest.mark.parametrize("longest_first", [None, True, False])
    def test_the_default_of_longest_first(self, run, seen, strategy, longest_first):
        run("run", train_sampling_strategy=strategy, longest_first=longest_first, max_steps=1)
        expected = strategy != "sequential" if longest_first is None else longest_first
        assert seen["order"][0].longest_first is expected

    def test_packing_keeps_its_order_of_packs(self, run, monkeypatch):
        found, init = [], OrderedTrainer.__init__

        def keep(self, *args, order, **kwargs):
            found.append((order, kwargs["train_dataset"]))
            init(self, *args, order=order, **kwargs)

        monkeypatch.setattr(OrderedTrainer, "__init__", keep)
        run("run", packing=True, max_steps=1)
        order, dataset = found[0]
        assert order.longest_first is False
        assert order.lengths.tolist() == [len(row) for row in dataset["input_ids"]]

    @pytest.mark.parametrize(
        ("values", "steps"),
        [({"num_train_epochs": 0.5}, 3), ({"num_train_epochs": 1.5}, 9), ({"max_steps": 20}, 20)],
        ids=["half", "one and a half", "max_steps"],
    )
    def test_fractional_epochs_and_steps_beyond_the_epochs(self, run, values, steps):
        told, lost = run("run", **values)
        whole = run("whole", num_train_epochs=4)[0]
        assert len(lost) == steps
        assert told == whole[:steps]

    def test_rows_are_prefetched_by_workers(self, run):
        assert run("here")[0] == run("workers", dataloader_num_workers=1)[0]


class TestResume:
    @pytest.mark.parametrize(
        ("step", "save_steps"), [(4, 2), (6, 3), (7, 6), (9, 2)], ids=["middle", "boundary", "behind", "second"]
    )
    @pytest.mark.parametrize("strategy", ["random", "group_by_length"])
    def test_a_resumed_run_reads_and_writes_what_a_whole_one_does(
        self, run, stop_at, tmp_path, step, save_steps, strategy
    ):
        values = {"save_steps": save_steps, "train_sampling_strategy": strategy}
        told, lost = run("whole", **values)
        stop_at(step)
        with pytest.raises(KeyboardInterrupt):
            run("torn", **values)
        assert len(lines(tmp_path / "torn")) == step
        stop_at(None)
        assert run("torn", **values) == (told, lost)

    def test_with_another_batch_a_rank_it_goes_on_in_the_same_order(self, run, stop_at, tmp_path):
        """As on another number of processes: a step takes the same rows, in other shares."""
        told, lost = run("whole", global_batch_size=4, save_steps=2)
        stop_at(9)
        with pytest.raises(KeyboardInterrupt):
            run("torn", global_batch_size=4, save_steps=2)
        stop_at(None)
        again = run("torn", global_batch_size=4, save_steps=2, per_device_train_batch_size=2)
        assert again[0] == told
        assert again[1] == pytest.approx(lost, abs=1e-4)

    @pytest.mark.parametrize("torn", ["", '{"step": 4', '{"step": 4, "epoch": {}'])
    def test_the_file_is_cut_back(self, tmp_path, torn):
        path = tmp_path / "order.jsonl"
        path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)) + torn)
        assert [line["step"] for line in cut_back(path, 9)] == [1, 2, 3]
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
        cut_back(path, 2)
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
        cut_back(path, 0)
        assert path.read_text() == ""


class TestProof:
    """What a resume verifies: the file of the steps before, and the tokens of every batch."""

    def test_a_file_that_the_order_no_longer_gives_stops_the_run(self):
        order = order_of(8)
        told = [{"step": step, "rows": rows} for step, rows in enumerate(rows_of(order, 20), 1)]
        require_same_order(told, order)
        with pytest.raises(Stopped, match="order.jsonl: step 1 took other rows"):
            require_same_order(told, order_of(8, seed=4))
        told[13]["rows"] = told[14]["rows"]
        with pytest.raises(Stopped, match="order.jsonl: step 14 took other rows"):
            require_same_order(told, order)

    @pytest.mark.parametrize("ranks", [1, 2])
    @pytest.mark.parametrize("flat", [False, True], ids=["padded", "flattened"])
    def test_batches_that_are_not_the_orders_stop_it(self, ranks, flat):
        rows = Dataset.from_dict({"input_ids": [list(range(n, n + size)) for n, size in enumerate(LENGTHS.tolist())]})
        order = order_of(8, each=2, padding_free=flat)

        def batches(step, rank):
            taken = order.batches_of(step)[rank::ranks]
            made = []
            for numbers in taken:
                ids = [torch.tensor(rows[int(number)]["input_ids"]) for number in numbers]
                padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
                mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
                made.append(
                    {"input_ids": torch.cat(ids)[None]} if flat else {"input_ids": padded, "attention_mask": mask}
                )
            return made

        for step in (1, 12, 13, 40):
            for rank in range(ranks):
                require_rows(batches(step, rank), rows, order, step, rank, ranks)
        with pytest.raises(Stopped, match=f"step 13: process {ranks - 1} was given other rows"):
            require_rows(batches(14, ranks - 1), rows, order, 13, ranks - 1, ranks)
        moved = batches(13, 0)
        with pytest.raises(Stopped, match=r"batch 1"):
            require_rows([moved[1], moved[0], *moved[2:]], rows, order, 13, 0, ranks)

    def test_a_run_whose_batches_are_skipped_wrongly_stops(self, run, stop_at, tmp_path, monkeypatch, capsys):
        stop_at(4)
        with pytest.raises(KeyboardInterrupt):
            run("torn", save_steps=2)
        stop_at(None)
        from transformers import trainer

        skip = trainer.skip_first_batches
        monkeypatch.setattr(trainer, "skip_first_batches", lambda loader, count: skip(loader, count - 1))
        with pytest.raises(AssertionError):
            run("torn", save_steps=2)
        assert "step 5: process 0 was given other rows than the order says" in capsys.readouterr().err


REFUSED = {
    "no whole number": ({"global_batch_size": 6}, "set global_batch_size: 4 or 8, or per_device_train_batch_size: 1"),
    "too few rows": (
        {"global_batch_size": 28},
        "26 rows cannot fill one optimiser step, which takes 28: per_device_train_batch_size 4 x "
        "gradient_accumulation_steps 7 x 1 process; set per_device_train_batch_size: 1 and global_batch_size: 26",
    ),
    "too few packs": ({"packing": True, "global_batch_size": 28}, "leave packing out, or bring more data"),
    "two that disagree": (
        {"global_batch_size": 8, "gradient_accumulation_steps": 4},
        "global_batch_size 8 is not gradient_accumulation_steps 4 (command line) x per_device_train_batch_size 4 x 1",
    ),
    "below one": ({"global_batch_size": 0}, "global_batch_size must be at least 1; found 0"),
    "found by itself": ({"auto_find_batch_size": True}, "leave it out: --dry_run says what fits"),
    "rebalanced": ({"train_sampling_strategy": "batch_rebalance"}, "use group_by_length"),
    "split": ({"accelerator_config": {"split_batches": True}}, "leave it out and set global_batch_size"),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_ordered_is_refused_before_weights(
    tiny_model, chat_file, tmp_path, monkeypatch, capsys, values, message
):
    monkeypatch.setattr("open_r1.model.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "dataset_max_samples": ROWS}
    common |= {"output_dir": tmp_path / "run", "per_device_train_batch_size": 4}
    assert main(settings(**{**common, **values})) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_two_that_agree_are_one_batch(run):
    assert run("both", global_batch_size=8, gradient_accumulation_steps=2)[0] == run("one", global_batch_size=8)[0]
