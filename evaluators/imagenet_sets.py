"""Other test sets for a classifier that was trained on ImageNet, as distributed; logits in, accuracies out.

    imagenet-v2:ROOT       ROOT/0 ... ROOT/999: the folder's number is a place among the sorted classes (of numbers: by size)
    imagenet-real:FILE     real.json, whose k-th entry lists the right classes of ILSVRC2012_val_(k+1): any of them counts,
                           images without any are skipped; the images are the test images themselves
    imagenet-a:ROOT        ROOT/WNID/* or ROOT/imagenet-a/WNID/*; answers are taken among the classes that occur (so is imagenet-r:ROOT)
    imagenet-sketch:ROOT   ROOT/WNID/* or ROOT/sketch/WNID/*
    imagenet-c:ROOT        ROOT/CORRUPTION/1..5/WNID/*; errors relative to AlexNet's, averaged (lower is better)

Read in this order: parse_sets, open_sets, score, measure_sets.
Legend: n images, C classes; of imagenet-c: G photographs, S strata (K corruptions x L severities), R resamples, M = 2 S columns.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from data.datasets import Dataset
from data.errors import InputError
from data.listings import IMAGE, Item, Record, images_under
from data.members import Member
from data.preprocess import Preprocess
from evaluators.accuracy import mean_metric
from evaluators.bootstrap import interval95
from evaluators.classification import NetworkOptions, progress_bar
from evaluators.combinations import wide
from evaluators.extract import ExtractSpec, extract
from evaluators.results import Measurement, Metric
from evaluators.splits import labelled, open_splits
from evaluators.view_batches import ViewSpec
from runtimes.open import open_runtime

Kind = Literal["v2", "real", "a", "r", "sketch", "c"]
ROWS_AT_ONCE = 8192
"""Images that are classified at a time."""
SEVERITIES = ("1", "2", "3", "4", "5")
ALEXNET_ERROR: dict[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Mean error of AlexNet over the severities of each corruption (Hendrycks and Dietterich 2019)."""
STRATA = tuple(f"{corruption}/{severity}" for corruption in ALEXNET_ERROR for severity in SEVERITIES)
UNPACKED: dict[Kind, str] = {
    "v2": "imagenetv2-matched-frequency-format-val",
    "a": "imagenet-a",
    "r": "imagenet-r",
    "sketch": "sketch",
}
"""Folder that a set's archive unpacks to."""
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ExtraSet:
    """A test set whose labels are indices of the trained classes."""

    kind: Kind
    dataset: Dataset
    answers: tuple[frozenset[int], ...]
    """For each image, the classes that count as right; none: the image is skipped."""
    among: tuple[int, ...] | None = None
    """Classes that answers are taken from; None: all."""
    strata: tuple[str, ...] = ()
    """For each image, its corruption and severity, one of `STRATA` (imagenet-c)."""
    originals: tuple[str, ...] = ()
    """For each image, the photograph that was corrupted, WNID/NAME (imagenet-c)."""
    notes: tuple[str, ...] = ()
    """What a reader must know of its answers."""

    def view(self, preprocess: Preprocess) -> ViewSpec:
        """Centre views; images of imagenet-c come cropped, and lose no margin."""
        return ViewSpec(resize_px=preprocess.size_px) if self.kind == "c" else ViewSpec()


@dataclass(frozen=True)
class Scores:
    """What a classifier made of one set or more."""

    metrics: dict[str, Metric]
    errors: dict[str, float]
    """By corruption (imagenet-c)."""
    predictions: dict[str, np.ndarray]
    """Of each set KIND, a row an image that has an answer: KIND_names, KIND_predicted (places among the trained classes) and KIND_correct;
    c_groups numbers the photographs that were corrupted."""
    notes: tuple[str, ...] = ()
    """What else a reader must know."""


def parse_sets(texts: Sequence[str]) -> dict[Kind, Path]:
    """`imagenet-KIND:PATH` of each text. Raises InputError for another form, a kind twice, or nothing there."""
    found: dict[Kind, Path] = {}
    for text in texts:
        name, colon, path = text.partition(":")
        kinds = {f"imagenet-{kind}": kind for kind in get_args(Kind)}
        if not colon or name not in kinds or kinds[name] in found:
            raise InputError(f"--test-data {text}: wanted NAME:PATH, each name once, with one of {', '.join(kinds)}")
        if not Path(path).exists():
            raise InputError(f"--test-data {text}: nothing at {path}")
        found[kinds[name]] = Path(path)
    return found


