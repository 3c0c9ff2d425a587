"""One choice on its way from token ids to the text that a client gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from engines.protocol import SamplingParams, TokenLogprobs
from server.requests import ChoiceNews
from server.text import ModelText, ReasoningSplitter, StopStrings

Finish = Literal["", "stop", "length"]


@dataclass(frozen=True, slots=True)
class LoggedToken:
    id: int
    offset: int
    """Where its text begins, in characters of the choice's output."""
    entry: TokenLogprobs


@dataclass(slots=True)
class Delta:
    """What one flush adds to a choice."""

    content: str = ""
    reasoning: str = ""
    logprobs: list[LoggedToken] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    finish: Finish = ""


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What a request wants of the text of its choices."""

    stops: Sequence[str] = ()
    thinking: bool | None = None
    """Whether the output begins inside a thought; None leaves the text unsplit."""
    skip_special_tokens: bool = True


class ChoiceText:
    """Detokenizes, finds stop strings and splits off reasoning. Text from a stop string on is never given out."""

    def __init__(self, text: ModelText, sampling: SamplingParams, options: TextOptions) -> None:
        stops, thinking = options.stops, options.thinking
        self.finish: Finish = ""
        self.completion_tokens = 0
        """Tokens up to the ending, an end token counted in; those dropped after a stop string are not."""
        self.reasoning_tokens = 0
        """Tokens before the answer began."""
        self._detokenizer = text.detokenizer(skip_special_tokens=options.skip_special_tokens)
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._stops = StopStrings(stops) if stops else None
        self._splitter = None if thinking is None else ReasoningSplitter(thinking)
        self._token_by_token = bool(stops) or sampling.logprobs is not None or thinking is not None
        self._held: list[LoggedToken] = []
        self._length = 0
        self._emitted = 0
        self._answering = False

    def push(self, news: ChoiceNews) -> Delta:
        """Take in what came; ``news.end`` is stop, length or empty. To be called until ``finish`` is set."""
        delta = Delta(prompt_logprobs=news.prompt_logprobs)
        tokens = news.tokens
        ends_here = news.end == "stop" and bool(tokens) and tokens[-1] in self._stop_ids
        shown = tokens[:-1] if ends_here else tokens
        if self._token_by_token:
            for index, token in enumerate(shown):
                self._advance([token], news.logprobs[index : index + 1], delta)
                if self.finish:
                    return delta
        elif shown:
            self._advance(shown, (), delta)
        self.completion_tokens += ends_here
        if news.end == "stop" or news.end == "length":
            self._end(news.end, delta)
        return delta

    def _advance(self, tokens: Sequence[int], entries: Sequence[TokenLogprobs], delta: Delta) -> None:
        self.completion_tokens += len(tokens)
        piece = self._detokenizer.push(tokens)
        if entries:
            logged = zip(tokens, entries, strict=False)
            self._held += [LoggedToken(token, self._length, entry) for token, entry in logged]
        self._emit(piece, delta)

    def _emit(self, piece: str, delta: Delta) -> None:
        self._length += len(piece)
        stopped = False
        if self._stops is not None:
            piece, stopped = self._stops.push(piece)
        self._give(piece, delta)
        if stopped:
            self._close("stop", delta)

    def _end(self, finish: Literal["stop", "length"], delta: Delta) -> None:
        self._emit(self._detokenizer.flush(), delta)
        if self.finish:
            return
        if self._stops is not None:
            self._give(self._stops.flush(), delta)
        delta.logprobs += self._held
        self._held = []
        self._close(finish, delta)

    def _close(self, finish: Literal["stop", "length"], delta: Delta) -> None:
        if self._splitter is not None:
            self._add(*self._splitter.flush(), delta)
        self.finish = delta.finish = finish

    def _give(self, piece: str, delta: Delta) -> None:
        """Text that no stop string can take back any more, and the log probabilities of its tokens."""
        self._emitted += len(piece)
        if self._held:
            self._release(delta)
        if self._splitter is None:
            delta.content += piece
        else:
            self._add(*self._splitter.push(piece), delta)

    def _release(self, delta: Delta) -> None:
        """The log probabilities of tokens whose text has begun to be given out."""
        ready = len(self._held)
        if self._stops is not None:
            ready = next((i for i, token in enumerate(self._held) if token.offset >= self._emitted), ready)
        delta.logprobs += self._held[:ready]
        del self._held[:ready]

    def _add(self, reasoning: str, content: str, delta: Delta) -> None:
        delta.reasoning += reasoning
        delta.content += content
        self._answering = self._answering or bool(content)
        if reasoning and not self._answering:
            self.reasoning_tokens = self.completion_tokens
