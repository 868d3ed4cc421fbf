"""Images from URLs, from a server on this machine."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ivl_export.errors import InputError
from ivl_export.runtime.urls import UrlPolicy, fetch, is_url

HERE = UrlPolicy(schemes=("http",), private=True, max_bytes=5000, timeout=5)


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to"))
            self.end_headers()
            return
        if self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
            return
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "ftp://example.org/x")
            self.end_headers()
            return
        if self.path.startswith("/none"):
            self.send_error(404)
            return
        if self.path.startswith("/echo"):  # the path as it came
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.path.encode())
            return
        if self.path in ("/packed", "/bomb", "/unpacked"):
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            body = {"/packed": b"y" * 100, "/bomb": b"y" * 100_000}.get(self.path)
            self.wfile.write(b"no gzip" if body is None else gzip.compress(body))
            return
        self.send_response(200)
        if self.path == "/announced":
            self.send_header("Content-Length", "6000")
        self.end_headers()
        if self.path == "/slow":
            for _ in range(50):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        self.wfile.write(b"x" * (6000 if self.path.startswith(("/long", "/announced")) else 10))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_is_a_url() -> None:
    assert is_url("https://example.org/a.jpg")
    assert is_url("HTTP://example.org")
    assert not any(is_url(image) for image in ("photo.jpg", "https.jpg", b"https://", None))


def test_redirects_are_followed(address: str) -> None:
    assert fetch(f"{address}/photo.jpg?size=1", HERE) == b"x" * 10
    assert fetch(f"{address}/to/photo.jpg", HERE) == b"x" * 10


def test_nothing_is_fetched_without_leave(address: str) -> None:
    with pytest.raises(InputError, match="without leave to fetch"):
        fetch(f"{address}/photo.jpg", None)


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (UrlPolicy(private=True), "Allowed: https from public hosts"),
        (UrlPolicy(schemes=("http",)), "127.0.0.1 is no public address"),
        (UrlPolicy(("example.org",), ("http",), private=True), "from example.org"),
        (UrlPolicy((".0.0.2",), ("http",), private=True), "from .0.0.2"),
    ],
)
def test_a_policy_is_held(address: str, policy: UrlPolicy, why: str) -> None:
    with pytest.raises(InputError, match=why):
        fetch(f"{address}/photo.jpg", policy)


def test_hosts_and_those_below_them_are_allowed(address: str) -> None:
    for hosts in (("127.0.0.1",), (".0.0.1",)):
        policy = UrlPolicy(hosts, ("http",), private=True)
        assert fetch(f"{address}/photo.jpg", policy) == b"x" * 10


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/none", "status 404"),
        ("/loop", "redirected more than 3 times"),
        ("/away", "Allowed: http"),
        ("/long", "limit is 5000 bytes"),
        ("/announced", "limit is 5000 bytes"),
    ],
)
def test_servers_that_do_not_answer_as_they_should(address: str, path: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        fetch(address + path, HERE)


def test_a_server_that_drips_is_given_up(address: str) -> None:
    with pytest.raises(InputError, match=r"too long|timed out"):
        fetch(f"{address}/slow", UrlPolicy(schemes=("http",), private=True, timeout=0.5))


@pytest.mark.parametrize(
    "url", ["http://user:word@127.0.0.1/x", "http:///x", "http://[::1/x", "http://127.0.0.1:99999/"]
)
def test_urls_that_cannot_be_right(url: str) -> None:
    with pytest.raises(InputError):
        fetch(url, HERE)


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("图片.png", "%E5%9B%BE%E7%89%87.png"),
        ("a b.png?q=é&x=%20", "a%20b.png?q=%C3%A9&x=%20"),
        ("a%20b+c,(d).png", "a%20b+c,(d).png"),
    ],
)
def test_addresses_are_percent_encoded_as_other_clients_do(address: str, path: str, sent: str) -> None:
    assert fetch(f"{address}/echo/{path}", HERE).decode() == f"/echo/{sent}"


def test_what_a_server_packs_is_unpacked_within_the_limit(address: str) -> None:
    assert fetch(f"{address}/packed", HERE) == b"y" * 100
    with pytest.raises(InputError, match="limit is 5000"):
        fetch(f"{address}/bomb", HERE)
    with pytest.raises(InputError, match="gzip is damaged"):
        fetch(f"{address}/unpacked", HERE)


def test_errors_show_no_query(address: str) -> None:
    for url in (
        f"{address}/none?signature=S3CRET",
        f"{address}/long?signature=S3CRET",
        "https://h/a?k=S3CRET",
    ):
        with pytest.raises(InputError) as caught:
            fetch(url, None if "//h/" in url else HERE)
        assert "S3CRET" not in str(caught.value)
