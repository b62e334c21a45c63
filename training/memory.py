"""How this process takes memory from the system while it trains on a CPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_LARGEST_INT = 2**31 - 1
_TOP_PAD = 256 * 2**20


def keep_freed_memory() -> bool:
    """Keep freed memory for the next step instead of returning it; True where the C library can (glibc's mallopt).

    Activations of tens of megabytes are otherwise mapped and unmapped at each operation, and the system zeroes every page anew; see
    `benchmarks/training.py`. Peak memory grows by some percent.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST_INT), (_M_TOP_PAD, _TOP_PAD))
    return all(mallopt(name, value) == 1 for name, value in settings)
