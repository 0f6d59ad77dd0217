"""The commands of whoever operates workers: top | networks | networks fetch."""

from typing import Any

import click

from gradcam_worker.errors import GradcamError, InternalError, InvalidSettings, WeightsUnavailable
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.models import weights
from gradcam_worker.gradcam.models.registry import Registry
from gradcam_worker.operations import console
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted, visible

MEGABYTE = 1e6


@click.command()
@click.option("--once", is_flag=True, help="Show it once, as it is now.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON once, for machines.")
def top(*, once: bool, as_json: bool) -> int:
    """Show queues, workers, throughput and errors, again every second. `q` ends it.

    \b
    Example:
      gradcam top
    """
    from gradcam_worker.operations.top import run

    return run(Settings.from_environment(), once=once, as_json=as_json)


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
@click.pass_context
def networks(context: click.Context, *, as_json: bool) -> int:
    """List the networks that a job can name, the operator's own too, and where their weights are.

    \b
    Example:
      gradcam networks
      gradcam networks fetch vgg16 --all-mine
    """
    if context.invoked_subcommand:
        return 0
    settings = Settings.from_environment()
    rows = Registry(settings.networks).rows().values()
    if as_json:
        console.print_json([console.facts(row, settings) for row in rows])
    else:
        console.show_networks(rows, settings)
    return 0


@networks.command()
@click.argument("names", nargs=-1)
@click.option("--all-mine", is_flag=True, help="All of the operator's own, of GRADCAM_NETWORKS.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
def fetch(*, names: tuple[str, ...], all_mine: bool, as_json: bool) -> int:
    """Fetch the weights of these networks ahead of time, so that no worker needs a way out.

    An operator's own go to GRADCAM_CACHE_DIR, once their checksum is right; those of the catalog, by Keras,
    to KERAS_HOME. Give workers both folders.

    \b
    Example:
      gradcam networks fetch vgg16 resnet50 --all-mine
    """
    settings = Settings.from_environment()
    registry = Registry(settings.networks)
    if not names and not all_mine:
        message = "Name networks, or say --all-mine."
        raise click.UsageError(message)
    if all_mine and not registry.own():
        message = "--all-mine: GRADCAM_NETWORKS names no networks of your own."
        raise InvalidSettings(message)
    asked = [*names, *(row.name for row in registry.own() if all_mine)]
    found, failed = [], 0
    for name in dict.fromkeys(asked):
        try:
            one = _fetched(registry.find(name), settings)
        except Exception as unforeseen:  # noqa: BLE001  # what stops one does not stop the others
            error = unforeseen if isinstance(unforeseen, GradcamError) else InternalError.of(unforeseen)
            one = {"name": name, "error": {"code": error.code, "detail": str(error)}}
            failed += 1
            if not as_json:
                console.err.print(visible(f"{name}: {error}"), markup=False, soft_wrap=True, style="red")
        else:
            if not as_json:
                line = f"{name}: {one['bytes'] / MEGABYTE:.1f} MB, {one['path']}"
                console.out.print(visible(line), markup=False, soft_wrap=True)
        found.append(one)
    if as_json:
        console.print_json(found)
    else:
        size = sum(one.get("bytes", 0) for one in found) / MEGABYTE
        of = counted(len(found), "network is", "networks are")
        console.out.print(f"{len(found) - failed} of {of} here, {size:.1f} MB.")
    return 1 if failed else 0


def _fetched(row: NetworkRow, settings: Settings) -> dict[str, Any]:
    """Bring a network's weights here; where they are, and how large.

    Raises WeightsUnavailable, WeightsChecksumMismatch, NetworkIncompatible.
    """
    from gradcam_worker.runtime.service_factory import load
    from gradcam_worker.storage.s3 import S3

    if row.file:
        path = weights.cached(row.file, settings.cache, S3(settings).download, settings.cache_bytes).path
    elif held := console.here(row, settings):
        path = held
    else:
        load(settings, S3(settings), row)  # Keras fetches them while it builds the network
        found = console.here(row, settings)
        if not found:
            message = (
                f"Keras has not kept the weights of {row.name} in {settings.keras_home}: KERAS_HOME must "
            )
            message += "name a folder that can be written to."
            raise WeightsUnavailable(message)
        path = found
    return {"name": row.name, "path": str(path), "bytes": path.stat().st_size}
