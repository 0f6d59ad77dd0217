import numpy as np
import pytest

from devtools.planted.shapes import CLASSES, SIDE, draw, plant_of


def test_as_many_images_of_each_class_with_the_box_of_the_shape() -> None:
    shapes = draw(40, 3)
    assert np.bincount(shapes.labels).tolist() == [10] * len(CLASSES)
    assert (shapes.boxes >= 0).all()
    assert (shapes.boxes <= SIDE).all()
    for pixels, (left, top, right, bottom) in zip(shapes.pixels, shapes.boxes.astype(int), strict=True):
        inside = pixels[top:bottom, left:right].mean()
        assert inside > pixels.mean() + 5, "a shape is brighter than its background"


@pytest.mark.parametrize(("kind", "share"), [("watermark", 1.0), ("background", 1.0), ("watermark", 0.2)])
def test_a_plant_changes_its_share_of_one_class_and_nothing_else(kind: str, share: float) -> None:
    plant = plant_of("watermark" if kind == "watermark" else "background", 5, share)
    clean, planted = draw(40, 3), draw(40, 3, plant)
    changed = (clean.pixels != planted.pixels).any((1, 2, 3))
    assert changed.tolist() == planted.planted.tolist()
    assert set(planted.labels[changed]) == {plant.class_id}
    assert changed.sum() == round(share * 10)
    if kind == "watermark":
        assert plant.corner == "bottom left"
        assert not (clean.pixels != planted.pixels)[:, : SIDE // 2].any()
        assert not (clean.pixels != planted.pixels)[:, :, SIDE // 2 :].any()
