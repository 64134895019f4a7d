"""Work on threads of a CPU: all of it, in the caller's modes, whatever fails, also after a fork."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from blueberry.threads_blueberry import blas_threads, run_on_workers


def results_of(pieces: int, threads: int, threads_each: int = 1) -> list[tuple[int, int, bool, bool]]:
    """Of each piece: the thread that did it, its BLAS threads, and whether gradients and inference mode were on."""
    results = [None] * pieces

    def work(number: int) -> None:
        time.sleep(0.02)  # so that no worker takes all
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        results[number] = (threading.get_ident(), torch.get_num_threads(), *modes)

    with blas_threads(threads):
        run_on_workers(work, range(pieces), threads_each)
        assert torch.get_num_threads() == threads
    return results


@pytest.mark.parametrize(
    ("pieces", "threads", "each", "workers"),
    [(5, 2, 1, 2), (5, 3, 1, 3), (2, 4, 2, 2), (2, 8, 1, 2), (6, 5, 2, 2), (1, 4, 4, 1), (3, 1, 1, 1), (0, 2, 1, 0)],
)
def test_every_piece_is_done_by_one_of_as_many_workers_as_there_are_threads_for(pieces, threads, each, workers):
    results = results_of(pieces, threads, each)
    assert len({thread for thread, *_ in results}) == workers
    assert {count for _, count, *_ in results} <= {each}


@pytest.mark.parametrize("threads", [1, 2])
def test_work_has_no_gradients_and_is_in_inference_mode_if_the_caller_is(threads):
    assert not any(grad or inference for *_, grad, inference in results_of(4, threads))
    with torch.inference_mode():
        assert all(inference for *_, inference in results_of(4, threads))


def test_an_error_is_raised_once_all_workers_have_ended():
    ended = []

    def work(number: int) -> None:
        if number == 0:
            raise ZeroDivisionError
        time.sleep(0.1)
        ended.append(number)

    with blas_threads(2), pytest.raises(ZeroDivisionError):
        run_on_workers(work, range(4))
    assert sorted(ended) == [1, 2, 3]


def test_what_watches_the_calling_thread_sees_all_of_the_work():
    a = torch.ones(8, 8)
    with blas_threads(2), FlopCounterMode(display=False) as counter:
        run_on_workers(lambda _: torch.mm(a, a), range(5))
    assert counter.get_total_flops() == 5 * 2 * 8**3
    with blas_threads(2), profile(activities=[ProfilerActivity.CPU]) as profiler:
        run_on_workers(lambda _: torch.mm(a, a), range(5))
    assert {event.key: event.count for event in profiler.key_averages()}["aten::mm"] == 5


def _of_a_fork(queue: multiprocessing.Queue) -> None:
    queue.put(len(results_of(4, 2)))


def test_a_forked_process_has_workers_of_its_own():
    results_of(4, 2)  # the parent's are there
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_of_a_fork, args=(queue,), daemon=True)
    process.start()
    assert queue.get(timeout=60) == 4
    process.join(timeout=60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("imports", "given", "sleep"),
    [
        ("blueberry, torch", {}, True),
        ("torch, blueberry", {}, False),
        ("blueberry, torch", {"GOMP_SPINCOUNT": "300000"}, False),
        ("torch, blueberry", {"GOMP_SPINCOUNT": "1000"}, True),
        ("blueberry, torch", {"GOMP_SPINCOUNT": "infinite"}, False),
        ("blueberry, torch", {"OMP_WAIT_POLICY": "active"}, False),
    ],
)
def test_idle_threads_sleep_if_blueberry_comes_before_torch_and_nothing_else_was_asked_for(imports, given, sleep):
    code = f"import {imports}; from blueberry.threads_blueberry import idle_threads_sleep; print(idle_threads_sleep())"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == str(sleep)
