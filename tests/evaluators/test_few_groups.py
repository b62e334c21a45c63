"""Intervals where the test part is of a few groups: of one group all resamples are alike, and would give an interval of no width."""

from collections.abc import Callable

import numpy as np
import pytest

from evaluators import attention, copies, depth_scores, knn, linear, logistic, retrieval, ridge
from evaluators import video_objects as videos
from evaluators.bootstrap import drawn_groups
from evaluators.depth_probe import DepthTable
from evaluators.depth_protocol import DepthSpec
from evaluators.extract import FeatureTable
from evaluators.results import Measurement

N = 24
RNG = np.random.default_rng(0)
NOTE = "the test part is of 2 groups only: intervals are over its single items, and too narrow"


def table(name: str, groups: list[str]) -> FeatureTable:
    """Two classes that overlap."""
    labels = np.arange(N) % 2
    features = RNG.normal(size=(N, 4)) + labels[:, None]
    names = tuple(f"{name}{row}" for row in range(N))
    return FeatureTable(names, tuple(map(str, labels)), tuple(groups), {"embedding": features.astype(np.float32)})


TRAIN = table("train", [str(row) for row in range(N)])
TEST = table("test", [f"film{row % 2}" for row in range(N)])
TIED = np.arange(N) % 2


def attended() -> Measurement:
    rows = tuple(range(N))
    jaccards = tuple(RNG.random((1, 2)) for _ in rows)
    kept = np.zeros((N, 2, 1, 1), np.uint8)
    return attention.evaluate(
        attention.Overlaps(TEST.names, rows, TEST.groups, jaccards, kept, 0, {}), attention.AttentionSpec()
    )


def deep() -> Measurement:
    test = DepthTable(TEST.names, TEST.groups, RNG.random((N, 1, 1)), RNG.random((N, 1)), [np.ones((2, 2))] * N)
    maps = (np.full((2, 2), 1 + RNG.random()) for _ in range(N))
    return depth_scores.score(maps, test, DepthSpec(), protocol="", selected_on="", chosen={}, grid=[])


def followed() -> Measurement:
    films = [videos.Followed(name, (1, 2, 3), (), RNG.random((3, 4)), RNG.random((3, 4))) for name in "ab"]
    return videos.evaluate(films, videos.VideoObjectsSpec())


CASES: dict[str, Callable[[], Measurement]] = {
    "knn": lambda: knn.evaluate(TRAIN, TEST, knn.KnnSpec(k=(3,), n_per_class=(5,))),
    "linear": lambda: linear.evaluate(TRAIN, TEST, linear.LinearSpec(lr=(0.01,), epochs=1, min_steps=5)),
    "logistic": lambda: logistic.evaluate(TRAIN, TEST, logistic.LogisticSpec(C=(0.1, 1.0))),
    "ridge": lambda: ridge.evaluate(TRAIN, TEST),
    "retrieval": lambda: retrieval.evaluate(TEST, [str(label) for label in TEST.labels]),
    "copies": lambda: copies.evaluate_pairs(TEST, TEST.groups),
    "attention": attended,
    "depth": deep,
    "video_objects": followed,
}


@pytest.mark.parametrize("evaluator", CASES)
def test_items_are_drawn_where_there_are_too_few_groups_and_the_result_says_so(evaluator: str) -> None:
    found = CASES[evaluator]()
    assert NOTE in found.notes
    low, high = found.metrics[found.headline].ci95 or (0, 0)
    assert low < found.metrics[found.headline].value < high
    assert len(np.unique(found.predictions["groups"])) == len(found.predictions["names"]), "comparisons draw the same"


def test_from_five_groups_on_these_are_drawn_as_a_whole() -> None:
    groups, notes = drawn_groups(["e", "a", "b", "c", "d", "a"])
    assert (groups.tolist(), notes) == ([4, 0, 1, 2, 3, 0], [])
    groups, notes = drawn_groups(["a", "b", "c", "d", "a"])
    assert (groups.tolist(), len(notes)) == ([0, 1, 2, 3, 4], 1)


def test_a_few_items_that_stand_for_themselves_are_no_groups() -> None:
    assert drawn_groups(["a", "b"])[1] == []


def test_the_altered_images_of_one_original_are_drawn_one_by_one() -> None:
    originals = FeatureTable(("2000.jpg", "x"), (None,) * 2, ("", ""), {"embedding": np.eye(2, dtype=np.float32)})
    names = tuple(f"2000{n}.jpg" for n in range(6))
    features = np.array([[1, 0]] * 3 + [[0, 1]] * 3, np.float32)
    strong = FeatureTable(names, (None,) * 6, names, {"embedding": features})
    found = copies.evaluate_copydays(originals, {"strong": strong})
    low, high = found.metrics["map_strong"].ci95 or (0, 0)
    assert low < high
    assert any(note.startswith("strong: the test part is of 1 group only") for note in found.notes)
