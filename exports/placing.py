"""Where artifacts come to be: under a hidden name beside their own, which they take when they are whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from data.errors import InputError


def check_free(out: Path) -> None:
    """Raise InputError where something has the name already."""
    if out.exists():
        raise InputError(f"--out {out}: is there already; delete it first, or choose another name")


def write_file(model: onnx.ModelProto, path: Path) -> None:
    """Write a model to the disk itself."""
    with open(path, "wb") as file:
        file.write(model.SerializeToString())
        file.flush()
        os.fsync(file.fileno())
    os.chmod(path, 0o644)


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """A hidden file to write into, in the folder of `out`, gone afterwards. Raises InputError where it cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.stem}.", suffix=out.suffix)
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error}); choose another place") from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name at the end, where nothing else has it by then. Raises InputError."""
    scratch: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        yield scratch
        if not out.exists():
            scratch.chmod(0o755)
            scratch.rename(out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
