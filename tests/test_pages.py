"""Pages show hostile names as text: read with a parser everywhere, and with a browser where there is one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffrep.cli import main
from diffrep.manifold.files import hover_page
from diffrep.pictures import Page, render

ROOT = Path(__file__).resolve().parent.parent
RUN = "document.title = 31337"
HOSTILE = (
    f"</script><script>{RUN}</script>",
    f"<!--<script>{RUN}",
    f"<img src=x onerror='{RUN}'>",
    f'" onmouseover="{RUN}" \'',
    "@DATA@ @TITLE@ {{ 7 * 7 }} {% raw %}",
    "a & b &amp; \u2028 ]]> \\u003c",
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Parsed(HTMLParser):
    """What a browser would make of a page: elements, texts, scripts, style sheets."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.inline: list[tuple[str, str, str]] = []  # (element, its type, content)
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._open.append(tag)
        if tag in ("script", "style"):
            self.inline.append((tag, self.elements[-1][1].get("type", ""), ""))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            tag, kind, before = self.inline[-1]
            self.inline[-1] = (tag, kind, before + data)
        else:
            self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_safe(page: str, scripts: int) -> Parsed:
    """Nothing but our own script may run, and the policy says so."""
    parsed = Parsed(page)
    assert not [a for _, attributes in parsed.elements for a in attributes if a.startswith("on") or a == "style"]
    assert all(attributes["src"].startswith("data:image/") for attributes in parsed.named("img"))
    (policy,) = (m["content"] for m in parsed.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    code = [(tag, content) for tag, kind, content in parsed.inline if kind != "application/json"]
    assert [tag for tag, _ in code].count("script") == scripts
    for tag, content in code:
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    return parsed


def title_in_browser(path: Path, folder: Path) -> str:
    """The title of a page after its scripts have run."""
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions"]
    more = [f"--user-data-dir={folder}", "--virtual-time-budget=2000", "--dump-dom", path.absolute().as_uri()]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=120, check=True)
    titles = re.findall(r"<title>(.*?)</title>", done.stdout, re.S)
    assert len(titles) == 1
    return titles[0]


def report() -> Page:
    page = Page(HOSTILE[0], HOSTILE[1])
    page.section(HOSTILE[2], HOSTILE[3])
    page.code(HOSTILE[4])
    page.figures([(Image.new("RGB", (4, 4)), text) for text in HOSTILE], layout="small")
    page.table(HOSTILE, [HOSTILE, HOSTILE], best=1)
    return page


def test_a_report_shows_hostile_names_as_text() -> None:
    parsed = check_safe(report().html(), scripts=0)
    assert parsed.texts.count(HOSTILE[0]) == 6  # title, heading, caption, head and two rows of the table
    for text in HOSTILE:
        assert text in parsed.texts
    assert [attributes["alt"] for attributes in parsed.named("img")] == list(HOSTILE)
    assert [attributes.get("class") for attributes in parsed.named("tr")] == [None, None, "best"]


def test_a_map_shows_hostile_names_as_text() -> None:
    labels = np.array(HOSTILE * 3)
    points = np.random.default_rng(0).random((len(labels), 2))
    page = hover_page(points, {HOSTILE[0]: labels}, labels, name=HOSTILE[1], title=HOSTILE[4])
    parsed = check_safe(page, scripts=1)
    assert parsed.texts.count(HOSTILE[4]) == 3  # of the page, its heading, in the legend
    for text in HOSTILE:
        assert text in "".join(parsed.texts)
    (data,) = (content for _, kind, content in parsed.inline if kind == "application/json")
    assert "<" not in data
    assert json.loads(data)["columns"] == {HOSTILE[0]: labels.tolist()}


def hostile_table(folder: Path) -> Path:
    rows = np.random.default_rng(0).random((24, 3))
    path = folder / "@DATA@ <!--<script>.csv"
    labels = [HOSTILE[i % len(HOSTILE)].replace('"', '""') for i in range(24)]
    lines = [f'{x},{y},{z},"{label}"' for (x, y, z), label in zip(rows.tolist(), labels, strict=True)]
    path.write_text("\n".join(['x,y,z,"<script>label"', *lines]) + "\n", encoding="utf-8")
    return path


def test_embed_makes_a_safe_page_of_a_hostile_table(tmp_path: Path) -> None:
    source = hostile_table(tmp_path)
    assert main(["embed", str(source), "--color", "<script>label", "-o", str(tmp_path / "map.png"), "--json"]) == 0
    parsed = check_safe((tmp_path / "map.html").read_text(encoding="utf-8"), scripts=1)
    assert f"{source.name}, heat-geodesic" in parsed.texts


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser is installed; the tests above read the pages with a parser")
def test_no_script_of_a_name_runs_in_a_browser(tmp_path: Path) -> None:
    report().save(tmp_path / "report.html")
    assert main(["embed", str(hostile_table(tmp_path)), "--color", "<script>label", "-o", str(tmp_path / "m.png")]) == 0
    bare = f"<!doctype html><title>safe</title><script>{RUN}</script>"
    (tmp_path / "bare.html").write_text(bare)
    titles = {
        name: title_in_browser(tmp_path / f"{name}.html", tmp_path / "profile") for name in ("bare", "report", "m")
    }
    assert titles["bare"] == "31337"  # the browser does run scripts
    assert "31337" not in (titles["report"].replace(RUN, ""), titles["m"])


def test_pages_are_made_by_the_engine_alone() -> None:
    """Markup in Python code is where escaping is forgotten; results and reports show tables in notebooks."""
    allowed = {"diffrep/pictures.py", "diffrep/results.py", "eval/report.py"}
    found = []
    for folder in ("diffrep", "heads", "eval"):
        for file in (ROOT / folder).rglob("*.py"):
            name = file.relative_to(ROOT).as_posix()
            if name not in allowed and re.search(
                r"</?(html|script|div|figure|section|table|pre|img)\b", file.read_text()
            ):
                found.append(name)
    assert not found


def test_a_value_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(Exception, match="'lead' is undefined"):
        render("report.html", title="t", style="report.css", blocks=[])
