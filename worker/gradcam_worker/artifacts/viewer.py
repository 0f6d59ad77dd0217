"""The JSON that `<gradcam-viewer>` reads: a viewer document.

    {"manifest": {...}, "urls": {artifact URI: URL}, "heatmaps": "...", "photo": URL}

All that the element draws is in it, but the photo, which a page of any origin can show without the bucket's
leave (CORS). The element is one file, `VIEWER_FILE` in the package `gradcam_worker.gradcam`, and reads a
manifest alone as well. Nothing here needs NumPy: the browser reads the array.
"""

import base64
from collections.abc import Mapping
from typing import Any

from gradcam_worker.schemas.manifest import ArtifactRecord, Manifest

VIEWER_FILE = "data/gradcam-viewer.js"
ARRAY_FORMATS = ("application/x-npz", "application/x-npy")


def heatmaps_record(manifest: Manifest) -> ArtifactRecord | None:
    """Find the file with the heatmaps of all classes, as numbers.

    Args:
        manifest: The manifest.

    Returns:
        The record of `heatmaps.npz` or `heatmaps.npy`; None: the job left neither.
    """
    records = (record for one in manifest.explanations for record in one.artifacts)
    return next((record for record in records if record.media_type in ARRAY_FORMATS), None)


def viewer_document(
    manifest: Manifest,
    heatmaps: bytes | None = None,
    urls: Mapping[str, str] | None = None,
    photo: str | None = None,
) -> dict[str, Any]:
    """Build the viewer document of a job.

    Args:
        manifest: Its manifest.
        heatmaps: The bytes of the artifact of `heatmaps_record`; None: the browser reads it from `urls`,
            which the bucket has to allow.
        urls: A URL that a browser can read, for each artifact's URI.
        photo: The same for the photo, in any size: the whole of it, upright. None: the URI of the manifest's
            input, if it is of the web.

    Returns:
        The document, which can be written as JSON.
    """
    document: dict[str, Any] = {
        "manifest": manifest.model_dump(mode="json", by_alias=True),
        "urls": dict(urls or {}),
        "photo": photo,
    }
    if heatmaps is not None:
        document["heatmaps"] = base64.b64encode(heatmaps).decode()
    return document
