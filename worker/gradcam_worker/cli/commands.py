"""The command group `gradcam`, and its commands demo, worker, deliver and doctor."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import click
from click.core import ParameterSource

from gradcam_worker import __version__, extras
from gradcam_worker.cli import convert, jobs, ledger, operate, serve, tenants
from gradcam_worker.cli.datasets import audit, backfill, compare, gallery, replay
from gradcam_worker.cli.exit_codes import ExitCode, of_error
from gradcam_worker.cli.options import asks_for_json, json_option
from gradcam_worker.errors import GradcamError, InvalidSettings
from gradcam_worker.observability.logs import configure_logging
from gradcam_worker.operations.terminal import console
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import visible


def run(arguments: Sequence[str]) -> int:
    """Run the command line. Errors of this package are printed as a sentence, without a traceback.

    Args:
        arguments: The words after `gradcam`.

    Returns:
        The exit code: one of `ExitCode`.
    """
    as_json = asks_for_json(arguments)
    try:
        return int(gradcam.main([*arguments], standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return _ended("usage", error.format_message(), ExitCode(error.exit_code), as_json=as_json)
    except (click.Abort, KeyboardInterrupt):
        console.err.print("Stopped.")
        return _ended("interrupted", "Stopped.", ExitCode.INTERRUPTED, as_json=as_json)
    except GradcamError as error:
        lines = error.problems if isinstance(error, InvalidSettings) else (str(error),)
        console.err.print(f"[red]Error[/] ({error.code}):", end=" " if len(lines) == 1 else "\n")
        for line in lines:
            console.err.print(visible(line), markup=False, soft_wrap=True)
        return _ended(error.code, str(error), of_error(error), as_json=as_json, retryable=error.retryable)
    except ModuleNotFoundError as error:
        extra = "backfill" if [*arguments][:1] == ["backfill"] else "cpu"
        needed = extras.describe(str(error.name), "This command", extra)
        console.err.print("[red]Error[/]: ", end="")
        console.err.print(needed, markup=False, soft_wrap=True)
        return _ended("missing_extra", needed, ExitCode.FAILURE, as_json=as_json)


def _ended(code: str, message: str, exit_code: ExitCode, *, as_json: bool, retryable: bool = False) -> int:
    """Print an error as a line of JSON where the command prints JSON; return its exit code."""
    if as_json:
        error = {"code": code, "message": visible(message), "retryable": retryable}
        console.print_json_line({"event": "error", "error": error, "exit_code": exit_code.value})
    return exit_code


def _require(*packages: str) -> None:
    """Raise ModuleNotFoundError for the first package that is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(name=package)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gradcam")
def gradcam() -> None:
    """Explain image classifiers with Grad-CAM: on this machine, or through a queue.

    Settings are environment variables named GRADCAM_*; `gradcam doctor` checks whether they work.
    """


@gradcam.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default="gradcam-demo")
@click.option(
    "--against-running",
    is_flag=True,
    help="Start nothing; use the servers and workers that the GRADCAM_* variables name.",
)
def demo(folder: Path, *, against_running: bool) -> int:
    """Explain five photos, to try everything out.

    The demo uses a real queue, a real worker and a real object store. Everything runs on this machine and is
    stopped at the end. Results are written to FOLDER.

    \b
    Example:
      gradcam demo
      GRADCAM_UPLOADS=s3://photos/demo gradcam demo --against-running
    """
    from gradcam_worker.operations import demo as photos_demo

    return photos_demo.run_against_running(folder) if against_running else photos_demo.run(folder)


@gradcam.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option(
    "--port",
    type=click.IntRange(1, 65_000),
    default=8000,
    show_default=True,
    help="Of the page and the HTTP API, on 127.0.0.1. The servers take those after the next nine.",
)
def dev(folder: Path | None, *, port: int) -> int:
    """Run all that an app needs to develop against, until Ctrl-C.

    A Valkey server, an S3 server, a worker and the HTTP API with its page, on this machine alone. What to
    export, for an app and for the other commands, is printed, and written to FOLDER/environment, which a
    shell can read. FOLDER keeps jobs, photos and results for the next time; without it, nothing is kept.

    \b
    Example:
      gradcam dev
      gradcam dev gradcam-dev --port 9000
      GRADCAM_NETWORKS=networks.toml gradcam dev gradcam-dev
    """
    from gradcam_worker.operations import dev as development

    return development.run(port, folder)


