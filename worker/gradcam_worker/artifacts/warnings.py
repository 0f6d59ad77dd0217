"""What a reader of a result should know about it."""

from gradcam_worker.gradcam.explain import Explanation
from gradcam_worker.schemas.manifest import InputRecord
from gradcam_worker.schemas.status import ResultWarning


def result_warnings(image: InputRecord, explanation: Explanation) -> tuple[ResultWarning, ...]:
    """List what a reader should know: a damaged image, heatmaps that are zero, sums that are wrong."""
    warnings = [
        ResultWarning(code="zero_heatmap", class_id=class_id) for class_id in explanation.zero_heatmaps
    ]
    for class_id in explanation.incomplete:
        detail = (
            "The attributions do not sum to the difference between the scores of image and baseline: take "
            "more steps."
        )
        warnings.append(ResultWarning(code="incomplete_attributions", class_id=class_id, detail=detail))
    if image.damage:
        warnings.insert(0, ResultWarning(code="image_damaged", **dict(image.damage)))
    return tuple(warnings)
