"""The page for people at `/`, and its files."""

import hashlib
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header
from starlette.responses import Response

from gradcam_worker.gateway.http.answers import is_held
from gradcam_worker.gradcam.classes import DATA

PAGE = Path(__file__).parents[1] / "page"
FILES = {  # by name below /static
    "page.css": (PAGE / "page.css", "text/css"),
    "page.js": (PAGE / "page.js", "text/javascript"),
    "gradcam-viewer.js": (DATA / "gradcam-viewer.js", "text/javascript"),
    "sample.jpg": (DATA / "photos" / "chelsea.jpg", "image/jpeg"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; "
    "img-src 'self' http: https: data: blob:"  # photos come from the bucket, by presigned URLs
)

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class StaticFile:
    """A file that browsers keep, and ask for again each time."""

    content: bytes
    media_type: str
    etag: str

    def response(self, if_none_match: str | None, headers: dict[str, str] | None = None) -> Response:
        """The answer to a request: 304 where the browser has it."""
        all_headers = {"ETag": self.etag, "Cache-Control": "no-cache", **(headers or {})}
        if is_held(self.etag, if_none_match):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=all_headers)
        return Response(self.content, headers=all_headers, media_type=self.media_type)


@cache
def _read(path: Path, media_type: str) -> StaticFile:
    content = path.read_bytes()
    return StaticFile(content, media_type, f'W/"{hashlib.blake2b(content, digest_size=12).hexdigest()}"')


@router.head("/")
@router.get("/")
async def page(if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """The page."""
    file = _read(PAGE / "index.html", "text/html")
    return file.response(if_none_match, {"Content-Security-Policy": POLICY})


def _serve(name: str) -> None:
    async def file(if_none_match: Annotated[str | None, Header()] = None) -> Response:
        return _read(*FILES[name]).response(if_none_match)

    router.head(f"/static/{name}")(file)
    router.get(f"/static/{name}", name=name)(file)


for _name in FILES:
    _serve(_name)
