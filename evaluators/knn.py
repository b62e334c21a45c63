"""Features in, the weighted k-NN accuracy out (Wu et al. 2018; the protocol of DINO and DINOv2).

Cosine similarity; each of the k nearest training images votes for its class with weight exp(similarity / T). All k, and
with --n-per-class every try of every small training set, share one pass over the similarities.
Read in this order: KnnSpec, votes, classify, few_shot_voters, evaluate, run.
Legend: n training images, q test images, c of a chunk, k neighbours, C classes, D feature size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from data.errors import InputError, run_cli
from evaluators.accuracy import Guesses, accuracies, accuracy_metrics, mean_metric, rank_classes
from evaluators.bootstrap import drawn_groups
from evaluators.classification import (
    ClassificationRun,
    index_groups,
    index_labels,
    print_result,
    run_classification,
)
from evaluators.extract import FeatureTable
from evaluators.neighbours import in_parts, similarity_chunks, top_rows, unit_rows
from evaluators.presets import check_words, evaluator_cli
from evaluators.results import Measurement

VERSION = 1
PROTOCOL_K = (10, 20, 100, 200)
"""Neighbour counts of both papers."""
VOTE_BYTES = 2**19
"""Votes that are counted at a time."""
MIN_TEMPERATURE = 0.002
"""exp(1 / T) overflows double precision just below."""
MAX_SELECTION_QUERIES = 10_000
"""Training images (evenly spaced) that vote on k; more would cost as much as the test itself."""
Vote = Literal["exp", "softmax"]


@dataclass(frozen=True, kw_only=True)
class KnnSpec:
    """The k-NN protocol."""

    preset: Literal["dino", "dinov2"] = "dinov2"
    """Votes: dino, exp(similarity / T); dinov2, its softmax over the most neighbours asked for. Both elect the same."""
    k: tuple[int, ...] | None = None
    """Neighbour counts; left out: 10 20 100 200, cut to the number of training images."""
    temperature: float = 0.07
    """T of the vote exp(similarity / T)."""
    n_per_class: tuple[int, ...] = ()
    """Also measure with only so many training images a class; k is cut to that number, which is a k itself."""
    tries: int = 5
    """Random training sets for each of --n-per-class; try t is drawn with seed t, as published."""
    select_on: Literal["train", "val"] = "train"
    """Where the k of the headline is chosen: leave-one-out on the training images, or, as published, on the test."""

    def __post_init__(self) -> None:
        check_words(self)
        if not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise InputError(f"--temperature {self.temperature}: wanted at least {MIN_TEMPERATURE} (published: 0.07)")
        if self.k is not None and (not self.k or min(self.k) < 1):
            raise InputError(f"--k {' '.join(map(str, self.k)) or '(empty)'}: wanted whole numbers of at least 1")
        if min(self.n_per_class, default=1) < 1 or self.tries < 1:
            raise InputError("--n-per-class and --tries: wanted whole numbers of at least 1")

    @property
    def vote(self) -> Vote:
        """How a similarity becomes a vote."""
        return "exp" if self.preset == "dino" else "softmax"


def vote_weights(similarity_ck: Tensor, temperature: float, kind: Vote = "exp") -> Tensor:
    """Weight of each neighbour's vote, float64: exp(s / T) as DINO, or its softmax over the row as DINOv2.

    A row's softmax is its exp divided by one number, so both elect the same classes.
    """
    scaled = similarity_ck.double() / temperature
    return scaled.exp() if kind == "exp" else scaled.softmax(dim=1)


def votes(weights_ck: Tensor, labels_ck: Tensor, ks: tuple[int, ...], n_classes: int) -> Iterator[Tensor]:
    """Yield the class votes [c, C] for each k of the ascending `ks`; each is the one before with the neighbours that are new."""
    total_cC = torch.zeros(len(weights_ck), n_classes, dtype=weights_ck.dtype)
    counted = 0
    for k in ks:
        total_cC.scatter_add_(1, labels_ck[:, counted:k], weights_ck[:, counted:k])
        counted = k
        yield total_cC


@dataclass(frozen=True)
class Voters:
    """Training images that vote, and the ascending neighbour counts that are asked of them."""

    ks: tuple[int, ...]
    rows: Tensor | None = None
    """Rows of the training features; None: all."""


def classify(
    train_nD: Tensor,
    train_labels_n: Tensor,
    queries_qD: np.ndarray | Tensor,
    query_labels_q: np.ndarray,
    n_classes: int,
    voters: Sequence[Voters],
    temperature: float,
    vote: Vote = "exp",
    groups: tuple[Tensor, Tensor] | None = None,
) -> list[dict[int, Guesses]]:
    """Guesses for every query at every k, for each of `voters`; the training features have unit rows.

    `groups` of training images and queries: no image votes on a query of its own group.
    """
    chunks: list[dict[int, list[Guesses]]] = [{k: [] for k in some.ks} for some in voters]
    for start, similarity_cn in similarity_chunks(train_nD, queries_qD):
        truth = query_labels_q[start : start + len(similarity_cn)]
        if groups is not None:
            own = groups[1][start : start + len(similarity_cn), None] == groups[0][None, :]
            similarity_cn.masked_fill_(own, -torch.inf)
        for some, parts in zip(voters, chunks, strict=True):
            seen_cn = similarity_cn if some.rows is None else similarity_cn.index_select(1, some.rows)
            values, rows = top_rows(seen_cn, some.ks[-1])
            labels_ck = train_labels_n[rows if some.rows is None else some.rows[rows]]
            weights = vote_weights(values, temperature, vote)
            count = partial(_guesses, weights, labels_ck, truth, some.ks, n_classes)
            for guesses in in_parts(count, len(truth), max(1, VOTE_BYTES // (8 * n_classes))):
                for k, guess in zip(some.ks, guesses, strict=True):
                    parts[k].append(guess)
    return [{k: _joined(parts) for k, parts in by_k.items()} for by_k in chunks]


def _guesses(
    weights_ck: Tensor, labels_ck: Tensor, truth_c: np.ndarray, ks: tuple[int, ...], n_classes: int, part: slice
) -> list[Guesses]:
    """For each k, what a part of the queries elects: few at a time, so that their votes, read several times, stay in a core's cache."""
    counted = votes(weights_ck[part], labels_ck[part], ks, n_classes)
    tallies = (votes_cC.numpy() for votes_cC in counted)
    return [rank_classes(tally, truth_c[part], guessable_NC=tally > 0) for tally in tallies]


