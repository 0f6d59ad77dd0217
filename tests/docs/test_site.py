"""The documentation builds strictly, and what is broken in it is found."""

from pathlib import Path

import pytest

from devtools.docs import site


def test_the_site_is_built_without_a_broken_link(capsys: pytest.CaptureFixture[str]) -> None:
    code = site.main()
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    assert "pages in build/site" in said.out


@pytest.mark.parametrize(
    ("html", "said"),
    [
        ('<a href="b/#here">there</a>', None),
        ('<a href="https://example.com/">elsewhere</a>', None),
        ('<a href="c/">gone</a>', "links to c/, which does not exist"),
        ('<a href="b/#gone">gone</a>', "links to b/#gone: there is no such anchor"),
        ('<img src="gone.png">', "links to gone.png, which does not exist"),
        ('<script src="https://example.com/x.js"></script>', "loads https://example.com/x.js"),
        ('<link rel="stylesheet" href="//example.com/x.css">', "loads //example.com/x.css"),
    ],
)
def test_what_is_broken_in_a_page_is_found(html: str, said: str | None, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text('<h2 id="here">Here</h2>')
    (tmp_path / "index.html").write_text(html)
    assert [*site.problems(tmp_path)] == ([f"index.html {said}"] if said else [])
