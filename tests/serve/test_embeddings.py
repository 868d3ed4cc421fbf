"""A started server's embeddings, asked for with the official client in every shape that servers take."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from ivl_export.runtime import InternVL
from ivl_export.runtime.zero_shot import l2

from .conftest import KEY, Server, data_url, picture

TEXTS = ("a red ring", "two small squares")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[InternVL]:
    with InternVL.load(tiny_bundle, threads=1) as one:
        yield one


@pytest.fixture(scope="module")
def image_row(model: InternVL) -> Any:
    return l2(model.encode_image([picture()]))[0]


def vector(answer: Any) -> Any:
    (one,) = answer.data
    return np.array(one.embedding, np.float32)


def test_texts_are_unit_vectors_in_their_order(client: openai.OpenAI, model: InternVL) -> None:
    answer = client.embeddings.create(model="tiny", input=list(TEXTS))
    rows = np.array([one.embedding for one in answer.data], np.float32)
    np.testing.assert_allclose(rows, l2(model.encode_text(TEXTS)), atol=1e-5)
    assert [one.index for one in answer.data] == [0, 1]
    lengths = model.tokenizer.encode_contrastive(TEXTS)[1]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == lengths.sum()
    assert answer.model == "tiny"


def test_numbers_and_base64_are_the_same_vector(client: openai.OpenAI) -> None:
    own: list[Any] = [
        vector(client.embeddings.create(model="tiny", input="a ring", encoding_format=kind))
        for kind in ("float", openai.omit)  # the client asks for base64 by itself
    ]
    np.testing.assert_array_equal(*own)


SHAPES: dict[str, dict[str, Any]] = {
    "a data URL": {"input": data_url(picture())},
    "an object": {"input": [{"image": data_url(picture())}]},
    "base64 in an object": {"input": [{"image": base64.b64encode(picture()).decode()}]},
    "a content part": {"input": [{"type": "image_url", "image_url": {"url": data_url(picture())}}]},
    "a modality": {"input": [data_url(picture())], "extra_body": {"modality": "image"}},
    "messages": {
        "input": openai.omit,
        "extra_body": {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": data_url(picture())}}],
                }
            ]
        },
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_in_every_shape(client: openai.OpenAI, image_row: Any, shape: str) -> None:
    answer = client.embeddings.create(model="tiny", **SHAPES[shape])
    np.testing.assert_allclose(vector(answer), image_row, atol=1e-5)
    assert answer.usage.prompt_tokens > 1


def test_texts_and_images_together(client: openai.OpenAI, model: InternVL, image_row: Any) -> None:
    mixed: Any = [{"text": TEXTS[0]}, {"image": data_url(picture())}, TEXTS[1]]
    answer = client.embeddings.create(model="tiny", input=mixed)
    texts = l2(model.encode_text(TEXTS))
    rows = np.array([one.embedding for one in answer.data], np.float32)
    np.testing.assert_allclose(rows, [texts[0], image_row, texts[1]], atol=1e-5)


def test_the_other_head_and_lengths_as_they_are(client: openai.OpenAI, model: InternVL) -> None:
    extra = {"mode": "G", "normalize": False, "resize": "pad"}
    answer = client.embeddings.create(model="tiny", input=data_url(picture()), extra_body=extra)
    want = model.encode_image([picture()], "InternVL-G", "pad")[0]
    np.testing.assert_allclose(vector(answer), want, atol=1e-5)


def test_asynchronous_clients_at_once(server: Server, model: InternVL) -> None:
    pictures = [picture(seed) for seed in range(12)]

    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key=KEY) as client:
            requests = [client.embeddings.create(model="tiny", input=data_url(one)) for one in pictures]
            return [vector(answer) for answer in await asyncio.gather(*requests)]

    np.testing.assert_allclose(asyncio.run(all_of_them()), l2(model.encode_image(pictures)), atol=1e-5)


def test_a_large_image(client: openai.OpenAI, model: InternVL) -> None:
    """Its JSON and its base64 are read on threads."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (700, 600, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    assert len(file.getvalue()) > 1 << 20
    answer = client.embeddings.create(model="tiny", input=data_url(file.getvalue()))
    np.testing.assert_allclose(vector(answer), l2(model.encode_image([pixels]))[0], atol=1e-5)


