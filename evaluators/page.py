"""Pieces of pages that need nothing but themselves: style, charts as inline SVG, pictures as data, the frame around them."""

import base64
import html
import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 52, 10, 8, 22
"""Of a chart and its margins, in units of its own."""
N_COLOURS = 6
MAX_MARKED = 6
"""Up to so many different x on a logarithmic axis, each is marked itself."""
JPEG_QUALITY = 85
Points = Sequence[tuple[float, float]]
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
    for i in range(N_COLOURS)
)


def page(title: str, body: Sequence[str], style: str = "") -> str:
    """A whole page; `title` is text, `body` markup."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{COLOURS}{style}</style></head><body>{''.join(body)}</body></html>\n"
    )


def picture(bgr_HWC: np.ndarray, words: str, width_px: int) -> str:
    """An element that holds a picture, at most so wide; `words` for those who do not see it."""
    height, width = bgr_HWC.shape[:2]
    if width > width_px:
        size = (width_px, max(round(height * width_px / width), 1))
        bgr_HWC = cv2.resize(bgr_HWC, size, interpolation=cv2.INTER_AREA)
    done, encoded = cv2.imencode(".jpg", bgr_HWC, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert done, "JPEG holds any uint8 picture"
    data = base64.b64encode(encoded.tobytes()).decode()
    return f'<img alt="{html.escape(words)}" src="data:image/jpeg;base64,{data}">'


def chart(
    title: str, curves: Mapping[str, Points], ends: Mapping[str, float] | None = None, log_x: bool = False
) -> str:
    """A figure with one line a curve, its axes and a legend with the last values, or `ends`; the curves share the vertical axis.

    `log_x`: equal distances are equal ratios; x must be above 0. Empty where there is nothing to draw.
    """
    drawn = {
        name: [(math.log10(x) if log_x else x, y) for x, y in points if math.isfinite(y)]
        for name, points in curves.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    if not ys:
        return ""
    y_ticks = ticks(min(ys), max(ys), 4)
    low, high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)
    first, last = min(xs), max(xs) if max(xs) > min(xs) and log_x else max(max(xs), min(xs) + 1)

    def at(x: float, y: float) -> str:
        across = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        down = TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for tick in y_ticks:
        down = at(first, tick).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(
            f'<text x="{LEFT - 5}" y="{down}" text-anchor="end" dominant-baseline="middle">{short(tick)}</text>'
        )
    marked = [tick for tick in ticks(first, last, 4) if first <= tick <= last and tick == round(tick)]
    if log_x and len(set(xs)) <= MAX_MARKED:
        marked = sorted(set(xs))
    for tick in marked:
        across = at(tick, low).split(",")[0]
        words = short(float(f"{10.0**tick:.10g}") if log_x else tick)
        anchor = "end" if float(across) > WIDTH - 2 * RIGHT else "middle"
        parts.append(f'<text x="{across}" y="{HEIGHT - 6}" text-anchor="{anchor}">{words}</text>')
    legend = []
    for i, (name, values) in enumerate(drawn.items()):
        points = [at(x, y) for x, y in values]
        if len(points) == 1:
            across, down = points[0].split(",")
            parts.append(f'<circle class="c{i % N_COLOURS}" cx="{across}" cy="{down}" r="2.5"/>')
        parts.append(f'<polyline class="c{i % N_COLOURS}" points="{" ".join(points)}"/>')
        legend.append(
            f'<span><i class="c{i % N_COLOURS}"></i>{html.escape(name)} <b>{short((ends or {}).get(name, values[-1][1]))}</b></span>'
        )
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg><p class="legend">{"".join(legend)}</p></figure>'
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about so many."""
    size = max(abs(low), abs(high))
    # A curve that hardly moves gets an axis on which it is seen to stand still.
    span = max(high - low, size * 0.01) or 1.0
    raw = span / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """A number in few characters: 4 digits, thousands as k, millions as M, small ones as powers of ten."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            return f"{value / (factor if factor != 1e4 else 1e3):.4g}{letter}"
    if size == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.1e}".replace("e-0", "e-")
