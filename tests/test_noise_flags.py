"""Flags over micro-batches and processes: the gather logic, without a model and without processes."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from align_loop.objectives.noise import NoiseHandling
from align_loop.trainers.noise_flags import NoiseFlags

IDS = [f"pair-{i:02d}" for i in range(24)]
Step = list[list[list[int]]]  # process -> micro-batch -> index


def step_of(order: list[int], processes: int, micro: int) -> Step:
    """A global batch as data-parallel loaders deal it: micro-batches in turn, filled up with -1."""
    order = order + [-1] * (-len(order) % (processes * micro))
    batches = [order[i : i + micro] for i in range(0, len(order), micro)]
    return [batches[rank::processes] for rank in range(processes)]


def gather_of(step: Step, margin_of: dict[int, float]) -> Callable[[Tensor], Tensor]:
    """What the collective would return on any process, recognised by the tensor that is handed in."""
    indices = torch.tensor([i for process in step for batch in process for i in batch])
    margins = torch.tensor([margin_of[i] for i in indices.tolist()])

    def gather(local: Tensor) -> Tensor:
        return indices if local.dtype == torch.int64 else margins

    return gather


def run(orders: list[list[int]], margins: list[dict[int, float]], processes: int, micro: int) -> list[list[dict]]:
    """The record of every process after all steps, and a check that each process's flags are those of its pairs."""
    noise = NoiseHandling(share=0.2, warmup=0.25)
    records = []
    for rank in range(processes):
        flags = NoiseFlags(noise, IDS, lambda tensor: tensor)
        for number, (order, margin_of) in enumerate(zip(orders, margins, strict=True)):
            step = step_of(order, processes, micro)
            flags.gather = gather_of(step, margin_of)
            indices = [torch.tensor(batch) for batch in step[rank]]
            wanted = flags.wants_margins(number, len(orders))
            values = [torch.tensor([margin_of[i] for i in batch]) for batch in step[rank]] if wanted else None
            acting = flags.decide(indices, values, number, len(orders))
            flagged = {row["example_id"] for row in flags.rows if row["step"] == number and row["flagged"]}
            for batch, marks in zip(step[rank], acting, strict=True):
                assert marks.tolist() == [float(i >= 0 and IDS[i] in flagged) for i in batch]
        records.append(flags.rows)
    return records


def test_one_process_and_two_flag_the_same_pairs_however_the_batch_is_divided() -> None:
    source = random.Random(3)
    orders = [source.sample(range(24), size) for size in (8, 8, 8, 5)] * 2
    margins = [{i: source.gauss(0, 1) for i in range(-1, 24)} for _ in orders]
    reference = run(orders, margins, processes=1, micro=8)[0]
    assert sum(row["flagged"] for row in reference) == round(0.2 * (8 + 5 + 3 * 8 + 5))  # all but the warm-up
    assert {row["step"] for row in reference if row["alpha_active"]} == set(range(2, 8))
    assert all(row["detector_margin"] is None for row in reference if row["step"] < 2)
    for processes, micro in ((1, 1), (1, 3), (2, 1), (2, 4), (4, 2)):
        for record in run(orders, margins, processes, micro):
            assert record == reference


def test_padding_is_neither_counted_nor_flagged_nor_recorded() -> None:
    flags = NoiseFlags(NoiseHandling(share=0.5, warmup=0.0), IDS, lambda tensor: tensor)
    acting = flags.decide([torch.tensor([4, -1, 2, -1])], [torch.tensor([0.5, -9.0, 0.1, -9.0])], 0, 1)
    assert acting[0].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert flags.detector.seen == 2 and [row["example_id"] for row in flags.rows] == ["pair-02", "pair-04"]


def test_no_burst_of_flags_when_the_warmup_ends() -> None:
    flags = NoiseFlags(NoiseHandling(share=0.1, warmup=0.5), IDS, lambda tensor: tensor)
    shares = []
    for step in range(8):
        indices = [torch.arange(20)]
        margins = [torch.randn(20)] if flags.wants_margins(step, 8) else None
        shares.append(sum(flags.decide(indices, margins, step, 8)[0].tolist()))
    assert shares == [0, 0, 0, 0, 2, 2, 2, 2]


def test_paper_code_fills_its_window_during_the_warmup_without_acting() -> None:
    flags = NoiseFlags(NoiseHandling(rule="paper_code", warmup=0.5), IDS, lambda tensor: tensor)
    acting = [
        flags.decide([torch.tensor([0]), torch.tensor([1])], [torch.tensor([-1.0]), torch.tensor([1.0])], step, 4)
        for step in range(4)
    ]
    assert [[batch.item() for batch in step] for step in acting] == [[0, 0], [0, 0], [1, 0], [1, 0]]
    assert len(flags.detector.window) == 8
    assert [row["flagged"] for row in flags.rows] == [True, False] * 4


def test_state_carries_detector_and_record() -> None:
    first = NoiseFlags(NoiseHandling(share=0.3, warmup=0.0), IDS, lambda tensor: tensor)
    first.decide([torch.tensor([0, 1, 2])], [torch.tensor([0.1, 0.2, 0.3])], 0, 9)
    second = NoiseFlags(NoiseHandling(share=0.3, warmup=0.0), IDS, lambda tensor: tensor)
    second.load_state_dict(first.state_dict())
    assert second.rows == first.rows and second.detector.state_dict() == first.detector.state_dict()
