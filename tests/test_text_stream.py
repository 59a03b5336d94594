"""Text comes out as early as it is certain, and never past a stop string, however it is cut into tokens."""

from __future__ import annotations

import random

import pytest

from rewrite.runtime.text_stream import StopStrings, TextStream


def stopped(text: str, strings: list[str]) -> str:
    """The text before the string that is complete first; of those, the longest: character by character."""
    for end in range(1, len(text) + 1):
        complete = [s for s in strings if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def test_random_texts_in_random_pieces():
    rng = random.Random(0)
    ends = 0
    for _ in range(5000):
        strings = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        text = "".join(rng.choices("abc", k=rng.randint(0, 20)))
        expected, stop, out, fed = stopped(text, strings), StopStrings(strings), "", 0
        while fed < len(text):
            size = rng.randint(1, 4)
            out += stop.add(text[fed : fed + size])
            fed += size
            assert expected.startswith(out), "what came out is taken back"
            if stop.found is None:
                held = text[:fed][len(out) :]
                assert not held or any(s.startswith(held) for s in strings), "text is held back that cannot become a stop string"
        assert out + stop.end() == expected
        assert (stop.found is not None) == any(s in text for s in strings)
        ends += stop.found is not None
    assert 1000 < ends < 4000, "both ends are reached"


def test_nothing_comes_after_a_stop_string():
    stop = StopStrings(["END"])
    assert [stop.add(p) for p in ("go E", "N", "x E", "NDmore", "more")] == ["go ", "", "ENx ", "", ""]
    assert stop.end() == ""
    assert stop.found == "END"


def bytes_decode(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def test_a_character_of_several_tokens_comes_out_whole():
    text = "naïve 漢字 🙂 ok"
    stream = TextStream(bytes_decode)
    pieces = [stream.add(token) for token in text.encode()]
    assert "".join(pieces) + stream.end() == text
    assert "🙂" in pieces
    assert all("\ufffd" not in p for p in pieces)


def test_an_incomplete_character_comes_out_at_the_end():
    stream = TextStream(bytes_decode, ["z"])
    assert [stream.add(t) for t in "aé".encode()[:2]] == ["a", ""]
    assert stream.end() == "\ufffd"


@pytest.mark.parametrize("text", ["a b  c", " leading", "x"])
def test_a_tokenizer_whose_first_word_has_no_space(text):
    """As SentencePiece decodes: the space before the first token is dropped, so that the text of a token depends on the ones before."""
    words = [f"▁{w}" for w in text.split(" ")]

    def decode(tokens: list[int]) -> str:
        return "".join(words[t] for t in tokens).replace("▁", " ").removeprefix(" ")

    stream = TextStream(decode)
    assert "".join(stream.add(t) for t in range(len(words))) + stream.end() == text


def test_a_stop_string_inside_and_across_tokens():
    pieces = ["ab", "cd", "e", "fgh"]
    for strings, expected in ((["cde"], "ab"), (["bc"], "a"), (["fg"], "abcde"), (["h"], "abcdefg"), (["xy"], "abcdefgh"), (["d", "cd"], "ab")):
        stream = TextStream(lambda tokens: "".join(pieces[t] for t in tokens), strings)
        assert "".join(stream.add(t) for t in range(4)) + stream.end() == expected, strings
        assert stream.found in [*strings, None]
