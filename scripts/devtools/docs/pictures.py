"""Make the images in docs/images/ again, with the shipped network and photos.

    scripts/pictures [NAME ...]    all of them, unless some are named

They are what `gradcam explain` and a backfill leave. The contact sheet is the demo's.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from devtools import ROOT
from devtools.bench import testbed
from gradcam_worker import testing
from gradcam_worker.audit.dataset.row_table import RowTable
from gradcam_worker.audit.pages.gallery import GalleryOptions, gallery
from gradcam_worker.audit.pages.page import PAGE, write_page
from gradcam_worker.audit.run import audit
from gradcam_worker.cli.main import main as gradcam
from gradcam_worker.execution import shards
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.gradcam import explain_image, load_network
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.imaging.overlay import COLORMAPS, encode, overlay
from gradcam_worker.gradcam.imaging.region import draw_box, draw_contour, hot_box
from gradcam_worker.gradcam.imaging.sheet import arrange_in_rows, as_tile, sheet
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.annotations import Annotations
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.options import Target
from gradcam_worker.schemas.shard import Row, Shard

DOCS = ROOT / "docs" / "images"
PHOTOS = DATA / "photos"
NETWORK = "efficientnet_lite0"
TILE = 360 * 270  # pixels of an image on a sheet: three beside each other fill a page
SMALL_TILE = 200 * 150  # likewise: nine beside each other
THRESHOLD = 0.5
KINDS = ("gradcam", "gradcam++", "layercam", "eigencam", "rise", "occlusion", "integrated_gradients")
AGAINST, AGAINST_SIGN = "gradcam, against", " / "
CHROMIUM = (  # nothing but the page: no profile, no network, no first-run greetings
    *("chromium", "--headless=new", "--no-sandbox", "--no-first-run", "--disable-gpu", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--hide-scrollbars", "--window-size=1280,900", "--virtual-time-budget=5000"),
)
LABELS = {  # what is on the shipped photos, as ImageNet's classes name it
    "astronaut": (652,),  # a uniform
    "camera": (759, 872),  # a camera on a tripod
    "chelsea": (281, 282, 285),  # a cat
    "coffee": (967,),
    "rocket": (657, 744),
}
CLASSES = "560,812,652,450,610"  # football helmet, space shuttle, military uniform, bobsled, jersey


def artifact(kind: str, classes: str = CLASSES) -> bytes:
    """Return an artifact that `gradcam explain` makes of the astronaut."""
    with tempfile.TemporaryDirectory() as folder:
        photo = str(PHOTOS / "astronaut.jpg")
        gradcam(["explain", photo, "--classes", classes, "--artifact", kind, "--output", folder])
        (file,) = Path(folder).rglob(f"{kind}.*")
        return file.read_bytes()


def overlay_styles() -> bytes:
    """One heatmap in all colour maps, with its contour, its box, and both."""
    seen = explain_image(load_network(NETWORK), PHOTOS / "chelsea.jpg", classes=[285])
    photo, heatmap = as_tile(seen.picture, TILE), seen.shown[0]
    tiles = [(name, overlay(photo, heatmap, colormap=name)) for name in COLORMAPS]
    box = hot_box(heatmap, (photo.shape[0], photo.shape[1]), THRESHOLD)
    contour = draw_contour(tiles[0][1], heatmap, THRESHOLD)
    tiles.append(("jet, contour", contour))
    if box:  # a dark heatmap has none
        tiles += [
            ("jet, box", draw_box(tiles[0][1], box)),
            ("jet, contour, box", draw_box(contour, box)),
            ("alpha 0, contour, box", draw_box(draw_contour(photo, heatmap, THRESHOLD), box)),
        ]
    return encode(sheet(arrange_in_rows(tiles)))


def every_method() -> bytes:
    """The best class of each photo under each kind of method; at last, against the second best class."""
    network, rows = load_network(NETWORK), []
    for photo in sorted(PHOTOS.iterdir()):
        best, second = explain_image(network, photo, top_n=2).explained
        row = []
        for name in (*KINDS, AGAINST):
            others = [second.id] if name == AGAINST else None
            method = None if name == AGAINST else name
            seen = explain_image(network, photo, classes=[best.id], against=others, method=method)
            row.append((name, overlay(as_tile(seen.picture, SMALL_TILE), seen.shown[0])))
        title = f"{best.name}{AGAINST_SIGN}{second.name}".replace("_", " ")
        rows.append([(title, as_tile(seen.picture, SMALL_TILE)), *row])
    return encode(sheet(rows))


def gallery_page() -> bytes:
    """The gallery of a small backfill, over parts of the shipped photos, in a browser."""
    images = _parts_of_photos(40)
    store = _explained(images, tuple(Row(uri=uri) for uri in images), top_n=3)
    return _shot(gallery(store, testing.MemoryImageFetcher(images), Limits(), GalleryOptions()).page)


def audit_page() -> bytes:
    """The page of an audit of such a backfill, with labels."""
    images = _parts_of_photos(150)
    names = [path.stem for path in sorted(PHOTOS.glob("*.jpg"))]  # parts are made of them in turns
    labels = (LABELS[names[number % len(names)]] for number in range(len(images)))
    rows = tuple(
        Row(uri=uri, annotations=Annotations(labels=own), classes=own)
        for uri, own in zip(images, labels, strict=True)
    )
    store = _explained(images, rows, top_n=2)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        table = RowTable(output)
        found = audit(store, table=table)
        table.finish({"cause": found.causes})
        report = found.report.model_copy(
            update={
                "dataset": found.report.dataset.model_copy(update={"uri": "s3://results/cams"}),
                "advice": (),
            }
        )
        write_page(output, report, store, testing.MemoryImageFetcher(images), Limits())
        return _shot((output / PAGE).read_bytes())


def _parts_of_photos(count: int) -> dict[str, bytes | Exception]:
    photos = enumerate(testbed.photographs(count))
    return {f"s3://photos/{number}.jpg": photo for number, photo in photos}


def _explained(
    images: dict[str, bytes | Exception], rows: tuple[Row, ...], *, top_n: int
) -> testing.MemoryStore:
    """The dataset of a backfill with the shipped network."""
    store, cache = testing.MemoryStore(), ModelCache(lambda _: load_network(NETWORK), max_batch=8)
    services = testing.fake_services(images, store=store, inference=cache)
    shard = Shard(
        backfill=new_id(),
        index=0,
        key=f"{0:08d}-{0:016x}",
        first=0,
        rows=rows,
        annotated=any(row.annotations for row in rows),
        network=NETWORK,
        target=Target(top_n=top_n),
        output="s3://results/cams",
    )
    shards.run_shard(shard, services, JobContext(Deadline(600), lambda _: None))
    store.put("dataset.json", b"{}", "application/json")
    return store


def _shot(written: bytes) -> bytes:
    """A page as it opens in a browser."""
    if not shutil.which(CHROMIUM[0]):
        sys.exit("No chromium here: scripts/browser installs it on Debian.")
    with tempfile.TemporaryDirectory() as folder:
        html, shot = Path(folder, "page.html"), Path(folder, "page.png")
        html.write_bytes(written)
        options = [*CHROMIUM, f"--user-data-dir={folder}/profile", f"--screenshot={shot}", html.as_uri()]
        subprocess.run(options, check=True, capture_output=True)
        return encode(decode(shot.read_bytes()).pixels)


MAKERS: dict[str, Callable[[], bytes]] = {
    "grid.jpg": partial(artifact, "grid"),
    "overlay-styles.jpg": overlay_styles,
    "methods.jpg": every_method,
    "animation.gif": partial(artifact, "animation", "560,812,652"),
    "report.jpg": lambda: _shot(artifact("report")),
    "gallery.jpg": gallery_page,
    "audit.jpg": audit_page,
}


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - MAKERS.keys():
        sys.exit(f"{', '.join(unknown)}: there are {', '.join(MAKERS)}.")
    for image in sys.argv[1:] or MAKERS:
        data = MAKERS[image]()
        (DOCS / image).write_bytes(data)
        print(f"docs/images/{image}: {len(data) / 1000:.0f} KB", flush=True)
