"""Pictures of a report, as markup: what is confused, what is found, and what evaluators drew."""

import html
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.datasets import Dataset, open_dataset
from data.errors import InputError
from evaluators.copies import copydays_at, open_copydays
from evaluators.landmarks import landmarks_at, open_landmarks
from evaluators.page import picture
from evaluators.report_groups import Found
from evaluators.video_frames import CLIP, VideoFrames, open_actions

THUMB_PX = 78
CONFUSED_PAIRS, EXAMPLES = 8, 5
QUERIES, NEIGHBOURS = 6, 8
PICTURE_PX = 1400
COLUMNS = {
    "attention": "image, its objects, the best head's attention, the patches that it keeps",
    "depth": "image, measured and predicted depth (near is bright)",
    "segmentation": "image, true and predicted classes",
    "video_objects": "the objects as given, where they are in a late frame, where they were found",
}
"""What stands side by side in the pictures of an evaluator."""


class Thumbnails:
    """Small pictures of a result's images by name, as long as the data is where it was; names alone otherwise."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        try:
            sets = images_behind(result)
        except InputError:
            sets = ()
        self.places = [{_shown_name(one, row): (one, row) for row in range(len(one))} for one in sets]

    def figure(self, name: str, kind: str, words: str = "") -> str:
        """A thumbnail with its caption; `kind` is the class of its frame, `query` where an image searched others."""
        image, places = "", self.places[-1 if kind == "query" else 0] if self.places else {}
        if name in places:
            dataset, row = places[name]
            try:
                pixels = dataset.image(row)
                height, width = pixels.shape[:2]
                side = min(height, width)
                top, left = (height - side) // 2, (width - side) // 2
                square = cv2.resize(
                    pixels[top : top + side, left : left + side], (THUMB_PX, THUMB_PX), interpolation=cv2.INTER_AREA
                )
                image = picture(cv2.cvtColor(square, cv2.COLOR_RGB2BGR), name, THUMB_PX)
            except InputError:
                image = ""
        caption = html.escape(words or Path(name).name)
        return f'<figure class="{kind}" title="{html.escape(name)}">{image}<figcaption>{caption}</figcaption></figure>'


def _shown_name(dataset: Dataset, row: int) -> str:
    """A result speaks of videos, whose middle frame stands for them here."""
    item = dataset.items[row]
    return item.row[CLIP] if isinstance(dataset, VideoFrames) else item.name


def images_behind(result: Mapping[str, Any]) -> tuple[Dataset, ...]:
    """The images of a result, those that are searched before those that search them. Raises InputError."""
    source = result["data"]["source"]
    if (benchmark := landmarks_at(source)) is not None:
        return open_landmarks(benchmark, bool(result["settings"].get("queries_cropped")))[1:]
    if (root := copydays_at(source)) is not None:
        blocks = open_copydays(root)
        return tuple(blocks[name] for name in ("original", result["headline"].removeprefix("map_")) if name in blocks)
    if result["evaluator"] == "video_actions":
        return (open_actions(source, n_frames=1),)
    opened = open_dataset(source)
    return (opened,) if isinstance(opened, Dataset) else ()


def confusions(one: Found) -> str:
    """The pairs of classes most often taken for each other, with examples; empty for results without guesses of classes."""
    predictions = {} if one.scored is None else one.scored.predictions
    if not {"labels", "predicted", "classes", "names"} <= predictions.keys():
        return ""
    labels, predicted, classes = (predictions[key] for key in ("labels", "predicted", "classes"))
    if predicted.shape != labels.shape or not ((labels >= 0) & (labels < len(classes))).all():
        return ""
    pairs = Counter(
        (int(t), int(p)) for t, p in zip(labels, predicted, strict=True) if t != p and 0 <= p < len(classes)
    )
    if not pairs:
        return '<p class="soft">no test image was misclassified</p>'
    thumbnails, rows = Thumbnails(one.result), []
    for (truth, guess), count in pairs.most_common(CONFUSED_PAIRS):
        wrong = np.flatnonzero((labels == truth) & (predicted == guess))[:EXAMPLES]
        shown = "".join(thumbnails.figure(str(predictions["names"][row]), "miss") for row in wrong)
        of = int((labels == truth).sum())
        rows.append(
            f"<p><b>{html.escape(str(classes[truth]))}</b> taken for <b>{html.escape(str(classes[guess]))}</b>: {count} of {of}</p>"
            f'<div class="row">{shown}</div>'
        )
    return f"<details open><summary>{html.escape(one.label)}: most confused classes</summary>{''.join(rows)}</details>"


def retrievals(one: Found) -> str:
    """Queries from the worst to the best with what they find; empty for results that search nothing."""
    predictions = {} if one.scored is None else one.scored.predictions
    if not {"neighbours", "database", "names", "score"} <= predictions.keys():
        return ""
    names, database, neighbours = (predictions[key] for key in ("names", "database", "neighbours"))
    order = np.argsort(predictions["score"], kind="stable")
    picked = dict.fromkeys(int(order[round(i * (len(order) - 1) / max(QUERIES - 1, 1))]) for i in range(QUERIES))
    thumbnails, rows = Thumbnails(one.result), []
    for row in picked:
        strip = [thumbnails.figure(str(names[row]), "query", f"query, {predictions['score'][row]:.2f}")]
        for place, number in enumerate(neighbours[row][:NEIGHBOURS]):
            if 0 <= number < len(database):
                right = "relevant" in predictions and bool(predictions["relevant"][row][place])
                kind = ("hit" if right else "miss") if "relevant" in predictions else ""
                strip.append(thumbnails.figure(str(database[number]), kind))
        rows.append(f'<div class="row">{"".join(strip)}</div>')
    return (
        f"<details open><summary>{html.escape(one.label)}: what queries find, from the worst to the best (green: what they should)"
        f"</summary>{''.join(rows)}</details>"
    )


def file_picture(one: Found) -> str:
    """The picture that an evaluator wrote beside its result, if it is there."""
    name = one.result.get("picture_file")
    found = cv2.imread(str(one.path.parent / Path(name).name)) if isinstance(name, str) else None
    if found is None:
        return ""
    shown = picture(found, f"{one.result['evaluator']} of {one.label}", PICTURE_PX)
    columns = COLUMNS.get(one.result["evaluator"])
    words = f"{one.label}: {columns}" if columns else f"{one.label}: pictures"
    return f'<figure style="margin-top:10px"><figcaption>{html.escape(words)}</figcaption>{shown}</figure>'
