"""What the commands of this room share: where images come from, what embeds them, who works, and what is left behind."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import faiss
import torch

from curation.decisions import Decision, save_decisions, tally
from curation.filters import load_hook
from curation.folder import Folder, Stage, replacing
from curation.images import embed
from curation.report import Example, Histogram, Report
from curation.workers import Workers, make_workers
from curation.write import can_be_listed, save_list, save_shards
from data.datasets import Dataset
from data.errors import InputError

EmbedRows = Callable[[Dataset, Sequence[int]], Stage]


@dataclass(frozen=True, kw_only=True)
class CurationOptions:
    """What is curated, by what, and where it goes."""

    ckpt: str
    """The network whose embeddings are compared: anything that evaluators take as `--ckpt`."""
    data: str
    """The images: a folder, a CSV, tar shards, a packed set, or several joined by commas."""
    out: Path
    """Folder for the curated list (kept.csv or shards/), decisions.csv, report.html and the stages; the same command goes on there."""
    split: str | None = None
    """Use only the rows of this split."""
    form: Literal["auto", "csv", "shards"] = "auto"
    """`csv`: a list of paths; `shards`: tar files with the images; `auto`: a list where every image is a file of its own."""
    blur: str | None = None
    """MODULE:FUNCTION of yours that returns boxes (left, top, right, bottom) to blur in written images, faces say; wants shards."""
    device: str = "auto"
    """Where the network runs: auto, cpu, cuda."""
    threads: int | None = None
    """CPU threads; with --ray, of each worker."""
    ray: str | None = None
    """Address of a Ray cluster, or `local` to start one here; all its machines must see the data and --out."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads {self.threads}: wanted at least 1")
        if self.blur is not None and self.form == "csv":
            raise InputError("--blur changes images, which a list cannot; use --form shards")


def opened(options: CurationOptions) -> tuple[Folder, Workers, EmbedRows]:
    """The output folder, the workers, and the function that embeds rows of a data set as a stage."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
        faiss.omp_set_num_threads(options.threads)
    load_hook(options.blur, "--blur")
    folder, workers = Folder(options.out), make_workers(options.ray, options.threads)

    def embedding(dataset: Dataset, rows: Sequence[int]) -> Stage:
        return embed(dataset, rows, options.ckpt, options.device, options.threads, folder, workers)

    return folder, workers, embedding


def close(
    options: CurationOptions,
    dataset: Dataset,
    decisions: Sequence[Decision],
    title: str,
    settings: Mapping[str, object],
    histograms: Sequence[Histogram],
    sections: Mapping[str, Sequence[Example]],
) -> None:
    """Write what was decided: the record, the curated images or their list, the summary and the page."""
    rows = [row for row, one in enumerate(decisions) if one.decision == "kept"]
    if not rows:
        raise InputError(
            f"{dataset.name}: nothing is left of {len(decisions)} images; loosen the filters or thresholds"
        )
    save_decisions(options.out / "decisions.csv", [item.name for item in dataset.items], decisions)
    listed = options.form == "csv" or (options.form == "auto" and options.blur is None and can_be_listed(dataset, rows))
    if listed:
        written = save_list(options.out, dataset, rows)
    else:
        find_boxes = load_hook(options.blur, "--blur")
        written = save_shards(Folder(options.out), dataset, rows, dataset.fingerprint(), find_boxes, options.blur)
    counts = {"images": len(decisions), **tally(decisions)}
    summary = {"title": title, "counts": counts, "settings": dict(settings), "curated": written.name}
    _save_text(options.out / "summary.json", json.dumps(summary, indent=1, default=str) + "\n")
    _save_text(options.out / "report.html", Report(title, counts, settings, histograms, sections).to_html())
    for name, count in counts.items():
        print(f"{name:<24}{count:>10,}")
    print(written)


def _save_text(target: Path, text: str) -> None:
    with replacing(target) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="replace")
