"""What evaluators cost beside the products they cannot do without and beside well-known libraries, as ratios in one run.

    .venv/bin/python -m benchmarks.evaluators            (about 15 minutes on one core, most of it scikit-learn's)

CPU seconds of one thread (with --threads, seconds on a clock); cases take turns, so that a noisy machine disturbs all alike,
and medians are printed.
- k-NN: all k of the protocol and the vote, beside the bare product (in our chunks, which are written over, and in one
  call, which needs 2 GB), faiss's flat index (search only), and scikit-learn's classifier (one k); memory beyond the
  database, in chunks of similarities.
- Logistic regression: 45 values of C, beside scikit-learn's cold fits and its warm-started path; worst objective.
- Linear grid: 52 heads, beside their products alone.
- Start: what a second evaluator does before it evaluates, on a folder of files whose features are in the cache.
"""

import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import faiss
import numpy as np
import torch
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.evaluators_start import start_times
from data.errors import run_cli
from evaluators.knn import PROTOCOL_K, Voters, classify
from evaluators.linear import LR_PER_256
from evaluators.linear_grid import train_grid
from evaluators.logistic import PROTOCOL_C
from evaluators.logistic_path import fit_path
from evaluators.neighbours import CHUNK_QUERIES, unit_rows

Case = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """How large the problems are; the defaults are those of the stated bounds."""

    part: tuple[str, ...] = ("start", "knn", "linear", "logistic")
    """What is measured: start, knn, linear, logistic."""
    rounds: int = 3
    """Of each case of k-NN and linear; logistic regression runs once."""
    database: int = 50_000
    queries: int = 10_000
    width: int = 384
    """Feature size."""
    fitted: int = 20_000
    """Images of the logistic regression."""
    classes: int = 100
    batch: int = 1024
    steps: int = 60
    """Of the linear grid."""
    threads: int = 1
    """More than one: seconds on a clock instead of CPU seconds, as what one thread does alone holds the others up."""
    measure_memory: bool = False
    """Only print the memory of k-NN in this process, as JSON."""


def seconds(case: Case, threads: int) -> float:
    """CPU seconds of one call, or seconds on a clock where several threads share it."""
    clock = time.process_time if threads == 1 else time.perf_counter
    started = clock()
    case()
    return clock() - started


def compare(cases: dict[str, Case], sizes: Sizes) -> dict[str, float]:
    """Median seconds of each case over interleaved rounds; one round goes uncounted before."""
    seen: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(sizes.rounds + 1):
        for name, case in cases.items():
            taken = seconds(case, sizes.threads)
            seen[name] += [taken] if number else []
    return {name: statistics.median(times) for name, times in seen.items()}


def show(title: str, times: dict[str, float], base: str) -> None:
    """Seconds, and ratios to the case `base`."""
    print(f"\n{title}")
    for name, taken in times.items():
        print(f"  {name:<44} {taken:8.2f} s   {taken / times[base]:5.2f} x {base}")


def features(n: int, width: int, n_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes in features whose spread falls off by a power law, turned at random; rows in order of class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, n_classes, (n,), generator=generator).sort().values
    means = torch.randn(n_classes, width, generator=torch.Generator().manual_seed(99))
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(98)))[0]
    spread = 4 * torch.arange(1, width + 1).float() ** -0.7
    return ((means[labels] * 0.28 + torch.randn(n, width, generator=generator)) * spread) @ turn, labels


def knn_cases(sizes: Sizes) -> dict[str, Case]:
    """The product alone, ours, faiss and scikit-learn."""
    raw, labels = features(sizes.database, sizes.width, sizes.classes)
    bank, (queries, truth) = unit_rows(raw), features(sizes.queries, sizes.width, sizes.classes, seed=1)
    unit = unit_rows(queries)
    index = faiss.IndexFlatIP(sizes.width)
    index.add(bank.numpy())
    neighbours = KNeighborsClassifier(
        20, algorithm="brute", weights=lambda d: np.exp(-d / 0.07), metric="cosine", n_jobs=sizes.threads
    )
    neighbours.fit(bank.numpy(), labels.numpy())
    out = torch.empty(CHUNK_QUERIES, sizes.database)

    def product() -> None:
        for start in range(0, len(unit), CHUNK_QUERIES):
            some = unit[start : start + CHUNK_QUERIES]
            torch.mm(some, bank.T, out=out[: len(some)])

    return {
        "product": product,
        "product in one call, all similarities held": lambda: torch.mm(unit, bank.T),
        "ours, k 10 20 100 200 and the vote": lambda: classify(
            bank, labels, queries, truth.numpy(), sizes.classes, [Voters(PROTOCOL_K)], 0.07, "softmax"
        ),
        "faiss flat index, 200 neighbours, no vote": lambda: index.search(unit.numpy(), max(PROTOCOL_K)),
        "scikit-learn, k 20, weighted vote": lambda: neighbours.predict(unit.numpy()),
    }


