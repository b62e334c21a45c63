"""The images that travel with the repository: complete, small, readable, and free to pass on with their authors named."""

import csv
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from data.datasets import open_dataset
from data.decode import decode_image

MAX_BYTES = 5_000_000
CC_BY = {"CC-BY-2.0", "CC-BY-2.5", "CC-BY-3.0", "CC-BY-4.0"}
ALLOWED_LICENCES = {"CC0-1.0", "public domain"} | CC_BY
LICENCE_PAGES = {
    "CC0-1.0": ("https://creativecommons.org/publicdomain/zero/1.0/",),
    "public domain": (
        "https://creativecommons.org/publicdomain/mark/1.0/",
        "https://creativecommons.org/licenses/publicdomain/",
    ),
} | {licence: (f"https://creativecommons.org/licenses/by/{licence[-3:]}/",) for licence in CC_BY}


@pytest.fixture(scope="module")
def samples(repo_root: Path) -> Path:
    return repo_root / "samples"


@pytest.fixture(scope="module")
def rows(samples: Path) -> list[dict[str, str]]:
    with open(samples / "samples.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def notices(samples: Path) -> dict[str, str]:
    """The notice of each image in ATTRIBUTION.md, by the image's path."""
    lines = (samples / "ATTRIBUTION.md").read_text(encoding="utf-8").splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("- `images/")}


def test_the_columns_are_those_the_readers_and_the_licences_need(rows: list[dict[str, str]]) -> None:
    assert list(rows[0]) == ["path", "label", "split", "title", "author", "licence", "source"]
    assert [row for row in rows if not all(row.values())] == []


def test_the_list_and_the_folder_name_the_same_50_to_70_images(rows: list[dict[str, str]], samples: Path) -> None:
    listed = [row["path"] for row in rows]
    assert 50 <= len(listed) <= 70
    assert sorted(listed) == sorted(path.relative_to(samples).as_posix() for path in (samples / "images").rglob("*"))


def test_all_images_together_stay_under_five_megabytes(samples: Path) -> None:
    assert sum(path.stat().st_size for path in samples.rglob("*") if path.is_file()) <= MAX_BYTES


def test_every_image_decodes_at_a_size_worth_looking_at(rows: list[dict[str, str]], samples: Path) -> None:
    for row in rows:
        image_HWC = decode_image((samples / row["path"]).read_bytes())
        assert (image_HWC.dtype, image_HWC.shape[2]) == (np.uint8, 3), row["path"]
        assert 256 <= max(image_HWC.shape[:2]) <= 512, row["path"]
        assert image_HWC.std() > 10, row["path"]


def test_no_image_stands_twice_in_the_set(rows: list[dict[str, str]], samples: Path) -> None:
    assert len({(samples / row["path"]).read_bytes() for row in rows}) == len(rows)


def test_each_class_has_5_to_8_images_and_is_in_both_splits(rows: list[dict[str, str]]) -> None:
    splits_of = defaultdict(set)
    for row in rows:
        splits_of[row["label"]].add(row["split"])
    assert 8 <= len(splits_of) <= 10
    assert all(splits == {"train", "val"} for splits in splits_of.values())
    assert all(5 <= count <= 8 for count in Counter(row["label"] for row in rows).values())
    train_share = sum(row["split"] == "train" for row in rows) / len(rows)
    assert 0.6 <= train_share <= 0.8


def test_only_licences_that_let_everybody_pass_the_images_on(rows: list[dict[str, str]]) -> None:
    assert {row["licence"] for row in rows} <= ALLOWED_LICENCES


def test_the_attribution_names_each_image_with_author_licence_and_changes(
    rows: list[dict[str, str]], notices: dict[str, str]
) -> None:
    assert set(notices) == {row["path"] for row in rows}
    for row in rows:
        notice = notices[row["path"]]
        package, file = row["source"].split(": ", 1)
        for part in (
            f'"{row["title"]}" by {row["author"]}.',
            f"[{row['licence']}](",
            package,
            f"`{file}`",
            "Changes: ",
        ):
            assert part in notice, (row["path"], part)
        assert any(f"({page})" in notice for page in LICENCE_PAGES[row["licence"]]), row["path"]


def test_the_list_opens_as_a_data_set_with_both_splits(rows: list[dict[str, str]], samples: Path) -> None:
    train = open_dataset(samples / "samples.csv", split="train")
    val = open_dataset(samples / "samples.csv", split="val")
    assert len(train) + len(val) == len(rows)
    assert set(val.labels()) == set(train.labels())
    assert len(val.labels()) == len(val)
    assert val.image(0).ndim == 3