def open_set(kind: Kind, path: Path, classes: Sequence[str], test: Dataset) -> ExtraSet:
    """A set for a classifier with these (sorted) classes; `test` are the images it was tested on.

    Raises InputError where the set is not laid out as distributed, or names a class that was not trained on.
    """
    if kind == "real":
        return _open_real(path, classes, test)
    if kind == "c":
        return _open_corruptions(path, classes)
    nested = path / UNPACKED[kind]
    root = nested if nested.is_dir() else path
    folders = _class_folders(root)
    index = _by_position(folders, classes, root) if kind == "v2" else _by_name(folders, classes, root)
    records, answers = [], []
    for folder in folders:
        for image in images_under(folder):
            records.append(_record(image, root))
            answers.append(frozenset([index[folder.name]]))
    among = tuple(sorted(index.values())) if kind in ("a", "r") else None
    notes = _doubts(kind, classes) if kind == "v2" else ()
    return ExtraSet(kind, _dataset(records, root), tuple(answers), among, notes=notes)


def score(extra: ExtraSet, logits_nC: np.ndarray, rows: Sequence[int]) -> Scores:
    """Figures and guesses of one set; `rows` are those of the set behind the logits.

    Raises InputError where no image has an answer.
    """
    if extra.among is not None:
        allowed = np.full(logits_nC.shape[1], -np.inf)
        allowed[list(extra.among)] = 0
        logits_nC = logits_nC + allowed
    guessed_n = logits_nC.argmax(axis=1)
    asked = [place for place, row in enumerate(rows) if extra.answers[row]]
    if not asked:
        raise InputError(f"imagenet-{extra.kind}: no image has an answer; is it the file for these images?")
    right = np.array([guessed_n[place] in extra.answers[rows[place]] for place in asked])
    predictions = {
        f"{extra.kind}_names": np.array([extra.dataset.items[rows[place]].name for place in asked]),
        f"{extra.kind}_predicted": guessed_n[asked].astype(np.int64),
        f"{extra.kind}_correct": right,
    }
    if extra.kind != "c":
        return Scores({f"{extra.kind}_top1": mean_metric(right)}, {}, predictions, extra.notes)
    originals_n = np.unique([extra.originals[rows[place]] for place in asked], return_inverse=True)[1]
    strata_n = np.array([STRATA.index(extra.strata[rows[place]]) for place in asked])
    metric, errors = corruption_error(right, strata_n, originals_n)
    there = len(np.unique(strata_n))
    notes = () if there == len(STRATA) else (partial_note(there, list(errors)),)
    return Scores({"c_mce": metric}, errors, predictions | {"c_groups": originals_n}, notes)


def partial_note(there: int, corruptions: Sequence[str]) -> str:
    """What to say of an mCE over fewer than the fifteen corruptions at five severities, which no published figure is."""
    return (
        f"imagenet-c: c_mce is over {there} of the {len(STRATA)} corruptions and severities ({', '.join(corruptions)}); "
        "published figures are over all"
    )


def corruption_error(
    right_n: np.ndarray, strata_n: np.ndarray, originals_n: np.ndarray
) -> tuple[Metric, dict[str, float]]:
    """mCE with its interval, and the error of each corruption that occurs; `strata_n` are places in `STRATA`.

    The corruptions show the same photographs, `originals_n`: a resample draws photographs, each with all its corrupted copies. Drawn one
    by one, copies would count as so many independent images, and the interval would be too narrow.
    """
    # sums of each photograph at once: a row for each of 3.75 million copies would take 4.5 GB
    wrong_GS, copies_GS = np.zeros((2, int(originals_n.max()) + 1, len(STRATA)))
    np.add.at(wrong_GS, (originals_n, strata_n), ~right_n)
    np.add.at(copies_GS, (originals_n, strata_n), 1)
    sums_GM = np.concatenate([wrong_GS, copies_GS], axis=1)
    ci95 = interval95(sums_GM, lambda sums_RM: _relative(_errors(sums_RM)))
    errors_1K = _errors(sums_GM.sum(axis=0, keepdims=True))
    errors = {
        name: float(error) for name, error in zip(ALEXNET_ERROR, errors_1K[0], strict=True) if not np.isnan(error)
    }
    return Metric(float(_relative(errors_1K)[0]), ci95, len(right_n), lower_is_better=True), errors


