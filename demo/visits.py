"""What visitors bring and how much of it at a time: uploads, their folder, and turns.

Uploads lie in a folder of their own that goes with this process; within it Gradio deletes what is older than KEPT_S. Read in this
order: private_folder, read_upload, Turns.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from data.decode import decode_image
from data.errors import InputError
from demo.pictures import fitted

KEPT_S = 1800
"""How long an upload and the pictures made of it stay, for a visitor who still looks at them."""
MAX_UPLOAD_MB = 64
PREFIX = "dinoscope-demo-"


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for uploads that nobody else may read, gone afterwards; what killed processes left behind goes first."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        _remove_if_abandoned(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_if_abandoned(folder: Path) -> None:
    """Whoever lives holds the lock in its folder."""
    with contextlib.suppress(OSError):
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return
        with (folder / ".lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def refusal(text: str) -> gr.Error:
    """An error whose words are for the visitor."""
    return gr.Error(text, print_exception=False)


def as_it_came(payload: Any) -> Any:
    """Path of an upload, or None: the server's decoder judges it, not Gradio's, whose refusals are long and its own."""
    return None if payload is None else payload.path


def read_bytes(path: str | None) -> bytes:
    """The bytes of an upload. Raises gr.Error."""
    if path is None:
        raise refusal("Choose a sample or upload an image first.")
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise refusal(f"This upload was deleted after {KEPT_S // 60} minutes. Upload it again.") from error


def read_upload(path: str | None) -> tuple[bytes, np.ndarray]:
    """The bytes of the chosen image file as they came, and the decoded image. Raises gr.Error."""
    data = read_bytes(path)
    try:
        return data, decode_image(data)
    except InputError as error:
        raise refusal(f"This file cannot be used: {error}") from error


def read_picture(path: str | None) -> tuple[bytes, np.ndarray]:
    """As `read_upload`, the image in the size of the page's pictures. Raises gr.Error."""
    data, image_HWC = read_upload(path)
    return data, fitted(image_HWC)


class Turns:
    """One piece of work of a kind at a time for each visitor, so that nobody fills the queue of all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[tuple[str | None, str]] = set()
        self._asked: dict[tuple[str | None, str], tuple[Any, ...]] = {}
        """What a visitor asked for and nobody has begun."""

    @contextlib.contextmanager
    def take(self, request: gr.Request, work: str) -> Iterator[None]:
        """Raises gr.Error where the visitor's last such request is still being answered."""
        turn = (request.session_hash, work)
        with self._lock:
            if turn in self._running:
                raise refusal("Your request before this one is still being answered. One at a time, please.")
            self._running.add(turn)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(turn)

    def newest(self, request: gr.Request, name: str, work: Callable[..., Any], *asked: Any) -> Any:
        """`work(*asked)`, or what the visitor asked for meanwhile: events that follow from one click may come at once, and the last counts.

        A call that comes while another works leaves its question to that one and returns gr.skip() at once.
        """
        turn = (request.session_hash, name)
        with self._lock:
            self._asked[turn] = asked
            if turn in self._running:
                return gr.skip()
            self._running.add(turn)
        while True:
            with self._lock:
                asked = self._asked.pop(turn)
            answer, error = _attempt(work, asked)
            with self._lock:
                if turn not in self._asked:
                    self._running.discard(turn)
                    break
        if error is not None:
            raise error
        return answer


def _attempt(work: Callable[..., Any], asked: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    try:
        return work(*asked), None
    except Exception as error:  # a question that came meanwhile is answered first
        return None, error
