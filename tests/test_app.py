"""`diffrep app` in a real browser: Chromium without a window, driven by Playwright."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffrep.cli import main
from diffrep.recipes import Correspondence
from diffrep.scenes import held_out_pair, shared_keypoints

ROOT = Path(__file__).resolve().parents[1]
BROWSER = os.environ.get("DIFFREP_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge"))), None
)
QUIET = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-sync")
WATCH = """() => {
    window.bars = new Set()
    const look = () => document.querySelectorAll('.progress-level-inner').forEach(e => window.bars.add(e.innerText))
    new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true})
}"""
PATIENCE = 120_000  # milliseconds for an answer: a model is loaded, and others use the machine too


def test_what_cannot_be_used_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, line in (
        (["--port", "0"], "port must be in 1..65535, got 0"),
        (["--recipe", "dfit"], "there is no recipe 'dfit'"),
        (["--index", str(tmp_path)], str(tmp_path)),
    ):
        assert main(["app", *options]) == 2
        error = capsys.readouterr().err.strip()
        assert line in error
        assert "\n" not in error


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page is served, by a process of its own."""
    pytest.importorskip("gradio", reason="the page needs the extra app")
    place = tmp_path_factory.mktemp("app")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "diffrep", "app", "--port", str(port)]
    with (place / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=place)
        for _ in range(600):
            if (text := (place / "log").read_text()) or process.poll() is not None:
                break
            time.sleep(0.2)
        assert text == f"the page is at http://127.0.0.1:{port}/ until Ctrl-C\n"
        assert list(place.glob("diffrep-app-*"))
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    assert not list(place.glob("diffrep-app-*")), "the temporary folder stays"
    assert "Traceback" not in (place / "log").read_text()


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    """The page in a browser; `page.outside` lists what it asked of other machines."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser, it is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium here: install one, or name it in DIFFREP_BROWSER")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=[f"--{option}" for option in QUIET])
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        page.set_default_timeout(PATIENCE)
        page.outside = []
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((address, "data:", "blob:")) else page.outside.append(request.url)
            ),
        )
        page.goto(address)
        page.wait_for_selector("#match-a img")
        page.evaluate(WATCH)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A rendered pair as files, and a place of it that the recipe `tiny` gets right."""
    folder = tmp_path_factory.mktemp("pair")
    a, b = held_out_pair("car", 4)
    points, truth = shared_keypoints(a, b)
    for name, scene in (("a", a), ("b", b)):
        Image.fromarray(scene.image).save(folder / f"{name}.png")
    errors = np.linalg.norm(Correspondence("tiny").match(a.image, b.image, points).points.numpy() - truth, axis=1)
    best = int(errors.argmin())
    return {"a": folder / "a.png", "b": folder / "b.png", "point": points[best], "truth": truth[best]}


def upload(page: Any, place: str, file: Path) -> None:
    """Put a file in an image's place as a person does: empty it, then choose a file."""
    remove = page.locator(f"#{place}").get_by_role("button", name="Remove Image")
    if remove.count():
        remove.click()
    page.wait_for_selector(f"#{place} img", state="detached")
    page.locator(f"#{place} input[type=file]").set_input_files(str(file))
    page.wait_for_selector(f"#{place} img")


def click(page: Any, place: str, point: np.ndarray) -> None:
    """Click at a pixel of an image."""
    image = page.locator(f"#{place} img").first
    image.scroll_into_view_if_needed()
    box, size = image.bounding_box(), image.evaluate("e => [e.naturalWidth, e.naturalHeight]")
    at = [(float(c) + 0.5) * box[side] / n for c, side, n in zip(point, ("width", "height"), size, strict=True)]
    image.click(position={"x": at[0], "y": at[1]})


