"""The tab Train: watch a run folder of `python -m training` while it is written: curves, warnings, what the teacher sees.

Only folders below the one that the operator allowed can be chosen, by their names. Everything is read anew at each look, from the files
that a run keeps: log.jsonl, attention.png, pca.png.
"""

import html
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from data.decode import decode_image
from data.errors import InputError
from demo.parts import Parts

EVERY_S = 5.0
MAX_RUNS = 200
MAX_DEPTH = 3
"""Folders between the allowed one and a run."""
MAX_POINTS = 300
"""Of a curve; steps between are left out."""
MAX_LOG_BYTES = 256 << 20
SHOWN_NOTES = 12
CHARTS: dict[str, tuple[str, ...]] = {
    "Loss and its terms (nats)": ("loss", "dino_local", "dino_global", "ibot", "koleo"),
    "k-NN accuracy of the teacher": ("knn_top1",),
    "Entropy of targets and predictions (nats)": (
        "target_entropy_nats",
        "ibot_target_entropy_nats",
        "student_entropy_nats",
    ),
    "Prototypes used": ("prototypes_used", "ibot_prototypes_used"),
    "Spread of features: 1 is healthy, 0 is collapse": ("feature_spread", "patch_spread"),
    "Effective rank of features": ("effective_rank",),
    "KL of the student from the teacher (nats)": ("kl_nats",),
    "Learning rate": ("lr",),
}
"""What is drawn together."""
PICTURES = {"attention": "Attention of each head", "pca": "Patches by their principal components"}


@dataclass
class Log:
    """What log.jsonl holds."""

    name: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)


def find_runs(root: Path) -> list[str]:
    """Names of the run folders below the allowed one, the last written first."""
    found: list[tuple[float, str]] = []
    for depth in range(1, MAX_DEPTH + 1):
        for log in _globbed(root, "/".join(["*"] * depth) + "/log.jsonl"):
            if _is_inside(log, root) and len(found) < MAX_RUNS:
                found.append((log.stat().st_mtime, log.parent.relative_to(root).as_posix()))
    return [name for _, name in sorted(found, reverse=True)]


def _globbed(root: Path, pattern: str) -> Iterator[Path]:
    try:
        yield from root.glob(pattern)
    except OSError:
        return


def _is_inside(path: Path, root: Path) -> bool:
    """Whether a path leads to a file below the root, wherever its links point."""
    return path.is_file() and path.resolve().is_relative_to(root.resolve())


def read_log(path: Path) -> Log:
    """The lines of a log; one that is still being written, or was cut short, is left out."""
    log = Log()
    with path.open("rb") as file:
        size = path.stat().st_size
        if size > MAX_LOG_BYTES:  # the latest part of a very long run
            file.seek(size - MAX_LOG_BYTES)
            file.readline()
        for line in file:
            try:
                record = json.loads(line)
                if "start" in record:
                    log.name = str(record["start"].get("name", ""))
                elif "note" in record:
                    log.notes.append((int(record["note"]["step"]), str(record["note"]["text"])))
                elif "step" in record:
                    log.steps.append(record)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    return log


