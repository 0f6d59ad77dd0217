from typing import Any

import numpy as np
import pytest

from devtools.planted.samples import anywhere, boxes_around, sample_of
from gradcam_worker.audit.dataset.samples import ClassSample
from gradcam_worker.audit.shortcuts.masking_trial import TrialOutcome, try_suspects
from gradcam_worker.audit.shortcuts.suspects import Suspect
from gradcam_worker.errors import ImageNotFound
from gradcam_worker.gradcam.sizing import Placement
from gradcam_worker.testing import TinyNetwork

SIDE = TinyNetwork.SIDE
RED, GREEN = 0, 1
TOP_LEFT = np.zeros((12, 12), np.bool_)
TOP_LEFT[:3, :3] = True


class Images:
    """Noise, with a red corner in the images of class 0, and a green square around the object of class 1.

    Objects of class 0 are red too, but the network of the tests does not look at them.
    """

    def __init__(self, *, mark: bool, unread: int = 0) -> None:
        self.mark, self.unread = mark, unread
        self.boxes = {class_id: boxes_around(anywhere(30, class_id), 0.12) for class_id in (RED, GREEN)}

    def samples(self) -> list[ClassSample]:
        return [
            sample_of(class_id, anywhere(30, class_id), boxes=self.boxes[class_id]) for class_id in self.boxes
        ]

    def load(self, uri: str, sha256: str) -> tuple[Any, Placement | None]:
        class_id, number = map(int, uri.split("/"))
        if number < self.unread:
            message = f"There is nothing at {uri}."
            raise ImageNotFound(message)
        pixels = np.random.default_rng([class_id, number]).integers(90, 110, (SIDE, SIDE, 3)).astype(np.uint8)
        boxes = self.boxes[class_id][number]
        assert boxes is not None
        left, top, right, bottom = (boxes[0] * SIDE).astype(int)
        pixels[top:bottom, left:right, class_id] = 255
        if self.mark and class_id == RED:
            pixels[:4, :4] = (255, 0, 0)
        return pixels, None


class CornerNetwork(TinyNetwork):
    """Knows red by the corner at the top left, and green by the block with most of it; blue by nothing."""

    def scores(self, pixels: Any) -> Any:
        blocks = self._blocks(pixels)
        shades = blocks - blocks.mean(3, keepdims=True)
        red, green = shades[:, 0, 0, RED], shades[..., GREEN].max((1, 2))
        return 20 * np.stack([red, green, np.full(len(red), 0.05)], axis=1).astype(np.float32)


class AnyCornerNetwork(CornerNetwork):
    """Knows red by any pixel of the corner: what is left of a mark is enough."""

    def _blocks(self, pixels: Any) -> Any:
        blocks = super()._blocks(pixels)
        blocks[:, 0, 0] = pixels[:, :4, :4].max((1, 2)) / np.float32(255)
        return blocks


def suspect(class_id: int, **changes: Any) -> Suspect:
    fields = {"kind": "place", "basis": "boxes", "region": TOP_LEFT, "members": np.arange(30)}
    return Suspect(class_id, **{**fields, "heat": 0.5, "expected": 0.1, **changes})


def trial(suspects: list[Suspect], images: Images, **options: Any) -> TrialOutcome:
    return try_suspects(suspects, images.samples(), CornerNetwork(), images.load, **options)


def test_a_region_that_the_network_needs_is_named_with_its_effect() -> None:
    outcome = trial([suspect(RED)], Images(mark=True))
    ((found, effect),) = outcome.named
    assert found.class_id == RED
    assert effect.images == 30
    assert 0 < effect.low <= effect.effect <= effect.high <= 1
    assert effect.fall_mean > effect.control
    assert (outcome.dropped, outcome.untested, outcome.unread) == (0, (), {})


def test_a_region_without_an_effect_is_dropped() -> None:
    outcome = trial([suspect(RED), suspect(GREEN)], Images(mark=False))
    assert (outcome.named, outcome.dropped) == ((), 2)


def test_a_region_that_covers_a_part_of_a_mark_is_named_though_the_other_part_is_enough() -> None:
    part = np.zeros((12, 12), np.bool_)
    part[:3, :2] = True
    images = Images(mark=True)
    outcome = try_suspects([suspect(RED, region=part)], images.samples(), AnyCornerNetwork(), images.load)
    assert len(outcome.named) == 1


def test_objects_are_never_filled() -> None:
    everywhere = np.ones((12, 12), np.bool_)
    outcome = trial([suspect(GREEN, region=everywhere)], Images(mark=False))
    assert not outcome.named


def test_what_a_named_place_explains_is_not_asked_again_of_the_background() -> None:
    background = suspect(RED, kind="background", region=None)
    outcome = trial([background, suspect(RED)], Images(mark=True))
    assert [found.kind for found, _ in outcome.named] == ["place"]
    (alone,) = trial([background], Images(mark=True)).named
    assert alone[0].kind == "background"


def test_a_background_is_tested_beside_several_named_places() -> None:
    top, beside = np.zeros((2, 12, 12), np.bool_)
    top[:3, :2], beside[:3, 1:3] = True, True
    both = [suspect(RED, region=top), suspect(RED, region=beside)]
    outcome = trial([*both, suspect(RED, kind="background", region=None)], Images(mark=True))
    assert both[0] != suspect(RED, region=top), "arrays have no equality of their own"
    assert outcome.named


def test_the_same_seed_gives_the_same_interval_and_more_suspects_a_wider_one() -> None:
    images = Images(mark=True)
    ((_, first),) = trial([suspect(RED)], images).named
    ((_, again),) = trial([suspect(RED)], images).named
    ((_, of_two),) = trial([suspect(RED), suspect(GREEN)], images).named
    assert first == again
    assert of_two.confidence == pytest.approx(0.975)
    assert of_two.high - of_two.low >= first.high - first.low


def test_suspects_whose_images_cannot_be_read_are_untested() -> None:
    outcome = trial([suspect(RED)], Images(mark=True, unread=30))
    assert not outcome.named
    assert (len(outcome.untested), outcome.dropped) == (1, 0)
    assert outcome.unread["image_not_found"] >= 30


def test_no_more_suspects_are_tested_than_were_asked_for() -> None:
    outcome = trial([suspect(RED), suspect(GREEN)], Images(mark=True), max_suspects=1)
    assert [found.class_id for found, _ in outcome.named] == [RED]
    assert [left.class_id for left in outcome.untested] == [GREEN]
