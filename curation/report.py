"""What a curation did, as one self-contained page: counts, histograms, and examples as thumbnails."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from data.datasets import Dataset
from data.errors import InputError

THUMB_PX = 96
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:1rem;color:#1b1b1f;background:#fff}
table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left}td.n{text-align:right}
.row{display:flex;flex-wrap:wrap;gap:.5rem;margin:.4rem 0 1.2rem}figure{margin:0;width:7rem}
figure img{width:6rem;height:6rem;object-fit:contain;background:#eee;border:3px solid #bbb}
figure.kept img{border-color:#18794e}figcaption{font-size:.72rem;overflow-wrap:anywhere;color:#555}
svg{max-width:100%;height:auto}.bar{fill:#3b6ea5}.mark{stroke:#b3261e;stroke-width:2}
"""


@dataclass(frozen=True)
class Picture:
    """A thumbnail: an image of a data set, and words below it."""

    dataset: Dataset
    row: int
    caption: str
    kept: bool = False


@dataclass(frozen=True)
class Example:
    """A row of thumbnails under a line of words."""

    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Histogram:
    """Counts between edges; `mark` is a threshold worth seeing."""

    title: str
    edges: Sequence[float]
    counts: Sequence[int]
    mark: float | None = None


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    title: str
    counts: Mapping[str, int]
    settings: Mapping[str, object]
    histograms: Sequence[Histogram] = field(default_factory=list)
    sections: Mapping[str, Sequence[Example]] = field(default_factory=dict)

    def to_html(self) -> str:
        """The page; nothing in it is fetched from elsewhere."""
        parts = [
            "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>",
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style><h1>{html.escape(self.title)}</h1>",
            _table("Images", {name: f"{count:,}" for name, count in self.counts.items()}),
            *(_svg(histogram) for histogram in self.histograms),
        ]
        for title, examples in self.sections.items():
            parts.append(f"<h2>{html.escape(title)}</h2>")
            parts += [_example(one) for one in examples] or ["<p>None.</p>"]
        parts.append(_table("Settings", {name: str(value) for name, value in self.settings.items()}))
        return "\n".join(parts) + "</html>\n"


def _table(title: str, rows: Mapping[str, str]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{html.escape(value)}</td></tr>" for name, value in rows.items()
    )
    return f"<h2>{html.escape(title)}</h2><table>{cells}</table>"


def _example(example: Example) -> str:
    figures = "".join(_figure(picture) for picture in example.pictures)
    return f"<p>{html.escape(example.title)}</p><div class=row>{figures}</div>"


def _figure(picture: Picture) -> str:
    caption = html.escape(picture.caption)
    kept = " class=kept" if picture.kept else ""
    source = thumbnail(picture.dataset, picture.row)
    image = f"<img src='{source}' alt='{caption}'>" if source else "<img alt='cannot be decoded'>"
    return f"<figure{kept}>{image}<figcaption>{caption}</figcaption></figure>"


def thumbnail(dataset: Dataset, row: int) -> str:
    """A small JPEG of an image as a data URL; empty for one that cannot be decoded."""
    try:
        image_HWC = dataset.image(row)
    except InputError:
        return ""
    height, width = image_HWC.shape[:2]
    scale = min(1.0, THUMB_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode()


def _svg(histogram: Histogram) -> str:
    width, height, base = 640, 200, 160
    edges, counts = np.asarray(histogram.edges, float), np.asarray(histogram.counts, float)
    top, span = max(counts.max(initial=0), 1), max(edges[-1] - edges[0], 1e-12)
    bars = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        x, wide = (low - edges[0]) / span * width, max((high - low) / span * width - 1, 1)
        tall = count / top * (base - 10)
        bars.append(
            f"<rect class=bar x={x:.1f} y={base - tall:.1f} width={wide:.1f} height={tall:.1f}>"
            f"<title>{low:.3g} to {high:.3g}: {int(count):,}</title></rect>"
        )
    if histogram.mark is not None:
        x = (histogram.mark - edges[0]) / span * width
        bars.append(f"<line class=mark x1={x:.1f} x2={x:.1f} y1=0 y2={base}><title>threshold</title></line>")
    labels = "".join(
        f"<text x={share * (width - 40):.0f} y=180 font-size=13>{edges[0] + share * span:.3g}</text>"
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    title = html.escape(histogram.title)
    return (
        f"<h2>{title}</h2><svg viewBox='0 0 {width} {height}' width={width} height={height} role=img aria-label='{title}'>"
        f"{''.join(bars)}{labels}</svg><p>Highest bar: {int(top):,}.</p>"
    )


def histogram_of(
    title: str, values: np.ndarray, low: float, high: float, bins: int = 40, mark: float | None = None
) -> Histogram:
    """A histogram of values between two bounds."""
    counts, edges = np.histogram(values, bins=bins, range=(low, high))
    return Histogram(title, edges.tolist(), counts.tolist(), mark)
