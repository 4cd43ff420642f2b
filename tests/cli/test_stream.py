"""The text stream alone: nothing lost, nothing twice, no half characters, no stop string."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swapless.cli.stream import TextStream


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8, so that characters span tokens."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def _stream(prompt: str, text: str, stop=()) -> tuple[TextStream, list[str]]:
    pieces: list[str] = []
    stream = TextStream(Bytes(), pieces.append, stop)
    stream.put(np.frombuffer(prompt.encode(), np.uint8)[None])
    for byte in text.encode():
        stream.put(np.array([byte]))
        if stream.stopped:
            break
    stream.end()
    return stream, pieces


@given(prompt=st.text(min_size=1, max_size=9), text=st.text(max_size=40))
def test_the_pieces_are_the_text(prompt, text):
    stream, pieces = _stream(prompt, text)
    assert "".join(pieces) == stream.text == text
    assert "" not in pieces
    assert bytes(stream.new_ids) == text.encode()


@given(text=st.text(alphabet="abé", max_size=30), stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3))
def test_it_ends_before_the_first_stop_string(text, stop):
    stream, pieces = _stream("x", text, stop)
    ends = [place for place in (text.find(one) for one in stop) if place >= 0]
    assert stream.stopped == bool(ends)
    # the first to be complete ends the text: another that begins earlier may need more characters
    done = min((text.find(one) + len(one) for one in stop if one in text), default=len(text))
    seen = text[:done]
    expected = min((place for place in (seen.find(one) for one in stop) if place >= 0), default=len(text))
    assert "".join(pieces) == text[:expected]


def test_text_comes_as_soon_as_no_stop_string_can_begin_in_it():
    pieces: list[str] = []
    stream = TextStream(Bytes(), pieces.append, ["END"])
    stream.put(np.array([[65]]))
    for byte in b"abENx":
        stream.put(np.array([byte]))
    assert pieces == ["a", "b", "ENx"]


def test_an_unfinished_character_waits_and_is_shown_at_the_end():
    pieces: list[str] = []
    stream = TextStream(Bytes(), pieces.append)
    stream.put(np.array([[65]]))
    for byte in "é".encode() + b"\xc3":
        stream.put(np.array([byte]))
    assert pieces == ["é"]
    stream.end()
    assert pieces == ["é", "\ufffd"]


@pytest.mark.parametrize("stop", [("\n",), ("zz",)])
def test_times_are_of_the_first_and_the_last_token(stop):
    stream, _ = _stream("a", "bcd\n", stop)
    assert 0 < stream.first_token_at <= stream.last_token_at
