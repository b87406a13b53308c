"""However text is cut into tokens, the text that comes out is the same, whole characters only, up to the first stop
string.
"""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generate.detokenizer import Detokenizer


def cut(data: bytes, at: list[int]) -> list[bytes]:
    ends = sorted({min(i, len(data)) for i in at} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(ends)]


def pieces(parts: list[bytes], stop: tuple[str, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(stop)
    return [*(detokenizer.push(part) for part in parts), detokenizer.finish()]


def until_stop(text: str, stop: tuple[str, ...]) -> str:
    """The specification: read character by character, end where the first stop string is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@given(st.binary(max_size=40), st.lists(st.integers(0, 40)))
def test_any_bytes_in_any_pieces_give_the_text_of_the_whole(data: bytes, at: list[int]) -> None:
    assert "".join(pieces(cut(data, at))) == data.decode("utf-8", "replace")


@given(st.text(max_size=20), st.lists(st.integers(0, 80)))
def test_no_piece_ever_shows_a_broken_character(text: str, at: list[int]) -> None:
    shown = ""
    for piece in pieces(cut(text.encode(), at)):
        shown += piece
        assert text.startswith(shown)
    assert shown == text


few_letters = st.text("abé", max_size=12)


@given(few_letters, st.lists(st.text("abé", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 24)))
def test_stop_strings_are_found_across_pieces(text: str, stop: list[str], at: list[int]) -> None:
    expected = until_stop(text, tuple(stop))
    detokenizer = Detokenizer(tuple(stop))
    shown = ""
    for part in cut(text.encode(), at):
        shown += detokenizer.push(part)
        assert expected.startswith(shown)  # what was shown never has to be taken back
    assert detokenizer.stopped == (expected != text)
    assert shown + detokenizer.finish() == expected


def test_text_is_not_held_back_longer_than_it_must() -> None:
    detokenizer = Detokenizer(("###",))
    assert detokenizer.push(b"a#") == "a"
    assert detokenizer.push(b"b") == "#b"
    assert detokenizer.push("é".encode()[:1]) == ""
    assert detokenizer.push("é".encode()[1:]) == "é"
    assert detokenizer.push(b"c##") == "c"
    assert detokenizer.finish() == "##"


def test_an_incomplete_end_is_one_replacement_character() -> None:
    assert pieces(["🙂".encode()[:3]]) == ["", "\ufffd"]


@pytest.mark.parametrize("stop", [("b", "abc"), ("abc", "b")])
def test_the_stop_string_completed_first_wins(stop: tuple[str, ...]) -> None:
    assert "".join(pieces([b"abc"], stop)) == "a"


def test_nothing_comes_after_a_stop() -> None:
    detokenizer = Detokenizer(("x",))
    assert [detokenizer.push(b"1x2"), detokenizer.push(b"3"), detokenizer.finish()] == ["1", "", ""]
