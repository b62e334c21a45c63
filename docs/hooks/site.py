"""What the site has beside the written pages: a page of commands a room, and a page of Python a room, both made from the sources.

MkDocs calls `on_config`, then `on_files`. Nothing is written into the tree.
"""

import ast
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parent))
from commands import ROOT, find_commands, help_page, typed

ROOMS = ("data", "backbones", "runtimes", "training", "evaluators", "curation", "exports", "server")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out what is not there yet, and find a place for pages that nobody placed."""
    docs = Path(config.docs_dir)
    placed: set[str] = set()
    nav = [_existing(entry, docs, placed) for entry in config.nav or []]
    written = {str(path.relative_to(docs)) for path in docs.rglob("*.md")} - placed
    decisions = sorted(
        (page for page in written if page.startswith("decisions/")), key=lambda page: ("README" not in page, page)
    )
    others = sorted(written - set(decisions))
    nav.append({"Decisions": decisions})
    nav += [{"More": others}] if others else []
    config.nav = [entry for entry in nav if entry is not None]
    return config


def _existing(entry: Any, docs: Path, placed: set[str]) -> Any:
    """The part of a navigation entry whose pages exist, None if none does; notes the pages in `placed`."""
    if isinstance(entry, str):
        placed.add(entry)
        return entry if entry.startswith("reference/") or (docs / entry).exists() else None
    ((title, under),) = entry.items()
    if isinstance(under, str):
        return {title: under} if _existing(under, docs, placed) else None
    kept = [one for one in (_existing(one, docs, placed) for one in under) if one is not None]
    return {title: kept} if kept else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for room, modules in find_commands().items():
        files.append(File.generated(config, f"reference/commands-{room}.md", content=_commands_page(room, modules)))
    for room in ROOMS:
        files.append(File.generated(config, f"reference/python-{room}.md", content=_python_page(room)))
    return files


def _commands_page(room: str, modules: list[str]) -> str:
    parts = [
        f"# Commands: {room}",
        "",
        "Made from what `--help` prints. Run them as `.venv/bin/python ...`.",
    ]
    for module in modules:
        parts += ["", f"## `{typed(module)}`", "", help_page(module)]
    return "\n".join(parts) + "\n"


def _python_page(room: str) -> str:
    """The room's own docstring, then each module by mkdocstrings."""
    parts = [f"# Python: {room}", ""]
    for path in sorted((ROOT / room).glob("*.py")):
        if path.stem == "__main__" or ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None:
            continue
        module = room if path.stem == "__init__" else f"{room}.{path.stem}"
        parts += [f"::: {module}", ""]
    return "\n".join(parts)
