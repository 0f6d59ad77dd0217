"""The entry point of `gradcam`, which the base install has, too.

Exit codes: 0 all is well, 1 something failed (and what, on standard error), 2 wrong usage.
"""

import sys
from collections.abc import Sequence

CLI_PACKAGES = {"click", "rich"}  # of the extra cli, and of cpu, gpu and backfill


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, or say which extra it needs.

    Args:
        arguments: What stands after `gradcam`; those of this process where it is None.

    Returns:
        The exit code.
    """
    try:
        from gradcam_worker.cli import commands
    except ModuleNotFoundError as error:
        if error.name not in CLI_PACKAGES:
            raise
        print(  # noqa: T201  # what prints otherwise is not installed
            f"Error: {error.name} is not installed. "
            "The command gradcam needs the extra cli: pip install 'gradcam-worker[cli]'",
            file=sys.stderr,
        )
        return 1
    return commands.run(sys.argv[1:] if arguments is None else arguments)
