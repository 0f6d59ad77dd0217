"""What is known about an image, as the network sees it, and where the heat of an explanation lies."""

from collections.abc import Sequence
from dataclasses import dataclass

from gradcam_worker.gradcam.classes import Label
from gradcam_worker.gradcam.localization import Localization
from gradcam_worker.schemas.status import ResultWarning


@dataclass(frozen=True)
class Truth:
    """What is known about an image.

    Attributes:
        ids: Of the true classes that the network has; None: no label is known.
        rank: The best one of them, among all classes by score.
        boxes: In pixels of the upright image: left, top, right, bottom.
        mask: URI without secrets, or run lengths as JSON.
    """

    ids: tuple[int, ...] | None = None
    rank: int | None = None
    boxes: tuple[tuple[float, float, float, float], ...] | None = None
    mask: str | None = None

    @property
    def is_correct(self) -> bool | None:
        """Whether the class with the highest score is a true one; None: none is known."""
        return self.rank == 1 if self.ids else None


NO_TRUTH = Truth()


@dataclass(frozen=True)
class Located:
    """An explanation compared with what is known about its image.

    Attributes:
        localizations: Where the heat of each explained class lies.
        truth: What is known.
        classes: The true classes.
        warnings: What of it cannot be used.
    """

    localizations: Sequence[Localization]
    truth: Truth = NO_TRUTH
    classes: Sequence[Label] = ()
    warnings: tuple[ResultWarning, ...] = ()
