"""`python -m server --models PATH`: serve a backbone and its heads."""

import tyro

from data.errors import run_cli
from server.config import ServerConfig
from server.logs import configure_logs
from server.run import main


def serve_from_command_line() -> None:
    """Read the flags and serve until told to stop."""
    config = tyro.cli(ServerConfig, prog="python -m server")
    configure_logs(config.log_level)
    main(config)


if __name__ == "__main__":
    run_cli(serve_from_command_line)