@gradcam.command()
@click.option(
    "--devices",
    metavar="auto|cpu|0,1,...",
    help="A process for each GPU (auto), for each GPU in a list (0,1), or one on the CPU (cpu). [auto]",
)
@click.option("--unsupervised", is_flag=True, help="Run jobs in this process; nothing restarts it.")
@click.option("--ready-fd", type=int, hidden=True)
def worker(*, devices: str | None, unsupervised: bool, ready_fd: int | None) -> int:
    """Run jobs until stopped.

    There is one process for each device; a process that dies is restarted. After SIGTERM or Ctrl-C the
    worker finishes its running jobs and exits. After a second one it requeues them and exits at once.

    \b
    Example:
      GRADCAM_BROKER_URL=redis://queue:6379/0 GRADCAM_OUTPUT=s3://out/cams gradcam worker
    """
    _require("celery", "keras")  # fail here once, not in each process that would be started
    settings = Settings.from_environment(devices=devices)
    configure_logging(settings.log_format, settings.log_level)
    if ready_fd is not None and settings.role == "engine":
        with extras.without_garbage_collection():
            from gradcam_worker.runtime.processes import engine_process
        return engine_process.run(settings, ready_fd)
    if ready_fd is not None:
        with extras.without_garbage_collection():
            from gradcam_worker.runtime.processes import worker_process
        return worker_process.run_supervised(settings, ready_fd)
    from gradcam_worker.runtime.processes import preflight

    if unsupervised:
        with extras.without_garbage_collection():
            from gradcam_worker.runtime.processes import worker_process
        from gradcam_worker.runtime.devices import use_single_device

        settings = use_single_device(settings)
        preflight.check(settings)
        return worker_process.run(settings)
    from gradcam_worker.runtime.processes.supervisor import Supervisor

    supervisor = Supervisor(settings)
    preflight.check(settings)
    return supervisor.run()


@gradcam.command()
def deliver() -> int:
    """Send webhooks while no worker runs.

    It sends webhooks and database updates, and requeues the jobs of dead workers, as every worker does too,
    but runs no jobs. Use it where the number of workers can be zero. It needs no GPU. Stop it with SIGTERM
    or Ctrl-C.

    \b
    Example:
      GRADCAM_BROKER_URL=redis://queue:6379/0 GRADCAM_WEBHOOK_HOSTS=app.example.com gradcam deliver
    """
    _require("httpx", "standardwebhooks")  # fail here, not when the first event is delivered
    with extras.without_garbage_collection():
        from gradcam_worker.runtime.processes import delivery_process, preflight
    settings = Settings.from_environment()
    configure_logging(settings.log_format, settings.log_level)
    preflight.check(settings, stores=False)
    return delivery_process.run(settings)


@gradcam.command()
@json_option()
@click.option(
    "--expect-workers",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Fail if fewer workers than this are alive.",
)
@click.option(
    "--sample",
    metavar="FOLDER|CSV",
    type=click.Path(exists=True, path_type=Path),
    help="Instead, look at photos whose classes are known, and say how a network's photos must be resized.",
)
@click.option("--network", help="The network of --sample. [your own, if there is only one]")
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="The most photos of --sample to look at, of all classes as evenly as possible.",
)
@click.pass_context
def doctor(
    context: click.Context,
    *,
    as_json: bool,
    expect_workers: int,
    sample: Path | None,
    network: str | None,
    limit: int,
) -> int:
    """Check servers, storage, weights and device.

    For each check that fails, it says what to fix. Exit code 1 if any check fails.

    With --sample it checks one network instead: how often it is right about photos under each way to resize
    them. FOLDER has a folder of photos for each class, named by the class. CSV has a header with the columns
    path and label, and may have a column for each class with the probabilities that your own program gives
    it. Exit code 1 if another way is better than the one that is set.

    \b
    Example:
      gradcam doctor
      gradcam doctor --expect-workers 2
      gradcam doctor --sample xrays/test --network tumours
    """
    if sample:
        _require("keras")
        from gradcam_worker.operations import sample_check

        settings = Settings.from_environment()
        return sample_check.run(sample, network, settings, limit=limit, as_json=as_json)
    for option in ("network", "limit"):
        if context.get_parameter_source(option) is ParameterSource.COMMANDLINE:
            message = f"--{option} belongs to --sample"
            raise click.UsageError(message)
    from gradcam_worker.operations.doctor import run_checks

    findings = []
    for finding in run_checks(Settings.from_environment(), expected_workers=expect_workers):
        findings.append(finding)
        if not as_json:
            mark = "[green]ok  [/]" if finding.well else "[red]FAIL[/]"
            console.out.print(f"{mark} ", end="")
            console.out.print(visible(f"{finding.what}: {finding.detail}"), markup=False, soft_wrap=True)
            if finding.fix and not finding.well:
                console.out.print(f"     {finding.fix}", markup=False, soft_wrap=True)
    if as_json:
        console.print_json([vars(finding) for finding in findings])
    return 0 if all(finding.well for finding in findings) else 1


for _command in (
    convert.convert,
    compare.compare,
    gallery.gallery,
    audit.audit,
    jobs.explain,
    jobs.submit,
    jobs.status,
    jobs.cancel,
    replay.replay,
    replay.redeliver,
    backfill.backfill,
    operate.networks,
    operate.top,
    serve.serve,
    tenants.tenants,
    tenants.keys,
    ledger.ledger,
):
    gradcam.add_command(_command)
