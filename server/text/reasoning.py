"""Splits the output of a reasoning model into what it thinks (``<think> ... </think>``) and what it answers."""

from __future__ import annotations

OPENING = "<think>"
CLOSING = "</think>"


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside an open think block, so that the output begins with reasoning."""
    return prompt.rstrip().endswith(OPENING)


class ReasoningSplitter:
    """Feed it text as it comes; the split does not depend on how the text is cut.

    Only a block at the very beginning counts: without an opening tag there (and ``starts_inside`` false) all is
    content, and tags after the first closing one are plain text. Line breaks next to the tags belong to the markup and
    are dropped, as DeepSeek's own service does. A block that is never closed is reasoning to its end.
    """

    def __init__(self, starts_inside: bool) -> None:
        self._push = self._thinking if starts_inside else self._beginning
        self._held = ""
        self._fresh = True
        """Nothing but line breaks came since the last tag."""

    def push(self, text: str) -> tuple[str, str]:
        """Reasoning and content that are certain now."""
        return self._push(text)

    def flush(self) -> tuple[str, str]:
        """What was held back, once the text has ended."""
        held, self._held = self._held, ""
        if self._push == self._thinking:
            return held.rstrip("\n"), ""
        return "", held

    def _beginning(self, text: str) -> tuple[str, str]:
        self._held += text
        start = self._held.lstrip()
        if start.startswith(OPENING):
            self._held = ""
            self._push = self._thinking
            return self._thinking(start[len(OPENING) :])
        if OPENING.startswith(start):
            return "", ""
        content, self._held = self._held, ""
        self._fresh = False
        self._push = self._answering
        return "", content

    def _thinking(self, text: str) -> tuple[str, str]:
        held = self._held + text
        if self._fresh:
            held = held.lstrip("\n")
        reasoning, closing, answer = held.partition(CLOSING)
        if closing:
            self._held = ""
            self._fresh = True
            self._push = self._answering
            return reasoning.rstrip("\n"), self._answering(answer)[1]
        keep = _certain(held)
        self._held = held[keep:]
        self._fresh = self._fresh and not held
        return held[:keep], ""

    def _answering(self, text: str) -> tuple[str, str]:
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return "", text


def _certain(text: str) -> int:
    """How many characters can be no part of line breaks and a closing tag that the next text completes."""
    end = len(text)
    bracket = text.rfind("<", -len(CLOSING))
    if bracket >= 0 and CLOSING.startswith(text[bracket:]):
        end = bracket
    return len(text[:end].rstrip("\n"))
