"""Whatever `--data` names in, its test images out, for those who look at images and not at what is true of them.

Most sets are read by `data.datasets`. Some benchmarks are laid out so that only the evaluator that measures on them knows where their
images lie.
"""

from collections.abc import Callable

from data.datasets import Dataset
from evaluators.copies import copydays_at, open_copydays
from evaluators.depth_benchmarks import BENCHMARKS as DEPTH_BENCHMARKS
from evaluators.landmarks import landmarks_at, open_landmarks
from evaluators.rgbd import open_depth
from evaluators.segmentation_data import BENCHMARKS as MASK_BENCHMARKS
from evaluators.segmentation_data import open_masks
from evaluators.splits import open_splits
from evaluators.video_data import open_videos
from evaluators.video_frames import open_actions


def images_to_test(data: str) -> Dataset:
    """The test images of a set; of landmarks the database, of copies the originals, of videos their frames. Raises InputError."""
    if (landmarks := landmarks_at(data)) is not None:
        return open_landmarks(landmarks, crop_queries=False)[1]
    if (copies := copydays_at(data)) is not None:
        return open_copydays(copies)["original"]
    opened = _BY_NAME.get(data.partition(":")[0]) if ":" in data else None
    return opened(data) if opened else open_splits(data).val


def _test_part(dataset: Dataset) -> Dataset:
    """What is not for training."""
    return dataset.subset(row for row, item in enumerate(dataset.items) if item.split != "train")


_BY_NAME: dict[str, Callable[[str], Dataset]] = {
    **dict.fromkeys(DEPTH_BENCHMARKS, lambda data: open_depth(data).splits.val),
    **dict.fromkeys(MASK_BENCHMARKS, lambda data: _test_part(open_masks(data, "classes").dataset)),
    **dict.fromkeys(("davis", "davis2017"), lambda data: open_videos(data).dataset),
    "ucf101": lambda data: _test_part(open_actions(data, n_frames=1)),
}
"""Prefix of `--data` to what finds the images behind it."""
