"""The backfills that this process has submitted: each is `gradcam backfill` in a process of its own.

Not a thread: reading a list, packing shards and waiting for them would take the interpreter from the caller,
and a thread cannot be ended. Not a process that outlives the caller either: nobody would stop or restart it.
So a backfill ends with the process that has submitted it, keeps what is done, and is continued by the next
process that submits the same. The HTTP API runs backfills in the same way.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

from pydantic import ValidationError

from gradcam_worker import extras
from gradcam_worker.backfill.plan import Plan
from gradcam_worker.backfill.registry import RedisBackfillRegistry
from gradcam_worker.client.datasets import backfills
from gradcam_worker.client.datasets.backfills import BackfillStatus, Cancellation
from gradcam_worker.client.job_fields import OF_TARGET, without_short_forms
from gradcam_worker.errors import BackfillRunning, BackfillStopped, GradcamError, InvalidJob
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.model import describe
from gradcam_worker.settings import Settings

START_TIMEOUT_S = 60.0  # until it holds its lease, or has refused
POLL_INTERVAL_S = 0.1
REMOTE_POLL_INTERVAL_S = 1.0  # of a backfill that another process runs
STOP_TIMEOUT_S = 15.0  # until it is killed
STARTED_LINE = '{"event": "started"'  # how the line begins that it prints when it holds its lease
ROWS_FAILED = 4  # its exit code where too many rows have failed
OptionValue: TypeAlias = str | float | bool | Sequence[str] | Mapping[str, str] | None


def command(
    input_: str,
    output: str,
    spec: Mapping[str, Any],
    options: Mapping[str, OptionValue],
    tenant: str | None = None,
) -> list[str]:
    """The command that runs a backfill for another program.

    Args:
        input_: What it reads.
        output: The dataset that it writes.
        spec: What is asked of each row: fields of a plan, as JSON.
        options: Further options of the command line, by their names with _ in place of -. A flag is True, an
            option that may be repeated is a list, one of NAME=VALUE is a mapping.
        tenant: Whose backfill it is; None: nobody's.

    Returns:
        The words.
    """
    for_api = json.dumps({"spec": spec, "tenant": tenant})
    words = [f"--output={output}", f"--network={spec['network']}", f"--for-api={for_api}", "--json"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool) or value is None:
            words += [option] if value else []
        elif isinstance(value, Mapping):
            words += [f"{option}={key}={one}" for key, one in value.items()]
        elif isinstance(value, str | float | int):
            words.append(f"{option}={value}")
        else:
            words += [f"{option}={one}" for one in value]
    return [sys.executable, "-P", "-m", "gradcam_worker", "backfill", "run", *words, "--", input_]


def wait_for_start(process: "subprocess.Popen[bytes]", printed: Callable[[], str], output: str) -> None:
    """Wait until a process of `command` holds its lease.

    Args:
        process: The process.
        printed: Returns what it has printed so far.
        output: The dataset that it writes.

    Raises:
        GradcamError: What it was refused with.
        BackfillStopped: It has not begun in time, and was told to end.
    """
    for _ in range(int(START_TIMEOUT_S / POLL_INTERVAL_S)):
        ended = None
        with suppress(subprocess.TimeoutExpired):
            ended = process.wait(POLL_INTERVAL_S)
        text = printed()
        if ended == 0 or any(line.startswith(STARTED_LINE) for line in text.splitlines()):
            return
        if ended is not None:
            raise backfills.error_of(text) or BackfillStopped(f"The backfill ended: {text[-500:]}")
    process.terminate()
    message = f"The backfill of {output} has not begun within {START_TIMEOUT_S:g} s."
    raise BackfillStopped(message)


def still_running(output: str, timeout_s: float | None) -> str:
    """The sentence about a backfill that was waited for in vain."""
    return f"The backfill of {output} is not complete after {timeout_s:g} s. It runs on."


@dataclass
class _Process:
    """One process of `command`."""

    words: list[str]
    program: "subprocess.Popen[bytes]"
    output: IO[bytes]

    def printed(self) -> str:
        file = self.output.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def end(self) -> None:
        if self.program.poll() is None:
            self.program.terminate()
            try:
                self.program.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.program.kill()
                self.program.wait()
        if self.program.stdin:
            self.program.stdin.close()
        self.output.close()


class SubmittedBackfills:
    """The processes of one client, and those backfills that other processes run."""

    def __init__(self, settings: Settings) -> None:
        """`settings`: of the client."""
        self._settings = settings
        self._processes: dict[str, _Process] = {}  # by output
        self._waiting: dict[str, list[str]] = {}  # by output, the commands of what another process runs now
        self._owner = os.getpid()  # a process that is forked from it ends none of them

    def submit(
        self,
        input_: str,
        output: str,
        fields: Mapping[str, Any],
        options: Mapping[str, OptionValue],
        tenant: str | None,
    ) -> str:
        """See `GradcamClient.submit_backfill`; `fields`: those of a job, with short forms."""
        output = output.rstrip("/")
        spec = _spec(input_, output, fields)
        self._forget(output)
        process = self._start(
            output, command(input_, output, spec, {**options, "ends_with_parent": True}, tenant)
        )
        try:
            wait_for_start(process.program, process.printed, output)
        except BackfillRunning:
            self._forget(output)
            self._waiting[output] = process.words
        except GradcamError:
            self._forget(output)
            raise
        return output

    def status(self, output: str) -> BackfillStatus:
        """See `GradcamClient.backfill_status`."""
        with extras.required("A backfill", "backfill"):
            return BackfillStatus.model_validate(backfills.read_status(output, self._settings))

    def cancel(self, output: str) -> Cancellation:
        """See `GradcamClient.cancel_backfill`."""
        with extras.required("A backfill", "backfill"):
            return backfills.cancel(output, self._settings)

    def find_end(self, output: str) -> BackfillStatus | float:
        """Return how a backfill has ended; while it runs, after how many seconds to look again.

        Args:
            output: The dataset that it writes.

        Returns:
            Its status once it is complete; else seconds.

        Raises:
            BackfillStopped: It has ended before it was complete, or too many rows have failed.
            BackfillCanceled: It was cancelled.
            GradcamError: Whatever else it has ended with.
        """
        output = output.rstrip("/")
        process = self._processes.get(output)
        if process and process.program.poll() is None:
            return POLL_INTERVAL_S
        if process:
            code, error = process.program.returncode, backfills.error_of(process.printed())
            self._forget(output)
            if isinstance(error, BackfillRunning):
                self._waiting[output] = process.words
            elif error:
                raise error
            else:
                return self._end(output, too_many_failed=code == ROWS_FAILED)
        record = RedisBackfillRegistry(RedisLedger(self._settings).server).find(output)
        if record and record.is_running:
            return REMOTE_POLL_INTERVAL_S
        if output not in self._waiting:
            return self._end(output)
        self._start(output, self._waiting.pop(output))
        return POLL_INTERVAL_S

    def _end(self, output: str, *, too_many_failed: bool = False) -> BackfillStatus:
        status = self.status(output)
        if too_many_failed and status.dataset:
            message = f"{status.failed:,} of the {status.rows:,} rows of {output} have failed."
            raise BackfillStopped(message)
        if status.state != "complete":
            message = f"The backfill of {output} is {status.state}: submitted again, it is continued."
            raise BackfillStopped(message)
        return status

    def close(self) -> None:
        """End all processes; what is done is kept, and can be continued."""
        for output in {*self._processes, *self._waiting}:
            self._forget(output)

    def _start(self, output: str, words: list[str]) -> _Process:
        printed = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process is known
        program = subprocess.Popen(  # noqa: S603  # this package's own command, without a shell
            words,
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self._settings.to_environment()},
            start_new_session=True,  # Ctrl-C in a terminal reaches the caller alone, which decides
        )
        self._processes[output] = process = _Process(words, program, printed)
        return process

    def _forget(self, output: str) -> None:
        """End the process of an output, if there is one."""
        self._waiting.pop(output, None)
        process = self._processes.pop(output, None)
        if process and os.getpid() == self._owner:
            process.end()


def _spec(input_: str, output: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked of each row, as JSON; `fields`: those of a job, with short forms. Raises InvalidJob."""
    wanted = {name: value for name, value in fields.items() if value is not None}
    if not any(name in wanted for name in OF_TARGET):
        message = "A backfill needs top_n or classes: which classes of each image are explained."
        raise InvalidJob(message)
    spec: Any = without_short_forms(wanted)
    try:
        return Plan.model_validate({**spec, "input": input_, "output": output}).spec()
    except ValidationError as error:
        message = f"This backfill is invalid: {describe(error)}."
        raise InvalidJob(message) from error
