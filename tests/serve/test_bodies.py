"""Bodies that no client means: no answer is an error of the server, and each error is one sentence."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import KEY, Server, data_url, picture

FIELDS = (
    "model", "input", "messages", "labels", "templates", "query", "documents", "queries", "stop", "mode",
    "text", "image", "image_url", "url", "type", "role", "content", "max_tokens", "temperature", "seed",
    "stream", "stream_options", "dimensions", "top", "top_n", "method", "resize", "prompt", "modality",
)  # fmt: skip
WORDS = (
    "", "tiny", "chat", "user", "assistant", "system", "text", "image_url", "match", "C", "{}", "photo",
    "\ud800", "\0", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "data:,", "<image>", "</s>",
    "<IMG_CONTEXT>", "data:image/png;base64,", data_url(picture()), data_url(picture()[:200]),
    data_url(b"GIF89a"),
)  # fmt: skip
words = st.sampled_from(WORDS)
numbers = st.integers(-2, 3) | st.sampled_from([1e308, 2**70, -0.5])
leaves = words | st.none() | st.booleans() | numbers
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=8,
)
wild = st.dictionaries(st.sampled_from(FIELDS), values, max_size=2)
parts = st.one_of(
    st.fixed_dictionaries({"text": words}),
    st.fixed_dictionaries({"image": words}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": words})}),
)
items = words | parts | st.lists(words | parts, max_size=3)
roles = st.sampled_from(["user", "user", "assistant", "system"])
messages = st.fixed_dictionaries({"role": roles, "content": words | st.lists(parts, max_size=3)})
SHAPES = {
    "embeddings": st.fixed_dictionaries({"input": items}),
    "chat/completions": st.fixed_dictionaries({"messages": st.lists(messages, min_size=1, max_size=3)}),
    "captions": st.fixed_dictionaries({"input": items}),
    "classify": st.fixed_dictionaries({"input": items, "labels": st.lists(words, max_size=3)}),
    "rerank": st.fixed_dictionaries({"query": words | parts, "documents": items}),
    "score": st.fixed_dictionaries({"queries": items, "documents": items}),
}
requests = st.one_of(
    [st.tuples(st.just(route), shape, wild | st.just({})) for route, shape in SHAPES.items()]
)


@pytest.fixture(scope="module")
def connection(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=60)


@settings(max_examples=100)
@given(request=requests)
def test_any_body(
    connection: http.client.HTTPConnection, request: tuple[str, dict[str, Any], dict[str, Any]]
) -> None:
    route, body, more = request
    text = json.dumps({"max_tokens": 2, **body, **more})
    connection.request("POST", f"/v1/{route}", text, {"Authorization": f"Bearer {KEY}"})
    answer = connection.getresponse()
    data = answer.read()
    assert answer.status in (200, 400, 404, 413), (answer.status, data)
    if answer.status != 200:
        error = json.loads(data)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert "\n" not in error["message"].rstrip()
        assert "Traceback" not in error["message"]
        assert "root:" not in error["message"]


def test_the_server_lives(server: Server, connection: http.client.HTTPConnection) -> None:
    connection.request("GET", "/ready")
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200
    assert "failed with" not in server.log.read_text()
