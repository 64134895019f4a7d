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

from blueberry import threads_blueberry
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


@pytest.mark.parametrize("threads", [1, 2])
def test_work_computes_in_the_dtypes_that_it_is_given_also_under_autocast(threads):
    a, dtypes = torch.ones(2, 2), []
    with blas_threads(threads), torch.autocast("cpu", torch.bfloat16):
        run_on_workers(lambda _: dtypes.append((a @ a).dtype), range(2))
        assert (a @ a).dtype == torch.bfloat16
    assert dtypes == [torch.float32] * 2


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_nothing_goes_on_after_an_error_or_an_interruption(error, monkeypatch):
    begun, ended = [], []

    def work(number: int) -> None:
        begun.append(number)
        if number == 0 and error is ZeroDivisionError:
            raise error
        time.sleep(0.1)
        ended.append(number)

    def interrupted(*_: object, **__: object) -> None:
        monkeypatch.undo()
        time.sleep(0.05)
        raise error

    results_of(2, 2)  # the workers are there before
    if error is KeyboardInterrupt:
        monkeypatch.setattr(threads_blueberry, "wait", interrupted)
    with blas_threads(2), pytest.raises(error):
        run_on_workers(work, range(20))
    after = list(begun)
    time.sleep(0.3)
    assert begun == after and 0 < len(begun) < 6 and set(begun) - set(ended) <= {0}


def test_a_pool_that_cannot_start_all_its_workers_leaves_none_waiting(monkeypatch):
    start, started = threading.Thread.start, []

    def fail_at_the_third(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patch, blas_threads(13):  # a number that no other test has a pool for
        patch.setattr(threading.Thread, "start", fail_at_the_third)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            run_on_workers(print, range(13))
    for thread in started:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_threads_do_not_grow_with_the_numbers_of_pieces():
    with blas_threads(7):
        run_on_workers(time.sleep, [0] * 7)
        before = threading.active_count()
        for pieces in range(2, 30):
            run_on_workers(time.sleep, [0] * pieces)
        assert threading.active_count() == before


def test_a_thread_goes_on_working_when_the_main_thread_has_ended():
    code = """
import threading, time, torch
from blueberry.threads_blueberry import run_on_workers
torch.set_num_threads(2)
run_on_workers(time.sleep, [0] * 2)
def loop():
    for _ in range(200):
        run_on_workers(time.sleep, [0.001] * 2)
    print("done")
threading.Thread(target=loop).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "done" and not done.stderr


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
        ("torch, blueberry", {"OMP_WAIT_POLICY": "PASSIVE"}, True),
    ],
)
def test_idle_threads_sleep_if_blueberry_comes_before_torch_and_nothing_else_was_asked_for(imports, given, sleep):
    code = f"import {imports}; from blueberry.threads_blueberry import idle_threads_sleep; print(idle_threads_sleep())"
    others = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=others | given, check=True)
    assert done.stdout.strip() == str(sleep)
