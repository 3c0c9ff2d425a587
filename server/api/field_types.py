"""Types of the fields of request bodies, with their bounds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidatorFunctionWrapHandler, WithJsonSchema, WrapValidator

MAX_TOKENS = 1 << 24
ID_LIMIT = 1 << 31

_RESERVED_TEMPLATE_KEYS = frozenset({"messages", "chat_template", "tools", "documents", "add_generation_prompt"})


def unsupported(*neutral: object) -> tuple[BeforeValidator, WithJsonSchema]:
    """A field that may only hold one of the ``neutral`` values, or null: those change nothing."""

    def check(value: object) -> object:
        if value is not None and not any(type(value) is type(each) and value == each for each in neutral):
            raise ValueError("this value is not supported")
        return value

    return BeforeValidator(check), WithJsonSchema({"enum": [*neutral, None]})


def _plain_kwargs(value: dict[str, Any]) -> dict[str, Any]:
    if reserved := sorted(_RESERVED_TEMPLATE_KEYS & value.keys()):
        raise ValueError(f"{reserved[0]} may not be set here")
    return value


def _integral(value: object) -> object:
    """JSON knows one kind of number: 16.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integral_items(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """Plain ids are most of a body's bytes: they are checked in bulk, and one by one only where something is wrong."""
    if isinstance(value, list):
        kinds = set(map(type, value))
        if kinds == {int} and len(value) <= MAX_TOKENS and min(value) >= 0 and max(value) < ID_LIMIT:
            return value
        if float in kinds:
            value = [_integral(each) for each in value]
    return handler(value)


INTEGRAL = BeforeValidator(_integral)
Refused = Annotated[Any, *unsupported()]
RefusedList = Annotated[Any, *unsupported([])]
RefusedUnlessFalse = Annotated[Any, *unsupported(False)]

ModelName = Annotated[str, Field(min_length=1, max_length=256)]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=ID_LIMIT)]],
    Field(max_length=MAX_TOKENS, fail_fast=True),
    WrapValidator(_integral_items),
]
PromptIds = Annotated[TokenIds, Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
TemplateKwargs = Annotated[dict[str, Any], Field(max_length=32), AfterValidator(_plain_kwargs)]