def curve_table(steps: list[dict[str, Any]], names: tuple[str, ...]) -> pd.DataFrame:
    """Rows (step, value, curve) of some quantities, thinned to MAX_POINTS each, the newest kept."""
    rows: list[tuple[int, float, str]] = []
    for name in names:
        points = [(one["step"], one[name], name) for one in steps if isinstance(one.get(name), int | float)]
        rows += points[:: -(len(points) // MAX_POINTS + 1)][::-1]
    return pd.DataFrame(rows, columns=["step", "value", "curve"])


def tiles(log: Log) -> str:
    """HTML: the last step in a few numbers."""
    if not log.steps:
        return "<p>The run has not taken a step yet.</p>"
    last = log.steps[-1]
    shown: dict[str, str] = {"recipe": log.name, "step": f"{last['step']:,}"}
    formats = {"loss": "{:.4f}", "images_per_s": "{:.1f}", "knn_top1": "{:.1%}", "feature_spread": "{:.2f}"}
    for name, text in formats.items():
        value = next((one[name] for one in reversed(log.steps) if isinstance(one.get(name), int | float)), None)
        if value is not None:
            shown[name.replace("_per_s", " a second").replace("_", " ")] = text.format(value)
    left = last.get("time_left_s")
    if isinstance(left, int | float):
        shown["time left"] = f"{left / 60:.1f} min" if left < 5400 else f"{left / 3600:.1f} h"
    inside = "".join(
        f"<div><b>{html.escape(value)}</b><span>{key}</span></div>" for key, value in shown.items() if value
    )
    return f'<div class="tiles">{inside}</div>'


def warnings(log: Log) -> str:
    """HTML: what the monitors of collapse said, the latest first."""
    if not log.notes:
        return '<p class="fine">The collapse monitors have nothing to warn of.</p>' if log.steps else ""
    lines = "".join(f"<li>step {step:,}: {html.escape(text)}</li>" for step, text in log.notes[-SHOWN_NOTES:][::-1])
    more = f", the latest {SHOWN_NOTES} of {len(log.notes)}" if len(log.notes) > SHOWN_NOTES else ""
    return f'<h3>Warnings{more}</h3><ul class="warnings">{lines}</ul>'


@dataclass(frozen=True)
class TrainTab:
    """What its events do."""

    root: Path

    def look(self, run: str | None, seen: str) -> tuple[Any, ...]:
        """Choice of runs, numbers, warnings, pictures and charts as they are now; what is unchanged since `seen` is left as it is."""
        runs = find_runs(self.root)
        run = run if run in runs else next(iter(runs), None)
        if run is None:
            words = (
                f"<p>There is no run below <code>{html.escape(self.root.name)}/</code> yet. It appears here by itself once you start "
                f"<code>python -m training --out {html.escape(self.root.name)}/NAME ...</code></p>"
            )
            return gr.Dropdown(choices=[], value=None), words, "", [], *(gr.skip() for _ in CHARTS), ""
        path = self.root / run / "log.jsonl"
        stamp = f"{run} of {sorted(runs)} {path.stat().st_mtime_ns}"
        if stamp == seen:
            return (*(gr.skip() for _ in range(4 + len(CHARTS))), seen)
        log = read_log(path)
        charts = [curve_table(log.steps, names) for names in CHARTS.values()]
        drawn = [gr.LinePlot(value=table, visible=len(table) > 0) for table in charts]
        # A list that somebody has open closes when it is sent again; a run that goes on does not change it.
        same = seen.rpartition(" ")[0] == stamp.rpartition(" ")[0]
        choice = gr.skip() if same else gr.Dropdown(choices=runs, value=run)
        return choice, tiles(log), warnings(log), self.pictures(run), *drawn, stamp

    def pictures(self, run: str) -> list[tuple[Any, str]]:
        """What the teacher sees, where the run has drawn it."""
        found = []
        for kind, title in PICTURES.items():
            path = self.root / run / f"{kind}.png"
            if _is_inside(path, self.root):
                try:
                    found.append((decode_image(path.read_bytes()), title))
                except (OSError, InputError):  # the run changes it at this moment
                    continue
        return found


def train_tab(parts: Parts) -> None:
    """The chosen run, looked at anew every few seconds."""
    with parts.tab("Train", "train", image=False):
        gr.Markdown("Watch a training run. The page looks again every few seconds.")
        run = gr.Dropdown([], label="Run", elem_id="run")
        numbers = gr.HTML(elem_id="run-numbers")
        told = gr.HTML(elem_id="run-warnings")
        charts = []
        with gr.Row(elem_id="charts"):
            for title in CHARTS:
                charts.append(
                    gr.LinePlot(
                        x="step", y="value", color="curve", title=title, height=260, min_width=320, visible=False
                    )
                )
        drawn = gr.Gallery(
            label="What the teacher sees", columns=2, object_fit="contain", height="auto", elem_id="run-pictures"
        )
        seen = gr.State("")
        tab = TrainTab(parts.runs)

        def look(looked_at: str, chosen: str | None, before: str) -> Any:
            return tab.look(chosen, before) if looked_at == "train" else gr.skip()

        gr.on(
            [parts.looked_at.change, run.input, gr.Timer(EVERY_S).tick],
            look,
            [parts.looked_at, run, seen],
            [run, numbers, told, drawn, *charts, seen],
            show_progress="hidden",
        )
