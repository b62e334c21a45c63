"""Perceptual hashes, and the exact search for those near to each other."""

import cv2
import numpy as np
import pytest

from curation.components import connected_components
from curation.hashes import PCA_SIDE, dct_hash, distances, pack, pairs_within, pca_hash, shrink
from tests.oracles.curation import components_of, hash_pairs


def picture(seed: int) -> np.ndarray:
    """A smooth random picture, uint8 [64, 64]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8)).astype(np.uint8)
    return cv2.resize(coarse, (64, 64), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("most", [0, 1, 3, 6])
def test_all_pairs_within_a_distance_are_found_and_no_others(most: int) -> None:
    rng = np.random.default_rng(most)
    hashes = rng.integers(0, 2**63, 60, dtype=np.uint64)
    near = hashes[:40] ^ np.array(
        [sum(1 << int(b) for b in rng.choice(64, rng.integers(0, 8), False)) for _ in range(40)], np.uint64
    )
    every = np.concatenate([hashes, near, hashes[:5]])
    wanted = hash_pairs(every.tolist(), most)
    found = {tuple(sorted(pair)) for block in pairs_within(every, most) for pair in block.tolist()}
    assert found <= wanted
    assert all(int(every[i] ^ every[j]).bit_count() <= most for i, j in found)
    joined = connected_components(len(every), pairs_within(every, most)).tolist()
    assert joined == components_of(len(every), list(wanted))


def test_many_equal_hashes_cost_a_chain_not_all_their_pairs() -> None:
    equal = np.zeros(100_000, np.uint64)
    assert sum(len(block) for block in pairs_within(equal, 4)) == len(equal) - 1


def test_no_hashes_give_no_pairs() -> None:
    assert list(pairs_within(np.empty(0, np.uint64), 3)) == []


def test_a_recompressed_or_shrunk_picture_keeps_its_dct_hash_within_a_few_bits() -> None:
    for seed in range(20):
        image = picture(seed)
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 30])[1]
        again = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)
        small = cv2.resize(cv2.resize(image, (24, 24), interpolation=cv2.INTER_AREA), (64, 64))
        for altered in (again, small):
            assert int(dct_hash(image) ^ dct_hash(altered)).bit_count() <= 10
    strangers = [int(dct_hash(picture(seed)) ^ dct_hash(picture(seed + 1))).bit_count() for seed in range(100, 140)]
    assert min(strangers) > 10


def test_the_pca_hash_of_a_set_is_the_same_each_time_and_near_for_near_pictures() -> None:
    images = [picture(seed) for seed in range(200)]
    brighter = [cv2.convertScaleAbs(image, alpha=0.8, beta=10) for image in images[:50]]
    shrunk = np.stack([shrink(image) for image in images + brighter])
    assert shrunk.shape[1:] == (PCA_SIDE, PCA_SIDE)
    hashes = pca_hash(shrunk)
    assert np.array_equal(hashes, pca_hash(shrunk))
    assert np.median(distances(hashes[:50], hashes[200:])) <= 2
    assert np.median(distances(hashes[:100], hashes[100:200])) > 16


def test_bits_are_packed_without_loss() -> None:
    bits = np.random.default_rng(0).random((10, 64)) > 0.5
    assert [int(word).bit_count() for word in pack(bits)] == bits.sum(axis=1).tolist()
