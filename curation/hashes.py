"""Shrunken images in, pairs that look the same at a glance out: perceptual hashes of 64 bits and their Hamming distance.

Two hashes: the signs of the lowest DCT coefficients (as "pHash"), and the signs along the principal components of the set itself (a PCA
hash, as LVD-142M's first pass; Oquab et al. 2023, section 3). All pairs within a distance are found exactly.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import cv2
import numpy as np

BITS = 64
_DCT_SIDE = 32
PCA_SIDE = 16
_BLOCK_ROWS = 65_536
_BLOCK_PAIRS = 2_000_000
HashKind = Literal["dct", "pca"]


def dct_hash(gray_HW: np.ndarray) -> np.uint64:
    """Which of the 64 lowest DCT coefficients of an image (without the mean) lie above their median."""
    shrunk = cv2.resize(gray_HW, (_DCT_SIDE, _DCT_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(shrunk)[:9, :9].flatten()[1 : BITS + 1]
    return pack(low[None] > np.median(low))[0]


def shrink(gray_HW: np.ndarray) -> np.ndarray:
    """What a PCA hash looks at: 16 x 16 shades, uint8."""
    return cv2.resize(gray_HW, (PCA_SIDE, PCA_SIDE), interpolation=cv2.INTER_AREA)


def pca_hash(shrunk_nHW: np.ndarray) -> np.ndarray:
    """uint64 [n]: the side of the mean on which an image lies, along each of the set's 64 main directions of shading.

    `shrunk_nHW` are uint8 [n, 16, 16]; they are read a block at a time.
    """
    blocks = [shrunk_nHW[start : start + _BLOCK_ROWS] for start in range(0, len(shrunk_nHW), _BLOCK_ROWS)]
    mean_P = sum(_contrasts(block).sum(axis=0, dtype=np.float64) for block in blocks) / max(len(shrunk_nHW), 1)
    covariance_PP = np.zeros((PCA_SIDE**2, PCA_SIDE**2))
    for block in blocks:
        centred = _contrasts(block) - mean_P
        covariance_PP += centred.T @ centred
    directions_PB = np.linalg.eigh(covariance_PP)[1][:, ::-1][:, :BITS]
    # eigh leaves signs open; the largest entry of each direction decides, so that equal sets give equal hashes
    directions_PB = directions_PB * np.sign(directions_PB[np.abs(directions_PB).argmax(axis=0), np.arange(BITS)])
    return np.concatenate([pack((_contrasts(block) - mean_P) @ directions_PB > 0) for block in blocks])


def _contrasts(shrunk_nHW: np.ndarray) -> np.ndarray:
    """Shades [n, P] of mean 0 and deviation 1 within each image."""
    shades_nP = shrunk_nHW.reshape(len(shrunk_nHW), -1).astype(np.float32)
    shades_nP -= shades_nP.mean(axis=1, keepdims=True)
    return shades_nP / np.maximum(shades_nP.std(axis=1, keepdims=True), 1e-6)


def pack(bits_nB: np.ndarray) -> np.ndarray:
    """64 bits a row as uint64 [n]."""
    return np.packbits(bits_nB, axis=1).view(np.uint64).reshape(-1)


def distances(a_E: np.ndarray, b_E: np.ndarray) -> np.ndarray:
    """Differing bits of each pair, int [E]."""
    return np.bitwise_count(a_E ^ b_E).astype(np.int64)


def pairs_within(hashes_n: np.ndarray, max_distance: int) -> Iterator[np.ndarray]:
    """Edges [E, 2] that join all pairs of hashes at most `max_distance` bits apart, each unequal pair once; exact.

    Of d + 1 parts of two hashes that differ in d bits at least one is equal (pigeonhole), so only hashes that share a part are compared.
    Equal hashes are joined in a chain, which connects them as well as all their pairs would.
    """
    if not len(hashes_n):
        return
    order = np.argsort(hashes_n, kind="stable")
    equal = hashes_n[order][1:] == hashes_n[order][:-1]
    yield np.stack([order[:-1][equal], order[1:][equal]], axis=1)
    first = order[np.concatenate([[True], ~equal])]
    unique = hashes_n[first]
    edges = np.linspace(0, BITS, max_distance + 2).astype(int)
    for low, high in pairwise(edges.tolist()):
        mask = np.uint64(((1 << (high - low)) - 1) << low)
        for pairs_E2 in _pairs_of_equal(unique & mask):
            near = distances(unique[pairs_E2[:, 0]], unique[pairs_E2[:, 1]]) <= max_distance
            yield first[pairs_E2[near]]


def _pairs_of_equal(values_n: np.ndarray) -> Iterator[np.ndarray]:
    """All pairs of places with equal values, in blocks of bounded size."""
    order = np.argsort(values_n, kind="stable")
    ordered = values_n[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.append(starts[1:], len(ordered))
    group_end = np.repeat(ends, ends - starts)
    # place i is paired with the places after it in its group
    later = group_end - np.arange(len(ordered)) - 1
    start = 0
    totals = np.cumsum(later)
    while start < len(ordered):
        done = totals[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(totals, done + _BLOCK_PAIRS, side="right")))
        counts = later[start:stop]
        left = np.repeat(np.arange(start, stop), counts)
        offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        if len(left):
            yield np.stack([order[left], order[left + 1 + offset]], axis=1)
        start = stop
