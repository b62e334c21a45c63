"""Tables and charts of a report, as markup: leaderboards, curves over what was tried, the heat map of a linear probe."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluators.page import chart, short
from evaluators.published_figures import source_text
from evaluators.report_groups import Found, Group

CURVES = {
    "k": ("neighbours k", True),
    "C": ("inverse strength C", True),
    "n_per_class": ("training images a class", True),
}
"""Keys of a grid that are drawn along the horizontal axis: what they are, and whether ratios count."""
HEAT = ("features", "lr_per_256")
STYLE = """
section{margin-top:34px;border-top:1px solid var(--line)}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 9px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600;white-space:normal}
.paired{white-space:normal;min-width:10rem}
th:first-child,td:first-child{text-align:left}tr.base td{color:var(--soft)}td small{color:var(--soft)}td.best{font-weight:700}
a{color:var(--c0)}.heat td{border:1px solid var(--card);padding:4px 5px;font-size:.7rem;color:#fff;text-align:center}
.heat th{font-size:.68rem;padding:3px 4px}.heat td.chosen{outline:2px solid var(--c1);outline-offset:-2px}
.row{display:flex;align-items:flex-end;gap:5px;flex-wrap:wrap;margin:5px 0 12px}
.row figure{padding:3px;width:min(84px,19vw)}
.row figcaption{font-size:.64rem;font-weight:400;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.row .hit{border:2px solid #16a34a}.row .miss{border:2px solid #dc2626}.row .query{border:2px solid var(--c0)}
"""


def overview(groups: Sequence[Group]) -> str:
    """Networks by evaluators: every headline, the best of each in bold."""
    networks = list(dict.fromkeys(one.network for group in groups for one in group.found))
    head = "".join(
        f'<th><a href="#{group.anchor}">{html.escape(group.evaluator)}</a><br><small>{html.escape(Path(group.source.split(",")[0]).name)}, '
        f"{html.escape(group.best.result['headline'])}{arrow(group.best.result, group.best.result['headline'])}</small></th>"
        for group in groups
    )
    rows = []
    for network in networks:
        cells = []
        for group in groups:
            one = next((one for one in group.found if one.network == network), None)
            if one is None:
                cells.append("<td>-</td>")
            else:
                best = ' class="best"' if one is group.best and len(group.found) > 1 else ""
                cells.append(f"<td{best}>{figure(one.result['metrics'][one.result['headline']])}</td>")
        rows.append(f"<tr><td>{html.escape(network)}</td>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr><th>network</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def leaderboard(group: Group, compared: Mapping[Path, Mapping[str, Any]]) -> str:
    """One row a network and a baseline, best network first: all metrics with intervals, the published figure, the paired difference."""
    headline = group.best.result["headline"]
    names = list(dict.fromkeys([headline, *(name for one in group.found for name in one.result["metrics"])]))
    head = "".join(f"<th>{html.escape(name)}{arrow(group.best.result, name)}</th>" for name in names)
    rows, published = [], any(one.result.get("published") for one in group.found)
    paired = len(group.found) > 1 or any(one.result["baselines"] for one in group.found)
    for one in group.found:
        cells = "".join(f"<td>{with_interval(one.result['metrics'].get(name))}</td>" for name in names)
        cells += f"<td>{published_cell(one.result)}</td>" if published else ""
        gain = paired_cell(compared.get(one.path))
        rows.append(
            f"<tr><td>{html.escape(one.network)}{small(one.apart)}</td>{cells}<td class='paired'>{gain}</td></tr>"
        )
        for name, baseline in one.result["baselines"].items():
            cells = "".join(f"<td>{figure(baseline['metrics'].get(name))}</td>" for name in names)
            cells += "<td></td>" if published else ""
            gain = with_interval(baseline.get("difference"), signed=True)
            rows.append(
                f'<tr class="base"><td>&nbsp;&nbsp;{html.escape(name)}</td>{cells}<td class="paired">network above it by {gain}</td></tr>'
            )
    extra = ("<th>published</th>" if published else "") + (
        '<th class="paired">compared with the best, paired</th>' if paired else ""
    )
    n = group.best.result["metrics"][headline]["n"]
    lower = "; arrows: lower is better" if any(arrow(group.best.result, name) for name in names) else ""
    return (
        f'<p class="soft">{n:,} test items; 95 % intervals below the figures{lower}</p>'
        f'<div class="scroll"><table>'
        f"<thead><tr><th>network</th>{head}{extra}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def notes(group: Group) -> str:
    """What the results say of themselves, such as an interval that is too narrow: once what all say, the rest under the network's name."""
    told = [[str(note) for note in one.result.get("notes") or []] for one in group.found]
    shared = [note for note in told[0] if all(note in of_one for of_one in told)]
    lines = [*shared]
    for one, own in zip(group.found, told, strict=True):
        lines += [f"{one.label}: {note}" for note in own if note not in shared]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<ul class="soft">{items}</ul>' if items else ""


def small(words: str) -> str:
    """Words below a name."""
    return f"<br><small>{html.escape(words)}</small>" if words else ""


def arrow(result: Mapping[str, Any], name: str) -> str:
    """The mark of a metric of which less is better."""
    return "\u00a0↓" if result["metrics"].get(name, {}).get("lower_is_better") else ""


def figure(metric: Mapping[str, Any] | None) -> str:
    """A value in its unit."""
    if metric is None:
        return "-"
    if metric.get("unit"):
        return f"{metric['value']:.3f} {html.escape(str(metric['unit']))}"
    return f"{metric['value']:.4f}"


def with_interval(metric: Mapping[str, Any] | None, signed: bool = False) -> str:
    """A value, and its interval below."""
    if metric is None:
        return "-"
    value = f"{metric['value']:+.4f}" if signed else figure(metric)
    if not metric.get("ci95"):
        return value
    low, high = metric["ci95"]
    return f"{value}<br><small>{low:.3f} to {high:.3f}</small>"


def published_cell(result: Mapping[str, Any]) -> str:
    """What the authors report, and the difference."""
    return "<br>".join(
        f"{html.escape(name)} {one['value']:.3f} <small>({one['difference']:+.4f}; {html.escape(source_text(one))})</small>"
        for name, one in result.get("published", {}).items()
    )


def paired_cell(found: Mapping[str, Any] | None) -> str:
    """How far a network is behind the best one, and whether that is more than chance."""
    if found is None:
        return ""
    score = found["paired"]["score"]
    low, high = score["ci95"]
    text = f"{score['difference']:+.4f}<br><small>{low:+.3f} to {high:+.3f}"
    if "mcnemar" in score:
        text += f"; p {score['mcnemar']['p']:.2g}"
    text += "; no clear difference" if found["verdict"] == "neither" else ""
    return text + ("" if found["score_is_headline"] else "; of the mean score") + "</small>"


def curves(group: Group) -> str:
    """The headline over what was tried: k, C, images a class, one line a network, named with the headline itself."""
    parts = []
    headline = group.best.result["headline"]
    for key, (words, log_x) in CURVES.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for one in group.found:
            lines |= {
                f"{one.label}{suffix}": points
                for suffix, points in grid_lines(one.result["grid"], key, headline).items()
            }
        if any(len(points) > 1 for points in lines.values()):
            ends = {one.label: float(one.result["metrics"][headline]["value"]) for one in group.found}
            parts.append(chart(f"{headline} over {words}", lines, ends, log_x))
    return "".join(parts)


def grid_lines(grid: Sequence[Mapping[str, Any]], key: str, headline: str) -> dict[str, list[tuple[float, float]]]:
    """Points of a grid along `key` (mean over tries), by whatever else sets its entries apart."""
    measure = next((name for name in (headline, "top1") if any(name in entry for entry in grid)), None)
    sums: dict[str, dict[float, list[float]]] = {}
    for entry in grid:
        x, y = entry.get(key), entry.get(measure or "")
        if x is None or y is None or not (number(x) and number(y) and x > 0):
            continue
        others = {"k": "n_per_class", "n_per_class": "k"}
        apart = entry.get(others.get(key, ""))
        suffix = "" if apart is None else f", {others[key]} {apart}"
        sums.setdefault(suffix, {}).setdefault(float(x), []).append(float(y))
    return {
        suffix: sorted((x, sum(ys) / len(ys)) for x, ys in points.items())
        for suffix, points in sums.items()
        if len(points) > 1
    }


def number(value: Any) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def heat_map(one: Found) -> str:
    """Accuracy of a linear probe by features and learning rate; empty for what has no such grid."""
    by, across = HEAT
    grid = [entry for entry in one.result["grid"] if by in entry and across in entry and number(entry.get("top1"))]
    if not grid:
        return ""
    rates, features = sorted({entry[across] for entry in grid}), list(dict.fromkeys(entry[by] for entry in grid))
    values = {(entry[by], entry[across]): entry for entry in grid}
    low, high = (pick(entry["top1"] for entry in grid) for pick in (min, max))
    rows = []
    for name in features:
        cells = []
        for rate in rates:
            entry = values.get((name, rate))
            if entry is None:
                cells.append("<td></td>")
                continue
            share = (entry["top1"] - low) / ((high - low) or 1)
            chosen = one.result["chosen"].get(by) == name and one.result["chosen"].get(across) == rate
            colour = f"hsl({240 - 190 * share:.0f} 60% {28 + 12 * share:.0f}%)"
            mark = ' class="chosen"' if chosen else ""
            said = "diverged" if entry.get("diverged") else f"{100 * entry['top1']:.1f}"
            cells.append(f'<td{mark} style="background:{colour}">{said}</td>')
        rows.append(f"<tr><th>{html.escape(str(name))}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{short(rate)}</th>" for rate in rates)
    return (
        f'<figure style="grid-column:1/-1"><figcaption>{html.escape(one.label)}: top-1 in percent by features and learning '
        f"rate (for a batch of 256); the frame marks the chosen head</figcaption>"
        f'<div class="scroll"><table class="heat"><thead><tr><th></th>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div></figure>"
    )
