"""Compares greedy answers of a model with those of its base, and both with the right ones."""

from __future__ import annotations

from collections.abc import Sequence

from compression.card import AnswerScores
from compression.measures.agreement import Passage, Scores
from compression.measures.intervals import ratio_if_any, share
from compression.measures.texts import Question, final_number
from server.text import ModelText

INSTRUCTION = "\nGive the final number after ####."


def prompts_of(text: ModelText, questions: Sequence[Question]) -> list[list[int]]:
    """As a chat where the model has a template."""
    if not text.has_chat_template:
        plain = "Question: {}\nAnswer:"
        return [text.encode(plain.format(each.question)) for each in questions]
    chats = [text.render_chat([{"role": "user", "content": each.question + INSTRUCTION}]) for each in questions]
    return [text.encode(chat, add_special=False) for chat in chats]


def answer_passages(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[Passage]:
    """Each answer after its prompt; empty answers have none."""
    return [Passage(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True) if answer]


def solution_passages(text: ModelText, prompts: Sequence[list[int]], questions: Sequence[Question]) -> list[Passage]:
    """The worked solutions after the prompts."""
    solutions = [text.encode(question.solution, add_special=False) for question in questions]
    return answer_passages(prompts, solutions)


def score_answers(
    name: str,
    questions: Sequence[Question],
    own: Sequence[str],
    base: Sequence[str],
    tokens: tuple[Sequence[list[int]], Sequence[list[int]]],
    forced: Scores,
    solutions: Scores,
    most: int,
) -> AnswerScores:
    """``own`` and ``base`` are the texts of the answers and ``tokens`` their ids, ours first.

    ``forced`` scores the base's answers under both models, ``solutions`` the worked ones.
    """
    numbers = [(final_number(mine), final_number(theirs)) for mine, theirs in zip(own, base, strict=True)]
    right = [question.answer for question in questions]
    kept = [_common(mine, theirs) for mine, theirs in zip(*tokens, strict=True)]
    count = len(questions)
    return AnswerScores(
        name=name,
        questions=count,
        most_tokens=most,
        accuracy=share(sum(mine == answer for (mine, _), answer in zip(numbers, right, strict=True)), count),
        base_accuracy=share(sum(theirs == answer for (_, theirs), answer in zip(numbers, right, strict=True)), count),
        same_number=share(sum(mine == theirs for mine, theirs in numbers), count),
        same_choice=ratio_if_any(forced.same_best, forced.tokens),
        kept=ratio_if_any(kept, [len(theirs) for theirs in tokens[1]]),
        loss_difference=ratio_if_any(solutions.own_loss - solutions.base_loss, solutions.tokens),
    )


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = zip(left, right, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))
