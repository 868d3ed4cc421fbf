"""The page at ``/`` in a real headless browser, where one is installed."""

from __future__ import annotations

import os
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import KEY, Server, picture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = os.environ.get("IVL_EXPORT_SHOTS")
"""A folder for pictures of the page, for people."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


def test_the_page_is_one_file_that_loads_nothing(server: Server) -> None:
    answer = urllib.request.urlopen(f"{server.address}/")
    policy, html = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    assert "http://" not in html
    assert "https://" not in html


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_image_is_dropped(server: Server, browser: Any, tmp_path: Path, scheme: str) -> None:
    """Labels, caption and neighbours of images; then a chat about one; no error in the console."""
    files = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, file in enumerate(files):
        file.write_bytes(picture(seed))
    page = browser.new_page(color_scheme=scheme)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{server.address}/")
    page.wait_for_selector("#error:has-text('API key')")
    page.fill("#key", KEY)
    page.dispatch_event("#key", "change")
    page.wait_for_selector("#model option:nth-child(2)", state="attached")
    page.set_input_files("#file", files)
    page.wait_for_selector("#near figure")
    page.wait_for_selector("#labels div:nth-child(5)")
    page.wait_for_selector("#caption:not(:empty)")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 200) == (scheme == "dark")
    _shot(page, f"{scheme}-embed")
    page.select_option("#model", "chat")
    page.wait_for_selector("#question")
    page.fill("#question", "two small squares")
    page.click("#ask button")
    page.wait_for_selector("#talk .assistant[data-done]")
    _shot(page, f"{scheme}-chat")
    assert page.text_content("#error") == ""
    assert problems == []
    page.close()


@pytest.mark.slow
def test_an_error_is_shown_as_text(server: Server, browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    file.write_bytes(b"<img src=x onerror=alert(1)>")
    page = browser.new_page()
    page.goto(f"{server.address}/")
    page.fill("#key", KEY)
    page.dispatch_event("#key", "change")
    page.wait_for_selector("#model option:nth-child(2)", state="attached")
    page.set_input_files("#file", [file])
    page.wait_for_selector("#error:has-text('image')")
    page.close()


def _shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)
