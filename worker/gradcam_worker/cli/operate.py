"""The commands for operators of workers: top, networks, networks fetch."""

from typing import Any

import click

from gradcam_worker.cli.options import json_option
from gradcam_worker.errors import GradcamError, InternalError, InvalidSettings, WeightsUnavailable
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.files import weights
from gradcam_worker.gradcam.registry.registry import Registry
from gradcam_worker.operations.terminal import console
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted, visible

MEGABYTE = 1e6


@click.command()
@click.option("--once", is_flag=True, help="Show the present state once, and exit.")
@json_option("Print JSON once, for programs.")
def top(*, once: bool, as_json: bool) -> int:
    """Show queues, workers, throughput and errors.

    The screen is refreshed every second. Press `q` to exit.

    \b
    Example:
      gradcam top
    """
    from gradcam_worker.operations.top import run

    return run(Settings.from_environment(), once=once, as_json=as_json)


@click.group(invoke_without_command=True)
@json_option()
@click.pass_context
def networks(context: click.Context, *, as_json: bool) -> int:
    """List the networks that a job can name.

    The list includes your own networks (GRADCAM_NETWORKS), and shows where the weights of each are.

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
        console.print_json([console.network_facts(row, settings) for row in rows])
    else:
        console.show_networks(rows, settings)
    return 0


@networks.command()
@click.argument("names", nargs=-1)
@click.option(
    "--all-mine",
    is_flag=True,
    help="Also fetch every network of your own, as listed in the file GRADCAM_NETWORKS.",
)
@json_option()
def fetch(*, names: tuple[str, ...], all_mine: bool, as_json: bool) -> int:
    """Download the weights of networks.

    Workers then need no internet access for them. Weights of your own networks are checked against their
    checksum and stored in GRADCAM_CACHE_DIR. Keras downloads weights of the built-in networks to KERAS_HOME.
    Make both folders available to the workers.

    \b
    Example:
      gradcam networks fetch vgg16 resnet50 --all-mine
    """
    settings = Settings.from_environment()
    registry = Registry(settings.networks)
    if not names and not all_mine:
        message = "Name at least one network, or use --all-mine."
        raise click.UsageError(message)
    if all_mine and not registry.operator_networks():
        message = "--all-mine: GRADCAM_NETWORKS names no networks of your own."
        raise InvalidSettings(message)
    from gradcam_worker.runtime import service_factory  # noqa: F401  # a missing extra is no network's failure

    wanted = [*names, *(row.name for row in registry.operator_networks() if all_mine)]
    results, failed = [], 0
    for name in dict.fromkeys(wanted):
        try:
            result = _fetch_weights(registry.find(name), settings)
        except Exception as unexpected:  # noqa: BLE001  # a failure of one network does not stop the others
            error = unexpected if isinstance(unexpected, GradcamError) else InternalError.of(unexpected)
            result = {"name": name, "error": {"code": error.code, "detail": str(error)}}
            failed += 1
            if not as_json:
                console.err.print(visible(f"{name}: {error}"), markup=False, soft_wrap=True, style="red")
        else:
            if not as_json:
                line = f"{name}: {result['bytes'] / MEGABYTE:.1f} MB, {result['path']}"
                console.out.print(visible(line), markup=False, soft_wrap=True)
        results.append(result)
    if as_json:
        console.print_json(results)
    else:
        size = sum(result.get("bytes", 0) for result in results) / MEGABYTE
        total = counted(len(results), "network is", "networks are")
        console.out.print(f"{len(results) - failed} of {total} on this machine, {size:.1f} MB.")
    return 1 if failed else 0


def _fetch_weights(row: NetworkRow, settings: Settings) -> dict[str, Any]:
    """Download a network's weights to this machine; return its name, their path and their size.

    Raises WeightsUnavailable, WeightsChecksumMismatch, NetworkIncompatible.
    """
    from gradcam_worker.runtime.service_factory import load
    from gradcam_worker.storage.s3 import S3

    if row.file:
        path = weights.fetch_cached(
            row.file, settings.cache, S3(settings).download, settings.cache_bytes
        ).path
    elif present := console.weights_path(row, settings):
        path = present
    else:
        load(settings, S3(settings), row)  # Keras downloads the weights while it builds the network
        downloaded = console.weights_path(row, settings)
        if not downloaded:
            message = (
                f"Keras has not stored the weights of {row.name} in {settings.keras_home}: KERAS_HOME must "
                "name a folder that can be written to."
            )
            raise WeightsUnavailable(message)
        path = downloaded
    return {"name": row.name, "path": str(path), "bytes": path.stat().st_size}
