"""Every command that the README and the documentation print is one that its program takes."""

import re

import pytest

from tests.docs.blocks import INERT, PAGES, PYTHON, ROOT, SHELL, Block, blocks_of, commands_of
from tests.docs.reading import RUNNABLE, help_flags, wrong_with


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_read_by_its_program(page: str) -> None:
    wrong = [f"{one.where}: {said}" for one in commands_of(blocks_of(page)) if (said := wrong_with(one)) is not None]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_holds(page: str) -> None:
    """A block without a language, or with one that nobody knows, would not be checked."""
    unknown = [f"{one.page}:{one.line}: {one.language!r}" for one in blocks_of(page)]
    assert [one for one in unknown if one.split(": ")[1].strip("'") not in (*SHELL, *PYTHON, *INERT)] == []


@pytest.mark.parametrize("page", PAGES)
def test_programs_in_python_compile_and_import_what_exists(page: str) -> None:
    for block in blocks_of(page):
        if block.language in PYTHON:
            compile(block.text, f"{page}:{block.line}", "exec")
            imports = [line for line in block.text.splitlines() if re.match(r"(import|from) ", line)]
            exec("\n".join(imports), {})


def test_flags_and_modules_in_running_text_exist() -> None:
    """`--flag` and `python -m module` between backticks, outside of blocks."""
    flags, wrong = help_flags(), []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
        for code in re.findall(r"`([^`\n]+)`", text):
            wrong += [
                f"{page}: {flag}" for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", code) if flag not in flags
            ]
            for module in re.findall(r"python -m ([a-z_.]+)", code):
                if module not in RUNNABLE | {"pytest", "pip"} and not module.endswith("."):
                    wrong.append(f"{page}: {module}")
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (".venv/bin/python -m training --recipe smoke --data d --out o --epoch 3", "--epoch"),
        (".venv/bin/python -m training --recipe smok --data d --out o", "smok"),
        (".venv/bin/python -m evaluators.knn --ckpt x --data d --baselines noise", "noise"),
        (".venv/bin/python -m evaluators.suite --ckpt x --data d --out o --evaluators knnn", "knnn"),
        (".venv/bin/python -m evaluators.nearest --ckpt x", "evaluators.nearest"),
        ("D=photos\n.venv/bin/python -m server --models $D --grpc-port many", "many"),
        (".venv/bin/torchrun --nproc-per-node 2 -m training --recipe smoke --data d", "--out"),
        (".venv/bin/torchrun --nproc-per-node 2 --no-such 3 -m training --recipe smoke --data d --out o", "no-such"),
        ("srun bash -c '.venv/bin/torchrun --nnodes $N -m training \\\n    --recipe smoke --dat d --out o'", "--dat"),
        ('.venv/bin/pip install -e ".[mysql]"', "mysql"),
        ("make everything", "everything"),
        ("serve-it --now | less", "serve-it"),
        ("true; make demo && make nothing > log", "nothing"),
    ],
)
def test_a_wrong_word_is_found(line: str, said: str) -> None:
    """The check itself: each of these was typed wrong in one place."""
    wrong = [wrong_with(one) for one in commands_of([Block("page", 1, "sh", line)])]
    assert any(said in text for text in wrong if text is not None), wrong


def test_a_right_command_is_let_pass() -> None:
    line = 'S=a\nC="--ckpt x"\nA=b .venv/bin/python -m evaluators.knn $C --data $S,${S} # as --this\nmake demo GPU=1 > log 2>&1 &'
    commands = commands_of([Block("page", 1, "sh", line)])
    assert [one.words[-1] for one in commands] == ["a,a", "GPU=1"]
    assert [wrong_with(one) for one in commands] == [None, None]
