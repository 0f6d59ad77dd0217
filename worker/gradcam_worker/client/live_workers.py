"""Reads what live workers report: their state, and the networks that they offer."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.files.label_file import IMAGENET_CLASSES
from gradcam_worker.schemas.worker_report import NetworkOffer, OfferedNetworks, WorkerReport

UNREADABLE = "It reports its health in a form that this version cannot read."


@dataclass(frozen=True)
class LiveWorkers:
    """The live workers, and the networks that they offer."""

    workers: tuple[WorkerReport, ...]
    networks: tuple[NetworkOffer, ...]


def read_live_workers(reports: Mapping[str, str]) -> LiveWorkers:
    """Read the health reports of workers.

    Args:
        reports: As `Ledger.find_workers` returns them.

    Returns:
        The workers by name, and the networks by name. A report that cannot be read is a worker in trouble.
    """
    workers, offers = [], []
    for name, text in sorted(reports.items()):
        try:
            fields = json.loads(text)
            offered = OfferedNetworks.model_validate(fields.pop("networks", {}))
            found = [*_of_catalog(offered.catalog), *offered.own]
            names = tuple(one.name for one in found)
            workers.append(WorkerReport.model_validate({**fields, "id": name, "networks": names}))
        except (ValidationError, ValueError, AttributeError, TypeError):
            workers.append(WorkerReport(id=name, trouble=UNREADABLE))
        else:
            offers += found
    return LiveWorkers(tuple(workers), _merged(offers))


def _of_catalog(names: Iterable[str]) -> Iterable[NetworkOffer]:
    for row in (CATALOG[name] for name in names if name in CATALOG):
        yield NetworkOffer(
            name=row.name,
            input_size=row.input_size,
            layer=row.target_layer,
            classes=IMAGENET_CLASSES,
            imagenet=True,
        )


def _merged(offers: Iterable[NetworkOffer]) -> tuple[NetworkOffer, ...]:
    """Each network once, with the number of its workers; where workers differ, as the last one has it."""
    count: dict[str, int] = {}
    latest: dict[str, NetworkOffer] = {}
    for one in offers:
        count[one.name] = count.get(one.name, 0) + 1
        latest[one.name] = one
    return tuple(latest[name].model_copy(update={"workers": count[name]}) for name in sorted(latest))
