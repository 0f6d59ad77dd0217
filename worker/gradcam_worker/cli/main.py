"""The entry point of `gradcam`. It is part of the base install, which has no click and rich.

Exit codes: see `gradcam_worker.cli.exit_codes`.
"""

import os
import signal
import sys
from collections.abc import Sequence

from gradcam_worker import extras

FIRST_PROCESS = 1  # its id, in a container
CLI_PACKAGES = {"click", "rich"}  # installed by the extras cli, cpu, gpu and backfill


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, or print which extra it needs.

    Args:
        arguments: The words after `gradcam`; None: the arguments of this process.

    Returns:
        The exit code.
    """
    _end_at_sigterm_in_container()
    extras.run_as_command()
    try:
        with extras.without_garbage_collection():
            # Redis's client has metrics that nobody asks for, and imports all of OpenTelemetry for them.
            with extras.hidden_in_commands("opentelemetry"):
                import gradcam_worker.redis_server.client  # noqa: F401  # imports it
            from gradcam_worker.cli import commands
    except ModuleNotFoundError as error:
        if error.name not in CLI_PACKAGES:
            raise
        print(  # noqa: T201  # rich is not installed
            f"Error: {extras.describe(error.name, 'The command gradcam', 'cli')}", file=sys.stderr
        )
        return 1
    return commands.run(sys.argv[1:] if arguments is None else arguments)


def _end_at_sigterm_in_container() -> None:
    """End at SIGTERM from now on, until a command has its own handler.

    The first process of a container is sent no signal that it does not handle: a pod that is to end while it
    starts would take jobs until it is killed.
    """
    if os.getpid() == FIRST_PROCESS and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
