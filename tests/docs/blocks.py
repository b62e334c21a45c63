"""The fenced blocks of the README and of docs/, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
)
SHELL = ("sh", "bash", "console", "shell")
PYTHON = ("python", "py")
INERT = ("text", "json", "toml", "yaml", "ini", "promql", "html", "csv", "dockerfile")
"""Shown, not run."""
_FENCE = re.compile(r"^(?P<indent>[ >]*)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```\s*$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its first line within."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A simple command, its variables filled in, without redirections."""

    where: str
    words: tuple[str, ...]


def blocks_of(page: str, text: str | None = None) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    found = []
    for match in _FENCE.finditer(text):
        inside = re.sub(rf"^{re.escape(match['indent'])}", "", match["text"], flags=re.M)
        found.append(Block(page, text[: match.start("text")].count("\n") + 1, match["language"], inside))
    return found


def commands_of(blocks: list[Block]) -> list[Command]:
    """Every simple command of a page's shell blocks; variables that the page sets are filled in, others keep their names."""
    known: dict[str, str] = {}
    found: list[Command] = []
    for block in blocks:
        if block.language not in SHELL:
            continue
        for line, text in _lines(block):
            found += [Command(f"{block.page}:{line}", tuple(words)) for words in _simple(text, known)]
    return found


def _lines(block: Block) -> list[tuple[int, str]]:
    """Lines with their numbers; those that a backslash or an open quote continues are joined."""
    lines: list[tuple[int, str]] = []
    held, start = "", block.line
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        line = re.sub(r"^\$ ", "", line) if block.language == "console" else line
        start = start if held else number
        held += line
        if held.endswith("\\"):
            held = held[:-1] + " "
        elif held.count("'") % 2 and not held.lstrip().startswith("#"):
            held += "\n"
        else:
            lines.append((start, held))
            held = ""
    return lines


def _simple(text: str, known: dict[str, str]) -> list[list[str]]:
    """The simple commands of one line, at `;`, `&&`, `||`, `|` and `&`; assignments go to `known`."""
    text = re.sub(r"\$\([^()]*\)", "SUBSTITUTED", text)
    lexer = shlex.shlex(_filled(text, known), posix=True, punctuation_chars=";&|<>()")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    redirect = False
    for word in lexer:
        if set(word) <= set(";&|()"):
            commands.append([])
        elif set(word) <= set("<>&"):
            redirect = True
            if commands[-1] and commands[-1][-1] in ("1", "2"):
                commands[-1].pop()
        elif redirect:
            redirect = False
        elif not commands[-1] and (match := re.fullmatch(r"(?s)([A-Za-z_]\w*)=(.*)", word)):
            known[match[1]] = match[2]
        else:
            commands[-1].append(word)
    return [words for words in commands if words]


def _filled(text: str, known: dict[str, str]) -> str:
    """Inside single quotes too: what stands there is a script that the page's reader will run."""
    return re.sub(r"\$\{?([A-Za-z_]\w*)\}?", lambda m: known.get(m[1], m[1]), text)
