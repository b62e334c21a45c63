"""Results in, one page out that needs nothing else: which network is best at what, how sure that is, and what it gets wrong.

Results of one evaluator on the same data stand in one table, best first, each compared with the best image by image. Below them come curves
over what was tried, a heat map of learning rates, the classes most often confused and what retrieval finds (with pictures, where the images
are still where they were), the pictures that evaluators wrote, and how each figure came about.
Read in this order: make_page, report_groups.py, report_tables.py, report_pictures.py.
"""

import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from data.errors import InputError, run_cli
from evaluators.classification import summary
from evaluators.page import page
from evaluators.report_groups import Found, against_best, group_results, load_results
from evaluators.report_pictures import confusions, file_picture, retrievals
from evaluators.report_tables import STYLE, curves, heat_map, leaderboard, notes, overview
from evaluators.results import check_writable, replacing

PROVENANCE = (
    "protocol", "version", "selected_on", "chosen", "settings", "notes", "model", "data", "preprocess", "timing", "environment",
)  # fmt: skip
"""What is told of how a figure came about."""


def make_page(found: Sequence[Found], title: str) -> str:
    """The whole page."""
    groups = group_results(found)
    body = [f"<h1>{html.escape(title)}</h1>", overview(groups)]
    for group in groups:
        body.append(
            f'<section id="{group.anchor}"><h2>{html.escape(group.evaluator)} '
            f'<span class="soft">on {html.escape(group.source)}</span></h2>'
        )
        body += [leaderboard(group, against_best(group)), notes(group)]
        charts = curves(group) + "".join(heat_map(one) for one in group.found)
        if charts:
            body.append(f'<div class="charts">{charts}</div>')
        body += [confusions(group.best), retrievals(group.best)]
        body += [file_picture(one) for one in group.found]
        body += [provenance(one) for one in group.found]
        body.append("</section>")
    return page(title, body, STYLE)


def provenance(one: Found) -> str:
    """How a figure came about, folded away."""
    result = one.result
    shown = {
        key: result.get(key)
        for key in (
            "protocol",
            "version",
            "selected_on",
            "chosen",
            "settings",
            "notes",
            "model",
            "data",
            "preprocess",
            "timing",
            "environment",
        )
    }
    text = json.dumps(shown, indent=1, ensure_ascii=False)
    return (
        f"<details><summary>{html.escape(one.label)}: how this was measured</summary>"
        f"<pre>{html.escape(text)}</pre></details>"
    )


def main(
    results: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path = Path("report.html"), title: str = "Results"
) -> None:
    """Make one page of result files.

    Args:
        results: Result files, or folders of them.
        out: The page to write (.html).
        title: Its heading.
    """
    if not results:
        raise InputError("no results were named; give result files or folders of them")
    check_writable(out, "--out", ".html")
    text = make_page(load_results(results, lambda line: print(f"note: {line}", file=sys.stderr)), title)
    try:
        with replacing(out) as path:
            path.write_text(text, "utf-8", "backslashreplace")  # names of files may be no UTF-8
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error.strerror}); name another place") from error
    print(f"written: {out}")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m evaluators.report", description=summary(__doc__)))
