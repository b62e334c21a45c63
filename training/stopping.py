"""How a run ends before its time: signals, which save first, and a disk that takes no more."""

import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from data.errors import CheckFailed, InputError
from training.run_folder import RunFolder
from training.saved_state import REMEDIES, remedy_of

NO_WRITING = (*REMEDIES, errno.EIO, errno.ESTALE)


@contextmanager
def failed_writes_named(out: Path) -> Iterator[None]:
    """Within it a write for which there is no room, no permission or no sound disk ends in one line. What was saved before stays."""
    try:
        with _curves_thread_hushed():
            yield
    except OSError as error:
        if error.errno not in NO_WRITING:
            raise
        where = error.filename if isinstance(error.filename, str) and error.filename.startswith(str(out)) else out
        raise InputError(
            f"{where}: cannot be written ({error.strerror}); {remedy_of(error)}, and the same command goes on from what was saved"
        ) from error


@contextmanager
def dead_workers_named(out: Path) -> Iterator[None]:
    """Within it a worker that something killed, the system for want of memory as a rule, ends the run in one line."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise CheckFailed(
            f"{out}: {' '.join(str(error).split())} Memory may have run out: give fewer --workers; "
            "the same command goes on from what was saved"
        ) from error


@contextmanager
def _curves_thread_hushed() -> Iterator[None]:
    """Within it the thread that writes the curves prints nothing of such a disk: its error is raised again where it is next written to."""
    before = threading.excepthook

    def hush(args: threading.ExceptHookArgs) -> None:
        known = isinstance(args.exc_value, OSError) and args.exc_value.errno in NO_WRITING
        if not (known and _writes_curves(args.thread)):
            before(args)

    threading.excepthook = hush
    try:
        yield
    except OSError:
        # It may have come here before the thread itself came to the hook.
        for thread in filter(_writes_curves, threading.enumerate()):
            thread.join(timeout=1.0)
        raise
    finally:
        threading.excepthook = before


def _writes_curves(thread: threading.Thread | None) -> bool:
    """Whether it is TensorBoard's, whose class has no public name."""
    return type(thread).__module__.startswith("tensorboard.")


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
