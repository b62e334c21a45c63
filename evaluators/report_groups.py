"""Result files in, groups that may be compared out: one evaluator, one version, the same data."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import InputError
from evaluators.compare import Scored, compare, load_scored, truth_of
from evaluators.results import SCHEMA, load_result

MAX_NAMED = 3
"""Files that an error names."""
OURS = "schema 'dinoscope."


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


def load_results(places: Sequence[Path], note: Callable[[str], None] = lambda _: None) -> list[Found]:
    """The results that files and folders hold. Raises InputError for a file that is none, and where there is none at all.

    In a folder what is no result is passed over, with a `note` unless it is ours (suite.json, comparisons); a result of
    another version of the schema is not.
    """
    found: list[Found] = []
    aliens: dict[Path, str] = {}
    for place in places:
        if place.is_dir():
            kinds = {path: _kind(path) for path in sorted(place.rglob("*.json"))}
            files = [path for path, kind in kinds.items() if kind.startswith(f"schema '{SCHEMA.split('/')[0]}/")]
            aliens |= {path: kind for path, kind in kinds.items() if path not in files}
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
        some = ", ".join(f"{path} ({kind})" for path, kind in list(aliens.items())[:MAX_NAMED])
        more = f" and {len(aliens) - MAX_NAMED} more" if len(aliens) > MAX_NAMED else ""
        came = f"; what is there is none: {some}{more}" if aliens else ""
        raise InputError(
            f"{', '.join(map(str, places))}: no result files{came}; wanted schema {SCHEMA!r}: run evaluators with --out, or the suite"
        )
    for path, kind in aliens.items():
        if not kind.startswith(OURS):
            note(f"{path} is no result of ours and was passed over: {kind}, wanted schema {SCHEMA!r}")
    return found


def _kind(path: Path) -> str:
    """The schema that a file names, or in words that it names none."""
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return "no readable JSON"
    schema = body.get("schema") if isinstance(body, dict) else None
    return f"schema {schema[:60]!r}" if isinstance(schema, str) else "no schema"


def group_results(found: Sequence[Found]) -> list[Group]:
    """Groups in the order in which their first result was given."""
    groups: dict[tuple[Any, ...], list[Found]] = {}
    for one in found:
        result = one.result
        key = (result["evaluator"], result["version"], result["headline"], truth_of(result))
        groups.setdefault(key, []).append(one)
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
