"""One evaluator in a process of its own: a job as JSON in, progress as JSON lines on stdout, a folder with result and report out.

Run by `evaluations`, never by people; they have `python -m evaluators.NAME`. It ends with the server: the end of stdin says that nobody
waits any more.
"""

import html
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

PRIORITY = 10
"""Of 19 steps down; serving goes first."""
NETWORK = "served"
"""What results name as the network."""
MIN_LINE_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run, and where everything is."""

    evaluator: str
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of its Spec."""
    address: str
    """Of the network, as --ckpt takes it."""
    data: str
    data_name: str
    """What clients know the data by."""
    folder: str
    cache: str
    threads: int


class Reporter:
    """Lines on the real stdout, of which evaluators know nothing."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._last = out, 0.0

    def say(self, **values: Any) -> None:
        """One line."""
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()

    def progress(self, title: str, done: int, total: int) -> None:
        """What a bar shows; not more than some lines a second."""
        part = title.partition(": ")[2] or title
        if done >= total or time.monotonic() - self._last >= MIN_LINE_S:
            self._last = time.monotonic()
            self.say(part=part if done < total else "evaluating", done=done, total=total)


def without_paths(job: Job) -> Callable[[str], str]:
    """What turns a text for clients: neither the operator's folders nor the way to the server are in it."""
    places = {job.address: NETWORK, job.folder: "", job.cache: "", job.data: job.data_name}
    places[job.data.partition(":")[2]] = job.data_name  # of imagenet:ROOT
    places[f"{Path(job.data).parent}{os.sep}"] = ""  # the table and the archive of a packed set lie side by side
    hidden = {text: instead for what, instead in places.items() for text in (what, html.escape(what))}

    def clean(text: str) -> str:
        for what, instead in hidden.items():
            if os.sep in what[:-1]:  # no single word, which may stand for itself
                text = text.replace(what, instead)
        return text.encode("utf-8", "backslashreplace").decode()  # names of files may be no UTF-8, and JSON must be

    return clean


def _cleaned(value: Any, clean: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {clean(str(name)): _cleaned(one, clean) for name, one in value.items()}
    if isinstance(value, list):
        return [_cleaned(one, clean) for one in value]
    return clean(value) if isinstance(value, str) else value


def run(job: Job, reporter: Reporter) -> None:
    """Evaluate, and write result.json and report.html. Raises InputError and CheckFailed."""
    from evaluators.classification import RunOptions, watch_progress
    from evaluators.report import make_page
    from evaluators.report_groups import load_results
    from evaluators.results import replacing
    from evaluators.suite import Entry, evaluate
    from server.evaluation_options import words_of

    watch_progress(reporter.progress)
    folder, clean = Path(job.folder), without_paths(job)
    options = RunOptions(ckpt=job.address, data=job.data, cache_dir=Path(job.cache), threads=job.threads)
    out = folder / "result.json"
    result = evaluate(Entry(job.evaluator, job.data, out.name), out, options, words_of(job.options))
    reporter.say(part="report")
    page = make_page(load_results([out]), f"{job.evaluator} on {job.data_name}")
    with replacing(folder / "report.html") as path:
        path.write_text(clean(page), encoding="utf-8")
    result["model"] |= {"ckpt": NETWORK}
    result["data"] |= {"source": job.data_name}
    with replacing(out) as path:
        path.write_text(json.dumps(_cleaned(result, clean), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _end_with_the_server() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock a thread must not hold when Python ends
    os._exit(1)


def main(words: str) -> None:
    """Run the job. Ends with status 0 where it is done, or told what was wrong."""
    reporter = Reporter(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # whatever prints must not be taken for progress
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    os.nice(PRIORITY)
    from data.errors import CheckFailed, InputError
    from server.evaluation_options import without_flags

    job = Job(**json.loads(words))
    try:
        run(job, reporter)
    except (InputError, CheckFailed) as error:
        reporter.say(error=without_flags(without_paths(job)(" ".join(str(error).split())))[:1000])
    sys.stderr.flush()
    os._exit(0)  # everything is written; taking the interpreter apart can last long at this priority


if __name__ == "__main__":
    main(sys.argv[1])
