"""Token ids into text as they come: characters whole, and as soon as they are."""

from collections.abc import Iterable, Iterator
from typing import Any

_PATIENCE = 8  # tokens to wait for the rest of a character
_UNFINISHED = 3  # bytes, so at most as many tokens, of a character that is not whole yet


class TextPieces:
    """Turns token ids into text as they come, holding back what is not yet a whole character."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.given: list[int] = []  # the ids last turned into text: they decide on spaces
        self.held: list[int] = []

    def push(self, token: int) -> str:
        """The text that became certain with this token, perhaps none."""
        self.held.append(token)
        text = self._held_text()
        if not text.endswith("\ufffd"):
            return self._give(text, len(self.held))
        if len(self.held) < _PATIENCE:
            return ""
        # These bytes are no UTF-8. But the last may begin a character: what lies further back than
        # one can reach is certain, if the cut is not through a character itself.
        for count in range(len(self.held) - _UNFINISHED, 0, -1):
            certain = self._held_text(count)
            if text.startswith(certain):
                return self._give(certain, count)
        return self._give(text, len(self.held))

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._give(self._held_text(), len(self.held)) if self.held else ""

    def _held_text(self, count: int | None = None) -> str:
        """Of all that is held, or of the first `count`."""
        before = self._decode(self.given)
        return self._decode(self.given + self.held[:count])[len(before) :]

    def _give(self, text: str, count: int) -> str:
        self.given, self.held = self.held[:count], self.held[count:]
        return text

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def texts(tokens: Iterable[int], pieces: TextPieces) -> Iterator[str]:
    for token in tokens:
        if text := pieces.push(token):
            yield text
    if text := pieces.flush():
        yield text
