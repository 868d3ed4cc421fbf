"""A real profile of a real (tiny) chat bundle: first tokens, answers, and known images."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivl_export.cli import main
from ivl_export.errors import UsageError
from ivl_export.profiles.measure.bundle_profile import Options, profile
from ivl_export.profiles.measure.cases import Case
from ivl_export.profiles.measure.chat_latency import ANSWER, FIRST, NEXT, OTHER, question, token_ms
from ivl_export.profiles.measure.receipt import Profile, read, write
from ivl_export.profiles.measure.timing import StopRule
from ivl_export.profiles.report.page import page

pytestmark = pytest.mark.slow

SHORT = StopRule(seconds=0.05)
COMPONENTS = ["vision_chat", "decoder_embed", "decoder"]


@pytest.fixture(scope="module")
def profiled(chat_bundle: Path) -> Profile:
    return profile(chat_bundle, Options(threads=1, batches=[2, 1], lengths=[8], rule=SHORT))


def test_components_first_tokens_and_answers_are_timed(profiled: Profile) -> None:
    names = [case.name for case in profiled.of_kind("component")]
    assert list(dict.fromkeys(names)) == COMPONENTS
    assert [case.name for case in profiled.of_kind("chained")] == [FIRST, NEXT, OTHER, ANSWER]
    assert {case.batch for case in profiled.of_kind("component")} == {1, 2}
    assert set(profiled.startup.load_seconds) == set(profiled.startup.first_call_ms) == set(COMPONENTS)
    assert profiled.table19 is None
    assert profiled.notes == ()
    decoder = [case for case in profiled.of_kind("component") if case.name == "decoder" and case.batch == 1]
    assert {case.unit for case in decoder} == {"tokens"}
    assert [case.sizes["text"] for case in decoder][:2] == [1, 1], "as tuned, and with 8 text positions"
    assert decoder[-1].sizes["text"] == profiled.of_kind("chained")[0].sizes["tokens"], "a whole prompt"
    assert profiled.cost(decoder[-1]) is not None


def test_what_is_known_is_not_computed(profiled: Profile) -> None:
    def work(case: Case) -> tuple[int, int]:
        """Images encoded, and positions through the decoder."""
        images = sum(call.count for call in case.calls if call.component == "vision_chat")
        fed = sum(c.sizes["text"] * c.count for c in case.calls if c.component == "decoder")
        return images, fed

    by_name = {case.name: work(case) for case in profiled.of_kind("chained")}
    prompt = profiled.of_kind("chained")[0].sizes["tokens"]
    assert by_name[FIRST] == (1, prompt)
    assert by_name[NEXT][0] == by_name[OTHER][0] == 0
    assert by_name[NEXT][1] <= by_name[OTHER][1] < prompt
    answer = profiled.of_kind("chained")[-1]
    assert by_name[ANSWER] == (0, by_name[NEXT][1] + answer.items - 1), "the last token is not fed back"
    assert (ms := token_ms(profiled.cases)) is not None
    assert ms > 0
    assert token_ms(profiled.of_kind("component")) is None
    for case in profiled.of_kind("chained"):
        assert case.floor is not None, "all of its calls were counted"


def test_no_question_repeats() -> None:
    questions = [question() for _ in range(30)]
    assert len({text[0] for text in questions[:10]}) == 10, "they differ from the first letter on"
    assert len(set(questions)) == 30
    assert len({len(text) for text in questions}) == 1


def test_receipt_page_and_verb(profiled: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(profiled.to_json(), tmp_path / "chat.json")
    assert read(tmp_path / "chat.json") == profiled
    assert "an image known to another conversation" in page(profiled)
    assert main(["profile", str(tmp_path / "chat.json")]) == 0
    out = capsys.readouterr().out
    assert "each further token of an answer" in out
    assert NEXT in out


def test_no_place_in_the_papers_table(chat_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"Table 19.*--table19"):
        profile(chat_bundle, Options(table19=True))
