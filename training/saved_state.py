"""The resumable state of a run on disk: written by all processes while the run goes on, read by any number of them.

state/step-00000120/    one saved state; the two newest are kept
    shard-*.safetensors     tensors, or the shards of them that one process holds (torch's distributed checkpoints)
    state.json              what belongs to it, with sizes; a file cut short or missing is seen
state/.part/            a state that is being written; renamed when it is complete and on the disk

Nothing in it is a pickle. A crash at any moment leaves the states that were complete.
"""

import errno
import json
import os
import shutil
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from data.errors import InputError
from training import parallel

KEPT = 2
CONTENTS = "state.json"
REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room") | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "make the run folder and all in it writable"
)
"""What to do where the system refuses to write: a full disk; another's files, or a disk made read-only after an error."""


class SavedStates:
    """The saved states of a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def part(self) -> Path:
        return self.folder / ".part"

    def complete(self) -> list[Path]:
        """All that were written to the end, oldest first."""
        return sorted(found.parent for found in self.folder.glob(f"step-*/{CONTENTS}"))

    def newest_sound(self) -> Path:
        """The newest state whose files are all there in full; says which newer ones are passed over. Raises InputError if none is."""
        complaints: list[str] = []
        for state in reversed(self.complete()):
            complaint = damage(state)
            if complaint is None:
                for text in complaints:
                    print(f"{text}; going on from {state}", file=sys.stderr)
                return state
            complaints.append(complaint)
        said = "; ".join(complaints) or f"{self.folder}: holds no state"
        raise InputError(f"{said}; remove {self.folder} to start the run anew")

    def publish(self, step: int, files: Mapping[str, int]) -> None:
        """Make what lies in `part` the newest state, durably, and drop the oldest."""
        contents = self.part / CONTENTS
        contents.write_text(json.dumps({"step": step, "bytes_by_file": files}))
        for path in (contents, self.part):
            sync(path)
        final = self.folder / f"step-{step:08d}"
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that was passed over
        self.part.rename(final)
        sync(self.folder)
        for old in self.complete()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)


def damage(state: Path) -> str | None:
    """What is wrong with the files of a state, or None."""
    try:
        wanted = json.loads((state / CONTENTS).read_text())["bytes_by_file"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{state / CONTENTS}: is damaged"
    for name, size in wanted:
        path = state / Path(name).name
        if not path.is_file():
            return f"{path}: is missing"
        if path.stat().st_size != size:
            return f"{path}: has {path.stat().st_size} bytes of {size}"
    return None


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Writer(HuggingFaceStorageWriter):
    """Publishes a state once all processes have written their files."""

    def __init__(self, states: SavedStates, step: int, files: dict[str, int]) -> None:
        super().__init__(str(states.part), fqn_to_index_mapping=files, save_distributed=True)
        self.states, self.step = states, step

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        names = {str(one.storage_data.relative_path) for part in results for one in part}
        self.states.publish(self.step, {name: (self.states.part / name).stat().st_size for name in names})


class Saver:
    """Writes states while training goes on: tensors are copied at once, and written by a thread."""

    def __init__(self, states: SavedStates) -> None:
        self.states = states
        self.running: Future[Any] | None = None
        self.step: int | None = None
        # A group of its own: the thread's messages must not mix with the steps'.
        self.group = dist.new_group(backend="gloo", timeout=parallel.PATIENCE) if parallel.world_size() > 1 else None
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        """However a run ends, a state that is being written is finished, or leaves nothing behind."""
        if self.running is not None and self.running.exception() is not None:
            shutil.rmtree(self.states.part, ignore_errors=True)

    @property
    def failed(self) -> bool:
        """Whether the last state could not be written, as far as is known by now."""
        return self.running is not None and self.running.done() and self.running.exception() is not None

    def start(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Begin to write a state, after the one before is written. All processes call it."""
        if step == self.step:
            return
        self.wait()
        if parallel.rank() == 0:
            shutil.rmtree(self.states.part, ignore_errors=True)
            self.states.folder.mkdir(parents=True, exist_ok=True)
        if self.group is not None:
            dist.barrier(self.group)
        kinds = sorted({name.split(".")[0] for name in tensors})
        files = {
            name: 1 + kinds.index(name.split(".")[0]) for name in tensors
        }  # one file a kind bounds what is serialised at once
        self.step = step
        self.running = dcp.async_save(  # type: ignore[assignment]
            dict(tensors),
            storage_writer=_Writer(self.states, step, files),
            process_group=self.group,
            no_dist=self.group is None,
        )

    def wait(self) -> None:
        """Until the state is on the disk. Raises InputError where it could not be written; what was saved before stays."""
        running, self.running = self.running, None
        if running is None:
            return
        error = running.exception()
        if error is None:
            return
        shutil.rmtree(self.states.part, ignore_errors=True)
        kept = self.states.complete()
        raise InputError(
            f"{self.states.folder}: the state of step {self.step} cannot be written ({reason_of(error)}); "
            + (f"{kept[-1].name} is kept. " if kept else "nothing was saved before. ")
            + f"{remedy_of(error).capitalize()}, and the same command goes on from there"
        ) from error


def system_error(error: BaseException) -> OSError | None:
    """What the system said, out of the layers that torch wraps it in."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else []
    return next((one for one in (error, *(failure[0] for failure in failures)) if isinstance(one, OSError)), None)


def remedy_of(error: BaseException) -> str:
    """What to do about an error of writing."""
    inner = system_error(error)
    return REMEDIES.get(inner.errno or 0, "see to the disk") if inner else "see to the disk"


def reason_of(error: BaseException) -> str:
    """An error in few words."""
    if inner := system_error(error):
        return inner.strerror or str(inner)
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}" if str(error) else type(error).__name__


def read_shapes(state: Path) -> dict[str, torch.Size]:
    """The shapes of a state's tensors by name. Raises InputError for a damaged one."""
    try:
        found = HuggingFaceStorageReader(str(state)).read_metadata().state_dict_metadata
    except Exception as error:  # safetensors raises its own kinds
        raise InputError(f"{state}: is damaged ({error}); remove it to go on from an older one") from error
    return {name: one.size for name, one in found.items() if isinstance(one, TensorStorageMetadata)}


def read_into_(state: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, or this process's shards of them, from a state. Raises InputError for a damaged one."""
    try:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(state)), no_dist=parallel.world_size() == 1)
    except (Exception, CheckpointException) as error:
        raise InputError(f"{state}: is damaged ({reason_of(error)}); remove it to go on from an older one") from error


def read_all(state: Path) -> dict[str, Tensor]:
    """All tensors of a state, whole, in this process alone."""
    meta = HuggingFaceStorageReader(str(state)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in meta.items()
        if isinstance(one, TensorStorageMetadata)
    }
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(state)), no_dist=True)
    return tensors
