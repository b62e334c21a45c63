"""Two results of the same test images in, how sure we are that one network is better: paired, image by image.

The difference of the mean score has a bootstrap interval over the same resamples of the same images; groups of images that belong together
are drawn as a whole. Where scores are right or wrong, McNemar's exact test counts the images on which the networks disagree; it takes
images as independent.
Read in this order: compare, paired, mcnemar_exact.
Legend: N test items.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from data.errors import InputError, run_cli
from evaluators.bootstrap import drawn_groups, mean_interval95
from evaluators.classification import summary
from evaluators.results import check_writable, load_predictions, load_result, replacing

SCHEMA = "dinoscope.comparison/1"
MEASURED = ("corruption_errors",)
"""Kept among the settings of a result, though it is none."""


@dataclass(frozen=True)
class Scored:
    """A result and its scores, one a test item."""

    path: Path
    result: dict[str, Any]
    predictions: dict[str, np.ndarray]

    @property
    def title(self) -> str:
        """The network, for people."""
        model = self.result["model"]
        return f"{model.get('ckpt', self.path.stem)} ({model.get('runtime', '?')})"


def load_scored(path: Path) -> Scored:
    """A result file with its predictions. Raises InputError."""
    result = load_result(path)
    predictions = load_predictions(path, result)
    kinds = further_kinds(predictions)
    lacking = {"names", "score", "groups", *(f"{kind}_names" for kind in kinds)} - predictions.keys()
    if lacking:
        raise InputError(f"{path}: its predictions hold no {', '.join(sorted(lacking))}; run the evaluator again")
    tables = [("names", "score", "groups"), *((f"{kind}_names", f"{kind}_correct", f"{kind}_groups") for kind in kinds)]
    shapes = [{predictions[key].shape for key in keys if key in predictions} for keys in tables]
    if any(len(found) != 1 or len(next(iter(found))) != 1 for found in shapes):
        raise InputError(f"{path}: its predictions are of different lengths; run the evaluator again")
    return Scored(path, result, predictions)


def further_kinds(predictions: Mapping[str, np.ndarray]) -> list[str]:
    """The further test sets that a result holds guesses of (`imagenet_sets`)."""
    return [key.removesuffix("_correct") for key in predictions if key.endswith("_correct")]


def compare(a: Scored, b: Scored) -> dict[str, Any]:
    """B minus A on the same test items. Raises InputError where the results are of different data or protocols."""
    refuse_unlike(a, b)
    order_a, order_b = (np.argsort(one.predictions["names"], kind="stable") for one in (a, b))
    score_a, score_b = a.predictions["score"][order_a], b.predictions["score"][order_b]
    groups, _ = drawn_groups(a.predictions["groups"][order_a])
    headline = a.result["headline"]
    # Higher scores may be worse, as an error of depth is.
    lower = bool(a.result["metrics"][headline].get("lower_is_better"))
    compared = {"score": paired(score_a, score_b, groups)}
    if all("rank" in one.predictions for one in (a, b)):
        within = [(one.predictions["rank"][order] < 5).astype(float) for one, order in ((a, order_a), (b, order_b))]
        compared["top5"] = paired(within[0], within[1], groups)
    further, unlike = pair_further_sets(a, b)
    shared = [name for name in a.result["metrics"] if name in b.result["metrics"]]
    return {
        "schema": SCHEMA,
        "evaluator": a.result["evaluator"],
        "data": {"source": a.result["data"]["source"], "fingerprint": a.result["data"]["fingerprint"]},
        "a": {"file": str(a.path), "model": a.result["model"]},
        "b": {"file": str(b.path), "model": b.result["model"]},
        "headline": headline,
        "lower_is_better": lower,
        "metrics": {name: metric_pair(a.result, b.result, name) for name in shared},
        "paired": compared | further,
        "not_paired": unlike,
        "settings_differ": differing_settings(a.result["settings"], b.result["settings"]),
        "n_groups": len(np.unique(groups)),
        "score_is_headline": all(
            math.isclose(score.mean(dtype=np.float64), one.result["metrics"][headline]["value"], abs_tol=1e-5)
            for score, one in ((score_a, a), (score_b, b))
        ),
        "verdict": verdict(compared["score"], lower),
    }


def pair_further_sets(a: Scored, b: Scored) -> tuple[dict[str, Any], list[str]]:
    """Shares of right answers on further test sets of both results, by KIND_top1, and the sets of which they scored different images.

    Such a set's rows are KIND_names and KIND_correct, and KIND_groups where images belong together.
    """
    found: dict[str, Any] = {}
    unlike: list[str] = []
    for kind in [kind for kind in further_kinds(a.predictions) if kind in further_kinds(b.predictions)]:
        order_a, order_b = (np.argsort(one.predictions[f"{kind}_names"], kind="stable") for one in (a, b))
        if not np.array_equal(a.predictions[f"{kind}_names"][order_a], b.predictions[f"{kind}_names"][order_b]):
            unlike.append(kind)
            continue
        score_a, score_b = a.predictions[f"{kind}_correct"][order_a], b.predictions[f"{kind}_correct"][order_b]
        groups = a.predictions.get(f"{kind}_groups", np.arange(len(order_a)))[order_a]
        pair = paired(score_a.astype(float), score_b.astype(float), groups)
        found[f"{kind}_top1"] = pair | {"n_groups": len(np.unique(groups))}
    return found, unlike


def differing_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Settings in which two results differ, so that what is compared is more than their networks."""
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key) and key not in MEASURED)


