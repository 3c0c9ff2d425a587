"""The web page's files, their headers, and who may have them."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from engines.manifest import Manifest
from server.api.routes import create_api
from server.web.page import FILES, PATHS
from tests.unit.api.harness import ScriptedDispatcher, call, make_state
from tests.unit.api.test_callers import ask, make, table


def test_the_page_and_all_that_it_loads_need_no_key(manifest: Manifest) -> None:
    state = make(manifest, table())
    for path in PATHS:
        answer = ask(state, "GET", path)
        assert (answer.status_code, answer.content) == (200, FILES[path].body)
    assert ask(state, "GET", "/v1/models").status_code == 401
    assert ask(state, "GET", "/stats").status_code == 401


def test_the_policy_lets_nothing_in_but_own_files(manifest: Manifest) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher()))
    for answer in call(app, *(("GET", path, None) for path in PATHS)):
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert {policy[each] for each in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


class Page(HTMLParser):
    """Notes what a strict policy forbids, and what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden: list[str] = []
        self.references: set[str] = set()
        self.ids: list[str] = []
        self.labelled: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.forbidden += [name for name in given if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.forbidden.append(tag)
        self.references |= {given[name] or "" for name in ("src", "href") if name in given}
        self.ids += [given["id"] or ""] if "id" in given else []
        if tag == "label" and given.get("for"):
            self.labelled.add(given["for"] or "")


def test_the_page_has_no_inline_code_and_refers_to_own_files() -> None:
    page = Page()
    page.feed(FILES["/"].body.decode())
    assert page.forbidden == []
    assert len(page.ids) == len(set(page.ids))
    local = {reference for reference in page.references if not reference.startswith("#")}
    assert local <= PATHS
    assert {reference[1:] for reference in page.references - local} <= set(page.ids)


def test_scripts_import_files_that_exist_and_find_the_elements_that_they_name() -> None:
    page = Page()
    page.feed(FILES["/"].body.decode())
    for path, file in FILES.items():
        if path.endswith(".js") and "/vendor/" not in path:
            text = file.body.decode()
            assert {f"/web/{name}" for name in re.findall(r'from "\./([^"]+)"', text)} <= PATHS
            assert set(re.findall(r'byId\("([^"]+)"\)', text)) <= set(page.ids), path
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|localStorage|sessionStorage|cookie", text), (
                path
            )


def test_a_browser_that_has_a_file_is_told_so(manifest: Manifest) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher()))
    first = call(app, ("GET", "/web/app.js", None))[0]
    assert first.headers["cache-control"] == "no-cache"
    again = call(app, ("GET", "/web/app.js", None), headers={"if-none-match": first.headers["etag"]})[0]
    assert (again.status_code, again.content) == (304, b"")
    assert "content-security-policy" in again.headers


@pytest.mark.parametrize(
    "path", ["/web/", "/web/index.html", "/web/../page.py", "/web/vendor/uplot/LICENSE", "/web/x.js"]
)
def test_nothing_else_is_sent(manifest: Manifest, path: str) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher()))
    assert call(app, ("GET", path, None))[0].status_code == 404


def test_the_page_cannot_be_posted_to(manifest: Manifest) -> None:
    app = create_api(make_state(manifest, ScriptedDispatcher()))
    assert call(app, ("POST", "/", {}))[0].status_code == 405
