"""What would make an audit say more, in sentences."""

from collections.abc import Iterable, Iterator

from gradcam_worker.audit.report import Basis, ColumnFacts, DatasetFacts, Thresholds
from gradcam_worker.schemas.options import WITHOUT_CLASS
from gradcam_worker.text.visible import counted

FEW_LABELS = 0.9  # of the images: below it, the rest is told


def advice(
    dataset: DatasetFacts, basis: Basis, thresholds: Thresholds, columns: Iterable[ColumnFacts]
) -> Iterator[str]:
    """Yield a sentence for each thing that is missing in a dataset.

    Args:
        dataset: What is in it.
        basis: What its predictions were judged by.
        thresholds: When they count as looking at the object.
        columns: Of its files.

    Yields:
        The sentences, the most important ones first.
    """
    names = {column.name for column in columns}
    if dataset.method["name"] in WITHOUT_CLASS:
        yield (
            f"{dataset.method['name']} gives the same heatmap for every class: it does not tell what speaks "
            "for a prediction. Run the backfill with another method."
        )
    if dataset.unpredicted:
        some = counted(dataset.unpredicted, "image")
        yield (
            f"Of {some} the class that came first has no heatmap, so they are not judged: ask the backfill "
            "for --top-n instead of --classes, or for both with --classes-from."
        )
    if not dataset.labelled:
        yield (
            "No image has a label, so no prediction is known to be right or wrong: name the column with the "
            "true classes, gradcam backfill --label COLUMN."
        )
    elif dataset.labelled < FEW_LABELS * dataset.explained:
        yield (
            f"Only {dataset.labelled:,} of {counted(dataset.explained, 'image')} have a label that the "
            "network knows: gradcam backfill --label-map FILE says which class others mean."
        )
    if not basis.regions:
        by = "" if dataset.located else ": name the column with the objects, gradcam backfill --boxes COLUMN"
        large = f", since the regions cover more than {thresholds.largest_region:.0%} of the images"
        yield (
            "Where the network looks is judged by where the heat of the same class lies in other images, "
            f"not by where the object is{by or large}. A mistake that most images of a class share is not "
            "seen so, unless it lies at the border."
        )
    if basis.nothing:
        some = counted(basis.nothing, "image")
        yield (
            f"Where the heat of {some} lies is not judged: there are no boxes, and fewer than "
            f"{thresholds.typical_images} images of the class, or the heatmap is 0."
        )
    if "row_digest" not in names:
        yield (
            "An earlier version wrote this dataset: --changed runs the backfill again with labels, boxes and "
            "the columns of its input."
        )
    elif dataset.features is None:
        yield (
            "The dataset has no features of the target layer: gradcam backfill --features keeps them, and "
            "groups of images are told apart by what they show, too, not only by where the heat lies."
        )
