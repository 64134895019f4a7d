"""What tests of several processes rely on: no result is taken for one, and a death is told."""

import os
import signal
from pathlib import Path

import pytest
from ranks import run_ranks


def die_at_first(rank: int, folder: Path) -> bool:
    """Whether the folder was as it had been before; rank 1 dies unless that happened before."""
    mark = folder.with_name("died")
    fresh = not (folder / f"left-{rank}").exists() and (folder / "given").exists()
    (folder / f"left-{rank}").touch()
    if rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGABRT)
    return fresh


def die(rank: int, folder: Path) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)


def fail(rank: int, folder: Path) -> None:
    (folder / f"tried-{rank}").open("a").write("x")
    raise ValueError("no luck")


def test_ranks_of_which_one_dies_of_a_signal_try_once_more_and_say_so(tmp_path):
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "given").touch()
    with pytest.warns(UserWarning, match=r"(?s)tried again: no result of ranks .*exit codes .*-6.*in die_at_first"):
        assert run_ranks(die_at_first, 2, tmp_path / "ranks") == [True, True]


def test_a_second_death_is_an_error_that_shows_where(tmp_path):
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=r"(?s)ranks \[1\]; exit codes .*-11.*in die"):
        run_ranks(die, 2, tmp_path)


def test_an_exception_is_told_at_once_and_results_of_earlier_ranks_are_not_taken_for_its(tmp_path):
    assert run_ranks(own_rank, 1, tmp_path) == [0]
    with pytest.raises(RuntimeError, match=r"(?s)ranks \[0\]; exit codes \[1\].*ValueError: no luck"):
        run_ranks(fail, 1, tmp_path)
    assert (tmp_path / "tried-0").read_text() == "x"


def own_rank(rank: int, folder: Path) -> int:
    return rank
