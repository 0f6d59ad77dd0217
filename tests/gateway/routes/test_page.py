"""The page at `/` and its files: what they are, and that nothing in them runs inline."""

import re

from fastapi.testclient import TestClient

from gradcam_worker.gateway.routes.page import PAGE


def test_the_page_may_run_nothing_but_its_own_files(waiting: TestClient) -> None:
    answer = waiting.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "style-src 'self';" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", answer.text)
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", answer.text), "nothing comes from elsewhere"


def test_the_files_that_the_page_names_are_there_and_kept_by_browsers(waiting: TestClient) -> None:
    names = re.findall(r"\"(static/[^\"]+)\"", waiting.get("/").text)
    assert len(names) == 4
    for name in names:
        answer = waiting.get(f"/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["content-type"].split("/")[0] in {"text", "image"}
        again = waiting.get(f"/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert waiting.get("/static/index.html").status_code == 404
    assert waiting.get("/static/..%2findex.html").status_code == 404


def test_the_page_is_in_no_document_of_the_api(waiting: TestClient) -> None:
    assert [path for path in waiting.get("/openapi.json").json()["paths"] if not path.startswith("/v1")] == [
        "/live",
        "/ready",
        "/metrics",
    ]


def test_every_element_that_the_script_uses_is_on_the_page() -> None:
    page, script = (PAGE / "index.html").read_text(), (PAGE / "page.js").read_text()
    used = set(re.findall(r"\$\(\"([\w-]+)\"\)", script)) | set(re.findall(r"linesOf\(\"(\w+)\"\)", script))
    there = re.findall(r"\bid=\"([\w-]+)\"", page)
    assert used <= set(there)
    assert len(there) == len(set(there))
    assert "innerHTML" not in script, "what is data becomes text, never markup"
