"""The shipped photos in many variants, through the shipped network: what it is known to confuse is first."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gradcam_worker import testing
from gradcam_worker.audit.report import AuditReport
from gradcam_worker.audit.run import audit
from gradcam_worker.execution import shards
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.overlay import encode
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.annotations import AnnotatedBox, Annotations
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.options import Target
from gradcam_worker.schemas.shard import Row, Shard

VARIANTS = 8
COFFEE_MUG, ESPRESSO, CAMERA, TRIPOD, CAT, MISSILE = 504, 967, 759, 872, 285, 657
KNOWN = {  # photo -> true class, and the object: left, top, right, bottom as shares
    "coffee.jpg": (COFFEE_MUG, (0.28, 0.04, 0.69, 0.72)),  # the network says espresso
    "camera.jpg": (CAMERA, (0.48, 0.25, 0.66, 0.38)),  # and tripod, at which it looks
    "chelsea.jpg": (CAT, (0.15, 0.0, 0.85, 1.0)),
    "rocket.jpg": (MISSILE, (0.45, 0.1, 0.58, 0.95)),
}
Box = tuple[float, float, float, float]


def variants(pixels: NDArray[np.uint8], box: Box) -> list[tuple[NDArray[np.uint8], Box]]:
    """Darker and brighter ones, with less of the margins, half of them mirrored; the box moves with it."""
    rng, (height, width, _) = np.random.default_rng(1), pixels.shape
    made = []
    for number in range(VARIANTS):
        left, top, right, bottom = (0.08 * rng.random(4)).tolist()
        part = pixels[round(top * height) : round((1 - bottom) * height)]
        part = part[:, round(left * width) : round((1 - right) * width)]
        across, down = 1 - left - right, 1 - top - bottom
        x1, y1 = (box[0] - left) / across, (box[1] - top) / down
        x2, y2 = (box[2] - left) / across, (box[3] - top) / down
        if number % 2:
            part, x1, x2 = part[:, ::-1], 1 - x2, 1 - x1
        made.append((np.clip(part * rng.uniform(0.8, 1.15), 0, 255).astype(np.uint8), (x1, y1, x2, y2)))
    return made


@pytest.fixture(scope="module")
def report(photos: Path) -> AuditReport:
    from gradcam_worker.gradcam.models.loading import load_network

    images, rows = {}, []
    for name, (truth, box) in KNOWN.items():
        for number, (pixels, moved) in enumerate(variants(decode((photos / name).read_bytes()).pixels, box)):
            uri = f"s3://photos/{number}-{name}"
            images[uri] = encode(pixels)
            known = Annotations(labels=(truth,), boxes=(AnnotatedBox(xyxy=moved, relative=True),))
            rows.append(Row(uri=uri, annotations=known))
    store = testing.MemoryStore()
    shard = Shard(
        backfill=new_id(),
        index=0,
        key=f"{0:08d}-{'0' * 16}",
        first=0,
        rows=tuple(rows),
        network="efficientnet_lite0",
        target=Target(top_n=2),
        annotated=True,
        output="s3://gradcam/results",
    )
    network = load_network("efficientnet_lite0", forward="tensorflow")
    services = testing.fake_services(
        images, store=store, inference=ModelCache(lambda _: network, max_batch=8)
    )
    shards.run_shard(shard, services, JobContext(Deadline(120), lambda _: None))
    return audit(store).report


@pytest.mark.tensorflow
def test_the_known_confusions_come_first(report: AuditReport) -> None:
    assert report.dataset.labelled == report.dataset.located == len(KNOWN) * VARIANTS
    first = {(one.truth, one.predicted): one for one in report.confusions[:2]}
    assert first.keys() == {(COFFEE_MUG, ESPRESSO), (CAMERA, TRIPOD)}
    assert [one.images for one in first.values()] == [VARIANTS] * 2
    cup, camera = first[COFFEE_MUG, ESPRESSO], first[CAMERA, TRIPOD]
    assert cup.causes["wrong_on_object"] == VARIANTS, "it looks at the cup"
    assert camera.causes["wrong_elsewhere"] == VARIANTS, "it looks at the tripod"
    assert {one.id for one in report.classes[:4]} == {COFFEE_MUG, ESPRESSO, CAMERA, TRIPOD}


@pytest.mark.tensorflow
def test_a_cat_is_a_cat_since_it_looks_at_it(report: AuditReport) -> None:
    (cat,) = (one for one in report.classes if one.id == CAT)
    assert cat.causes["right_reason"] == cat.predicted == VARIANTS
    assert cat.to_learn == 0
    assert report.advice[-1].startswith("The dataset has no features")
