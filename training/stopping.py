"""How a run ends before its time: signals, which save first, and a disk without room."""

import errno
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from data.errors import InputError
from training.run_folder import RunFolder


@contextmanager
def a_full_disk_named(out: Path) -> Iterator[None]:
    """Within it a write for which there is no room ends in one line. What was saved before stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{out}: cannot be written ({error.strerror}); make room, and the same command goes on from what was saved"
        ) from error


@contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Within it SIGINT and SIGTERM are remembered, not obeyed; yields a function that tells which one came."""
    seen: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        seen.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: seen[0] if seen else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(signal_number: int, step: int, folders: Sequence[RunFolder]) -> None:
    """End the process after a signal: all is saved. Ctrl-C gives status 130, SIGTERM 0."""
    where = ", ".join(str(folder.path) for folder in folders)
    print(f"stopped after step {step}, saved to {where}; the same command goes on from there", file=sys.stderr)
    if signal_number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(0)