def print_memory(sizes: Sizes) -> None:
    """Peak memory beyond what the process had with the database in it, in bytes, as JSON."""
    raw, labels = features(sizes.database, sizes.width, sizes.classes)
    bank = raw.div_(raw.norm(dim=1, keepdim=True))
    queries, truth = features(sizes.queries, sizes.width, sizes.classes, seed=1)
    voters = [Voters(PROTOCOL_K)]
    classify(bank[:1000], labels[:1000], queries[:8], truth.numpy()[:8], sizes.classes, voters, 0.07)  # loads libraries
    with open("/proc/self/clear_refs", "w") as file:  # the peak starts anew from here (Linux)
        file.write("5")
    before = _peak()
    classify(bank, labels, queries[:2048], truth.numpy()[:2048], sizes.classes, voters, 0.07)
    print(json.dumps({"before": before, "peak": _peak()}))


def _peak() -> int:
    """Most memory that this process has held, in bytes."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))


def linear_cases(sizes: Sizes) -> dict[str, Case]:
    """The products of 52 heads, and the whole step."""
    width, n_columns = sizes.width, len(LR_PER_256) * sizes.classes
    wide, labels = features(8 * sizes.batch, 5 * width, sizes.classes)
    ranges = {"cls": (3, 4), "cls+patch_mean": (3, 5), "cls_last4": (0, 4), "cls_last4+patch_mean": (0, 5)}
    slices = {name: slice(width * start, width * stop) for name, (start, stop) in ranges.items()}
    weights = {name: torch.randn(one.stop - one.start, n_columns) for name, one in slices.items()}
    logits, changes = (
        torch.empty(sizes.batch, n_columns),
        {name: torch.empty_like(one) for name, one in weights.items()},
    )

    def products() -> None:
        batch = wide[: sizes.batch]
        for _ in range(sizes.steps):
            for name, columns in slices.items():
                torch.mm(batch[:, columns], weights[name], out=logits)
                torch.mm(batch[:, columns].T, logits, out=changes[name])

    def take(rows: Tensor, _: int, columns: slice, out: Tensor) -> None:
        torch.index_select(wide[:, columns], 0, rows, out=out)

    def steps() -> None:
        rates = [lr * sizes.batch / 256 for lr in LR_PER_256]
        train_grid(take, slices, labels, sizes.classes, rates, steps=sizes.steps, batch=sizes.batch, seed=0)

    return {"products": products, "52 heads, whole steps": steps}


def logistic(sizes: Sizes) -> None:
    """Our path once, scikit-learn warm and cold once, and how the objectives compare at each C."""
    x, labels = features(sizes.fitted, sizes.width, sizes.classes)
    started = time.process_time()
    ours = fit_path(x, labels, sizes.classes, PROTOCOL_C)
    times = {"ours": time.process_time() - started}
    mine = [objective(x, labels, one.weight_KD, one.bias_K, one.C) for one in ours]
    worst: dict[str, float] = {}
    for name in ("scikit-learn, warm-started", "scikit-learn, cold"):
        model = LogisticRegression(tol=1e-6, max_iter=1000, warm_start="warm" in name)
        times[name], worst[name] = 0.0, -math.inf
        for one, value in zip(ours, mine, strict=True):
            model.C = one.C
            started = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.fit(x.numpy(), labels.numpy())
            times[name] += time.process_time() - started
            theirs = objective(x, labels, torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_), one.C)
            worst[name] = max(worst[name], value / theirs - 1)
    show(f"logistic regression, {sizes.fitted} x {sizes.width}, {sizes.classes} classes, 45 C", times, "ours")
    for name, excess in worst.items():
        print(f"  our objective, at the C where it is worst beside {name}: {excess:+.1e} (relative)")
    print(f"  {sum(one.iterations for one in ours)} iterations, {sum(one.products for one in ours)} products")
    print("  relative gradient by C: " + " ".join(f"{one.C:.0e}:{one.gradient:.0e}" for one in ours[::4]))


def objective(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, C: float) -> float:
    """Mean cross-entropy + |W|^2 / (2 C n), in double precision."""
    loss = torch.nn.functional.cross_entropy(x.double() @ weight.double().T + bias.double(), labels)
    return float(loss + weight.double().square().sum() / (2 * C * len(labels)))


def main(sizes: Sizes) -> None:
    """Measure and print."""
    torch.set_num_threads(sizes.threads)
    faiss.omp_set_num_threads(sizes.threads)
    threadpool_limits(sizes.threads)  # of NumPy's and SciPy's products, in which scikit-learn spends its time
    if sizes.measure_memory:
        print_memory(sizes)
        return
    if "start" in sizes.part:
        title = f"start of a second evaluator, {sizes.database} files"
        show(title, start_times(sizes.database, sizes.classes, sizes.rounds), "all three")
    if "knn" in sizes.part:
        title = f"k-NN, {sizes.queries} x {sizes.database} x {sizes.width}"
        show(title, compare(knn_cases(sizes), sizes), "product")
        again = [sys.executable, "-m", "benchmarks.evaluators", "--measure-memory"]
        again += ["--database", str(sizes.database), "--width", str(sizes.width), "--classes", str(sizes.classes)]
        again += ["--threads", str(sizes.threads)]
        found = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
        chunk = 4 * CHUNK_QUERIES * sizes.database
        print(f"  memory beyond the database: {(found['peak'] - found['before']) / chunk:.2f} chunks of similarities")
    if "linear" in sizes.part:
        show(f"linear grid, batch {sizes.batch}", compare(linear_cases(sizes), sizes), "products")
    if "logistic" in sizes.part:
        logistic(sizes)


if __name__ == "__main__":
    run_cli(lambda: main(tyro.cli(Sizes, prog="python -m benchmarks.evaluators", description=__doc__)))