def truth_of(result: Mapping[str, Any]) -> str:
    """What tells the images of a result, and what is true of them, from those of others."""
    data = result["data"]
    return json.dumps([data["fingerprint"], data.get("truth_fingerprint")], sort_keys=True)


def refuse_unlike(a: Scored, b: Scored) -> None:
    """Raise InputError where two results do not measure the same thing on the same items."""
    for what, of_a, of_b in (
        ("evaluator", a.result["evaluator"], b.result["evaluator"]),
        ("version of the protocol", a.result["version"], b.result["version"]),
        ("headline", a.result["headline"], b.result["headline"]),
    ):
        if of_a != of_b:
            raise InputError(f"{a.path} and {b.path}: {what} {of_a!r} and {of_b!r}; compare results of the same kind")
    if truth_of(a.result) != truth_of(b.result):
        raise InputError(
            f"{a.path} and {b.path} are of different data ({a.result['data']['source']}, {b.result['data']['source']}); "
            "evaluate both networks on the same images, splits and labels, masks or depth"
        )
    names_a, names_b = (set(one.predictions["names"].tolist()) for one in (a, b))
    if len(names_a) != len(a.predictions["names"]) or len(names_b) != len(b.predictions["names"]):
        raise InputError(f"{a.path} and {b.path}: a test item occurs twice, so that pairs cannot be made")
    if names_a != names_b:
        odd = sorted(names_a ^ names_b)
        raise InputError(
            f"{a.path} and {b.path} score different test items ({len(odd)} are in one only, first {odd[0]!r}); "
            "evaluate both on the same readable images"
        )


