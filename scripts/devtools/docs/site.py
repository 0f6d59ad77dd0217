"""Builds the documentation strictly: `scripts/docs`.

Zensical checks the links of the Markdown sources. What it does not check is checked here, in the pages that
it made: images, links between generated parts (the Python API), and that no page loads anything from
elsewhere.
"""

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from devtools import ROOT

CONFIG = ROOT / "zensical.toml"
LOADS = {("img", "src"), ("script", "src"), ("link", "href"), ("source", "src"), ("iframe", "src")}
NAMES_ONLY = {"canonical", "alternate"}  # rel of a <link> that loads nothing
ERROR_PAGE = "404.html"  # its links are those of the site's root, wherever that is


class Page(HTMLParser):
    """What a page links to and loads, and which anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors = {"__top"}
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the tag's anchors and addresses."""
        values = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        for name in ("href", "src"):
            if address := values.get(name):
                self.links.append(address)
                if (tag, name) in LOADS and values.get("rel") not in NAMES_ONLY:
                    self.loads.append(address)


def problems(site: Path) -> Iterator[str]:
    """Links and images that lead nowhere, and what a page would load from elsewhere."""
    paths = [path for path in sorted(site.rglob("*.html")) if path.name != ERROR_PAGE]
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in paths}
    for path, page in pages.items():
        here = path.relative_to(site)
        for address in page.loads:
            if urlsplit(address).netloc:
                yield f"{here} loads {address}"
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{here} links to {address}, which does not exist"
            elif parts.fragment and target in pages and parts.fragment not in pages[target].anchors:
                yield f"{here} links to {address}: there is no such anchor"


def main() -> int:
    """Build, then check the pages; print what is wrong."""
    zensical = Path(sys.executable).with_name("zensical")
    command: list[str | Path] = [zensical, "build", "--strict", "--clean", "--config-file", CONFIG]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        print(done.stdout + done.stderr.partition("Traceback (most recent call last)")[0], file=sys.stderr)
        return 1
    folder = ROOT / tomllib.loads(CONFIG.read_text(encoding="utf-8"))["project"]["site_dir"]
    broken = [*problems(folder)]
    print("\n".join(broken) or f"{len(list(folder.rglob('*.html')))} pages in {folder.relative_to(ROOT)}.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
