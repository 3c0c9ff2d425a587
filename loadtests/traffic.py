"""What users ask for and when: a walk along a recorded trace, and words of the lengths that it says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.simulation.traces import Recorded
from loadtests.answers import Api, Failed

TEXT = (
    "the river runs past a mill and two old houses where people once kept bees and sold honey to those who came over "
    "the hill from town on market days with bread salt paper nails and news of far places"
)
WORDS = TEXT.split()
SAMPLE = 200
"""Words whose tokens are counted once, to make prompts of a length."""
SYSTEM_PROMPTS, SYSTEM_WORDS = 4, 40
"""Chats begin with one of a few texts, as an application's do: a prefix cache finds them."""
ROOM = 0.8
"""Of the longest sequence that requests may fill: templates add tokens, and words are not all alike."""


@dataclass(frozen=True, slots=True)
class Asked:
    """``gap`` in seconds since the request before, lengths in tokens."""

    gap: float
    prompt: int
    output: int


class Walk:
    """One user's way along a trace, from a random place on: bursts and lengths come as they were recorded.

    ``pace`` is the user's mean rate in requests a second; 0 sends the next as soon as the one before has ended.
    ``scale`` shortens prompts and outputs, ``longest`` is the longest sequence that the model takes.
    """

    def __init__(
        self, trace: Sequence[Recorded], pace: float, scale: float, longest: int, randomness: random.Random
    ) -> None:
        self._trace = trace
        self._mean = (trace[-1].time - trace[0].time) / (len(trace) - 1)
        self._pace = pace
        self._scale = scale
        self._room = int(longest * ROOM)
        self._place = randomness.randrange(len(trace))

    def next(self) -> Asked:
        now = self._trace[self._place]
        # After the last request comes the first one, a mean gap later.
        gap = now.time - self._trace[self._place - 1].time if self._place else self._mean
        self._place = (self._place + 1) % len(self._trace)
        output = min(max(1, round(now.output * self._scale)), self._room // 2)
        prompt = min(max(1, round(now.prompt * self._scale)), self._room - output)
        return Asked(gap / self._mean / self._pace if self._pace else 0.0, prompt, output)


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    longest: int
    """Tokens, prompt and output together."""
    tokens_per_word: float

    def words(self, tokens: int, randomness: random.Random) -> str:
        return " ".join(randomness.choices(WORDS, k=max(1, round(tokens / self.tokens_per_word))))

    def chat(self, asked: Asked, randomness: random.Random) -> dict[str, object]:
        system = random.Random(randomness.randrange(SYSTEM_PROMPTS))
        shared = min(round(SYSTEM_WORDS * self.tokens_per_word), asked.prompt // 2)
        messages = [
            {"role": "system", "content": self.words(shared, system)},
            {"role": "user", "content": self.words(asked.prompt - shared, randomness)},
        ]
        return self._body(asked) | {"messages": messages} | _STREAMED

    def completion(self, asked: Asked, randomness: random.Random, *, streamed: bool) -> dict[str, object]:
        body = self._body(asked) | {"prompt": self.words(asked.prompt, randomness)}
        return body | _STREAMED if streamed else body

    def _body(self, asked: Asked) -> dict[str, object]:
        return {"model": self.name, "max_tokens": asked.output, "ignore_eos": True}


_STREAMED: dict[str, object] = {"stream": True, "stream_options": {"include_usage": True}}
OTHER_TOKENS_PER_WORD, OTHER_LONGEST = 1.3, 2048
"""Of servers that do not tell."""


def find_model(api: Api, name: str | None) -> Model:
    """The model of this name, or the first one that the server lists. Raises Failed, or OSError where none answers."""
    listed = {str(model["id"]): model for model in api.call("/v1/models")["data"]}
    name = name or next(iter(listed), None)
    if name not in listed:
        raise Failed(f"the server has no model {name}: it lists {', '.join(listed) or 'none'}")
    longest = int(listed[name].get("max_model_len") or OTHER_LONGEST)
    text = " ".join(random.Random(0).choices(WORDS, k=SAMPLE))
    try:
        tokens = len(api.call("/tokenize", {"model": name, "prompt": text})["tokens"]) / SAMPLE
    except (Failed, KeyError):
        tokens = OTHER_TOKENS_PER_WORD
    return Model(name, longest, tokens)