def metric_pair(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One metric of both results."""
    of_a, of_b = a["metrics"][name], b["metrics"][name]
    return {
        "a": of_a["value"],
        "b": of_b["value"],
        "difference": of_b["value"] - of_a["value"],
        "unit": of_a.get("unit"),
    }


def paired(a_N: np.ndarray, b_N: np.ndarray, groups_N: np.ndarray | None = None) -> dict[str, Any]:
    """Mean of b minus a with its 95 % interval; where both are 0 or 1, also McNemar's test."""
    difference_N = b_N.astype(np.float64) - a_N.astype(np.float64)
    if not np.isfinite(difference_N).all():
        raise InputError(f"{int((~np.isfinite(difference_N)).sum())} scores are not finite; run the evaluators again")
    found: dict[str, Any] = {
        "a": float(a_N.mean(dtype=np.float64)),
        "b": float(b_N.mean(dtype=np.float64)),
        "difference": float(difference_N.mean()),
        "ci95": list(mean_interval95(difference_N, groups_N)),
        "n": len(difference_N),
    }
    if np.isin(a_N, (0, 1)).all() and np.isin(b_N, (0, 1)).all():
        only_a, only_b = int((difference_N < 0).sum()), int((difference_N > 0).sum())
        found["mcnemar"] = {"only_a_right": only_a, "only_b_right": only_b, "p": mcnemar_exact(only_a, only_b)}
    return found


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test: of the items on which two classifiers disagree each is as likely to be right.

    Twice the binomial tail of the smaller count, at most 1 (McNemar 1947; Fay 2010).
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    # The largest of the terms is taken out of the sum, or it would be 0 for thousands of items.
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(fewer + 1)
    ]
    highest = max(logs)
    return min(1.0, 2 * math.exp(highest) * math.fsum(math.exp(one - highest) for one in logs))


def verdict(score: Mapping[str, Any], lower_is_better: bool) -> str:
    """Which network is better, in one word: `a`, `b`, or `neither` where the interval holds 0."""
    low, high = score["ci95"]
    if low <= 0 <= high:
        return "neither"
    return "b" if (low > 0) != lower_is_better else "a"


def table(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    lines = [f"{found['evaluator']} on {found['data']['source']}"]
    lines += [f"{side.upper()}: {found[side]['model'].get('ckpt')} ({found[side]['file']})" for side in "ab"]
    names = [*found["metrics"], "metric"]
    width = max(map(len, names))
    lines.append(f"{'metric':<{width}}  {'A':>9}  {'B':>9}  {'B - A':>9}")
    for name, one in found["metrics"].items():
        lines.append(
            f"{name:<{width}}  {one['a']:>9.4f}  {one['b']:>9.4f}  {one['difference']:>+9.4f}  {one['unit'] or ''}".rstrip()
        )
    for name, one in found["paired"].items():
        what = "mean score" if name == "score" else name
        lines.append(
            f"paired {what}: B - A {one['difference']:+.4f}, 95 % {one['ci95'][0]:+.4f} .. {one['ci95'][1]:+.4f} "
            f"(n {one['n']}, bootstrap over {one.get('n_groups', found['n_groups'])} groups)"
        )
        if "mcnemar" in one:
            test = one["mcnemar"]
            lines.append(
                f"McNemar {what}: only A right {test['only_a_right']}, only B right {test['only_b_right']}, exact p {test['p']:.3g}"
            )
    if not found["score_is_headline"]:
        lines.append(f"note: {found['headline']} is no mean over test items; the verdict is about the mean score")
    if found["settings_differ"]:
        lines.append(
            f"note: measured with other settings ({', '.join(found['settings_differ'])}): not the networks alone are compared"
        )
    if found["not_paired"]:
        lines.append(f"note: not paired, as different images were scored: {', '.join(found['not_paired'])}")
    better = {"a": "A is better", "b": "B is better", "neither": "no difference beyond chance"}[found["verdict"]]
    return "\n".join([*lines, f"verdict (95 %): {better}"])


def main(
    a: Annotated[Path, tyro.conf.Positional], b: Annotated[Path, tyro.conf.Positional], out: Path | None = None
) -> None:
    """Compare two results of one evaluator on the same test images.

    Args:
        a: A result file, as an evaluator writes it with --out.
        b: Another one, of another network.
        out: Write the comparison to this .json file.
    """
    if out is not None:
        if out.resolve() in (a.resolve(), b.resolve()):
            raise InputError(
                f"--out {out}: is one of the results that are compared, and would be lost; name another file"
            )
        check_writable(out, "--out", ".json")
    found = compare(load_scored(a), load_scored(b))
    print(table(found))
    if out is not None:
        try:
            with replacing(out) as path:
                path.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"--out {out}: cannot write there ({error.strerror}); name another place") from error
        print(f"written: {out}")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main, prog="python -m evaluators.compare", description=summary(__doc__)))
