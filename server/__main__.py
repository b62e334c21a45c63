"""`python -m server --models PATH`: serve a backbone and its heads."""

import os
import sys

from data.errors import run_cli
from server.logs import configure_logs
from server.run import main
from server.settings import read_settings


def serve_from_command_line() -> None:
    """Read the flags and serve until told to stop."""
    config = read_settings(sys.argv[1:], os.environ)
    configure_logs(config.log_level)
    main(config)


if __name__ == "__main__":
    run_cli(serve_from_command_line)
