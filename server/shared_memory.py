"""System shared memory: clients on this machine name a region of /dev/shm once, and tensors then stay out of the messages.

Triton's extension_shared_memory. Regions are read and written by file operations and not mapped: a client that shrinks its region then
gets an error, where a mapping would kill the server. Offered only while the server listens on the loopback address, because whoever may
name a region may have the server write into it.
"""

import os
import re
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.errors import InputError
from server.errors import Conflict, NotFound, TooLarge

FOLDER = "/dev/shm/"
REGION = "shared_memory_region"
BYTE_SIZE, OFFSET = "shared_memory_byte_size", "shared_memory_offset"
MAX_REGIONS = 1024
_KEY = re.compile(r"/?[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254}")
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,256}")


@dataclass(frozen=True)
class Region:
    """A registered part of a shared memory object."""

    name: str
    key: str
    offset: int
    byte_size: int
    file: int


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: bytes of a region."""

    region: str
    byte_size: int
    offset: int = 0

    @staticmethod
    def of(parameters: Mapping[str, Any], what: str) -> "Place | None":
        """The place that a tensor's parameters name, or None. Raises InputError."""
        if REGION not in parameters:
            return None
        region, size, offset = parameters[REGION], parameters.get(BYTE_SIZE), parameters.get(OFFSET, 0)
        numbers = all(
            isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 1 << 62 for one in (size, offset)
        )
        if not isinstance(region, str) or not numbers:
            raise InputError(f"{what}: wanted {REGION} as text, {BYTE_SIZE} and {OFFSET} as whole numbers")
        return Place(region, int(size), int(offset))  # type: ignore[arg-type]


class SharedMemory:
    """The regions of a server."""

    def __init__(self, offered: bool, max_bytes: int = 1 << 30) -> None:
        """`max_bytes` bounds one input: what is read of it is memory of the server."""
        self._offered, self._max_bytes = offered, max_bytes
        self._regions: dict[str, Region] = {}
        self._lock = threading.Lock()

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Take in a region. Raises InputError for one that is not there, Conflict for a name that is taken."""
        if not self._offered:
            raise InputError("shared memory is offered by servers that listen on the loopback address only")
        if not _NAME.fullmatch(name) or not _KEY.fullmatch(key):
            raise InputError(
                f"region {name!r:.80} with key {key!r:.80}: wanted a name, and the name of an object in {FOLDER}"
            )
        if not 0 <= offset < 1 << 62 or not 0 < byte_size < 1 << 62:
            raise InputError(f"region {name!r:.80}: {byte_size} bytes at {offset}; wanted at least 1 byte from 0 on")
        with self._lock:
            if name in self._regions:
                raise Conflict(f"region {name!r:.80} is registered already; unregister it first")
            if len(self._regions) >= MAX_REGIONS:
                raise Conflict(f"{MAX_REGIONS} regions are registered; unregister some first")
            file = self._open(key, offset + byte_size)
            self._regions[name] = Region(name, key, offset, byte_size, file)

    @staticmethod
    def _open(key: str, needed: int) -> int:
        try:
            file = os.open(FOLDER + key.removeprefix("/"), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"shared memory {key!r:.80} cannot be opened ({error.strerror})") from error
        there = os.fstat(file)
        if not stat.S_ISREG(there.st_mode) or there.st_size < needed:
            os.close(file)
            raise InputError(f"shared memory {key!r:.80} has {there.st_size} bytes; the region wants {needed}")
        return file

    def unregister(self, name: str = "") -> None:
        """Let go of a region, or of all; one that is not there is no error, as in Triton."""
        with self._lock:
            for one in [name] if name else list(self._regions):
                region = self._regions.pop(one, None)
                if region is not None:
                    os.close(region.file)

    def status(self, name: str = "") -> list[Region]:
        """The regions there are, or one. Raises NotFound."""
        with self._lock:
            if name and name not in self._regions:
                raise NotFound(f"there is no shared memory region {name!r:.80}")
            return [self._regions[one] for one in ([name] if name else sorted(self._regions))]

    def read(self, place: Place) -> bytes:
        """The bytes of a place. Raises InputError, NotFound, TooLarge."""
        if place.byte_size > self._max_bytes:
            raise TooLarge(
                f"an input of {place.byte_size} bytes in {place.region!r:.80} is larger than this server ever takes: "
                f"{self._max_bytes >> 20} MB; send fewer images at a time"
            )
        with self._lock:
            region = self._within(place)
            content = os.pread(region.file, place.byte_size, region.offset + place.offset)
        if len(content) != place.byte_size:
            raise InputError(f"shared memory region {region.name!r:.80} has become smaller than what was registered")
        return content

    def write(self, place: Place, content: bytes) -> None:
        """Put an output into its place. Raises InputError where it does not fit."""
        if len(content) > place.byte_size:
            raise InputError(
                f"an output of {len(content)} bytes does not fit into {place.byte_size} bytes of {place.region!r:.80}"
            )
        with self._lock:
            region = self._within(place)
            if os.fstat(region.file).st_size < region.offset + place.offset + len(content):
                raise InputError(
                    f"shared memory region {region.name!r:.80} has become smaller than what was registered"
                )
            os.pwrite(region.file, content, region.offset + place.offset)

    def _within(self, place: Place) -> Region:
        region = self._regions.get(place.region)
        if region is None:
            raise NotFound(f"there is no shared memory region {place.region!r:.80}; register it first")
        if place.offset + place.byte_size > region.byte_size:
            raise InputError(
                f"{place.byte_size} bytes at {place.offset} reach beyond region {region.name!r:.80} of {region.byte_size}"
            )
        return region