def _joined(parts: Sequence[Guesses]) -> Guesses:
    return Guesses(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("predicted_N", "rank_N")))


def few_shot_voters(labels_n: np.ndarray, n_per_class: int, tries: int, spec_ks: Sequence[int]) -> list[Voters]:
    """Random training sets of `n_per_class` images a class (all of a class that has fewer), one a try.

    As DINOv2 draws them: a fresh generator with seed t, one permutation a class in order; k is cut to `n_per_class`.
    Raises InputError where no class has so many.
    """
    largest = int(np.bincount(labels_n).max())
    if n_per_class > largest:
        raise InputError(f"--n-per-class {n_per_class}: the largest class has {largest} training images; name fewer")
    ks = tuple(sorted({k for k in spec_ks if k <= n_per_class} | {n_per_class}))
    members = [torch.from_numpy(np.flatnonzero(labels_n == label)) for label in np.unique(labels_n)]
    voters = []
    for seed in range(tries):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.cat([of[torch.randperm(len(of), generator=generator)[:n_per_class]] for of in members])
        voters.append(Voters(tuple(sorted({min(k, len(rows)) for k in ks})), rows))
    return voters


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
    """The k-NN accuracy of `test` against `train`, both with labels.

    Raises InputError for an impossible k, CheckFailed for features that are not finite.
    """
    ks, notes = neighbour_counts(spec, len(train))
    train_labels_n, test_labels_q, classes = index_labels(train, test)
    bank_nD, bank_labels_n = unit_rows(train.features), torch.from_numpy(train_labels_n)
    shots = {n: few_shot_voters(train_labels_n, n, spec.tries, spec.k or PROTOCOL_K) for n in spec.n_per_class}
    all_voters = [Voters(ks), *(one for tries in shots.values() for one in tries)]
    guesses, *few = classify(
        bank_nD, bank_labels_n, test.features, test_labels_q, len(classes), all_voters, spec.temperature, spec.vote
    )
    grid: list[dict[str, Any]] = [{"k": k, **accuracies(guesses[k], test_labels_q, len(classes))} for k in ks]
    left_out = _leave_one_out(bank_nD, train_labels_n, index_groups(train), len(classes), ks, spec)
    for entry, accuracy in zip(grid, left_out, strict=True):
        entry["train_left_out_top1"] = accuracy
    by = "train_left_out_top1" if spec.select_on == "train" else "top1"
    chosen = max(grid, key=lambda entry: entry[by])["k"]
    best = max(grid, key=lambda entry: entry["top1"])["k"]
    groups_q, too_few = drawn_groups(test.groups)
    metrics = accuracy_metrics(guesses[chosen], test_labels_q, len(classes), groups_q)
    metrics["top1_best_on_val"] = accuracy_metrics(guesses[best], test_labels_q, len(classes), groups_q)["top1"]
    for n in shots:
        of_n, few = few[: spec.tries], few[spec.tries :]
        hits_q = np.mean([by_k[max(by_k)].correct_N for by_k in of_n], axis=0)
        metrics[f"top1_{n}_per_class"] = mean_metric(hits_q, groups_q)
        grid += few_shot_entries(n, of_n)
    return Measurement(
        evaluator="knn",
        protocol=f"weighted k-NN, cosine, votes {spec.vote}(similarity / {spec.temperature:g}), all training images",
        version=VERSION,
        metrics=metrics,
        headline="top1",
        selected_on="train, leave-one-out" if spec.select_on == "train" else "val, as published",
        chosen={"k": chosen},
        grid=grid,
        settings=asdict(spec) | {"k": list(ks)},
        notes=notes + too_few,
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


def few_shot_entries(n_per_class: int, tries: Sequence[dict[int, Guesses]]) -> list[dict[str, Any]]:
    """Grid entries of one size of training set: mean and standard deviation of top-1 over its tries, for each k."""
    entries = []
    for k in tries[0]:
        top1 = [float(by_k[k].correct_N.mean()) for by_k in tries]
        entry: dict[str, Any] = {"k": k, "n_per_class": n_per_class, "tries": len(tries), "top1": float(np.mean(top1))}
        entries.append(entry | {"top1_std": float(np.std(top1, ddof=1)) if len(top1) > 1 else None})
    return entries


def _leave_one_out(
    bank_nD: Tensor,
    labels_n: np.ndarray,
    groups_n: np.ndarray,
    n_classes: int,
    ks: tuple[int, ...],
    spec: KnnSpec,
) -> list[float]:
    """Top-1 on training images, each judged by the others that are not of its group, for every k."""
    rows = np.unique(np.linspace(0, len(labels_n) - 1, min(len(labels_n), MAX_SELECTION_QUERIES)).astype(np.int64))
    groups = torch.from_numpy(groups_n)
    labels = torch.from_numpy(labels_n)
    queries_qD, between = bank_nD[rows], (groups, groups[rows])
    (guesses,) = classify(
        bank_nD, labels, queries_qD, labels_n[rows], n_classes, [Voters(ks)], spec.temperature, groups=between
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
    run_cli(lambda: evaluator_cli(main))
