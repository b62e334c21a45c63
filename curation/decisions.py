"""What became of every image, and why: the record that a curation leaves, one row an image.

name,decision,stage,reason,of,score
a.jpg,kept,,,,
b.jpg,dropped,embedding,near-duplicate,a.jpg,0.9312
"""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from curation.folder import replacing

FIELDS = ("name", "decision", "stage", "reason", "of", "score")


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of one image."""

    decision: Literal["kept", "dropped"]
    stage: str = ""
    """The stage that decided: filter, hash, embedding, evaluation, retrieval, balance."""
    reason: str = ""
    of: str = ""
    """Name of the image that speaks for or against it: the one it repeats, or the one that it was retrieved for."""
    score: float | None = None
    """Cosine to that image, or differing bits of the hashes."""


def save_decisions(path: Path, names: Sequence[str], decisions: Sequence[Decision]) -> None:
    """Write the record, whole or not at all."""
    with replacing(path) as scratch, scratch.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for name, one in zip(names, decisions, strict=True):
            score = "" if one.score is None else f"{one.score:.4f}"
            writer.writerow((name, one.decision, one.stage, one.reason, one.of, score))


def tally(decisions: Iterable[Decision]) -> dict[str, int]:
    """Images by what became of them: `kept`, and `dropped: STAGE` for each stage."""
    return dict(Counter("kept" if one.decision == "kept" else f"dropped: {one.stage}" for one in decisions))
