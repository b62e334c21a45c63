"""A network and a list of evaluators in, a folder of results out; what is done already is not done again.

Evaluators run one after the other and share the feature cache, so that images go through the network once. `suite.json` in the folder
says what was made of what: network, data, evaluator and options. Run again, the suite skips every result whose making would be the same,
and runs what is missing, failed or changed; a crash, Ctrl-C or a server that died costs one evaluator.
Read in this order: SuiteRun, plan, stamp_of, run.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from data.datasets import open_dataset
from data.errors import CheckFailed, InputError, run_cli
from evaluators.classification import RunOptions, summary
from evaluators.presets import evaluator_cli
from evaluators.results import check_writable, load_result, replacing
from runtimes.open import open_runtime

SCHEMA = "dinoscope.suite/1"
NAMES = (
    "knn",
    "linear",
    "logistic",
    "ridge",
    "retrieval",
    "copies",
    "segmentation",
    "depth",
    "attention",
    "video_objects",
    "video_actions",
)
"""All evaluators; those whose module is here can be run."""
IN_ONE_PROCESS = ("segmentation", "depth", "attention", "video_objects", "video_actions")
"""Those that refuse --processes; the suite leaves it out for them."""


@dataclass(frozen=True, kw_only=True)
class SuiteRun(RunOptions):
    """What is measured, by which evaluators, and where the results go."""

    data: str = ""
    """The images for every evaluator that is not given its own: a folder, a CSV, tar shards, a packed set, a benchmark."""
    evaluators: tuple[str, ...] = ("knn", "linear")
    """Names, or NAME=DATA for one that reads other data: `knn linear depth=rooms attention=stamps`."""
    out: Path = Path("results")
    """Folder of the results: NAME.json each, and suite.json."""


@dataclass(frozen=True)
class Entry:
    """One evaluator on one data set."""

    name: str
    data: str
    file: str

    @property
    def title(self) -> str:
        return f"{self.name} on {self.data}"


def available() -> list[str]:
    """Names of the evaluators that can be run."""
    return [name for name in NAMES if importlib.util.find_spec(f"evaluators.{name}") is not None]


def plan(options: SuiteRun, before: Mapping[str, Any] = {}) -> list[Entry]:
    """The evaluators in order, each with its data and the name of its result: the one that it has in `before`, an earlier suite.json.

    Raises InputError.
    """
    pairs: list[tuple[str, str]] = []
    for word in options.evaluators:
        name, _, own = word.partition("=")
        if name not in available():
            raise InputError(f"--evaluators {word}: want one of {', '.join(available())}, or NAME=DATA")
        if not (own or options.data):
            raise InputError(f"--evaluators {word}: is given no data; name it with --data or {name}=DATA")
        pairs.append((name, own or options.data))
    if not pairs:
        raise InputError(f"--evaluators: name at least one of {', '.join(available())}")
    if len(set(pairs)) < len(pairs):
        raise InputError("--evaluators: one is named twice on the same data; name each once")
    known = {(one.get("evaluator"), one.get("data")): file for file, one in before.get("entries", {}).items()}
    often, used, entries = Counter(name for name, _ in pairs), {known[pair] for pair in pairs if pair in known}, []
    for name, data in pairs:
        stem = name if often[name] == 1 else f"{name}.{Path(data.split(',')[0]).stem or 'data'}"
        names = (f"{stem}.json", *(f"{stem}.{number}.json" for number in range(2, len(pairs) + 2)))
        file = known.get((name, data)) or next(one for one in names if one not in used)
        used.add(file)
        entries.append(Entry(name, data, file))
    return entries


def stamp_of(entry: Entry, network: dict[str, Any], options: SuiteRun) -> str:
    """Hash of all that a result follows from: the network, the data's files, the evaluator and what it was asked."""
    made_of = {
        "network": network,
        "data": [entry.data, data_mark(entry.data)],
        "evaluator": [entry.name, versions_of(entry.name)],
        "options": {"seed": options.seed, "device": options.device},
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def versions_of(name: str) -> list[int]:
    """The protocol versions in an evaluator's modules, `NAME` and `NAME_...`."""
    importlib.import_module(f"evaluators.{name}")
    modules = sorted(key for key in sys.modules if f"{key}_".startswith(f"evaluators.{name}_"))
    return [sys.modules[key].VERSION for key in modules if hasattr(sys.modules[key], "VERSION")]


def data_mark(data: str) -> str:
    """Hash of what git goes by (names, sizes, inodes, times) of the files that `data` names, and of all that its tables name."""
    digest = hashlib.sha256()
    for part in _parts(data):
        path = Path(part.strip())
        if not _there(path) and ":" in part:
            path = Path(part.split(":", 1)[1].strip())
        for name, about in _files_of(path):
            digest.update(os.fsencode(f"{name}\0{_mark(about)}\n"))
        if path.suffix == ".csv":
            with contextlib.suppress(InputError):
                for file in open_dataset(part).files():
                    with contextlib.suppress(OSError):
                        digest.update(os.fsencode(f"{file}\0{_mark(os.stat(file))}\n"))
    return digest.hexdigest()


def _parts(data: str) -> list[str]:
    """What lies between commas, unless the whole is a path, bare or behind a benchmark's name."""
    whole = any(_there(Path(place)) for place in (data, data.partition(":")[2]) if place)
    return [data] if whole else data.split(",")


def _mark(about: os.stat_result) -> str:
    return f"{about.st_size}\0{about.st_ino}\0{about.st_mtime_ns}\0{about.st_ctime_ns}"


def _files_of(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below a folder, or a file and its namesakes of other suffixes, in a fixed order; those that have gone are left out.

    Links are followed, and each folder is entered once, as data sets are listed.
    """
    if not path.is_dir():
        for file in [path, *sorted(path.parent.glob(f"{path.stem}.*"))]:
            with contextlib.suppress(OSError):
                yield file.name, file.stat()
        return
    entered: set[tuple[int, int]] = set()
    for above, folders, names, handle in os.fwalk(path, follow_symlinks=True):
        about = os.fstat(handle)
        if (about.st_dev, about.st_ino) in entered:
            folders.clear()
            continue
        entered.add((about.st_dev, about.st_ino))
        folders.sort()
        for name in sorted(names):
            with contextlib.suppress(OSError):
                yield os.path.join(above, name), os.stat(name, dir_fd=handle)


def _there(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return path.exists()
    return False


def describe_network(options: SuiteRun) -> dict[str, Any]:
    """What decides the features of the network. Raises InputError where it cannot be opened."""
    with open_runtime(options.ckpt, device=options.device, threads=options.threads) as runtime:
        return {
            "weights_sha256": runtime.manifest.weights_sha256,
            "architecture": runtime.manifest.architecture,
            "preprocess": runtime.manifest.preprocess.to_json(),
            "runtime": runtime.name,
            "precision": runtime.precision,
            "device": runtime.device,
        }


def evaluate(entry: Entry, out: Path, options: RunOptions, more: Sequence[str] = ()) -> dict[str, Any]:
    """Run one evaluator as its command would, with `more` of its flags, and read its result back.

    Raises InputError and CheckFailed as it does.
    """
    module = importlib.import_module(f"evaluators.{entry.name}")
    words = ["--ckpt", options.ckpt, "--data", entry.data, "--out", str(out), "--device", options.device]
    words += ["--batch-size", str(options.batch_size), "--workers", str(options.workers), "--seed", str(options.seed)]
    words += ["--cache-dir", str(options.cache_dir)] + (["--threads", str(options.threads)] if options.threads else [])
    if options.processes > 1 and entry.name not in IN_ONE_PROCESS:
        words += ["--processes", str(options.processes)]
    words += more
    with contextlib.redirect_stdout(io.StringIO()):  # its table; the results hold it
        evaluator_cli(module.main, words)
    return load_result(out)


def run(options: SuiteRun) -> dict[str, Any]:
    """Run what is not done yet. Returns the contents of suite.json.

    Raises, after all have had their turn, CheckFailed where a check failed, and InputError where an input was bad.
    """
    plan(options)  # what is wrong with it is told before the network is opened
    check_writable(options.out / "suite.json", "--out", ".json")
    before = read_suite(options.out / "suite.json")
    network = describe_network(options)
    suite: dict[str, Any] = {"schema": SCHEMA, "ckpt": options.ckpt, "network": network, "entries": {}}
    # What other runs of the suite left in this folder stays listed as long as it belongs to the same network.
    if before.get("network") == network:
        suite["entries"] |= before["entries"]
    entries = plan(options, suite)
    failures: list[tuple[Entry, InputError | CheckFailed]] = []
    for number, entry in enumerate(entries, start=1):
        title, stamp = f"[{number}/{len(entries)}] {entry.title}", stamp_of(entry, network, options)
        if (done := finished(options.out / entry.file, before, entry, stamp)) is not None:
            say(f"{title}: done before, {headline(done)}")
            suite["entries"][entry.file] = before["entries"][entry.file]
            continue
        say(f"{title} ...")
        began = time.perf_counter()
        record = {"evaluator": entry.name, "data": entry.data, "stamp": stamp}
        try:
            result = evaluate(entry, options.out / entry.file, options)
        except (InputError, CheckFailed) as error:
            failures.append((entry, error))
            record |= {"status": "failed", "reason": str(error)}
            say(f"{title}: failed: {error}")
        else:
            record |= {"status": "done", "headline": headline(result), "sha256": file_hash(options.out / entry.file)}
            say(f"{title}: {headline(result)}, {time.perf_counter() - began:.1f} s")
        suite["entries"][entry.file] = record | {"seconds": round(time.perf_counter() - began, 3)}
        write_suite(options.out / "suite.json", suite)
    write_suite(options.out / "suite.json", suite)
    if failures:
        entry, first = next(((e, x) for e, x in failures if isinstance(x, CheckFailed)), failures[0])
        said = f"{len(failures)} of {len(entries)} evaluators failed, first {entry.title}: {first}; the same command runs only these again"
        raise CheckFailed(said) if isinstance(first, CheckFailed) else InputError(said)
    return suite


def finished(path: Path, before: dict[str, Any], entry: Entry, stamp: str) -> dict[str, Any] | None:
    """The result that an earlier run left, if the same inputs would make it again and nobody has put another in its place."""
    record = before.get("entries", {}).get(entry.file, {})
    if record.get("status") != "done" or record.get("stamp") != stamp:
        return None
    try:
        return load_result(path) if file_hash(path) == record.get("sha256") else None
    except (InputError, OSError):
        return None


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file. Raises OSError."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_suite(path: Path) -> dict[str, Any]:
    """What an earlier run wrote; empty where there is none or it is damaged, which costs only the time to run anew."""
    try:
        found = json.loads(path.read_text())
        assert found["schema"] == SCHEMA
        assert all(isinstance(entry, dict) for entry in found["entries"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        return {}
    return dict(found)


def write_suite(path: Path, suite: dict[str, Any]) -> None:
    """Atomically. Raises InputError where it cannot be written."""
    try:
        with replacing(path) as scratch:
            scratch.write_text(json.dumps(suite, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"--out {path}: cannot write there ({error.strerror}); name another folder") from error


def headline(result: dict[str, Any]) -> str:
    """The figure to quote."""
    metric = result["metrics"][result["headline"]]
    return f"{result['headline']} {metric['value']:.4f}{' ' + metric['unit'] if metric.get('unit') else ''}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(options: Annotated[SuiteRun, tyro.conf.arg(name="")]) -> None:
    """Run several evaluators on one network, each once."""
    suite = run(options)
    width = max(len(name) for name in suite["entries"])
    for name, entry in sorted(suite["entries"].items()):
        print(f"{name:<{width}}  {entry.get('headline', 'failed')}")
    print(f"written: {options.out}; python -m evaluators.report {options.out}{os.sep} makes a page of it")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m evaluators.suite", description=summary(__doc__)))
