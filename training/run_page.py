"""`run.html` in the run folder: how the run goes, on one page that needs nothing else, written anew at each save.

Curves of all that is logged, warnings, what the teacher sees in the same images over time, and the recipe.
"""

import base64
import html
import json
from collections.abc import Mapping
from typing import Any

import cv2

from training.curves import History, chart, short
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
STYLE = """
:root{color-scheme:light dark;--text:#1c2024;--soft:#5d6670;--line:#d9dee3;--back:#f6f7f9;--card:#fff;--warn:#9a3b00;
--c0:#2463c9;--c1:#c2410c;--c2:#15803d;--c3:#9333ea;--c4:#b8860b;--c5:#be185d}
@media(prefers-color-scheme:dark){:root{--text:#e6e9ec;--soft:#9aa5b1;--line:#343b43;--back:#14171a;--card:#1d2125;--warn:#ffab70;
--c0:#6ea8fe;--c1:#fb923c;--c2:#4ade80;--c3:#c084fc;--c4:#facc15;--c5:#f472b6}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1500px;padding:16px;font:15px/1.45 system-ui,sans-serif;color:var(--text);background:var(--back)}
h1{font-size:1.35rem;margin:0}h2{font-size:1.05rem;margin:28px 0 10px}p{margin:4px 0}.soft{color:var(--soft)}
.bar{height:6px;border-radius:3px;background:var(--line);margin:10px 0 14px;overflow:hidden}.bar div{height:100%;background:var(--c0)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(105px,1fr));gap:8px}
.tiles div,figure,details,.notes{background:var(--card);border:1px solid var(--line);border-radius:8px}
.tiles div{padding:8px 10px}
.tiles b{display:block;font-size:1.1rem;font-variant-numeric:tabular-nums}.tiles span{color:var(--soft);font-size:.8rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:10px}
figure{margin:0;padding:10px;min-width:0}figcaption{font-weight:600;font-size:.88rem;margin-bottom:4px}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font-size:11px}.grid{stroke:var(--line)}
polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px;font-size:.78rem;color:var(--soft)}
.legend i{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:4px}.legend b{color:var(--text)}
img{display:block;max-width:100%;height:auto;border-radius:4px}.wide{display:flex;flex-wrap:wrap;align-items:flex-start;gap:10px;margin-bottom:10px}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:10px}
.notes{padding:8px 12px 8px 30px;margin:0;color:var(--warn)}details{padding:10px;margin-top:10px}summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font-size:.8rem;margin:8px 0 0}
"""
COLOURS = "".join(
    f"polyline.c{i}{{stroke:var(--c{i})}}circle.c{i}{{fill:var(--c{i})}}i.c{i}{{background:var(--c{i})}}"
    for i in range(6)
)


class RunPage:
    """The page of a run folder; keeps what it has read of the log."""

    def __init__(self, folder: RunFolder, resolved: Mapping[str, Any], steps: int, album: Album) -> None:
        self.folder, self.resolved, self.steps, self.album = folder, resolved, steps, album
        self.history = History(folder.log)

    def write(self, step: int) -> None:
        """Write the page as of now, `step` steps being done, atomically."""
        self.history.update()
        name = html.escape(f"{self.resolved['name']}, {self.folder.path.name}")
        body = [
            f"<h1>{name}</h1>",
            f'<p class="soft">step {step:,} of {self.steps:,}; data {html.escape(self.resolved["source"])}; seed {self.resolved["seed"]}; '
            f"code {html.escape(self.resolved['revision'][:12] or 'not from a checkout')}</p>",
            f'<div class="bar"><div style="width:{100 * step / max(self.steps, 1):.1f}%"></div></div>',
            self._tiles(),
            self._notes(),
            self._pictures(),
            f'<h2>Curves over steps</h2><div class="charts">{self._charts()}</div>',
            f"<details><summary>Recipe</summary><pre>{html.escape(json.dumps(self.resolved, indent=1))}</pre></details>",
        ]
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{name}</title><style>{STYLE}{COLOURS}</style></head><body>{''.join(body)}</body></html>\n"
        )
        self.folder.write_text("run.html", page)

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
        return "".join(chart(title, {name: curves[name] for name in names}) for title, names in groups.items() if names)

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
            if (picture := inline(self.album, steps[-1], kind, 1440)) is not None:
                parts.append(f"<figure><figcaption>Step {steps[-1]:,}: {words}</figcaption>{picture}</figure>")
        parts.append("</div>")
        earlier = steps[:-1]
        chosen = sorted({earlier[round(i * (len(earlier) - 1) / (STRIP - 1))] for i in range(STRIP)}) if earlier else []
        figures = [
            f"<figure><figcaption>Step {step:,}</figcaption>{picture}</figure>"
            for step in chosen
            if (picture := inline(self.album, step, "pca", 480)) is not None
        ]
        if figures:
            parts.append(f'<div class="strip">{"".join(figures)}</div>')
        return "".join(parts)


def inline(album: Album, step: int, kind: str, width_px: int) -> str | None:
    """A picture as an element that holds it, at most so wide; None where there is none."""
    picture = cv2.imread(str(album.path(step, kind)))
    if picture is None:
        return None
    height, width = picture.shape[:2]
    if width > width_px:
        picture = cv2.resize(picture, (width_px, round(height * width_px / width)), interpolation=cv2.INTER_AREA)
    done, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert done, "JPEG holds any uint8 picture"
    data = base64.b64encode(encoded.tobytes()).decode()
    words = {"pca": "principal components of patches", "attention": "attention maps"}[kind]
    return f'<img alt="{words} at step {step}" src="data:image/jpeg;base64,{data}">'
