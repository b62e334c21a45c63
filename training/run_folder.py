"""The run folder: what a run leaves behind, and what it resumes from.

recipe.json              the resolved recipe, the data and the seed
log.jsonl                the resolved recipe and source revision, then one line a step: what was optimised, schedule values, speed
nan.jsonl                steps that were not finite: which terms, which images
tensorboard/             the same as curves
state/                   everything needed to go on, see saved_state.py
checkpoints/latest.safetensors   the teacher's backbone
pictures/                what it sees in a few images: attention by head, patches by their principal components, at growing distances
attention.png, pca.png   links to the latest
run.html                 all of this as one page
skipped.json             images that could not be read, and why
.lock                    held by the one trainer that writes here
places.jsonl             of tar shards: where the blocks of the epoch begin, so that a resumed run need not walk there
"""

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from data.errors import InputError
from training.saved_state import SavedStates, read_all, sync


class RunFolder:
    """Paths of a run and its atomic writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def states(self) -> SavedStates:
        return SavedStates(self.path / "state")

    @property
    def has_state(self) -> bool:
        """Whether a run has saved something here to go on from."""
        return bool(self.states.complete())

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def bad_steps(self) -> Path:
        return self.path / "nan.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoints" / "latest.safetensors"

    @property
    def skipped(self) -> Path:
        return self.path / "skipped.json"

    @property
    def picture(self) -> Path:
        return self.path / "attention.png"

    def open(self, resolved: Mapping[str, Any]) -> bool:
        """Make the folder, or check that it belongs to this run. True if there is a state to resume from."""
        recipe = self.recipe
        wanted = json.dumps(resolved, indent=1, sort_keys=True)
        if (self.path / "state.pt").exists():
            raise InputError(f"{self.path}: holds a run of an older version; choose another --out")
        if self.has_state:
            found = read_object(recipe)
            came = json.loads(wanted)
            # What only one of them has, a teacher for example, is a difference too.
            changed = [key for key in {**resolved, **found} if found.get(key) != came.get(key)]
            if changed:
                raise InputError(
                    f"{self.path}: holds a run with another {', '.join(changed)}; go on with the same ones or choose another --out"
                )
            self._hold()
            return True
        # A run that ended before it saved anything, over its data for example, leaves a recipe and perhaps a log, and may start anew.
        if self.path.is_dir() and any(one.name != ".lock" for one in self.path.iterdir()) and not recipe.is_file():
            raise InputError(f"{self.path}: is not empty and holds no run; choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
            self.write_text("recipe.json", wanted)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from error
        return False

    def _hold(self) -> None:
        """Keep other trainers out for as long as this process lives. A record lock: no worker inherits it, `kill -9` frees it."""
        try:
            self._lock = lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from error
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(
                f"{self.path}: another process is training into it; wait until it ends, or choose another --out"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
                raise

    def write_text(self, name: str, text: str) -> None:
        """Write a small file atomically; when the power fails it is the one before or this one, and not empty."""
        scratch = self.path / f".{name}.part"
        scratch.write_text(text)
        sync(scratch)
        os.replace(scratch, self.path / name)

    def listed(self) -> dict[str, str]:
        """Images that could not be read so far, name to reason; none where the list is absent or damaged, which stops no run."""
        try:
            found = read_object(self.skipped)
        except InputError:
            return {}
        return {name: reason for name, reason in found.items() if isinstance(reason, str)}

    def load_state(self) -> dict[str, Any]:
        """The newest state as one nested dict of whole tensors: student, teacher and optimizer by parameter name, centers by head."""
        nested: dict[str, Any] = {}
        for name, tensor in read_all(self.states.newest_sound()).items():
            kind, _, rest = name.partition(".")
            if rest:
                nested.setdefault(kind, {})[rest] = tensor
            else:
                nested[kind] = tensor
        return nested

    def keep_log_until(self, step: int) -> None:
        """Drop log lines of steps that will be taken again."""
        for log in (self.log, self.bad_steps):
            if log.is_file():
                kept = []
                for line in log.read_text().splitlines():
                    try:
                        record = json.loads(line)
                        if record.get("start", record.get("note", record))["step"] < step:
                            kept.append(line)
                    except (ValueError, KeyError, TypeError, AttributeError):
                        break  # a line cut short by a crash; whatever follows belongs to steps that will be taken again
                self.write_text(log.name, "".join(f"{line}\n" for line in kept))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); choose another --out") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no JSON object; choose another --out")
    return found
