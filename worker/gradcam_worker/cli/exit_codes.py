"""The exit codes of `gradcam`. They are a promise: a scheduler decides by them whether to try again."""

from enum import IntEnum

from gradcam_worker import errors
from gradcam_worker.errors import GradcamError


class ExitCode(IntEnum):
    """How a command ended."""

    SUCCESS = 0
    FAILURE = 1
    WRONG_USAGE = 2  # as click has it
    BAD_INPUT = 3
    ROWS_FAILED = 4
    UNREACHABLE = 5
    CANCELED = 6
    CONDITION_MET = 7
    RUNNING_ELSEWHERE = 8
    INTERRUPTED = 130  # 128 + SIGINT, as shells have it


MEANINGS = {
    ExitCode.SUCCESS: "Success.",
    ExitCode.FAILURE: "Any other failure; the reason is on standard error.",
    ExitCode.WRONG_USAGE: "Wrong usage: an option or argument is not what the command takes.",
    ExitCode.BAD_INPUT: "Bad input: a list, a job, a class, a network or an output that cannot be used. "
    "Trying again does not help.",
    ExitCode.ROWS_FAILED: "Some rows of a backfill failed: more than `--max-failed` allows, all of them, "
    "or whole shards, so that the dataset is not complete.",
    ExitCode.UNREACHABLE: "Redis, the storage or a worker cannot be reached. Trying again later may help.",
    ExitCode.CANCELED: "Cancelled from elsewhere, as by `gradcam backfill cancel`.",
    ExitCode.CONDITION_MET: "What `--fail-if` names is so.",
    ExitCode.RUNNING_ELSEWHERE: "Another process runs this backfill already.",
    ExitCode.INTERRUPTED: "Stopped by Ctrl-C, or by SIGTERM.",
}
_OF_ERRORS: tuple[tuple[type[GradcamError], ExitCode], ...] = (
    (errors.BackfillRunning, ExitCode.RUNNING_ELSEWHERE),
    (errors.BackfillCanceled, ExitCode.CANCELED),
    (errors.BackfillStopped, ExitCode.ROWS_FAILED),
    (errors.RedisUnavailable, ExitCode.UNREACHABLE),
    (errors.StorageUnavailable, ExitCode.UNREACHABLE),
    (errors.NoWorker, ExitCode.UNREACHABLE),
    (errors.BackfillError, ExitCode.BAD_INPUT),
    (errors.ImageError, ExitCode.BAD_INPUT),
    (errors.ModelError, ExitCode.BAD_INPUT),
    (errors.StorageError, ExitCode.BAD_INPUT),
    (errors.InvalidJob, ExitCode.BAD_INPUT),
    (errors.InvalidQuery, ExitCode.BAD_INPUT),
    (errors.InvalidExport, ExitCode.BAD_INPUT),
    (errors.IdempotencyConflict, ExitCode.BAD_INPUT),
    (errors.InvalidPolicy, ExitCode.BAD_INPUT),
)


def of_error(error: GradcamError) -> ExitCode:
    """The exit code of a command that ended with an error.

    Args:
        error: The error.

    Returns:
        The code of the first class of it that has one, else FAILURE.
    """
    return next((code for kind, code in _OF_ERRORS if isinstance(error, kind)), ExitCode.FAILURE)
