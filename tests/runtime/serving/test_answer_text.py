"""An answer's text in pieces is its whole text, up to the first stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ivl_export.inputs.chat_template import VICUNA
from ivl_export.inputs.tokenizer import Tokenizer
from ivl_export.runtime.serving.answer_text import AnswerText


class Letters(Tokenizer):
    """Each character is a token."""

    eos, prefix, files = -1, (), {}

    def __init__(self) -> None:
        super().__init__("letters", ())

    def __len__(self) -> int:
        return 128

    def piece(self, token: int) -> bytes:
        return chr(token).encode()

    def _ids(self, text: str, first: bool) -> list[int]:
        return [ord(letter) for letter in text]


@given(st.text("ab \n", max_size=20), st.lists(st.text("ab ", max_size=3), max_size=3))
def test_pieces_are_the_text_up_to_a_stop(text: str, stop: list[str]) -> None:
    answer, said = AnswerText(Letters(), VICUNA, lambda token: False, stop), ""
    for letter in text:
        said += answer.add(ord(letter))
        if answer.stopped:
            break
    said += answer.rest()
    whole = text.lstrip()
    places = [place for one in stop if one and (place := whole.find(one)) >= 0]
    ends = [place + len(one) for one in stop if one and (place := whole.find(one)) >= 0]
    assert answer.stopped == bool(places)
    first = min(ends, default=len(whole))
    seen = whole[:first]
    want = min((seen.find(one) for one in stop if one and one in seen), default=len(seen))
    assert said == seen[:want].rstrip()
