"""Result files in, groups that may be compared out: one evaluator, one version, the same data."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.errors import InputError
from evaluators.compare import Scored, compare, load_scored, truth_of
from evaluators.results import SCHEMA, load_result
from evaluators.suite import read_suite

MAX_NAMED = 3
"""Files that an error names."""
MAX_SETTING_CHARS = 40
"""Longer settings are no name for a row."""
OURS = "schema 'dinoscope."


@dataclass(frozen=True)
class Found:
    """A result file; its scores too, where they can be read."""

    path: Path
    result: dict[str, Any]
    scored: Scored | None
    network: str = ""
    """What tells its network from others, for people: the checkpoint's name, and the engine where it is not torch."""
    apart: str = ""
    """What tells it from other results of its network in one group: the settings that differ; else its file."""

    @property
    def label(self) -> str:
        """Its network, and what was set."""
        return f"{self.network}, {self.apart}" if self.apart else self.network


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


def failed_since(path: Path) -> list[str]:
    """What a result has to say where the suite in its folder could not measure it again, and left what an earlier run had made."""
    record = read_suite(path.parent / "suite.json").get("entries", {}).get(path.name, {})
    if record.get("status") != "failed":
        return []
    return [f"of an earlier run: when the suite last ran, this evaluator failed ({record.get('reason')})"]


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
            result["notes"] += failed_since(path)
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
    names = name_networks([{"ckpt": one.path.stem} | one.result["model"] for one in found])
    found = [replace(one, network=name) for one, name in zip(found, names, strict=True)]
    for path, kind in aliens.items():
        if not kind.startswith(OURS):
            note(f"{path} is no result of ours and was passed over: {kind}, wanted schema {SCHEMA!r}")
    return found


def name_networks(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each network: its file's, with as many folders before it as tell it from networks of other weights.

    Where one place held two networks, one after the other, the weights' hash tells them apart.
    """
    ckpts, weights = ([str(model.get(key, "")) for model in models] for key in ("ckpt", "weights_sha256"))
    names = []
    for model, ckpt, own in zip(models, ckpts, weights, strict=True):
        others = {one for one, held in zip(ckpts, weights, strict=True) if held != own}
        n_parts = len(Path(ckpt).parts)
        tails = (_tail(ckpt, parts) for parts in range(1, n_parts + 1))
        name = next(
            (tail for parts, tail in enumerate(tails, start=1) if all(_tail(one, parts) != tail for one in others)),
            f"{_tail(ckpt, n_parts)} {own[:8]}",
        )
        engine = str(model.get("runtime", ""))
        names.append(name if engine in ("", "torch") else f"{name} ({engine})")
    return names


def _tail(ckpt: str, parts: int) -> str:
    """The last parts of a path; addresses as they are."""
    return ckpt if "://" in ckpt else "/".join(Path(ckpt).parts[-parts:])


def tell_apart(members: Sequence[Found]) -> list[Found]:
    """The same, those of one network with what sets them apart: as few settings as do, else their files."""
    told = []
    for one in members:
        others = [other for other in members if other.network == one.network and other is not one]
        words: list[str] = []
        for key, value in one.result["settings"].items():
            left = [other for other in others if other.result["settings"].get(key) == value]
            if len(left) < len(others) and len(said := _in_words(key, value)) <= MAX_SETTING_CHARS:
                words.append(said)
                others = left
        told.append(replace(one, apart=", ".join([*words, one.path.name] if others else words)))
    return told


def _in_words(key: str, value: Any) -> str:
    shown = " ".join(map(str, value)) if isinstance(value, list) else value
    return f"no {key}" if value is None else f"{key} {shown}"


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
        made.append(
            Group(evaluator, members[0].result["data"]["source"], tuple(tell_apart(members)), f"part-{len(made) + 1}")
        )
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