def words(page: Any, place: str, other_than: str = "") -> str:
    """What a text field says, once it says something."""
    field = page.locator(f"#{place} textarea, #{place} input").first
    for _ in range(PATIENCE // 200):
        if (text := field.input_value()) and text != other_than:
            return text
        page.wait_for_timeout(200)
    pytest.fail(f"{place} says nothing")


def shown(page: Any, place: str) -> tuple[int, int]:
    """The size of the last picture in a place, once there is one."""
    page.wait_for_selector(f"#{place} img")
    size = page.locator(f"#{place} img").last.evaluate(
        "async e => (await e.decode(), [e.naturalWidth, e.naturalHeight])"
    )
    return tuple(size)


def bars(page: Any) -> str:
    """What progress bars have said since this was last asked."""
    said = page.evaluate("[...window.bars].join('; ')")
    page.evaluate("window.bars.clear()")
    return str(said)


def complaint(page: Any) -> str:
    """The line of an error, which is closed."""
    toast = page.locator(".toast-body.error, [data-testid=toast-body]").first
    toast.wait_for()
    text = toast.inner_text()
    page.locator(".toast-close, [data-testid=toast-close]").first.dispatch_event("click")
    page.wait_for_function("!document.querySelector('.toast-body, [data-testid=toast-body]')")
    return str(text)


@pytest.mark.slow
def test_a_click_shows_the_same_place_in_the_other_image(page: Any, pair: dict[str, Any]) -> None:
    upload(page, "match-a", pair["a"])
    upload(page, "match-b", pair["b"])
    click(page, "match-a", pair["point"])
    text = words(page, "match-words")
    found = np.array([float(n) for n in re.search(r"-> (\d+),(\d+)", text).groups()])
    assert np.linalg.norm(found - pair["truth"]) <= 16, text  # a cell of the map, in pixels of the image
    assert shown(page, "matches")[0] > 256
    assert shown(page, "similarity")[0] > 256
    click(page, "match-a", np.array([128, 128]))
    both = words(page, "match-words", other_than=text)
    assert both.count("->") == 2
    assert "features" in bars(page)
    page.locator("#recipe input").click()
    page.get_by_role("option", name="tiny-views").click()  # another model: the page begins anew
    page.wait_for_function("!document.querySelector('#match-words textarea, #match-words input').value")
    click(page, "match-a", pair["point"])
    other = words(page, "match-words")
    assert other.count("->") == 1
    assert other not in both


@pytest.mark.slow
def test_a_broken_file_is_said_in_one_line(page: Any, pair: dict[str, Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(pair["a"].read_bytes()[:200])
    page.get_by_role("tab", name="Depth, normals, masks, restoration").click()
    upload(page, "head-image", broken)
    page.locator("#head-run").click()
    text = complaint(page)
    assert "broken.png" in text
    assert "Traceback" not in text
    assert "/" not in text.replace("image/", ""), "a folder of this machine is shown"


def test_only_names_that_load_alone_are_offered() -> None:
    pytest.importorskip("gradio", reason="the page needs the extra app")
    from diffrep.commands.app_page import HEADS, _models

    offered = {task: _models(task) for task in HEADS}
    assert all(" " not in name for names in offered.values() for name in names)
    assert "prs-eth/marigold-depth-v1-1" in offered["depth"]


@pytest.mark.slow
def test_depth_appears_and_the_task_can_be_changed(page: Any, pair: dict[str, Any]) -> None:
    page.get_by_role("tab", name="Depth, normals, masks, restoration").click()
    upload(page, "head-image", pair["a"])
    page.locator("#head-run").click()
    text = words(page, "head-words")
    assert "kind: disparity" in text
    assert shown(page, "head-answer") == (256, 256)
    assert "depth" in bars(page)
    page.locator("#task").get_by_text("normals").click()
    page.locator("#head-run").click()
    text = words(page, "head-words", other_than=text)
    assert "frame: lub, axes: x left, y up, z towards the camera" in text
    page.locator("#task").get_by_text("segmentation").click()
    page.locator("#head-run").click()
    mask = words(page, "head-words", other_than=text)
    assert "object: 0." in mask
    page.locator("#task").get_by_text("restore").click()
    page.locator("#head-run").click()
    assert words(page, "head-words", other_than=mask) == "width: 1024, height: 1024"
    page.wait_for_function(
        "[...document.querySelectorAll('#head-answer img')].some(e => e.naturalWidth === 1024)", timeout=PATIENCE
    )


def covered(page: Any) -> float:
    """The share of the width, percent, on which the slider shows what was before."""
    style = page.locator("#head-answer img.fixed").get_attribute("style")
    return float(re.search(r"inset\(0px 0px 0px ([\d.]+)%\)", style)[1])


@pytest.mark.slow
def test_the_slider_is_dragged(page: Any, pair: dict[str, Any]) -> None:
    page.get_by_role("tab", name="Depth, normals, masks, restoration").click()
    before = covered(page)
    handle = page.locator("#head-answer .outer")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 100, y, steps=5)
    page.mouse.up()
    width = page.locator("#head-answer img.fixed").bounding_box()["width"]
    assert covered(page) == pytest.approx(before - 10_000 / width, abs=2)


@pytest.mark.slow
def test_the_model_is_chosen_by_name(page: Any) -> None:
    page.get_by_role("tab", name="Depth, normals, masks, restoration").click()
    page.locator("#task").get_by_text("depth").click()
    before = words(page, "head-words")

    def run(name: str) -> None:
        page.locator("#model input").fill(name)
        page.keyboard.press("Enter")
        page.locator("#head-run").click()

    run("tiny-depth")
    assert "kind: disparity" in words(page, "head-words", other_than=before)
    for name in ("no-such/model", "tiny-normals"):  # one that is not there, and one for another task
        run(name)
        text = complaint(page)
        assert name in text
        assert len(text.strip().splitlines()) <= 4, text  # the title and the cross of the box, the line
    page.locator("#task").get_by_text("normals").click()
    page.wait_for_function("!document.querySelector('#model input').value")  # the name was of the other task
    page.locator("#model input").click()
    assert "jingheya/lotus-normal-d-v1-1" in page.get_by_role("option").all_inner_texts()
    page.keyboard.press("Escape")


@pytest.mark.slow
def test_a_part_is_looked_for_in_the_collection(page: Any) -> None:
    page.get_by_role("tab", name="Search").click()
    click(page, "search-image", np.array([128, 128]))
    assert words(page, "search-words").count(".png") == 3
    assert "extract" in bars(page)  # the examples, for the first search
    assert shown(page, "search-answer")[0] > 600


@pytest.mark.slow
def test_the_map_has_thumbnails(page: Any) -> None:
    page.get_by_role("tab", name="Map").click()
    page.locator("#map-run").click()
    page.wait_for_selector("#map iframe")
    assert page.locator("#map iframe").get_attribute("srcdoc").count("data:image/jpeg") >= 24


@pytest.mark.slow
def test_the_browser_asked_no_other_machine(page: Any) -> None:
    assert page.outside == []


@pytest.mark.slow
def test_only_uploads_and_answers_are_served(address: str) -> None:
    for file in ("/etc/hostname", str(ROOT / "README.md"), str(Path(tempfile.gettempdir()) / "..")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/gradio_api/file={file}")
        assert refused.value.code in (403, 404)
        refused.value.close()


@pytest.mark.slow
def test_large_uploads_are_refused(address: str) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n'
    body = head + bytes(21 * 2**20) + b"\r\n--b--"
    request = urllib.request.Request(
        f"{address}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=b"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413
    refused.value.close()


@pytest.mark.slow
def test_other_machines_cannot_reach_the_page(address: str) -> None:
    port = int(address.rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only says which address of this machine would be used
        outer = probe.getsockname()[0]
    if outer.startswith("127."):
        pytest.skip("this machine has no address but its own")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((outer, port), timeout=2)
