"""Result files in, groups that may be compared out: one evaluator, one version, the same data."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import InputError
from evaluators.compare import Scored, compare, load_scored
from evaluators.results import SCHEMA, load_result


@dataclass(frozen=True)
class Found:
    """A result file; its scores too, where they can be read."""

    path: Path
    result: dict[str, Any]
    scored: Scored | None

    @property
    def network(self) -> str:
        """What tells it from others, for people: the checkpoint's name, and the engine where it is not torch."""
        model = self.result["model"]
        ckpt, engine = str(model.get("ckpt", self.path.stem)), str(model.get("runtime", ""))
        name = ckpt if "://" in ckpt else Path(ckpt).name
        return name if engine in ("", "torch") else f"{name} ({engine})"


@dataclass(frozen=True)
class Group:
    """Results of one evaluator, in one version, on the same data; the best headline first."""

    evaluator: str
    source: str
    found: tuple[Found, ...]
    anchor: str
    """Its place on the page."""

    @property
    def best(self) -> Found:
        return self.found[0]


def load_results(places: Sequence[Path]) -> list[Found]:
    """The results that files and folders hold. Raises InputError for a file that is none, and where there is none at all.

    In a folder what is no result (suite.json, comparisons) is passed over; a result of another schema is not.
    """
    found = []
    for place in places:
        if place.is_dir():
            files = [path for path in sorted(place.rglob("*.json")) if _is_result(path)]
        elif place.is_file():
            files = [place]
        else:
            raise InputError(f"{place}: nothing there; name result files or folders of them")
        for path in files:
            result = load_result(path)
            try:
                scored = load_scored(path)
            except InputError:
                scored = None
            found.append(Found(path, result, scored))
    if not found:
        raise InputError(f"{', '.join(map(str, places))}: no result files; run evaluators with --out, or the suite")
    return found


def _is_result(path: Path) -> bool:
    try:
        body = json.loads(path.read_text())
        return isinstance(body, dict) and str(body.get("schema", "")).split("/")[0] == SCHEMA.split("/")[0]
    except (OSError, ValueError, RecursionError):
        return False


def group_results(found: Sequence[Found]) -> list[Group]:
    """Groups in the order in which their first result was given."""
    groups: dict[tuple[Any, ...], list[Found]] = {}
    for one in found:
        result = one.result
        fingerprint = json.dumps(result["data"]["fingerprint"], sort_keys=True)
        groups.setdefault((result["evaluator"], result["version"], result["headline"], fingerprint), []).append(one)
    made: list[Group] = []
    for (evaluator, *_), members in groups.items():
        headline = members[0].result["headline"]
        lower = bool(members[0].result["metrics"][headline].get("lower_is_better"))
        members.sort(key=lambda one: one.result["metrics"][headline]["value"] * (1 if lower else -1))
        made.append(Group(evaluator, members[0].result["data"]["source"], tuple(members), f"part-{len(made) + 1}"))
    return made


def against_best(group: Group) -> dict[Path, dict[str, Any]]:
    """Each other result compared with the best; absent where that cannot be done."""
    compared = {}
    for one in group.found[1:]:
        if one.scored is not None and group.best.scored is not None:
            try:
                compared[one.path] = compare(group.best.scored, one.scored)
            except InputError:
                continue
    return compared
