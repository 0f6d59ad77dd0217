"""Loads the network of a dataset, so that an audit can try what it needs, and reads the dataset's images."""

from gradcam_worker.audit.report import DatasetFacts
from gradcam_worker.audit.shortcuts.gaze import TrialNetwork
from gradcam_worker.errors import NetworkIncompatible, WeightsChecksumMismatch
from gradcam_worker.extras import required
from gradcam_worker.gradcam.network import InputPixels
from gradcam_worker.gradcam.registry.registry import Registry
from gradcam_worker.gradcam.sizing import Placement
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef
from gradcam_worker.settings import Settings

IMAGE_TIMEOUT_S = 60.0  # to read one image


def open_trial_network(settings: Settings, dataset: DatasetFacts) -> TrialNetwork:
    """Load the network of a dataset in this process.

    Args:
        settings: Where networks, weights and images are.
        dataset: The dataset.

    Returns:
        The network, and what reads its images.

    Raises:
        MissingExtra: What computes networks is not installed.
        UnknownNetwork: The registry has no network of that name.
        NetworkIncompatible: It takes more than images, or cannot be loaded.
        WeightsChecksumMismatch: Here it has other weights than the dataset was made with.
        WeightsUnavailable: Its weights cannot be read.
    """
    with required("Masking what a network looks at", "cpu"):
        from gradcam_worker.execution.services import Services
        from gradcam_worker.images.prepare import fetch_image
        from gradcam_worker.runtime import service_factory
        from gradcam_worker.storage.s3 import S3

        row = Registry(settings.networks).find(dataset.network)
        service_factory.prepare(settings)
        network = service_factory.load(settings, S3(settings), row)
        services: Services = service_factory.build_services(settings)
    facts = network.facts
    if facts.inputs:
        names = ", ".join(one.name for one in facts.inputs)
        message = f"{facts.name} takes {names} beside the image, which the dataset does not have."
        raise NetworkIncompatible(message)
    if facts.weights_sha256 != dataset.weights_sha256:
        message = (
            f"The dataset was made with weights {dataset.weights_sha256} of {facts.name}; here it has "
            f"{facts.weights_sha256}."
        )
        raise WeightsChecksumMismatch(message)

    def load(uri: str, sha256: str) -> tuple[InputPixels, Placement | None]:
        reference = ImageRef(uri=uri, sha256=sha256 or None)
        deadline = Deadline(IMAGE_TIMEOUT_S)
        fast = facts.sizing.fast_jpeg
        with (
            fetch_image(reference, services, deadline) as fetched,
            fetched.decode(fast_jpeg=fast) as image,
        ):
            return image.fit(facts), image.placement(facts)

    return TrialNetwork(network, load)
