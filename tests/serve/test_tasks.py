"""A started server's captions, classes, ranks and scores are the model's own."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivl_export.runtime import InternVL
from ivl_export.runtime.zero_shot import l2

from .conftest import Server, asked, data_url, picture

LABELS = ["red", "blue", "small"]
TEXTS = ["a red ring", "two small squares", "above"]
IMAGES = [picture(seed) for seed in range(3)]
URLS = [data_url(one) for one in IMAGES]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[InternVL]:
    with InternVL.load(tiny_bundle, threads=1) as one:
        yield one


def test_captions(server: Server, model: InternVL) -> None:
    answer = asked(server, "/v1/captions", {"input": URLS, "max_tokens": 6})
    assert [one["caption"] for one in answer["data"]] == model.caption(IMAGES, max_new_tokens=6)
    ends = [one["finish_reason"] for one in answer["data"]]
    assert set(ends) <= {"stop", "length"}
    tokens = answer["usage"]["completion_tokens"]
    assert tokens == 18 if set(ends) == {"length"} else tokens < 18
    queries = model.components.spec("qllama_query").outputs[0].shape[1]
    prompt = len(model.tokenizer.encode_prompt("English caption:"))
    assert answer["usage"]["prompt_tokens"] == 3 * (int(queries) + prompt)


@pytest.mark.parametrize("templates", ["{}", ["a {}", "the {}"], "photo"])
def test_classes(server: Server, model: InternVL, templates: Any) -> None:
    request = {"input": URLS, "labels": LABELS, "templates": templates, "top": 2, "mode": "G"}
    answer = asked(server, "/v1/classify", request)
    from ivl_export.runtime.templates import templates as published

    words = [templates] if templates == "{}" else published("photo") if templates == "photo" else templates
    want = model.classify(IMAGES, LABELS, words, "InternVL-G")
    np.testing.assert_allclose([one["probs"] for one in answer["data"]], want, atol=1e-5)
    for one, row in zip(answer["data"], want, strict=True):
        assert one["label"] == LABELS[int(row.argmax())]
        assert [score["label"] for score in one["scores"]] == [LABELS[i] for i in np.argsort(-row)[:2]]
    assert asked(server, "/v1/classify", request)["data"] == answer["data"], "labels are kept"


def test_rerank_images_by_a_text_and_texts_by_an_image(server: Server, model: InternVL) -> None:
    images, texts = l2(model.encode_image(IMAGES)), l2(model.encode_text(TEXTS))
    answer = asked(server, "/v1/rerank", {"query": TEXTS[0], "documents": URLS})
    cosines = images @ texts[0]
    assert [one["index"] for one in answer["results"]] == np.argsort(-cosines).tolist()
    scores = [one["relevance_score"] for one in answer["results"]]
    np.testing.assert_allclose(scores, np.sort(cosines)[::-1], atol=1e-5)
    request = {"query": URLS[0], "documents": TEXTS, "top_n": 2, "return_documents": True}
    answer = asked(server, "/rerank", request)
    order = np.argsort(-(texts @ images[0]))[:2]
    assert [one["document"]["text"] for one in answer["results"]] == [TEXTS[i] for i in order]


def test_rerank_by_matching(server: Server, model: InternVL) -> None:
    answer = asked(server, "/v1/rerank", {"query": TEXTS[0], "documents": URLS, "method": "match"})
    want = model.match(IMAGES, [TEXTS[0]] * 3)
    by_index = {one["index"]: one["relevance_score"] for one in answer["results"]}
    np.testing.assert_allclose([by_index[i] for i in range(3)], want, atol=1e-5)


def test_scores_of_pairs(server: Server, model: InternVL) -> None:
    images, texts = l2(model.encode_image(IMAGES)), l2(model.encode_text(TEXTS))
    one = asked(server, "/v1/score", {"queries": TEXTS[0], "documents": URLS})
    np.testing.assert_allclose([row["score"] for row in one["data"]], images @ texts[0], atol=1e-5)
    each = asked(server, "/score", {"text_1": TEXTS, "text_2": URLS})
    np.testing.assert_allclose([row["score"] for row in each["data"]], (images * texts).sum(1), atol=1e-5)


BAD = {
    "no label": ("/v1/classify", {"input": URLS[0], "labels": []}, "labels"),
    "an unknown list": (
        "/v1/classify", {"input": URLS[0], "labels": ["a"], "templates": "none"}, "templates"
    ),
    "a text to caption": ("/v1/captions", {"input": "a ring"}, "input"),
    "more least than most": ("/v1/captions", {"input": URLS[0], "max_tokens": 2, "min_tokens": 9}, "prompt"),
    "no document": ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
    "a match of two texts": (
        "/v1/rerank", {"query": "a", "documents": ["b"], "method": "match"}, "documents[0]"
    ),
    "two with three": ("/v1/score", {"queries": ["a", "b"], "documents": TEXTS}, "queries"),
    "one side": ("/v1/score", {"queries": "a"}, "queries"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(server: Server, case: str) -> None:
    path, request, param = BAD[case]
    with pytest.raises(urllib.error.HTTPError) as caught:
        asked(server, path, request)
    error = json.loads(caught.value.read())["error"]
    assert (caught.value.code, error["param"]) == (400, param), error
