"""Make the pictures in docs/images/ again, with the network and the photos that are shipped.

    scripts/pictures [NAME ...]    all of them, unless some are named

They are what a job leaves behind: the same code draws them. The contact sheet is the demo's.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from devtools import ROOT
from gradcam_worker import testing
from gradcam_worker.audit.gallery import GalleryOptions, gallery
from gradcam_worker.execution import shards
from gradcam_worker.execution.pipeline import JobContext
from gradcam_worker.gradcam import Explained, explain_image, load_network
from gradcam_worker.gradcam.classes import DATA, caption
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.imaging.animation import animate, as_frame
from gradcam_worker.gradcam.imaging.overlay import COLORMAPS, Pixels, encode, overlay
from gradcam_worker.gradcam.imaging.region import draw_box, draw_contour, hot_box
from gradcam_worker.gradcam.imaging.sheet import arrange_in_rows, as_tile, sheet, with_title
from gradcam_worker.gradcam.network import Network
from gradcam_worker.gradcam.report import page
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.options import Target
from gradcam_worker.schemas.shard import Row, Shard

DOCS = ROOT / "docs" / "images"
TILE = 360 * 270  # pixels of a picture on a sheet: three beside each other fill a page
FRAME_EDGE = 360  # pixels of the animation: it stays below 400 KB
FRAME_S = 1.2
THRESHOLD = 0.5
CHROMIUM = (  # nothing but the page: no profile, no network, no first-run greetings
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--window-size=1280,900",
)
ASTRONAUT = (560, 812, 652, 450, 610)  # football helmet, space shuttle, military uniform, bobsled, jersey


@cache
def network() -> Network:
    """EfficientNet-Lite0, loaded once."""
    return load_network("efficientnet_lite0")


def explained(photo: str, *classes: int) -> Explained:
    """What the network saw in a shipped photo."""
    return explain_image(network(), DATA / "photos" / f"{photo}.jpg", classes=classes)


def titles(seen: Explained) -> list[str]:
    """Each explained class with its probability."""
    return [caption(one.id, one.name, one.probability) for one in seen.explained]


def grid() -> bytes:
    """One photo and what speaks for each of five classes."""
    seen = explained("astronaut", *ASTRONAUT)
    photo = as_tile(seen.picture, TILE)
    laid = [overlay(photo, heatmap) for heatmap in seen.shown]
    return _jpeg([("photo", photo), *zip(titles(seen), laid, strict=True)])


def overlay_styles() -> bytes:
    """One heatmap in all colour maps, with its contour, its box, and both."""
    seen = explained("chelsea", 285)
    photo, heatmap = as_tile(seen.picture, TILE), seen.shown[0]
    tiles = [(name, overlay(photo, heatmap, colormap=name)) for name in COLORMAPS]
    box = hot_box(heatmap, (photo.shape[0], photo.shape[1]), THRESHOLD)
    if box is None:
        message = "The heatmap is dark: there is nothing to frame."
        raise ValueError(message)
    contour = draw_contour(tiles[0][1], heatmap, THRESHOLD)
    tiles += [
        ("jet, contour", contour),
        ("jet, box", draw_box(tiles[0][1], box)),
        ("jet, contour, box", draw_box(contour, box)),
        ("alpha 0, contour, box", draw_box(draw_contour(photo, heatmap, THRESHOLD), box)),
    ]
    return _jpeg(tiles)


def animation() -> bytes:
    """Four classes in turn."""
    seen = explained("astronaut", *ASTRONAUT[:4])
    photo = as_frame(seen.picture, FRAME_EDGE, len(seen.explained))
    laid = [overlay(photo, heatmap) for heatmap in seen.shown]
    frames = [with_title(title, each) for title, each in zip(titles(seen), laid, strict=True)]
    return animate(frames, kind="gif", frame_s=FRAME_S)


def report_page() -> bytes:
    """The report in a browser, as it opens."""
    seen = explained("astronaut", *ASTRONAUT)
    facts = {"Network": seen.network.name, "Layer": seen.layer, "Method": "gradcam", "Score": "logit"}
    return _shot(page(seen, seen.picture, name="astronaut.jpg", facts=facts))


def gallery_page() -> bytes:
    """The gallery of a small backfill, over parts of the shipped photos, in a browser."""
    images = _parts()
    store, load = testing.MemoryStore(), lambda _: network()
    services = testing.fake_services(images, store=store, model_cache=ModelCache(load, max_batch=8))
    shard = Shard(
        backfill=new_id(),
        index=0,
        key=f"{0:08d}-{0:016x}",
        first=0,
        rows=tuple(Row(uri=uri) for uri in images),
        network=network().facts.name,
        target=Target(top_n=3),
        output="s3://results/cams",
    )
    shards.run_shard(shard, services, JobContext(Deadline(600), lambda _: None))
    store.put("dataset.json", b"{}", "application/json")
    return _shot(gallery(store, testing.MemoryImageFetcher(images), Limits(), GalleryOptions()).page)


def _parts() -> dict[str, bytes]:
    """Eight parts of each shipped photo, each where an image of its own could be."""
    rng, images = np.random.default_rng(1), {}
    for file in sorted((DATA / "photos").glob("*.jpg")):
        photo = decode(file.read_bytes()).pixels
        for number in range(8):
            size = [int(side * rng.uniform(0.5, 1)) for side in photo.shape[:2]]
            top, left = (
                int(rng.integers(0, whole - part + 1)) for whole, part in zip(photo.shape, size, strict=False)
            )
            part = photo[top : top + size[0], left : left + size[1]]
            images[f"s3://photos/{file.stem}/{number}.jpg"] = encode(np.ascontiguousarray(part))
    return images


def _shot(written: bytes) -> bytes:
    """A page as it opens in a browser."""
    chromium = shutil.which("chromium")
    if chromium is None:
        message = "No chromium here: scripts/browser installs it on Debian."
        raise FileNotFoundError(message)
    with tempfile.TemporaryDirectory() as folder:
        html, shot = Path(folder, "page.html"), Path(folder, "page.png")
        html.write_bytes(written)
        options = [*CHROMIUM, f"--user-data-dir={folder}/profile", f"--screenshot={shot}", html.as_uri()]
        subprocess.run([chromium, *options], check=True, capture_output=True)
        return encode(decode(shot.read_bytes()).pixels)


def _jpeg(tiles: list[tuple[str, Pixels]]) -> bytes:
    return encode(sheet(arrange_in_rows(tiles)))


MAKERS: dict[str, Callable[[], bytes]] = {
    "grid.jpg": grid,
    "overlay-styles.jpg": overlay_styles,
    "animation.gif": animation,
    "report.jpg": report_page,
    "gallery.jpg": gallery_page,
}


def main(arguments: list[str]) -> int:
    """Write the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MAKERS))
    names = parser.parse_args(arguments).names or list(MAKERS)
    for name in names:
        if name not in MAKERS:
            parser.error(f"{name!r} is none of {', '.join(MAKERS)}")
    for name in names:
        data = MAKERS[name]()
        (DOCS / name).write_bytes(data)
        print(f"docs/images/{name}: {len(data) / 1000:.0f} KB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
