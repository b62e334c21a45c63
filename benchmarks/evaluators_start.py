"""What a second evaluator does before it can evaluate, in CPU seconds: a folder of files whose features are in the cache."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from data.datasets import Dataset
from data.marks import SETTLED_S
from evaluators.extract import ExtractSpec, available_columns, extract, extraction_key
from evaluators.feature_cache import open_store
from evaluators.splits import Splits, labelled, open_splits
from runtimes.open import open_runtime
from runtimes.runtime import Runtime

NETWORK = "models/dinoscope_tiny.safetensors"
PICTURE = Path("samples/images/bison.jpg")


def start_times(n_files: int, n_classes: int, rounds: int) -> dict[str, float]:
    """The least of `rounds` for each step, and for the imports that come before: of torch alone, and of a command."""
    seen: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch, open_runtime(NETWORK, threads=1) as runtime:
        os.environ["XDG_CACHE_HOME"] = scratch
        data, spec = Path(scratch) / "data", ExtractSpec(cache_dir=Path(scratch) / "features")
        link_files(data, n_files, n_classes)
        splits = labelled(open_splits(data), str(data))
        for part in (splits.train, splits.val):
            remember(part, spec, runtime)
        for _ in range(rounds):
            for name, taken in start(data, spec, runtime).items():
                seen.setdefault(name, []).append(taken)
    times = {name: min(taken) for name, taken in seen.items()}
    times["all three"] = sum(times.values())
    for name, words in (
        ("import torch", ["-c", "import torch"]),
        ("a command's --help", ["-m", "evaluators.knn", "--help"]),
    ):
        times[name] = min(child_cpu_s([sys.executable, *words]) for _ in range(rounds))
    return times


def start(data: Path, spec: ExtractSpec, runtime: Runtime) -> dict[str, float]:
    """CPU seconds of each step."""
    began = time.process_time()
    splits: Splits = labelled(open_splits(data), str(data))
    listed = time.process_time()
    for part in (splits.train, splits.val):
        part.fingerprint()
    asked = time.process_time()
    for part in (splits.train, splits.val):
        if not extract(runtime, part, spec).cached:
            raise RuntimeError("the features were not in the cache")
    ended = time.process_time()
    return {
        "listing the files": listed - began,
        "asking whether they changed": asked - listed,
        "features from the cache": ended - asked,
    }


def link_files(data: Path, n: int, n_classes: int) -> None:
    """`n` files in the class folders of train/ and val/, all of them one picture, old enough for its checksum to be remembered."""
    one = data / "train" / "class000" / "image_000000.jpg"
    one.parent.mkdir(parents=True)
    one.write_bytes(PICTURE.read_bytes())
    for row in range(1, n):
        folder = data / ("val" if row % 10 == 0 else "train") / f"class{row // 10 % n_classes:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(one, folder / f"image_{row:06d}.jpg")
    time.sleep(SETTLED_S + 0.1)


def remember(part: Dataset, spec: ExtractSpec, runtime: Runtime) -> None:
    """Features as an extraction would leave them, without the network: they are random."""
    columns, n, rng = available_columns(runtime, spec.columns), len(part), np.random.default_rng(0)
    width = int(runtime.manifest.architecture["width"])
    widths = {name: 4 * width if name == "cls_last4" else width for name in columns}
    with open_store(spec.cache_dir, extraction_key(runtime, part, columns, spec), n) as store:
        store.append({name: rng.standard_normal((n, width), np.float32) for name, width in widths.items()}, n, {})
        store.finish()


def child_cpu_s(words: list[str]) -> float:
    """CPU seconds, user and system, of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
