"""Pieces of CPU work side by side: single-threaded inside, errors come out, nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from vecattention import workers


@pytest.fixture(autouse=True, params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def test_every_piece_runs_once_and_with_one_thread_inside(threads: int) -> None:
    seen: list[tuple[int, int]] = []
    workers.run(lambda i=i: seen.append((i, torch.get_num_threads())) for i in range(20))
    assert sorted(seen) == [(i, 1) for i in range(20)]


def test_pieces_run_side_by_side(threads: int) -> None:
    meeting = threading.Barrier(threads)
    workers.run([lambda: meeting.wait(timeout=30)] * threads)


def test_no_pieces_is_no_work() -> None:
    workers.run([])


def test_the_first_error_comes_out_and_stops_the_rest(threads: int) -> None:
    started = []

    def piece(i: int) -> None:
        started.append(i)
        if i == 2:
            raise ZeroDivisionError("piece 2")
        time.sleep(0.01)

    with pytest.raises(ZeroDivisionError, match="piece 2"):
        workers.run(lambda i=i: piece(i) for i in range(500))
    assert len(started) < 20


def test_threads_end_with_the_call_and_later_ones_start_as_before(threads: int) -> None:
    before = threading.active_count()
    workers.run([lambda: None] * 5)
    assert threading.active_count() == before
    counts: list[int] = []
    later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert counts == [threads]


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_when_no_thread_can_be_started_the_error_comes_out(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def second_fails(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        workers.run([lambda: None] * 5)
    started[0].join(timeout=30)
    assert threading.active_count() == before


def test_pieces_follow_the_inference_mode_of_the_caller() -> None:
    for wanted in (False, True):
        seen: list[tuple[bool, bool]] = []
        with torch.inference_mode(wanted):
            workers.run(
                [lambda seen=seen: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))] * 2
            )
        assert {mode for mode, _ in seen} == {wanted}


def test_calls_from_several_threads_do_not_disturb_one_another(threads: int) -> None:
    totals: list[list[int]] = [[] for _ in range(4)]

    def call(total: list[int]) -> None:
        torch.set_num_threads(threads)
        for _ in range(20):
            workers.run([lambda: total.append(torch.get_num_threads())] * 5)

    callers = [threading.Thread(target=call, args=(total,)) for total in totals]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert totals == [[1] * 100] * 4
