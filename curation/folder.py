"""The output folder of a curation command: stage results keyed by what they were made from, and atomic writes.

A stage's folder is `stages/NAME-KEY/`, where KEY is a hash of the stage's settings and of the keys of the stages it took its input from.
It is complete once `done.json` is in it; before that, whatever files it holds are taken up by the next try. So an interrupted command
goes on where it was, and a change of a threshold recomputes the stages that depend on it and no others.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside the target that takes its place, durably, once the block ends without an error."""
    path = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield path
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, target)
    finally:
        path.unlink(missing_ok=True)


def content_key(parts: Mapping[str, Any]) -> str:
    """Hash of what a result is made from; `parts` is anything JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


class Stage:
    """The folder of one stage."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    def done(self) -> bool:
        """Whether an earlier run finished it."""
        return (self.path / "done.json").is_file()

    def finish(self, counts: Mapping[str, Any] | None = None) -> None:
        """Mark it complete, with figures worth keeping."""
        with replacing(self.path / "done.json") as path:
            path.write_text(json.dumps(dict(counts or {}), indent=1))

    def counts(self) -> dict[str, Any]:
        """The figures that `finish` was given."""
        return json.loads((self.path / "done.json").read_text())

    def save(self, name: str, **arrays: np.ndarray) -> None:
        """Write arrays to NAME.npz; they appear whole or not at all."""
        with replacing(self.path / f"{name}.npz") as path, path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def load(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of NAME.npz."""
        with np.load(self.path / f"{name}.npz", allow_pickle=False) as file:
            return dict(file)


class Folder:
    """An output folder. Raises InputError where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()) and not (path / "stages").is_dir():
                raise InputError(f"--out {path}: is not empty and holds no curation; choose another folder")
            (path / "stages").mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {path}: cannot be written ({error.strerror}); choose another folder") from error

    def stage(self, name: str, **made_from: Any) -> Stage:
        """The folder of stage `name` for these settings and inputs."""
        key = content_key({"stage": name, **made_from})
        return Stage(self.path / "stages" / f"{name}-{key}", key)
