"""`run.html` in the run folder: how the run goes, on one page that needs nothing else, written anew at each save.

Curves of all that is logged, warnings, what the teacher sees in the same images over time, and the recipe.
"""

import html
import json
from collections.abc import Mapping
from typing import Any

import cv2

from evaluators.page import chart, page, picture, short
from training.curves import History
from training.picture import Album
from training.run_folder import RunFolder
from training.run_log import left_words

GROUPS: dict[str, tuple[str, ...]] = {
    "Loss and its terms, in nats": ("loss", "dino_local", "dino_global", "ibot", "koleo"),
    "k-NN top-1 of the teacher": ("knn_top1",),
    "Entropy of targets and predictions, in nats": (
        "target_entropy_nats",
        "ibot_target_entropy_nats",
        "student_entropy_nats",
    ),
    "KL of the student from the teacher, in nats": ("kl_nats",),
    "Prototypes used": ("prototypes_used", "ibot_prototypes_used"),
    "Effective rank of features": ("effective_rank",),
    "Spread of features": ("feature_spread", "patch_spread"),
    "Norm of the centre": ("center_norm", "ibot_center_norm"),
    "Gradient norms": ("grad_norm", "grad_norm_backbone", "grad_norm_dino_head", "grad_norm_ibot_head"),
    "Learning rate": ("lr",),
    "Weight decay": ("weight_decay",),
    "Momentum of the teacher": ("momentum",),
    "Temperature of the teacher": ("teacher_temperature",),
    "Images a second": ("images_per_s",),
    "Share of time: model FLOPs (MFU), waiting for data": ("mfu", "data_wait"),
    "Peak memory, in GB": ("peak_memory_gb",),
}
"""What is drawn together; numbers that are in none of these get a chart of their own."""
NOT_DRAWN = ("time_left_s", "freeze_last_layer")
SHOWN_NOTES = 20
STRIP = 6
"""Earlier pictures that are shown small, spread evenly over those that are kept."""


class RunPage:
    """The page of a run folder; keeps what it has read of the log."""

    def __init__(self, folder: RunFolder, resolved: Mapping[str, Any], steps: int, album: Album) -> None:
        self.folder, self.resolved, self.steps, self.album = folder, resolved, steps, album
        self.history = History(folder.log)

    def write(self, step: int) -> None:
        """Write the page as of now, `step` steps being done, atomically."""
        self.history.update()
        title = f"{self.resolved['name']}, {self.folder.path.name}"
        body = [
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="soft">step {step:,} of {self.steps:,}; data {html.escape(self.resolved["source"])}; seed {self.resolved["seed"]}; '
            f"code {html.escape(self.resolved['revision'][:12] or 'not from a checkout')}</p>",
            f'<div class="bar"><div style="width:{100 * step / max(self.steps, 1):.1f}%"></div></div>',
            self._tiles(),
            self._notes(),
            self._pictures(),
            f'<h2>Curves over steps</h2><div class="charts">{self._charts()}</div>',
            f"<details><summary>Recipe</summary><pre>{html.escape(json.dumps(self.resolved, indent=1))}</pre></details>",
        ]
        self.folder.write_text("run.html", page(title, body))

    def _tiles(self) -> str:
        last, curves = self.history.last, self.history.curves
        shown = {
            "loss": short(curves["loss"].last) if "loss" in curves else None,
            "k-NN top-1": f"{100 * curves['knn_top1'].last:.1f} %" if "knn_top1" in curves else None,
            "images/s": short(last["images_per_s"]) if "images_per_s" in last else None,
            "MFU": f"{100 * last['mfu']:.0f} %" if "mfu" in last else None,
            "data wait": f"{100 * last['data_wait']:.0f} %" if "data_wait" in last else None,
            "peak memory": f"{last['peak_memory_gb']:.1f} GB" if "peak_memory_gb" in last else None,
            "time left": left_words(last["time_left_s"]) if last.get("time_left_s") is not None else None,
        }
        tiles = "".join(f"<div><b>{value}</b><span>{key}</span></div>" for key, value in shown.items() if value)
        return f'<div class="tiles">{tiles}</div>'

    def _notes(self) -> str:
        notes = self.history.notes
        if not notes:
            return ""
        lines = "".join(f"<li>step {step:,}: {html.escape(text)}</li>" for step, text in notes[-SHOWN_NOTES:][::-1])
        more = f"; the latest {SHOWN_NOTES} of {len(notes)}, all are in log.jsonl" if len(notes) > SHOWN_NOTES else ""
        return f'<h2>Warnings{more}</h2><ul class="notes">{lines}</ul>'

    def _charts(self) -> str:
        curves = self.history.curves
        groups = {title: [name for name in names if name in curves] for title, names in GROUPS.items()}
        placed = {name for names in groups.values() for name in names}
        groups |= {name: [name] for name in curves if name not in placed and name not in NOT_DRAWN}
        return "".join(
            chart(title, {name: curves[name].xy for name in names}, ends={name: curves[name].last for name in names})
            for title, names in groups.items()
            if names
        )

    def _pictures(self) -> str:
        steps = self.album.steps()
        if not steps:
            return ""
        whose = "held out" if self.album.held_out else "of the training data: no other set was given"
        parts = [f'<h2>What the teacher sees <span class="soft">(images {whose})</span></h2>']
        parts.append('<div class="wide">')
        captions = {
            "pca": "three principal components of the patches as red, green, blue",
            "attention": "attention of each head in the last block",
        }
        for kind, words in captions.items():
            if (shown := inline(self.album, steps[-1], kind, 1440)) is not None:
                parts.append(f"<figure><figcaption>Step {steps[-1]:,}: {words}</figcaption>{shown}</figure>")
        parts.append("</div>")
        earlier = steps[:-1]
        chosen = sorted({earlier[round(i * (len(earlier) - 1) / (STRIP - 1))] for i in range(STRIP)}) if earlier else []
        figures = [
            f"<figure><figcaption>Step {step:,}</figcaption>{shown}</figure>"
            for step in chosen
            if (shown := inline(self.album, step, "pca", 480)) is not None
        ]
        if figures:
            parts.append(f'<div class="strip">{"".join(figures)}</div>')
        return "".join(parts)


def inline(album: Album, step: int, kind: str, width_px: int) -> str | None:
    """A picture as an element that holds it, at most so wide; None where there is none."""
    path = album.path(step, kind)
    image = cv2.imread(str(path)) if path.is_file() else None  # OpenCV complains on stderr of one that is not there
    words = {"pca": "principal components of patches", "attention": "attention maps"}[kind]
    return None if image is None else picture(image, f"{words} at step {step}", width_px)
