"""A started server with tight limits: what is too many, too large, too late or not allowed, and the end."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from PIL import Image

from .conftest import KEY, Server, asked, data_url, picture, started

CAPACITY = 6
# Names that resolve as on the internet: 93.184.215.14 is public, and its traffic goes to this machine.
INTERNET = """
import socket, time
from ivl_export.runtime.serving.scheduler import Scheduler
look_up, connect, step = socket.getaddrinfo, socket.socket.connect, Scheduler._step
times = {}
def getaddrinfo(host, port, *rest, **more):
    if str(host).endswith(".test"):
        times[host] = times.get(host, 0) + 1
        host = "127.0.0.1" if host == "rebind.test" and times[host] % 2 == 0 else "93.184.215.14"
    return look_up(host, port, *rest, **more)
def connected(self, address):
    return connect(self, ("127.0.0.1", *address[1:]) if address[0] == "93.184.215.14" else address)
def slow(self):
    time.sleep(0.05)
    step(self)
socket.getaddrinfo, socket.socket.connect, Scheduler._step = getaddrinfo, connected, slow
"""


class Site(BaseHTTPRequestHandler):
    """A site of images: ``/slow`` waits until it is told to go on, ``/to?URL`` redirects."""

    go_on = threading.Event()
    paths: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.paths.append(self.path)
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        if self.path == "/slow":
            self.go_on.wait(20)
        body = picture()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    Site.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def tight(tiny_bundle: Path, chat_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = "max-running=2 max-queued=4 max-body=1 max-pixels=5000 timeout=3 drain-delay=1 url-http"
    options = [word for setting in settings.split() for word in ("-O", setting)]
    hosts = [word for host in (".test", "localhost") for word in ("--allow-url", host)]
    arguments = [f"tiny={tiny_bundle}", f"chat={chat_bundle}", *options, *hosts]
    with started(tmp_path_factory.mktemp("limits") / "log", arguments, INTERNET) as one:
        yield one


def refused(server: Server, path: str, request: Any) -> tuple[int, dict[str, Any], Any]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        asked(server, path, request)
    return caught.value.code, json.loads(caught.value.read())["error"], caught.value.headers


def held(server: Server) -> int:
    page = urllib.request.urlopen(f"{server.address}/metrics").read().decode()
    found = re.search(r'ivl_export_items\{model="tiny"\} (\d+)', page)
    assert found is not None
    return int(found[1])


def wait_until_held(server: Server, count: int) -> None:
    for _ in range(400):
        if held(server) == count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{held(server)} items are held, not {count}")


def embed(server: Server, *images: str, **more: Any) -> Any:
    return asked(server, "/v1/embeddings", {"input": list(images), "modality": "image", **more})


def connection(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=30)


def test_a_full_server_says_when_to_come_again(tight: Server, site: int) -> None:
    Site.go_on.clear()
    slow = f"http://slow.test:{site}/slow"
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(embed, tight, slow, slow) for _ in range(2)]
        wait_until_held(tight, 4)
        request = {"input": ["no image"] * 3, "modality": "image"}
        status, error, headers = refused(tight, "/v1/embeddings", request)
        assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "overloaded")
        assert int(headers["Retry-After"]) >= 1
        assert urllib.request.urlopen(f"{tight.address}/health").status == 200
        assert len(asked(tight, "/v1/embeddings", {"input": ["a", "b"]})["data"]) == 2, (
            "there is room for two"
        )
        Site.go_on.set()
        assert all(len(one.result()["data"]) == 2 for one in waiting)
    wait_until_held(tight, 0)


def test_more_items_than_ever_fit(tight: Server) -> None:
    status, error, _ = refused(tight, "/v1/embeddings", {"input": ["a"] * (CAPACITY + 1)})
    assert (status, error["param"]) == (413, "input")


def test_a_client_that_leaves_gives_up_its_place(tight: Server, site: int) -> None:
    Site.go_on.clear()
    body = json.dumps({"input": f"http://slow.test:{site}/slow", "modality": "image"})
    clients = [connection(tight) for _ in range(3)]
    for client in clients:
        client.request("POST", "/v1/embeddings", body, {"Authorization": f"Bearer {KEY}"})
    wait_until_held(tight, 3)
    for client in clients:
        client.close()
    wait_until_held(tight, 0)
    Site.go_on.set()


@pytest.mark.slow
def test_out_of_time(tight: Server, site: int) -> None:
    """One whose work is not done, and one whose body does not come."""
    Site.go_on.clear()
    host, port = urlsplit(tight.address).netloc.split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %b\r\n" % KEY.encode()
        )
        half.sendall(b'Content-Length: 100\r\n\r\n{"input": ')
        request = {"input": f"http://slow.test:{site}/slow", "modality": "image"}
        status, error, _ = refused(tight, "/v1/embeddings", request)
        assert (status, error["code"]) == (504, "timeout")
        half.settimeout(30)
        assert half.recv(1000).startswith(b"HTTP/1.1 408 ")
    Site.go_on.set()
    wait_until_held(tight, 0)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux alone gives up slow readers")
def test_a_client_that_reads_nothing_is_given_up(tight: Server) -> None:
    """It asks for more than the buffers of the system hold; within its time the server resets it."""
    host, port = urlsplit(tight.address).netloc.split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.settimeout(30)
        request = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"

        def send() -> None:
            for _ in range(3000):
                client.sendall(request * 10)
                time.sleep(0.02)

        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send()
    assert urllib.request.urlopen(f"{tight.address}/health").status == 200


def test_long_bodies(tight: Server) -> None:
    long = b"{" + b" " * (1 << 20) + b"}"
    headers = {"Authorization": f"Bearer {KEY}"}
    for body in (long, (long[start : start + 65536] for start in range(0, len(long), 65536))):
        client = connection(tight)
        try:
            client.request(
                "POST", "/v1/embeddings", body, headers, encode_chunked=not isinstance(body, bytes)
            )
            answer = client.getresponse()
            assert answer.status == 413
            assert json.loads(answer.read())["error"]["code"] == "body_too_large"
        except (BrokenPipeError, ConnectionResetError):  # the server has closed before all was sent
            pass
        finally:
            client.close()


def saved(image: Image.Image, kind: str, **more: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return data_url(file.getvalue())


def test_pixels_are_counted_from_the_header(tight: Server) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, body)]
    bomb = data_url(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    for url in (bomb, saved(Image.new("RGB", (100, 51)), "JPEG")):
        status, error, _ = refused(tight, "/v1/embeddings", {"input": ["a", url]})
        assert (status, error["param"], error["code"]) == (413, "input[1]", "too_large")


def test_unusual_images_and_the_neighbours_of_broken_ones(tight: Server) -> None:
    small = Image.new("RGB", (30, 20), "red")
    unusual = {
        "one pixel": saved(Image.new("RGB", (1, 1)), "PNG"),
        "CMYK": saved(small.convert("CMYK"), "JPEG"),
        "animated": saved(small, "GIF", save_all=True, append_images=[small.rotate(90)]),
        "16 bits": saved(Image.new("I;16", (30, 20), 1000), "PNG"),
        "alpha": saved(small.convert("RGBA"), "PNG"),
    }
    with ThreadPoolExecutor(3) as pool:
        good = [pool.submit(embed, tight, url) for url in unusual.values()]
        bad = [
            pool.submit(refused, tight, "/v1/embeddings", {"input": data_url(picture()[:n])})
            for n in (40, 300)
        ]
        assert all(len(one.result()["data"][0]["embedding"]) > 1 for one in good)
        assert {one.result()[0] for one in bad} == {400}


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://localhost:{}/secret", "a private address"),
        ("http://public.test:{0}/to?http://localhost:{0}/secret", "a redirect to one"),
        ("http://public.test:{0}/to?http://127.0.0.1:{0}/secret", "a redirect to a host that is not allowed"),
        ("http://example.org:{}/secret", "a host that is not allowed"),
        ("ftp://public.test:{}/secret", "another scheme"),
    ],
)
def test_addresses_that_are_not_fetched(tight: Server, site: int, url: str, why: str) -> None:
    Site.paths.clear()
    status, error, _ = refused(tight, "/v1/embeddings", {"input": [{"image": url.format(site)}]})
    assert (status, error["param"]) == (400, "input[0].image"), why
    assert "93.184" not in error["message"]
    if "127.0.0.1" not in url:
        assert "127.0.0.1" not in error["message"]
    assert "/secret" not in Site.paths


def test_a_name_that_changes_its_address(tight: Server, site: int) -> None:
    """The address that was checked is the one that is asked; the next look-up finds a private one."""
    url = f"http://rebind.test:{site}/picture"
    assert len(embed(tight, url)["data"]) == 1
    Site.paths.clear()
    assert refused(tight, "/v1/embeddings", {"input": [{"image": url}]})[0] == 400
    assert Site.paths == []
    assert len(embed(tight, url)["data"]) == 1


@pytest.mark.slow
def test_a_stream_that_fails_ends_with_an_error(tight: Server) -> None:
    message: Any = {"role": "user", "content": "two small squares"}
    pieces: list[Any] = []
    with openai.OpenAI(base_url=f"{tight.address}/v1", api_key=KEY, max_retries=0) as client:
        stream = client.chat.completions.create(model="chat", messages=[message], max_tokens=200, stream=True)
        with pytest.raises(openai.APIError, match="not done in its time"):
            pieces.extend(stream)
    assert len(pieces) > 1
    page = urllib.request.urlopen(f"{tight.address}/metrics").read().decode()
    assert 'ivl_export_first_token_seconds_count{model="chat"} 1.0' in page


def test_the_metrics_have_models_and_histograms(tight: Server) -> None:
    page = urllib.request.urlopen(f"{tight.address}/metrics").read().decode()
    assert (
        'ivl_export_request_seconds_bucket{le="0.1",model="tiny",route="/v1/embeddings",status="200"}' in page
    )
    assert re.search(r'ivl_export_refused_total\{model="tiny"\} [1-9]', page)
    assert 'ivl_export_stage_seconds_count{model="tiny",stage="vision"}' in page
    assert re.search(r'ivl_export_tokens_total\{kind="prompt",model="tiny"\} [1-9]', page)


def test_the_end_loses_no_request(tight: Server) -> None:
    """The last test of this server. Its log has nothing of what clients sent."""
    sent, lost, ready = [0], [0], [200]
    body = json.dumps({"input": "a secret text"})

    def work() -> None:
        client = connection(tight)
        while True:
            try:
                client.connect() if client.sock is None else None
            except ConnectionRefusedError:  # the server has ended
                return
            try:
                client.request("POST", "/v1/embeddings", body, {"Authorization": f"Bearer {KEY}"})
                answer = client.getresponse()
                answer.read()
                sent[0] += 1
                lost[0] += answer.status != 200
            except (OSError, http.client.HTTPException):
                lost[0] += 1
                client.close()
            time.sleep(0.02)

    threads = [threading.Thread(target=work) for _ in range(CAPACITY)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    tight.process.terminate()
    for _ in range(100):
        try:
            urllib.request.urlopen(f"{tight.address}/ready")
        except urllib.error.HTTPError as error:
            ready[0] = error.code
            break
        time.sleep(0.01)
    for thread in threads:
        thread.join(30)
    assert tight.process.wait(30) == 0
    assert ready == [503]
    assert lost == [0]
    assert sent[0] > 50
    log = tight.log.read_text()
    assert "Traceback" not in log
    for secret in (KEY, "a secret text", base64.b64encode(picture())[:40].decode(), "slow.test"):
        assert secret not in log
