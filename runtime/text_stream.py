"""Text from tokens as they come, and where it stops: nothing is given out that a later token may still take back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces.

    The string that is complete first ends the text; of those complete at the same character, the longest. How the text is
    cut into pieces makes no difference.
    """

    def __init__(self, strings: Sequence[str]):
        self.strings = strings
        self.found: str | None = None
        self._held = ""

    def add(self, piece: str) -> str:
        """The text that is now safe to give out; nothing more once a string was found."""
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [(text.find(s) + len(s), -len(s), s) for s in self.strings if s in text]
        if ends:
            end, _, self.found = min(ends)
            self._held = ""
            return text[: end - len(self.found)]
        keep = max((self._begun(text, s) for s in self.strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, string: str) -> int:
        """How many characters at the end of the text may be the beginning of the string."""
        return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


class TextStream:
    """The text of one output. decode: tokens to text, as a tokenizer's `decode`; stop: strings that end the text.

    A token may hold a part of a character, and its text may depend on the tokens before it, so a few of them are decoded
    again with each new one. Text that ends in an incomplete character waits for the next token.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = StopStrings(stop)
        self._tokens: list[int] = []
        self._start = 0  # of the tokens that are decoded again
        self._read = 0  # tokens whose text was given out

    @property
    def found(self) -> str | None:
        """The stop string that ended the text."""
        return self._stop.found

    def add(self, token: int) -> str:
        """The text that is safe to give out after one more token."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._stop.add(text[len(before) :])

    def end(self) -> str:
        """The rest of the text, when no more tokens come."""
        before = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        self._start = self._read = len(self._tokens)
        return self._stop.add(text[len(before) :]) + self._stop.end()
