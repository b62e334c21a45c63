"""Features in, the weighted k-NN accuracy out (Wu et al. 2018; the protocol of DINO and DINOv2).

Cosine similarity; each of the k nearest training images votes for its class with weight exp(similarity / T). All k
share one search and one pass over the votes. Read in this order: nearest, votes, evaluate, run.
Legend: n training images, q test images, k neighbours, C classes, D feature size.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from data.errors import InputError, run_cli
from evaluators.accuracy import Guesses, accuracies, accuracy_metrics, rank_classes
from evaluators.classification import (
    ClassificationRun,
    index_groups,
    index_labels,
    print_result,
    run_classification,
    summary,
)
from evaluators.extract import FeatureTable
from evaluators.results import Measurement

VERSION = 1
PROTOCOL_K = (10, 20, 100, 200)
"""Neighbour counts of both papers."""
MIN_TEMPERATURE = 0.002
"""exp(1 / T) overflows double precision just below."""
CHUNK_BYTES = 128 * 2**20
"""Largest block of similarities held at a time; beside it memory holds the normalised training features."""
MAX_SELECTION_QUERIES = 10_000
"""Training images (evenly spaced) that vote on k; more would cost as much as the test itself."""


@dataclass(frozen=True, kw_only=True)
class KnnSpec:
    """The k-NN protocol."""

    k: tuple[int, ...] | None = None
    """Neighbour counts; left out: 10 20 100 200, cut to the number of training images."""
    temperature: float = 0.07
    """T of the vote exp(similarity / T)."""
    select_on: Literal["train", "val"] = "train"
    """Where the k of the headline is chosen: leave-one-out on the training images, or, as published, on the test."""

    def __post_init__(self) -> None:
        if not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise InputError(f"--temperature {self.temperature}: wanted at least {MIN_TEMPERATURE} (published: 0.07)")
        if self.k is not None and (not self.k or min(self.k) < 1):
            raise InputError(f"--k {' '.join(map(str, self.k)) or '(empty)'}: wanted whole numbers of at least 1")


def nearest(
    train_nD: Tensor,
    queries_qD: Tensor,
    k: int,
    train_groups_n: Tensor | None = None,
    query_groups_q: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, chunk by chunk of queries, the similarities [c, k] and rows [c, k] of the k nearest, nearest first.

    Rows of both inputs have unit length. Equal similarities are ordered by row, also at the k-th place, so results do
    not depend on how the search is cut. Training images of the query's own group are passed over (similarity -inf).
    """
    chunk = max(1, min(1024, CHUNK_BYTES // (4 * max(1, len(train_nD)))))
    for start in range(0, len(queries_qD), chunk):
        similarity = queries_qD[start : start + chunk] @ train_nD.T
        if train_groups_n is not None and query_groups_q is not None:
            own = query_groups_q[start : start + chunk, None] == train_groups_n[None, :]
            similarity.masked_fill_(own, -torch.inf)
        yield _stable_topk(similarity, k)


def _stable_topk(similarity_cn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, largest first, lowest column first among equals."""
    n = similarity_cn.shape[1]
    values, rows = similarity_cn.topk(min(k + 1, n), dim=1)
    if n > k:
        # topk may keep either of two equals; where the last kept equals the first left out, rank the row in full.
        tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
        values, rows = values[:, :k].contiguous(), rows[:, :k].contiguous()
        for i in tied.tolist():
            rows[i] = similarity_cn[i].sort(descending=True, stable=True).indices[:k]
            values[i] = similarity_cn[i, rows[i]]
    rows, order = rows.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, rows.gather(1, order)


def vote_weights(similarity_ck: Tensor, temperature: float, kind: Literal["exp", "softmax"] = "exp") -> Tensor:
    """Weight of each neighbour's vote, float64: exp(s / T) as DINO, or its softmax over the row as DINOv2.

    A row's softmax is its exp divided by one number, so both elect the same classes.
    """
    scaled = similarity_ck.double() / temperature
    return scaled.exp() if kind == "exp" else scaled.softmax(dim=1)


def votes(weights_ck: Tensor, labels_ck: Tensor, ks: tuple[int, ...], n_classes: int) -> Iterator[Tensor]:
    """Yield the class votes [c, C] for each k of the ascending `ks`; each adds only the neighbours that are new."""
    total_cC = torch.zeros(len(weights_ck), n_classes, dtype=weights_ck.dtype)
    counted = 0
    for k in ks:
        total_cC = total_cC.scatter_add(1, labels_ck[:, counted:k], weights_ck[:, counted:k])
        counted = k
        yield total_cC


def classify(
    train_nD: Tensor,
    train_labels_n: Tensor,
    queries_qD: Tensor,
    query_labels_q: np.ndarray,
    n_classes: int,
    ks: tuple[int, ...],
    temperature: float,
    groups: tuple[Tensor, Tensor] | None = None,
) -> dict[int, Guesses]:
    """Guesses for every query at every k of the ascending `ks`; features have unit rows. `groups`: see `nearest`."""
    chunks: dict[int, list[Guesses]] = {k: [] for k in ks}
    start = 0
    for similarity, rows in nearest(train_nD, queries_qD, ks[-1], *(groups or (None, None))):
        weights = vote_weights(similarity, temperature)
        labels = query_labels_q[start : start + len(rows)]
        for k, votes_cC in zip(ks, votes(weights, train_labels_n[rows], ks, n_classes), strict=True):
            tally = votes_cC.numpy()
            chunks[k].append(rank_classes(tally, labels, guessable_NC=tally > 0))
        start += len(rows)
    return {
        k: Guesses(
            np.concatenate([part.predicted_N for part in parts]), np.concatenate([part.rank_N for part in parts])
        )
        for k, parts in chunks.items()
    }


def unit_rows(features_nD: np.ndarray) -> Tensor:
    """A copy with rows of length 1; an all-zero row stays zero and is equally far from everything."""
    return torch.nn.functional.normalize(torch.tensor(features_nD, dtype=torch.float32), dim=1)


def neighbour_counts(spec: KnnSpec, n_train: int) -> tuple[tuple[int, ...], list[str]]:
    """The k values in ascending order, with notes. Raises InputError for a k asked for above n."""
    if spec.k is not None:
        if max(spec.k) > n_train:
            raise InputError(f"--k {max(spec.k)}: there are only {n_train} training images; name a smaller k")
        return tuple(sorted(set(spec.k))), []
    ks = tuple(sorted({min(k, n_train) for k in PROTOCOL_K}))
    cut = [k for k in PROTOCOL_K if k > n_train]
    return ks, [f"k = {', '.join(map(str, cut))} cut to the {n_train} training images"] if cut else []


def evaluate(train: FeatureTable, test: FeatureTable, spec: KnnSpec = KnnSpec()) -> Measurement:
    """The k-NN accuracy of `test` against `train`, both with labels. Raises InputError for an impossible k."""
    ks, notes = neighbour_counts(spec, len(train))
    train_labels_n, test_labels_q, classes = index_labels(train, test)
    bank_nD = unit_rows(train.features)
    bank_labels_n = torch.from_numpy(train_labels_n)
    guesses = classify(
        bank_nD, bank_labels_n, unit_rows(test.features), test_labels_q, len(classes), ks, spec.temperature
    )
    grid: list[dict[str, Any]] = [{"k": k, **accuracies(guesses[k], test_labels_q, len(classes))} for k in ks]
    left_out = _leave_one_out(bank_nD, train_labels_n, index_groups(train), len(classes), ks, spec.temperature)
    for entry, accuracy in zip(grid, left_out, strict=True):
        entry["train_left_out_top1"] = accuracy
    by = "train_left_out_top1" if spec.select_on == "train" else "top1"
    chosen = max(grid, key=lambda entry: entry[by])["k"]
    best = max(grid, key=lambda entry: entry["top1"])["k"]
    groups_q = index_groups(test)
    metrics = accuracy_metrics(guesses[chosen], test_labels_q, len(classes), groups_q)
    metrics["top1_best_on_val"] = accuracy_metrics(guesses[best], test_labels_q, len(classes), groups_q)["top1"]
    return Measurement(
        evaluator="knn",
        protocol=f"weighted k-NN, cosine, votes exp(similarity / {spec.temperature:g}), all training images",
        version=VERSION,
        metrics=metrics,
        headline="top1",
        selected_on="train, leave-one-out" if spec.select_on == "train" else "val, as published",
        chosen={"k": chosen},
        grid=grid,
        settings=asdict(spec) | {"k": list(ks)},
        notes=notes,
        predictions={
            "names": np.array(test.names),
            "labels": test_labels_q,
            "predicted": guesses[chosen].predicted_N,
            "rank": guesses[chosen].rank_N,
            "score": guesses[chosen].correct_N.astype(np.float32),
            "groups": groups_q,
            "classes": np.array(classes),
        },
    )


def _leave_one_out(
    bank_nD: Tensor,
    labels_n: np.ndarray,
    groups_n: np.ndarray,
    n_classes: int,
    ks: tuple[int, ...],
    temperature: float,
) -> list[float]:
    """Top-1 on training images, each judged by the others that are not of its group, for every k."""
    rows = np.unique(np.linspace(0, len(labels_n) - 1, min(len(labels_n), MAX_SELECTION_QUERIES)).astype(np.int64))
    groups = torch.from_numpy(groups_n)
    guesses = classify(
        bank_nD,
        torch.from_numpy(labels_n),
        bank_nD[rows],
        labels_n[rows],
        n_classes,
        ks,
        temperature,
        (groups, groups[rows]),
    )
    return [float(guesses[k].correct_N.mean()) for k in ks]


def run(options: ClassificationRun, spec: KnnSpec = KnnSpec()) -> dict[str, Any]:
    """Evaluate `options.ckpt` (and its baselines) on `options.data`; returns the result, written where asked."""
    result, _ = run_classification(options, lambda train, test: evaluate(train, test, spec))
    return result


def main(
    options: Annotated[ClassificationRun, tyro.conf.arg(name="")], spec: Annotated[KnnSpec, tyro.conf.arg(name="")]
) -> None:
    """Weighted k-NN accuracy of a frozen network on a labelled image set."""
    print_result(run(options, spec), options.out)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m evaluators.knn", description=summary(__doc__)))