def test_bits_do_not_depend_on_company(server: Server, client: openai.OpenAI) -> None:
    """As --invariant says: alone, and with seven others at once."""
    inputs = [*(data_url(picture(seed)) for seed in range(5)), "a ring", "two", "a red ring " * 4]

    def both(one: str) -> list[Any]:
        modes: list[Any] = [{"mode": "C"}, {"mode": "G"}]
        return [vector(client.embeddings.create(model="tiny", input=one, extra_body=mode)) for mode in modes]

    alone = [both(one) for one in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            np.testing.assert_array_equal(list(pool.map(both, inputs)), alone)


BAD: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "an empty list": ({"input": []}, 400, "input"),
    "tokens": ({"input": ["a", 1]}, 400, "input[1]"),
    "no input": ({"input": openai.omit}, 400, "input"),
    "other dimensions": ({"input": "a", "dimensions": 7}, 400, "dimensions"),
    "a wrong format": ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
    "an unknown model": ({"input": "a", "model": "gpt"}, 404, "model"),
    "a model that cannot": ({"input": "a", "model": "chat"}, 400, "model"),
    "a text and an image": ({"input": [{"text": "a", "image": data_url(picture())}]}, 400, "input[0]"),
    "a path": ({"input": [{"image": "/etc/passwd"}]}, 400, "input[0].image"),
    "a path as an image": ({"input": "/etc/passwd", "extra_body": {"modality": "image"}}, 400, "input"),
    "a file URL": ({"input": [{"image": "file:///etc/passwd"}]}, 400, "input[0].image"),
    "an address": ({"input": [{"image": "https://example.org/a.png"}]}, 400, "input[0].image"),
    "a damaged image": ({"input": ["a", data_url(picture()[:200])]}, 400, "input[1]"),
    "no image": ({"input": data_url(b"no image")}, 400, "input"),
    "too many": ({"input": ["a"] * 2000}, 413, "input"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(client: openai.OpenAI, case: str) -> None:
    arguments, status, param = BAD[case]
    with pytest.raises(openai.APIStatusError) as caught:
        client.embeddings.create(**{"model": "tiny", **arguments})
    error = caught.value
    assert (error.status_code, error.param) == (status, param), error.message
    body: Any = error.body
    sentence = body["message"]
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    assert "/etc" not in sentence
    assert "root:" not in sentence


def test_an_unknown_model_has_a_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="gpt", input="a")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("body", [b"{", b'{"input": NaN}', b"\xff", b"[]", b"[" * 100_000])
def test_a_body_that_is_not_a_request(server: Server, body: bytes) -> None:
    request = urllib.request.Request(
        f"{server.address}/v1/embeddings", body, {"Authorization": f"Bearer {KEY}"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 400
    assert json.loads(caught.value.read())["error"]["type"] == "invalid_request_error"


def test_keys(server: Server) -> None:
    for key in ("", "wrong", KEY + "x"):
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=key or "-", max_retries=0)
        with client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"


def test_the_models_have_their_receipts(client: openai.OpenAI, tiny_bundle: Path) -> None:
    listed = {one.id: one for one in client.models.list()}
    assert [*listed] == ["tiny", "chat"]
    tiny: Any = client.models.retrieve("tiny")
    assert tiny == listed["tiny"]
    assert tiny.recipe == "fp32"
    assert tiny.receipts == {}
    assert tiny.bundle.startswith("sha256:")
    assert "embed" in tiny.abilities
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_health(server: Server) -> None:
    for path in ("/health", "/livez", "/v1/health/live", "/ready", "/readyz", "/v1/health/ready"):
        assert urllib.request.urlopen(server.address + path).status == 200


def test_the_document_has_the_shapes(server: Server) -> None:
    document = json.load(urllib.request.urlopen(f"{server.address}/openapi.json"))
    body = document["paths"]["/v1/embeddings"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/EmbeddingRequest"}
    assert "mode" in document["components"]["schemas"]["EmbeddingRequest"]["properties"]
