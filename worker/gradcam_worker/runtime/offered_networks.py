"""Which networks a worker offers: a part of its health report."""

import time
from collections.abc import Mapping
from typing import Any

from gradcam_worker.execution.services import ModelRegistry
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.files import weights
from gradcam_worker.gradcam.files.label_file import IMAGENET_CLASSES
from gradcam_worker.gradcam.registry.registry import Registry
from gradcam_worker.schemas.worker_report import NetworkOffer, OfferedNetworks
from gradcam_worker.settings import Settings

REFRESH_S = 15.0  # between two searches for weights
MAX_OWN = 64  # networks in a report
MAX_LABELS, MAX_LABEL_BYTES = 20, 400  # of a network in a report


class NetworkReport:
    """The networks that a worker offers, found again every `REFRESH_S`."""

    def __init__(self, settings: Settings, networks: ModelRegistry) -> None:
        """Nothing is searched for yet."""
        self._settings, self._networks = settings, networks
        self._found_at_s, self._report = float("-inf"), dict[str, Any]()

    def read(self) -> dict[str, Any]:
        """The fields of `gradcam_worker.schemas.worker_report.OfferedNetworks` that are not empty."""
        if isinstance(self._networks, Registry) and time.monotonic() - self._found_at_s > REFRESH_S:
            self._found_at_s = time.monotonic()
            self._report = self._find(self._networks.rows())
        return self._report

    def _find(self, rows: Mapping[str, NetworkRow]) -> dict[str, Any]:
        own = [_describe(row) for row in rows.values() if row.file][:MAX_OWN]
        catalog = [name for name, row in rows.items() if not row.file and self._has_weights(row)]
        offered = OfferedNetworks(catalog=tuple(catalog), own=tuple(own))
        return offered.model_dump(mode="json", exclude_defaults=True)

    def _has_weights(self, row: NetworkRow) -> bool:
        if row.shipped:
            return True
        folder, keras_home = self._settings.weights_dir, self._settings.keras_home
        return weights.local_weights_path(row, folder, keras_home) is not None


def _describe(row: NetworkRow) -> NetworkOffer:
    labels = row.labels or ()
    few = len(labels) <= MAX_LABELS and sum(len(label.encode()) for label in labels) <= MAX_LABEL_BYTES
    return NetworkOffer(
        name=row.name,
        input_size=row.input_size,
        layer=row.target_layer,
        classes=row.classes or (IMAGENET_CLASSES if row.labels is None else len(labels) or None),
        imagenet=row.labels is None,
        labels=labels if few else (),
        inputs=tuple(one.name for one in row.inputs),
        scores_only=row.scores_only,
    )