def _errors(sums_RM: np.ndarray) -> np.ndarray:
    """Error of each corruption [R, K], the mean over its severities, from the wrong and all copies in each of the strata [R, 2 S]."""
    wrong_RKL, copies_RKL = sums_RM.reshape(len(sums_RM), 2, len(ALEXNET_ERROR), len(SEVERITIES)).swapaxes(0, 1)
    return _mean_of_finite(wrong_RKL, copies_RKL)


def _relative(errors_RK: np.ndarray) -> np.ndarray:
    """Mean over corruptions of the error relative to AlexNet's [R]."""
    return _mean_of_finite(errors_RK, np.array(list(ALEXNET_ERROR.values())))


def _mean_of_finite(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Mean along the last axis of `over / under`, without the quotients that do not exist; NaN where there is none."""
    with np.errstate(invalid="ignore"):
        shares = over / under
        exists = np.isfinite(shares)
        mean: np.ndarray = np.where(exists, shares, 0).sum(axis=-1) / exists.sum(axis=-1)
    return mean


def open_sets(
    paths: Mapping[Kind, Path], options: NetworkOptions, classes: Sequence[str] | None = None
) -> list[ExtraSet]:
    """The sets, for a classifier of these classes, or of all in `options.data`; nothing is decoded. Raises InputError."""
    splits = labelled(open_splits(options.data, options.train_split, options.val_split, options.group_by), options.data)
    named = {str(item.label) for part in (splits.train, splits.val) for item in part.items}
    return [open_set(kind, path, classes or sorted(named), splits.val) for kind, path in paths.items()]


def measure_sets(paths: Mapping[Kind, Path], options: NetworkOptions, measurement: Measurement) -> Scores:
    """What a measurement's linear classifier makes of all the sets."""
    weight_CD, bias_C = (torch.from_numpy(measurement.learned[name]) for name in ("weight", "bias"))
    name = measurement.chosen["features"]
    extras = open_sets(paths, options, measurement.learned["classes"].tolist())
    how = ExtractSpec(batch_size=options.batch_size, workers=options.workers, cache_dir=options.cache_dir)
    scores = Scores({}, {}, {})
    with open_runtime(options.ckpt, device=options.device, threads=options.threads) as runtime:
        for extra in extras:
            with progress_bar(f"imagenet-{extra.kind}") as progress:
                view = extra.view(runtime.manifest.preprocess)
                table = extract(runtime, extra.dataset, replace(how, view=view), progress)
            made = wide([table], [name])
            starts = range(0, len(table), ROWS_AT_ONCE)
            rows = [np.arange(start, min(start + ROWS_AT_ONCE, len(table))) for start in starts]
            logits = [made.take(some)[:, made.slices[name]] @ weight_CD.T + bias_C for some in rows]
            one = score(extra, torch.cat(logits).numpy(), table.rows)
            scores = Scores(
                scores.metrics | one.metrics,
                scores.errors | one.errors,
                scores.predictions | one.predictions,
                scores.notes + one.notes,
            )
    return scores


def _open_real(path: Path, classes: Sequence[str], test: Dataset) -> ExtraSet:
    try:
        lists = json.loads(path.read_text())
        answers_of = [frozenset(int(label) for label in labels) for labels in lists]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a list of label lists such as real.json ({type(error).__name__})") from error
    highest = max((max(labels) for labels in answers_of if labels), default=-1)
    _check_count(highest, classes, path)
    at, answers = _in_places(classes), []
    for item in test.items:
        number = _VAL_NUMBER.search(item.name)
        if number is None or not 1 <= int(number[1]) <= len(answers_of):
            raise InputError(
                f"imagenet-real: {item.name} is none of the {len(answers_of)} images of {path.name}; "
                "wanted ImageNet's own validation images, named ILSVRC2012_val_00000001 and so on"
            )
        answers.append(frozenset(at[place] for place in answers_of[int(number[1]) - 1]))
    return ExtraSet("real", test, tuple(answers), notes=_doubts("real", classes))


def _open_corruptions(root: Path, classes: Sequence[str]) -> ExtraSet:
    records, answers, strata, originals = [], [], [], []
    for corruption in ALEXNET_ERROR:
        # as distributed, corruptions lie in archives of their kind: noise/, blur/, weather/, digital/
        places = [root / corruption, *sorted(root.glob(f"*/{corruption}"))]
        for severity in SEVERITIES:
            folder = next((place / severity for place in places if (place / severity).is_dir()), None)
            if folder is None:
                continue
            folders = _class_folders(folder)
            index = _by_name(folders, classes, folder)
            for one in folders:
                for image in images_under(one):
                    records.append(_record(image, root))
                    answers.append(frozenset([index[one.name]]))
                    strata.append(f"{corruption}/{severity}")
                    originals.append(image.relative_to(folder).as_posix())
    if not records:
        raise InputError(f"{root}: no images; wanted CORRUPTION/1..5/WNID/*, such as fog/3/n01440764/*.JPEG")
    dataset = _dataset(records, root)
    return ExtraSet("c", dataset, tuple(answers), strata=tuple(strata), originals=tuple(originals))


def _class_folders(root: Path) -> list[Path]:
    folders = (
        sorted(one for one in root.iterdir() if one.is_dir() and not one.name.startswith(".")) if root.is_dir() else []
    )
    if not folders:
        raise InputError(f"{root}: no class folders in it; wanted the set as distributed")
    return folders


def _by_position(folders: Sequence[Path], classes: Sequence[str], root: Path) -> dict[str, int]:
    """Folders 0, 1, 10, ... to classes number 0, 1, 10, ...: sorting the folders' names would mislabel nearly all."""
    strange = [folder.name for folder in folders if not folder.name.isdigit()]
    if strange:
        raise InputError(f"{root}: folder {strange[0]!r} is no number; wanted 0 to 999, as distributed")
    _check_count(max(int(folder.name) for folder in folders), classes, root)
    at = _in_places(classes)
    return {folder.name: at[int(folder.name)] for folder in folders}


def _in_places(classes: Sequence[str]) -> list[int]:
    """Which class is at each place of ImageNet's order, that of the WordNet ids.

    Tar shards label by the place, and as text 10 comes before 2.
    """
    if all(name.isdecimal() for name in classes):
        return sorted(range(len(classes)), key=lambda number: int(classes[number]))
    return list(range(len(classes)))


def _doubts(kind: Kind, classes: Sequence[str]) -> tuple[str, ...]:
    """What to say where nothing tells that the classes are in ImageNet's order."""
    if all(name.isdecimal() for name in classes) or all(_WNID.fullmatch(name) for name in classes):
        return ()
    return (
        f"imagenet-{kind} counts classes in the order of their WordNet ids, and the labels here are neither those nor numbers (such as "
        f"{classes[0]!r}): its figure is right only if they sort in the same order",
    )


def _by_name(folders: Sequence[Path], classes: Sequence[str], root: Path) -> dict[str, int]:
    known: Mapping[str, int] = {name: number for number, name in enumerate(classes)}
    strange = [folder.name for folder in folders if folder.name not in known]
    if strange:
        raise InputError(
            f"{root}: {len(strange)} folders are no trained class, first {strange[0]!r}; "
            f"the classifier knows {classes[0]!r} and {len(classes) - 1} more"
        )
    return {folder.name: known[folder.name] for folder in folders}


def _check_count(highest: int, classes: Sequence[str], path: Path) -> None:
    if highest >= len(classes):
        raise InputError(
            f"{path}: it counts to class {highest}, and the classifier has {len(classes)}; wanted one trained on all classes"
        )


def _record(image: Path, root: Path) -> Record:
    return Record(Item(image.relative_to(root).as_posix()), {IMAGE: Member(str(image))})


def _dataset(records: Sequence[Record], root: Path) -> Dataset:
    if not records:
        raise InputError(f"{root}: no images in its class folders")
    return Dataset(records, name=str(root))
