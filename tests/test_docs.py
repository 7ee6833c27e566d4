"""The site: it builds without a warning, nothing on it leads nowhere, and every command has a guide near the README."""

from __future__ import annotations

import html.parser
import importlib.util
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import diffrep
from diffrep.cli import COMMANDS, usage
from tests.test_app import BROWSER, PATIENCE, QUIET

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WIDTH = "document.documentElement.scrollWidth"  # in a browser
GUIDES = sorted(p for p in (DOCS / "guides").glob("*.md") if p.name != "index.md")
TREES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / ".github").rglob("*.md")]


def anchors(page: Path) -> set[str]:
    """The names of a Markdown page's headings, as forges and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {
        re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())
        for title in re.findall(r"^#+ (.+)$", text, re.M)
    }


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures that lie in this repository."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("page", TREES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in links(page):
        file, _, anchor = urllib.parse.unquote(target).partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"


def pages_in_clicks(start: Path, clicks: int) -> set[Path]:
    """The Markdown files that so many clicks lead to."""
    seen = {start}
    for _ in range(clicks):
        seen |= {
            (page.parent / target.partition("#")[0]).resolve()
            for page in seen
            if page.suffix == ".md"
            for target in links(page)
            if target.partition("#")[0]
        }
    return seen


def test_every_command_has_a_guide_two_clicks_from_the_readme() -> None:
    listed = re.findall(r"^  (\S+) ", usage(), re.M)
    assert set(listed) == {name.split()[0] for name in COMMANDS}
    near = pages_in_clicks(ROOT / "README.md", 2)
    shown = {page: page.read_text(encoding="utf-8") for page in GUIDES if page.resolve() in near}
    assert len(shown) == len(GUIDES), "a guide is farther away"
    for name in COMMANDS:
        if COMMANDS[name][0]:
            # a command of a group also counts where a sentence or table of its guide names it
            needle = rf"(?:diffrep |`){re.escape(name)}\b"
            last = rf"`{re.escape(name.split()[-1])}`" if " " in name else needle
            assert any(re.search(f"{needle}|{last}", text) for text in shown.values()), f"no guide shows {name}"


def test_the_list_of_guides_has_every_command() -> None:
    table = dict(re.findall(r"^\| `([a-z-]+)` \|.*?\]\((\S+?)\)", (DOCS / "guides" / "index.md").read_text(), re.M))
    assert set(table) == {name.split()[0] for name in COMMANDS}
    for name, target in table.items():
        page = (DOCS / "guides" / target.partition("#")[0]).read_text(encoding="utf-8")
        assert f"diffrep {name}" in page or f"`{name}`" in page, f"{target} does not show {name}"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda page: page.stem)
def test_a_guide_begins_with_the_two_lines_one_needs(guide: Path) -> None:
    head = re.match(r"# [^\n]+\n\n```(?:python)?\n(.+?)```\n", guide.read_text(encoding="utf-8"), re.S)
    assert head, f"{guide.name}: a title, then a block"
    assert len([line for line in head[1].splitlines() if line]) <= 2, f"{guide.name}: more than two lines"


def test_the_page_of_models_is_what_info_lists() -> None:
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    assert text == loaded("tables").page(), "run: python docs/tables.py"


def loaded(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_gallery_is_what_its_script_paints(tmp_path: Path) -> None:
    gallery = loaded("gallery")
    assert (DOCS / "gallery.md").read_text(encoding="utf-8") == gallery.page(), "run: python docs/gallery.py"
    stored = {file.stem for file in (DOCS / "pictures" / "gallery").iterdir()}
    assert stored == {paint.__name__ for paint in gallery.PICTURES}
    gallery.main(["points", "cutouts"], tmp_path)
    for name in ("points", "cutouts"):
        with Image.open(tmp_path / f"{name}.webp") as now, Image.open(gallery.FOLDER / f"{name}.webp") as before:
            assert now.size == before.size
            difference = np.asarray(now, float) - np.asarray(before, float)
        assert abs(difference).mean() < 6, f"{name} has changed: run docs/gallery.py"


class Page(html.parser.HTMLParser):
    """The links and the anchors of a page of the site."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.targets.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    pytest.importorskip("mkdocs", reason="the site needs the extra docs")
    folder = tmp_path_factory.mktemp("site") / "site"
    command = ["make", "--no-print-directory", "docs", f"PYTHON={sys.executable}", f"SITE={folder}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "MAKEFLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stdout + done.stderr, "the site builds without a word"
    return folder


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_links_resolve(site: Path) -> None:
    pages = {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}
    assert len(pages) > 30
    for file, page in pages.items():
        for target in page.targets:
            address = urllib.parse.urlsplit(target)
            if address.scheme:
                # nothing is loaded from elsewhere; links of text may lead there
                assert address.scheme in ("https", "data"), f"{file}: {target}"
                continue
            there = (file.parent / urllib.parse.unquote(address.path)).resolve() if address.path else file
            there = there / "index.html" if there.is_dir() else there
            assert there.is_file(), f"{file.relative_to(site)}: {target}"
            if address.fragment and there in pages and not address.fragment.startswith("__"):
                assert urllib.parse.unquote(address.fragment) in pages[there].ids, f"{file.relative_to(site)}: {target}"


@pytest.mark.slow
def test_a_reader_of_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for file in site.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link\b(?=[^>]*rel=\"(?:stylesheet|preconnect|icon)\")[^>]*href=\"([^\"]+)\"", text)
        assert not [address for address in loaded if address.startswith(("http:", "https:", "//"))], file


@pytest.mark.slow
def test_the_reference_has_every_public_name(site: Path) -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in (site / "reference").rglob("index.html"))
    for name in diffrep.__all__:
        value = getattr(diffrep, name)
        assert f'id="{value.__module__}.{value.__qualname__}"' in text, f"{name} is not in the reference"


@pytest.mark.slow
def test_no_page_of_the_site_runs_sideways_on_a_phone(site: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser, it is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium here: install one, or name it in DIFFREP_BROWSER")
    wide = {}
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=[f"--{option}" for option in QUIET])
        page = browser.new_page(viewport={"width": 375, "height": 800})
        for file in site.rglob("*.html"):
            page.goto(file.as_uri(), wait_until="domcontentloaded", timeout=PATIENCE)
            width = page.evaluate(WIDTH)
            if width > 375:
                wide[str(file.relative_to(site))] = width
        page.goto((site / "index.html").as_uri())
        page.evaluate("document.querySelector('article').innerHTML += '<p style=width:600px>wide</p>'")
        assert page.evaluate(WIDTH) > 375, "what is too wide would not be seen"
        browser.close()
    assert not wide, f"wider than a phone's 375 pixels: {wide}"
