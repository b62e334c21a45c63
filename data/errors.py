"""What went wrong, in one line: the error types every room raises, and how a command line reports them.

Exit status of every command: 0 done, 2 bad input, 3 a check failed, 130 stopped by Ctrl-C.
"""

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(ValueError):
    """Something given from outside (a file, a flag, a request) cannot be used.

    The message is one line that says what came, what was wanted and what to do.
    """


class ToldElsewhere(InputError):
    """An InputError whose line another process of the same command prints: this one ends with the same status, silently."""


class CheckFailed(RuntimeError):
    """A verification (parity, drift, sanity) did not hold; the message gives the figure and its bound."""


def run_cli(main: Callable[[], object]) -> NoReturn:
    """Run `main` and end the process with the exit status of this module's table; errors become one stderr line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no UTF-8, which is no reason not to print it
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except ToldElsewhere:
        sys.exit(2)
    except InputError as error:
        _fail(error, 2)
    except CheckFailed as error:
        _fail(error, 3)
    except BrokenPipeError:  # whoever read our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _fail(error: Exception, status: int) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)
