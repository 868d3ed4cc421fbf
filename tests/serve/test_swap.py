"""A started server changes its bundle under load, and compares it with another."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Server, asked, data_url, picture, started


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bundles that differ in their manifest alone, one that is broken, and a file."""
    folder = tmp_path_factory.mktemp("bundles")
    for name in ("a", "b", "broken"):
        shutil.copytree(tiny_bundle, folder / name)
    manifest = folder / "b" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tests/goldens/tiny"', '"tests/goldens/other"'))
    (folder / "broken" / "manifest.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def server(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    shadow = ["--shadow", str(bundles / "b"), "--share", "100"]
    arguments = [f"one={bundles / 'a'}", "--swap-from", str(bundles), *shadow]
    with started(tmp_path_factory.mktemp("swap") / "log", arguments) as one:
        yield one


def bundle_of(server: Server) -> str:
    from .conftest import KEY

    request = urllib.request.Request(f"{server.address}/v1/models", headers={"X-Api-Key": KEY})
    return str(json.load(urllib.request.urlopen(request))["data"][0]["bundle"])


@pytest.mark.slow
def test_a_bundle_is_swapped_under_load(server: Server) -> None:
    answers: list[Any] = []
    failures: list[Exception] = []
    stop = threading.Event()

    def work(seed: int) -> None:
        while not stop.is_set():
            request = {"input": [data_url(picture(seed)), "a ring"], "encoding_format": "base64"}
            try:
                answers.append(asked(server, "/v1/embeddings", request)["data"])
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    before = bundle_of(server)
    swapped = [asked(server, "/admin/swap", {"model": "one", "bundle": name}) for name in ("b", "a", "b")]
    time.sleep(0.2)
    stop.set()
    for thread in threads:
        thread.join()
    assert [one["previous"] for one in swapped] == [before, *(one["bundle"] for one in swapped[:2])]
    assert bundle_of(server) == swapped[-1]["bundle"] != before
    assert failures == []
    assert len(answers) > 6


@pytest.mark.parametrize(
    ("model", "bundle", "status"),
    [
        ("one", "broken", 400),
        ("one", "none", 404),
        ("one", "../bundles/b", 404),
        ("one", "/etc", 404),
        ("two", "b", 404),
    ],
)
def test_what_is_not_swapped(server: Server, model: str, bundle: str, status: int) -> None:
    before = bundle_of(server)
    with pytest.raises(urllib.error.HTTPError) as caught:
        asked(server, "/admin/swap", {"model": model, "bundle": bundle})
    assert caught.value.code == status
    assert bundle_of(server) == before
    assert asked(server, "/v1/embeddings", {"input": "a ring"})["model"] == "one"


def test_the_shadow_agrees_with_its_like(server: Server) -> None:
    asked(server, "/v1/classify", {"input": data_url(picture()), "labels": ["red", "blue"]})
    for _ in range(200):
        page = urllib.request.urlopen(f"{server.address}/metrics").read().decode()
        if 'ivl_export_shadow_top1_total{same="yes"} 1.0' in page:
            break
        time.sleep(0.02)
    for mode in ("InternVL-C", "text"):
        count = re.search(rf'shadow_cosine_count{{mode="{mode}"}} (\d+)', page)
        low = re.search(rf'shadow_cosine_bucket{{le="0.9999",mode="{mode}"}} (\d+)', page)
        assert count is not None
        assert low is not None
        assert int(count[1]) > 0
        assert int(low[1]) == 0
    assert "shadow_failed_total{" not in page


def test_a_server_without_leave_swaps_nothing(server: Server, tiny_bundle: Path) -> None:
    from ivl_export.serve.errors import HttpError
    from ivl_export.serve.swap import Swaps

    for swaps, client, keys, status in (
        (Swaps(None, "", {}), ("127.0.0.1", 1), ("k",), 404),
        (Swaps(tiny_bundle, "", {}), ("127.0.0.1", 1), (), 403),
        (Swaps(tiny_bundle, "", {}), ("10.0.0.1", 1), ("k",), 403),
        (Swaps(tiny_bundle, "", {}), None, ("k",), 403),
    ):
        with pytest.raises(HttpError) as caught:
            swaps.check(client, keys)
        assert caught.value.status == status
    Swaps(tiny_bundle, "", {}).check(("::1", 1), ("k",))
