"""A disk under a run that is full or takes nothing: one line, whichever thread was writing."""

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from data.errors import CheckFailed, InputError
from training.stopping import dead_workers_named, failed_writes_named


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[type[BaseException]]:
    """Errors of threads that came to the hook which was there before, and would be printed."""
    found: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: found.append(args.exc_type))
    return found


def fails(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def write_curves(folder: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """A curve on a disk that answers with `error`, until the writer raises it here."""

    def write(*_: object) -> None:
        raise error

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", write)
    curves = SummaryWriter(str(folder))
    curves.add_scalar("loss", 1.0, 0)
    curves.close()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        *((number, "make room") for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
        *((number, "make the run folder and all in it writable") for number in (errno.EACCES, errno.EROFS)),
        (errno.EIO, "see to the disk"),
    ],
)
def test_the_thread_of_the_curves_says_nothing_of_such_a_disk_and_the_run_ends_in_one_line(
    number: int, remedy: str, told: list[type[BaseException]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(InputError, match=f"cannot be written .*; {remedy}, and the same command"),
        failed_writes_named(tmp_path),
    ):
        write_curves(tmp_path, monkeypatch, fails(number))
    assert told == []


def test_other_errors_of_that_thread_are_told(
    told: list[type[BaseException]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)), failed_writes_named(tmp_path):
        write_curves(tmp_path, monkeypatch, fails(errno.EINVAL))
    assert told == [OSError]


def test_a_worker_that_was_killed_is_told_in_one_line_and_other_errors_are_as_they_were(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckFailed, match=r"is killed by signal: Killed.*fewer --workers"),
        dead_workers_named(tmp_path),
    ):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="mine"), dead_workers_named(tmp_path):
        raise RuntimeError("mine")


@pytest.mark.parametrize("error", [ValueError("mine"), fails(errno.ENOSPC)])
def test_errors_of_other_threads_are_told(error: Exception, told: list[type[BaseException]], tmp_path: Path) -> None:
    def fail() -> None:
        raise error

    with failed_writes_named(tmp_path):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert told == [type(error)]


@pytest.mark.parametrize("error", [None, ValueError("mine"), fails(errno.ENOSPC)])
def test_the_hook_is_the_one_before_again_however_it_ends(
    error: Exception | None, told: list[type[BaseException]], tmp_path: Path
) -> None:
    before = threading.excepthook
    with suppress(ValueError), failed_writes_named(tmp_path):
        if error:
            raise error
    assert threading.excepthook is before
