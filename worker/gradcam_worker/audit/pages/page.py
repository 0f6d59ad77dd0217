"""The page of an audit: `index.html` beside the report and the table of rows.

What the audit found is in the page, with the images that it names. The page itself reads every further row
when somebody asks for it: numbers from the table (`gradcam_worker.audit.dataset.row_table`), heatmaps from
the files of the dataset, by relative links or presigned URLs. There is no server but that of the files.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from decimal import Decimal
from os.path import relpath
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import Batch, read_batches
from gradcam_worker.audit.dataset.row_table import (
    LINKS_FILE,
    MORE_FILE,
    ROWS_FILE,
    describe_columns,
    read_columns,
    write_links,
)
from gradcam_worker.audit.dataset.statistics import READ_TIMEOUT_S, ReportProgress
from gradcam_worker.audit.pages.photos import image_key, photo_bytes, read_photos, truncate
from gradcam_worker.audit.report import CAUSE_TEXTS, CAUSES, AuditReport, Cause, MaskingFacts, RowIndex
from gradcam_worker.errors import InvalidInput
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.gradcam.imaging.html import encode_heatmaps, fill_template
from gradcam_worker.gradcam.imaging.resize import enlarge
from gradcam_worker.images.prepare import ImageFetcher
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.storage.store import Store
from gradcam_worker.storage.stores import FolderStore, S3Store
from gradcam_worker.text.urls import signed_until
from gradcam_worker.text.visible import counted

DATA = Path(__file__).parents[1] / "data"
PAGE = "index.html"
MAX_PAGE_BYTES = 20_000_000  # what a browser opens without delay
MAX_CELLS_PER_SIDE = 24  # of an embedded heatmap
MAX_BESIDE = 3  # further classes of an embedded image, by rank
EXAMPLES = 4  # of each cause of a class, of each confusion, and of the most and least confident images
CONFUSIONS, CLASSES, SUSPECTS = 80, 60, 20  # of which images are embedded
CONFIDENCE = ("Most confident", "Least confident")
LEFT_OUT = frozenset({"sha256", "row_digest", "truth_mask", "heat_features", "error", "error_detail"})
TELLING: tuple[Cause, ...] = ("wrong_reason", "wrong_elsewhere", "wrong_on_object", "right_reason")
MAX_TEXT = 400  # characters of a value
MAX_EXPIRES_S = 7 * 24 * 3600  # of S3


@dataclass(frozen=True)
class PageOptions:
    """What the page holds, and how it finds the rest.

    Attributes:
        max_pictures: Images that are embedded, at most.
        image_links: Rows whose images on S3 get a link, at most; those that are wrong, or right for a wrong
            reason, go first. Whoever has the page can see these images until the links expire.
        expires_s: How long links to a dataset on S3, and to images, are valid.
        image_urls: Beginnings of image URIs, each with that of the URLs where browsers find the images.
    """

    max_pictures: int = 600
    image_links: int = 0
    expires_s: int = 24 * 3600
    image_urls: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PageSummary:
    """What was written."""

    size: int  # bytes
    pictures: int  # images that are embedded
    missing: Mapping[str, int]  # error code -> number of images that could not be fetched
    links: int  # rows with a link to their image
    expires_at: datetime | None  # of the links to dataset and images; None: there are none that expire


def write_page(
    output: Path,
    report: AuditReport,
    dataset: Store,
    images: ImageFetcher,
    limits: Limits,
    options: PageOptions | None = None,
    report_progress: ReportProgress = lambda *_: None,
    *,
    sign: Callable[[str, int], str | None] = lambda *_: None,
) -> PageSummary:
    """Write the page of an audit.

    Args:
        output: The audit's folder, in which the table of rows is.
        report: The audit's.
        dataset: Where the dataset is.
        images: Fetches the images that are embedded.
        limits: The largest size of an image.
        options: What the page holds.
        report_progress: Is called after each file and each image.
        sign: Returns a URL for the URI of an image that is valid for a number of seconds; None: it has none.

    Returns:
        What was written.

    Raises:
        InvalidInput: The dataset has changed since the audit, or the links would be valid for too long.
        StorageUnavailable: The dataset cannot be read.
        ImageFetchFailed: There are no keys to sign links with.
    """
    chosen = options or PageOptions()
    if not 0 < chosen.expires_s <= MAX_EXPIRES_S:
        message = (
            f"Links of {chosen.expires_s:,} s: S3 has them valid for {MAX_EXPIRES_S:,} s (7 days) at most."
        )
        raise InvalidInput(message)
    ends = [utc_now() + timedelta(seconds=chosen.expires_s)]  # of links: keys that expire end some sooner

    def signed(uri: str) -> str | None:
        if url := sign(uri, chosen.expires_s):
            ends.extend(filter(None, [signed_until(url)]))
        return url

    image_links = write_links(output, _worth_a_link(output, chosen.image_links), signed)
    links = _links(output, report, dataset, chosen.expires_s, min(ends), has_more=image_links > 0)
    confidence = _by_confidence(output, report)
    wanted = [*dict.fromkeys(_examples(report, confidence))][: chosen.max_pictures]
    records, grid = _read_records(report, dataset, wanted, report_progress)
    data = _page_data(output, report, records, grid, confidence, links, chosen)

    def fill() -> bytes:
        return fill_template("audit.html", data, folder=DATA, connect=("'self'", *links.origins))

    distinct = {image_key(record): record for record in records}
    room = (MAX_PAGE_BYTES - len(fill())) // max(len(distinct), 1)
    for photo in read_photos([*distinct.values()], images, limits, photo_bytes(room)):
        data["photos"].append(photo)
        report_progress("images", len(data["photos"]), len(distinct))
    places = {key: place for place, key in enumerate(distinct)}
    for record, shown in zip(records, data["records"], strict=True):
        shown["photo"] = places[image_key(record)]
    page = fill()
    FolderStore(output).put(PAGE, page, "text/html")
    missing = Counter(photo["code"] for photo in data["photos"] if "code" in photo)
    return PageSummary(len(page), len(distinct), missing, image_links, links.expires_at)


def _worth_a_link(output: Path, count: int) -> NDArray[np.int64]:
    """The places of the records of which there is most to learn."""
    columns = read_columns(output, ("rank", "cause")) if count else {}
    if not columns:
        return np.zeros(0, np.int64)
    right = CAUSES.index("right_reason")
    cause = columns.get("cause", np.full(len(columns["rank"]), -1, np.int8))
    order = np.lexsort((cause <= right, columns["rank"] != 1))
    return np.sort(order[:count]).astype(np.int64)


@dataclass(frozen=True)
class _Links:
    """How the page finds the files of the dataset."""

    base: str  # before their names
    urls: tuple[str, ...] | None = None  # or one for each
    origins: tuple[str, ...] = ()  # that the page may ask, besides its own
    expires_at: datetime | None = None


def _links(
    output: Path, report: AuditReport, dataset: Store, expires_s: int, expires_at: datetime, *, has_more: bool
) -> _Links:
    if isinstance(dataset, S3Store):
        urls = tuple(dataset.presigned_url(file.name, expires_s) for file in report.files)
        expires_at = min([expires_at, *filter(None, map(signed_until, urls))])
        hosts = {f"{url.scheme}://{url.netloc}" for url in map(urlsplit, urls)}
        return _Links("", urls, tuple(sorted(hosts)), expires_at)
    if isinstance(dataset, FolderStore):
        folder = Path(unquote(urlsplit(dataset.uri(PAGE)).path)).parent.resolve()
        base = quote(relpath(folder, output.resolve())) + "/"
        return _Links(base, expires_at=expires_at if has_more else None)
    return _Links("../")


def _examples(
    report: AuditReport, confidence: Mapping[int, Mapping[str, list[RowIndex]]]
) -> Iterator[RowIndex]:
    """The rows that are embedded, the most telling ones first."""
    for confusion in report.confusions[:CONFUSIONS]:
        yield from confusion.examples[:EXAMPLES]
    for suspect in (*report.shortcuts, *report.suspects[:SUSPECTS]):
        yield from suspect.examples[: 2 * EXAMPLES]
    for one in report.classes[:CLASSES]:
        for cause in TELLING:
            yield from one.examples.get(cause, ())[:EXAMPLES]
        for rows in confidence.get(one.id, {}).values():
            yield from rows


def _by_confidence(output: Path, report: AuditReport) -> dict[int, dict[str, list[RowIndex]]]:
    """The most and the least confident predictions of each class whose images are embedded."""
    columns = read_columns(output, ("row", "index", "class_id", "rank", "probability"))
    found: dict[int, dict[str, list[RowIndex]]] = {}
    if not columns:
        return found
    first = np.flatnonzero(columns["rank"] == 1)
    order = first[np.lexsort((columns["probability"][first], columns["class_id"][first]))]
    ids = columns["class_id"][order]

    def keys(places: NDArray[np.int64]) -> list[RowIndex]:
        return [(int(columns["row"][place]), int(columns["index"][place])) for place in places]

    for one in report.classes[:CLASSES]:
        begin, end = np.searchsorted(ids, one.id, "left"), np.searchsorted(ids, one.id, "right")
        most = order[max(end - EXAMPLES, begin) : end][::-1]
        least = order[begin : min(begin + EXAMPLES, max(end - EXAMPLES, begin))]
        groups = {title: keys(places) for title, places in zip(CONFIDENCE, (most, least), strict=True)}
        found[one.id] = {title: rows for title, rows in groups.items() if rows}
    return found


def _read_records(
    report: AuditReport, dataset: Store, wanted: Sequence[RowIndex], report_progress: ReportProgress
) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """The records of rows, with their heatmaps, and those of the same images beside them."""
    keys, rows = frozenset(wanted), np.unique(np.array([row for row, _ in wanted], np.int64))
    files = [file for file in report.files if _has_any(rows, file.first, file.last)]
    records: list[dict[str, Any]] = []
    for done, file in enumerate(files, 1):
        data = dataset.find(file.name, Deadline(READ_TIMEOUT_S))
        if data is None:
            message = f"{dataset.uri(file.name)} is gone since the audit: the dataset has changed."
            raise InvalidInput(message)
        for batch in read_batches(data):
            records += _records_of(batch, rows, keys)
        report_progress("examples", done, len(files))
    return records, report.dataset.grid


def _has_any(rows: NDArray[np.int64], first: int | None, last: int | None) -> bool:
    if first is None or last is None:
        return False
    return bool(np.searchsorted(rows, last, "right") > np.searchsorted(rows, first, "left"))


def _records_of(batch: Batch, rows: NDArray[np.int64], keys: frozenset[RowIndex]) -> Iterator[dict[str, Any]]:
    numbers = batch.other_columns["row"].to_numpy(zero_copy_only=False)
    for place in np.flatnonzero(np.isin(numbers, rows)).tolist():
        record = batch.record(place)
        if (record["row"], record["index"]) in keys or record["rank"] <= MAX_BESIDE:
            yield record | {"heatmap": batch.heatmaps[place]}


def _page_data(
    output: Path,
    report: AuditReport,
    records: Sequence[Mapping[str, Any]],
    grid: tuple[int, int],
    confidence: Mapping[int, Mapping[str, list[RowIndex]]],
    links: _Links,
    options: PageOptions,
) -> dict[str, Any]:
    """The data of the page, without the photos."""
    size = (min(grid[0], MAX_CELLS_PER_SIDE), min(grid[1], MAX_CELLS_PER_SIDE))
    described = report.model_dump(mode="json", by_alias=True, exclude={"files", "columns", "thresholds"})
    tables = {
        name: {"url": name, "bytes": (output / name).stat().st_size}
        for name in (ROWS_FILE, MORE_FILE, LINKS_FILE)
        if (output / name).exists()
    }
    return {
        "title": truncate(f"Audit · {report.dataset.network}"),
        "report": described,
        "advice": report.advice,
        "facts": [[label, truncate(value)] for label, value in _facts(report, links)],
        "cause_names": CAUSES,
        "cause_texts": CAUSE_TEXTS,
        "shortcut_note": _shortcut_note(report.masking),
        "maps": {"rows": size[0], "columns": size[1], "grid": grid},
        "records": [_record(record, size) for record in records],
        "photos": [],
        "groups": {
            "causes": {
                str(one.id): {
                    cause: [_key(row) for row in one.examples[cause][:EXAMPLES]]
                    for cause in TELLING
                    if cause in one.examples
                }
                for one in report.classes[:CLASSES]
            },
            "confidence": {
                str(id_): {title: [_key(row) for row in rows] for title, rows in groups.items()}
                for id_, groups in confidence.items()
            },
        },
        "columns": describe_columns(output),
        "table": {"records": report.dataset.explanations if tables else 0, "files": tables},
        "files": [
            {
                "name": file.name,
                "url": links.urls[place] if links.urls else links.base + quote(file.name),
                "bytes": file.bytes,
                "first": file.first,
                "last": file.last,
            }
            for place, file in enumerate(report.files)
        ],
        "image_urls": sorted(options.image_urls.items(), key=lambda pair: -len(pair[0])),
    }


def _shortcut_note(masking: MaskingFacts) -> str:
    """What was tried to find shortcuts, in a sentence."""
    if masking.left_out:
        return f"Nothing was masked, so no effect is known: {masking.left_out}"
    if not masking.suspects:
        return "No region besides the object is looked at much more often than in other classes."
    told = (
        f"{counted(masking.suspects, 'suspect')} were masked on a sample of images, by the network itself: "
    )
    told = told.replace("1 suspect were", "1 suspect was")
    untested = f", {masking.untested:,} not tested" if masking.untested else ""
    return f"{told}{masking.named:,} with an effect, {masking.dropped:,} without{untested}."


def _facts(report: AuditReport, links: _Links) -> Iterator[tuple[str, str]]:
    dataset, thresholds = report.dataset, report.thresholds
    yield "Network, layer", f"{dataset.network}, {dataset.layer}"
    yield "Method", str(dataset.method.get("name", ""))
    if dataset.weights_sha256:
        yield "Weights", dataset.weights_sha256[:16]
    yield (
        "Images",
        f"{dataset.rows:,}, {dataset.labelled:,} with labels, {dataset.located:,} with boxes or masks",
    )
    codes = ", ".join(f"{code} {count:,}" for code, count in dataset.codes.items())
    yield "Failed", codes or "none"
    basis = f"{report.basis.regions:,} by boxes or masks, {report.basis.typical_heat:,} by the typical heat"
    yield "Predictions judged", f"{basis} of their class, {report.basis.nothing:,} by nothing"
    limits = (f"{name.replace('_', ' ')} {value}" for name, value in thresholds.model_dump().items())
    yield "Thresholds", ", ".join(limits)
    if links.expires_at:
        yield "Links expire", f"{links.expires_at:%Y-%m-%d %H:%M} UTC"
    yield "Made by", report.generator


def _key(row: RowIndex) -> str:
    return f"{row[0]}:{row[1]}"


def _record(record: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    finite = np.clip(np.nan_to_num(record["heatmap"].astype(np.float32)), 0, 1)
    plain = {
        name: _plain(value) for name, value in record.items() if name != "heatmap" and name not in LEFT_OUT
    }
    kept = {name: value for name, value in plain.items() if value is not None}
    return kept | {"heatmap": encode_heatmaps(enlarge(finite, size) if finite.shape != size else finite)}


def _plain(value: Any) -> Any:
    """A value of a column as JSON has it; None: it has none."""
    plain = value
    if isinstance(value, float):
        plain = round(value, 6) if math.isfinite(value) else None
    elif isinstance(value, (datetime, date, timedelta, Decimal)):
        plain = str(value)
    elif isinstance(value, str):
        plain = truncate(value, MAX_TEXT)
    elif isinstance(value, Mapping):
        plain = {str(name): _plain(one) for name, one in value.items()}
    elif isinstance(value, Iterable):  # bytes, too
        plain = [_plain(one) for one in value]
    return plain
