"""Chat through ONNX Runtime: the published greedy tokens, nothing computed twice, streams, sampling."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ivl_export.cli import main
from ivl_export.errors import CapabilityError, InputError, UsageError
from ivl_export.inputs.chat_template import Turn
from ivl_export.runtime import Chat, InternVL, InternVLChat
from ivl_export.runtime.conversation_cache import ConversationCache
from ivl_export.runtime.kv_cache import BLOCK, GRAIN, PrefixCache
from ivl_export.sampling import Sampling, StopCriteria, sample_token

CHAT = Path(__file__).parents[1] / "goldens" / "chat"
GOLDEN = load_file(CHAT / "chat.safetensors")
EOS = 2


@pytest.fixture(scope="module")
def model(chat_bundle: Path) -> Iterator[InternVLChat]:
    """Its conversations share nothing: each is computed by itself."""
    with InternVLChat.load(chat_bundle, threads=1, kept_bytes=0) as loaded:
        yield loaded


@pytest.fixture
def sharing(model: InternVLChat, monkeypatch: pytest.MonkeyPatch) -> InternVLChat:
    """The same model, whose conversations share an empty store."""
    monkeypatch.setattr(model, "prefixes", PrefixCache())
    return model


def picture(seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)


class Counted:
    """How many rows and positions each component computed."""

    def __init__(self, model: InternVLChat, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, tuple[int, ...]]] = []
        real = model.components.run_device

        def run(name: str, inputs: Any, outputs: Any = None) -> Any:
            self.seen.append((name, next(iter(inputs.values())).shape[:2]))
            return real(name, inputs, outputs)

        monkeypatch.setattr(model.components, "run_device", run)

    def take(self, name: str) -> list[tuple[int, ...]]:
        results = [shape for own, shape in self.seen if own == name]
        self.seen = [item for item in self.seen if item[0] != name]
        return results


@pytest.mark.parametrize("row", [0, 1, 2])
def test_greedy_tokens_are_the_published_ones(model: InternVLChat, row: int) -> None:
    pixels = GOLDEN["images"][row : row + 1]
    context = ConversationCache(model.components, PrefixCache(), *model.encode_images(pixels))
    ids = GOLDEN[f"gen{row}.input_ids"][0].tolist()
    want = GOLDEN[f"gen{row}.new_tokens"][0].tolist()
    for _ in range(2):  # the second time out of the cache
        assert list(context.tokens(ids, StopCriteria(EOS, max_new_tokens=len(want)), Sampling())) == want


def test_a_further_question_computes_only_itself(
    model: InternVLChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(model, monkeypatch)
    chat = model.chat([picture()])
    assert len(counted.take("vision_chat")) == 1
    first = chat.ask("a red ring", max_new_tokens=4)
    prompt, *steps = counted.take("decoder")
    assert prompt[1] > 30
    assert all(shape == (1, 1) for shape in steps)
    chat.ask("and", max_new_tokens=4)
    again, *_ = counted.take("decoder")
    assert again[1] < 30
    chat.restart()
    assert chat.history == ()
    assert chat.ask("a red ring", max_new_tokens=4) == first
    prompt, *_ = counted.take("decoder")
    assert prompt == (1, 1), "all but the last position was there"
    assert counted.take("vision_chat") == []


def test_what_is_reused_changes_nothing(model: InternVLChat) -> None:
    chat = model.chat([picture()])
    for question in ("a red ring", "two small squares", "above"):
        chat.ask(question, max_new_tokens=6)
    turns = chat.history
    assert [t.images for t in turns] == [1, 0, 0]
    for k in range(3):
        fresh = model.chat([picture()], turns[:k])
        assert fresh.ask(turns[k].question, max_new_tokens=6) == turns[k].answer
    other = model.chat([picture(1)], turns[:2])
    own, other.cache = other.cache, chat.cache  # of another image: nothing of it may be taken
    other.cache.visual, other.cache.digests = own.visual, own.digests
    assert other.ask("above", 6) == model.chat([picture(1)], turns[:2]).ask("above", 6)


def test_conversations_share_what_they_begin_with(
    sharing: InternVLChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(sharing, monkeypatch)
    questions = ("a red ring", "two small squares", "above")
    results, prompts, encoded = [], [], []
    for question in questions:
        results.append(sharing.chat([picture()]).ask(question, 6))
        prompts.append(counted.take("decoder")[0][1])
        encoded.append(len(counted.take("vision_chat")))
    assert encoded == [1, 0, 0], "the image is encoded once"
    assert prompts[0] > 2 * BLOCK
    assert max(prompts[1:]) < prompts[0] - BLOCK, "its keys and values are computed once"
    monkeypatch.setattr(sharing, "prefixes", PrefixCache(0))
    assert results == [sharing.chat([picture()]).ask(question, 6) for question in questions]


def test_a_history_sent_again_is_not_computed_again(
    sharing: InternVLChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = sharing.chat([picture()])
    for question in ("a red ring", "two small squares"):
        chat.ask(question, 20)
    counted = Counted(sharing, monkeypatch)
    again = sharing.chat([picture()], chat.history)
    answer = again.ask("above", 6)
    prompt = counted.take("decoder")[0][1]
    assert counted.take("vision_chat") == []
    assert prompt < len(again.cache._contents) // 2
    monkeypatch.setattr(sharing, "prefixes", PrefixCache(0))
    assert sharing.chat([picture()], chat.history).ask("above", 6) == answer


def test_other_images_share_nothing(sharing: InternVLChat, monkeypatch: pytest.MonkeyPatch) -> None:
    sharing.chat([picture()]).ask("a red ring", 6)
    results = [sharing.chat([picture(1), picture()]).ask("a", 6), sharing.chat([picture(1)]).ask("a", 6)]
    monkeypatch.setattr(sharing, "prefixes", PrefixCache(0))
    assert results == [
        sharing.chat([picture(1), picture()]).ask("a", 6), sharing.chat([picture(1)]).ask("a", 6)
    ]  # fmt: skip


@pytest.mark.parametrize("limit", [0, 40_000, 200_000])
def test_a_small_store_is_kept_to(model: InternVLChat, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    want = [model.chat([picture(i % 3)]).ask("a red ring", 4) for i in range(6)]
    monkeypatch.setattr(model, "prefixes", PrefixCache(limit))
    for i in range(6):
        assert model.chat([picture(i % 3)]).ask("a red ring", 4) == want[i]
        assert model.prefixes.nbytes <= limit
    assert (model.prefixes.nbytes > 0) == (limit > 0)


def test_a_cache_grows(model: InternVLChat) -> None:
    chat = model.chat([picture()])
    answers = [chat.ask("small red ring " * 8, max_new_tokens=8) for _ in range(4)]
    assert chat.cache._cache is not None
    assert chat.cache._cache.capacity > 256
    assert model.chat([picture()], chat.history[:3]).ask("small red ring " * 8, 8) == answers[3]


def test_a_cache_has_room_for_what_is_used_not_for_what_may_come(model: InternVLChat) -> None:
    chat, context = model.chat([picture()]), model.chat([picture()]).cache
    most = context._spec.axis("past").max
    prompt = len(context._keys(chat.prompt("a red ring")[1]))
    stream = chat.stream("a red ring", most - prompt, min_new_tokens=60)
    for used in range(prompt, prompt + 3 * GRAIN):
        assert chat.cache._cache is None or chat.cache._cache.capacity <= used + used // 8 + GRAIN
        next(stream)
    stream.close()
    chat.restart()
    chat.ask("a", 2)
    assert chat.cache._cache is not None
    assert chat.cache._cache.capacity < 2 * (prompt + prompt // 8 + GRAIN)


def test_streams(model: InternVLChat) -> None:
    chat = model.chat([picture()])
    pieces = list(chat.stream("a red ring", max_new_tokens=12))
    assert "".join(pieces).strip() == model.chat([picture()]).ask("a red ring", max_new_tokens=12)
    assert len(pieces) > 1
    stream = chat.stream("two", max_new_tokens=12)
    piece = next(stream)
    stream.close()
    assert chat.history[-1] == Turn("two", piece.strip())
    chat.ask("and", max_new_tokens=2)  # continues
    heard = chat.stream("two", max_new_tokens=12)
    next(heard)
    for act in (chat.restart, lambda: chat.ask("and", 2)):
        with pytest.raises(UsageError, match="answering already"):
            act()
    heard.close()


def test_sampling() -> None:
    logits = np.log(np.array([0.05, 0.5, 0.3, 0.15], np.float32))
    rng = np.random.default_rng(0)

    def shares(how: Sampling) -> list[float]:
        drawn = [sample_token(logits, how, rng) for _ in range(4000)]
        return [drawn.count(i) / len(drawn) for i in range(4)]

    assert shares(Sampling()) == [0, 1, 0, 0]
    assert shares(Sampling(1.0)) == pytest.approx([0.05, 0.5, 0.3, 0.15], abs=0.03)
    assert shares(Sampling(1.0, top_k=2)) == pytest.approx([0, 0.625, 0.375, 0], abs=0.03)
    assert shares(Sampling(1.0, top_p=0.7)) == pytest.approx([0, 0.625, 0.375, 0], abs=0.03)
    assert shares(Sampling(1.0, top_p=0.01)) == [0, 1, 0, 0]
    square = np.array([0.05, 0.5, 0.3, 0.15]) ** 2
    assert shares(Sampling(0.5)) == pytest.approx((square / square.sum()).tolist(), abs=0.03)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}):
        with pytest.raises(UsageError, match="sampling settings"):
            Sampling(**wrong)


def test_a_seed_repeats_its_answer(model: InternVLChat) -> None:
    def ask(seed: int) -> str:
        return model.chat([picture()]).ask("a", 12, Sampling(5.0, seed=seed))

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(6)}) > 1


def test_conversations_in_threads(model: InternVLChat, monkeypatch: pytest.MonkeyPatch) -> None:
    want = [model.chat([picture(i % 3)]).ask("a red ring", 6) for i in range(8)]
    monkeypatch.setattr(model, "prefixes", PrefixCache(200_000))  # too few for all
    chats = [model.chat([picture(i % 3)]) for i in range(8)]
    by_name: dict[int, str] = {}

    def ask(i: int, chat: Chat) -> None:
        by_name[i] = chat.ask("a red ring", 6)

    threads = [threading.Thread(target=ask, args=(i, chat)) for i, chat in enumerate(chats)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [by_name[i] for i in range(8)] == want


def test_an_answer_is_not_shorter_than_requested(
    model: InternVLChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = model.chat([picture()])
    real = model.components.run_device

    def ending(name: str, inputs: Any, outputs: Any = None) -> Any:
        return {**real(name, inputs, outputs), "logits": np.eye(200, dtype=np.float32)[[EOS]]}

    monkeypatch.setattr(model.components, "run_device", ending)
    stop = StopCriteria(EOS, max_new_tokens=8, min_new_tokens=3)
    assert list(chat.cache.tokens([1, -200, 5], stop, Sampling())) == [0, 0, 0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(5.0, top_k=20, top_p=0.9, seed=3)])
def test_on_a_device_the_same_tokens(
    chat_bundle: Path, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    """Tensors in, tensors out, as on a GPU: caches, blocks of the store and logits are tensors then."""
    pytest.importorskip("torch")
    from ivl_export.engines.device import as_tensor

    questions = ("a red ring", "two")
    with InternVLChat.load(chat_bundle, backend="torch", kept_bytes=0) as host:
        want = [host.chat([picture()]).ask(question, 8, sampling) for question in questions]
    with InternVLChat.load(chat_bundle, backend="torch") as model:
        real = model.components.run_device
        monkeypatch.setattr(
            model.components,
            "run_device",
            lambda name, inputs, outputs=None: real(
                name, {key: as_tensor(value) for key, value in inputs.items()}, outputs
            ),
        )
        chats = [model.chat([picture()]) for _ in questions]
        assert [c.ask(q, 8, sampling) for c, q in zip(chats, questions, strict=True)] == want
        cache = chats[1].cache._cache
        assert cache is not None
        assert not isinstance(cache.data, np.ndarray)
        assert not any(
            isinstance(block, np.ndarray) for block in model.prefixes.find(chats[1].cache._contents)
        )


def test_without_an_image(model: InternVLChat) -> None:
    assert model.chat().ask("a", 3) == model.chat(history=()).ask("a", 3)


def test_errors(
    model: InternVLChat, tiny_bundle: Path, chat_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, chat = Counted(model, monkeypatch), model.chat()
    with pytest.raises(InputError, match="too long for this bundle"):
        chat.ask("a", 5000)
    assert counted.seen == [], "nothing was begun"
    assert chat.history == ()
    with pytest.raises(InputError, match=r"shows 2 images.*1 were given"):
        model.chat([picture()], [Turn("a", "b", 2)])
    with pytest.raises(InputError, match="A sequence of images"):
        model.chat("photo.jpg")
    with pytest.raises(UsageError, match="generation settings"):
        model.chat().ask("a", 0)
    with pytest.raises(CapabilityError, match="cannot chat"):
        InternVLChat.load(tiny_bundle)
    with pytest.raises(CapabilityError, match="InternVLChat"):
        InternVL.load(chat_bundle)


def test_the_verb(
    chat_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from PIL import Image

    Image.fromarray(picture()).save(tmp_path / "a.png")
    args = [
        "run",
        "chat",
        str(chat_bundle),
        str(tmp_path / "a.png"),
        "--threads",
        "1",
        "--max-new-tokens",
        "4",
    ]
    assert main([*args, "--question", "a red ring", "--question", "and", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    with InternVLChat.load(chat_bundle, threads=1) as model:
        chat = model.chat([tmp_path / "a.png"])
        want = [{"question": q, "answer": chat.ask(q, 4)} for q in ("a red ring", "and")]
    assert report["turns"] == want
    lines = iter(["a red ring", "", "and"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert main(args) == 0  # an empty line is not a question, the end of the input ends the chat
    out = capsys.readouterr().out
    assert all(turn["answer"] in out for turn in want)
