from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import psutil
import pytest

from server.errors import InvalidRequest
from server.text.template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


class Templates:
    """Builds templates and closes them at the end."""

    def __init__(self) -> None:
        self.built: list[ChatTemplate] = []

    def __call__(self, source: str, *, seconds: float = 5, most_chars: int = 100_000) -> ChatTemplate:
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        now = datetime(2024, 2, 29, 12, 30)
        self.built.append(ChatTemplate(source, special, most_chars, now=lambda: now, seconds=seconds))
        return self.built[-1]


@pytest.fixture
def template() -> Iterator[Templates]:
    templates = Templates()
    yield templates
    for built in templates.built:
        built.close()


def echo(templates: Templates, messages: list[dict[str, Any]]) -> str:
    return templates("{{ messages | tojson }}").render(messages, {})


def test_renders_as_transformers_does(template: Templates) -> None:
    source = (
        "{{ bos_token }}{% for message in messages %}\n"
        "  {% if loop.index > 9 %}{% break %}{% endif %}\n"
        "{{ message['role'] }}:{{ message.content | trim }}\n"
        "{% endfor %}\n"
        "{%- generation %}{{ strftime_now('%d %b %Y') }}{% endgeneration %}"
        "{{ {'b': '<é>', 'a': [1]} | tojson }}{% if tools is none %}{% set x = namespace(n=1) %}{% set x.n = 2 %}"
        "{{ x.n }}{% endif %}{{ undefined_name }}{% if thinking is defined %}{{ thinking }}{% endif %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rendered = template(source).render([{"role": "user", "content": " hé "}], {"thinking": True})
    jinja = pytest.importorskip("transformers.utils.chat_template_utils")
    compiled = jinja._compile_jinja_template(source)
    reference = compiled.render(
        messages=[{"role": "user", "content": " hé "}],
        tools=None,
        bos_token="<s>",
        thinking=True,
        add_generation_prompt=1,
    )
    assert rendered == reference.replace(datetime.now().strftime("%d %b %Y"), "29 Feb 2024")
    assert rendered.startswith("<s>user:hé\n29 Feb 2024{")


def test_add_generation_prompt_can_be_turned_off(template: Templates) -> None:
    assert template("{{ add_generation_prompt }}").render(USER, {"add_generation_prompt": False}) == "False"


def test_text_parts_become_one_text(template: Templates) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert '"content": "one\\ntwo"' in echo(template, [{"role": "user", "content": parts}])


def test_developer_becomes_system_unless_the_template_knows_it(template: Templates) -> None:
    message = [{"role": "developer", "content": "x"}]
    assert '"role": "system"' in echo(template, message)
    assert template("{# developer #}{{ messages[0].role }}").render(message, {}) == "developer"


def test_both_names_of_reasoning_reach_the_template(template: Templates) -> None:
    for name in ("reasoning", "reasoning_content"):
        assert '"reasoning_content": "why"' in echo(template, [{"role": "assistant", "content": "a", name: "why"}])


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "robot", "content": "x"}, "unknown role 'robot'"),
        ({"content": "x"}, "unknown role"),
        ({"role": "user", "content": 5}, "string or a list"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "type text"),
        ({"role": "user", "content": ["x"]}, "type text"),
        ({"role": "user", "content": "\ud800"}, "lone surrogate"),
    ],
)
def test_wrong_messages(template: Templates, message: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named) as caught:
        echo(template, [message])
    assert caught.value.param == "messages"


def test_kwargs_nested_too_deeply(template: Templates) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        template("x").render(USER, {"deep": nested})


@pytest.mark.parametrize("name", ["messages", "chat_template", "tools", "bos_token", "raise_exception"])
def test_kwargs_cannot_replace_what_the_server_passes(template: Templates, name: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        template("x").render(USER, {name: "y"})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate$"),
        ("{{ raise_exception('x' * 9000) }}", "x{300}$"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end"),
        ("{{ 'a' * 200000 }}", "more than 100000 characters"),
        ("{% set x = 'a' * (2 ** 31) %}", "too much memory"),
    ],
)
def test_a_template_that_fails_is_a_clear_error_and_the_next_render_works(
    template: Templates, source: str, named: str
) -> None:
    broken = template("{% if messages[0].role == 'user' %}" + source + "{% endif %}fine")
    with pytest.raises(InvalidRequest, match=named):
        broken.render(USER, {})
    if "Syntax" not in named:
        assert broken.render([{"role": "system", "content": ""}], {}) == "fine"


@pytest.mark.parametrize(
    "work",
    [
        LOOP,
        "{% set x = 9 ** (9 ** (messages|length + 8)) %}",
        "{% set n = namespace(s='ab') %}" + "{% set n.s = n.s|list|join %}" * 40 + LOOP,
    ],
)
def test_endless_work_is_stopped(template: Templates, work: str) -> None:
    endless = template("{% if messages[0].role == 'user' %}" + work + "{% endif %}fine", seconds=0.3)
    started = time.process_time()
    with pytest.raises(InvalidRequest, match=r"more than 0\.3 s of processor time"):
        endless.render(USER, {})
    assert time.process_time() - started < 0.2, "the work must not be done in this process"
    assert endless.render([{"role": "system", "content": ""}], {}) == "fine"


def test_endless_compiling_is_stopped(template: Templates) -> None:
    with pytest.raises(InvalidRequest, match=r"more than 0\.3 s of processor time"):
        template("{{ 9 ** (9 ** 9) }}", seconds=0.3).render(USER, {})


def test_a_loop_does_not_hold_up_other_renders(template: Templates) -> None:
    shared = template("{% if messages[0].role == 'user' %}" + LOOP + "{% endif %}fine", seconds=1.0)
    errors: list[InvalidRequest] = []

    def loop() -> None:
        try:
            shared.render(USER, {})
        except InvalidRequest as error:
            errors.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    assert shared.render([{"role": "system", "content": ""}], {}) == "fine"
    assert thread.is_alive()
    thread.join()
    assert len(errors) == 1


def test_a_killed_render_process_is_replaced(template: Templates) -> None:
    victim = template("fine")
    assert victim.render(USER, {}) == "fine"
    os.kill(psutil.Process().children()[-1].pid, signal.SIGKILL)
    assert victim.render(USER, {}) == "fine"


def test_the_render_process_gets_no_secrets(template: Templates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    built = template("fine")
    built.render(USER, {})
    living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert "HF_TOKEN" not in living[-1].environ()
