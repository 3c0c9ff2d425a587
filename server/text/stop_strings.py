"""Stop strings, found across token borders."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from functools import lru_cache


class _Automaton:
    """Aho-Corasick over the stop strings: one step a character, however many and however long they are.

    A state is the longest suffix of the text that begins some stop string, which is just what has to be held back.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.matched = [0]
        """Length of the longest stop string that ends in this state, or 0."""
        for stop in stops:
            self._add(stop)
        self.fallback = [0] * len(self.next)
        self._link()
        self.begins = re.compile("[" + "".join(re.escape(char) for char in self.next[0]) + "]")

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self.next[state]:
                self.next[state][char] = len(self.next)
                self.next.append({})
                self.depth.append(self.depth[state] + 1)
                self.matched.append(0)
            state = self.next[state][char]
        self.matched[state] = len(stop)

    def _link(self) -> None:
        queue = deque(self.next[0].values())
        while queue:
            parent = queue.popleft()
            for char, state in self.next[parent].items():
                queue.append(state)
                self.fallback[state] = self.step(self.fallback[parent], char)
                self.matched[state] = self.matched[state] or self.matched[self.fallback[state]]

    def step(self, state: int, char: str) -> int:
        while char not in self.next[state]:
            if state == 0:
                return 0
            state = self.fallback[state]
        return self.next[state][char]


@lru_cache(maxsize=64)
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    return _Automaton(stops)


class StopStrings:
    """Cuts a text off before the first stop string; holds back only what could still become one.

    The stop string that is complete first wins, of those complete at once the longest: so the result does not depend
    on how the text is cut into tokens. The stop string itself is never given out.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        wanted = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._automaton = _automaton(wanted) if wanted else None
        self._state = 0
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be given out now, and whether a stop string was found. Not safe after it was."""
        automaton = self._automaton
        if automaton is None:
            return text, False
        start = 0
        state = self._state
        if not state:
            first = automaton.begins.search(text)
            if first is None:
                return text, False
            start = first.start()
        held = self._held + text
        for position in range(start, len(text)):
            state = automaton.step(state, text[position])
            if automaton.matched[state]:
                end = len(held) - len(text) + position + 1
                self._held = ""
                self._state = 0
                return held[: end - automaton.matched[state]], True
        self._state = state
        keep = len(held) - automaton.depth[state]
        self._held = held[keep:]
        return held[:keep], False

    def flush(self) -> str:
        """What was held back, once the text has ended."""
        held, self._held, self._state = self._held, "", 0
        return held
