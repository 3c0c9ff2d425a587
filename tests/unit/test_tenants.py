from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from server.errors import UsageError
from server.tenants import NOBODY, TenantEntry, TenantTable, hash_key, new_key, read_tenants

KEY = "slim-a-long-enough-key"
HASH = "sha256:" + hashlib.sha256(KEY.encode()).hexdigest()
OTHER = "sha256:" + "0" * 64


def write(folder: Path, text: str) -> Path:
    path = folder / "tenants.yaml"
    path.write_text(text)
    return path


def test_a_key_leads_to_its_tenant_and_no_other(tmp_path: Path) -> None:
    text = f"tenants:\n- {{name: a, keys: [{HASH}], weight: 2, max_concurrent: 3}}\n- {{name: b, keys: [{OTHER}]}}\n"
    table = TenantTable(read_tenants(write(tmp_path, text)), api_keys=["operator"])
    tenant = table.find(KEY.encode())
    assert tenant is not None
    assert (tenant.name, tenant.weight, tenant.max_concurrent) == ("a", 2.0, 3)
    assert table.find(b"operator") is NOBODY
    for wrong in (b"", HASH.encode(), bytes.fromhex(HASH[7:]), KEY.upper().encode()):
        assert table.find(wrong) is None
    assert table.names == ["a", "b"]


def test_without_any_key_everybody_is_served() -> None:
    table = TenantTable()
    assert table.open
    assert table.find(b"") is NOBODY
    assert not TenantTable(api_keys=["x"]).open


def test_the_admin_key_closes_nothing() -> None:
    table = TenantTable(admin_key="boss")
    assert table.open
    assert table.has_admin
    assert table.is_admin(b"boss")
    assert not table.is_admin(b"other")
    assert not TenantTable().is_admin(b"")


def test_tenants_ask_for_their_classes_only() -> None:
    entry = TenantEntry(name="a", keys=[HASH])
    tenant = TenantTable([entry]).find(KEY.encode())
    assert tenant is not None
    assert [tenant.may_ask_for(each) for each in ("high", "normal", "low")] == [False, True, True]
    assert NOBODY.may_ask_for("high")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenants: [", "no YAML"),
        ("- 1", "the file: "),
        ("tenants: [{name: a}]", r"tenants\.0\.keys: Field required"),
        ("tenants: [{name: 'a b', keys: []}]", r"tenants\.0\.name"),
        (f"tenants: [{{name: a, keys: [{KEY}]}}]", r"tenants\.0\.keys\.0"),
        (f"tenants: [{{name: a, keys: [{HASH}], wieght: 2}}]", r"tenants\.0\.wieght"),
        (f"tenants: [{{name: a, keys: [{HASH}], weight: 0}}]", r"tenants\.0\.weight"),
        (f"tenants: [{{name: a, keys: [{HASH}]}}, {{name: b, keys: [{HASH}]}}]", "a key is listed twice"),
        (f"tenants: [{{name: a, keys: [{HASH}]}}, {{name: a, keys: [{OTHER}]}}]", "the same name"),
        ("!!python/object/apply:os.getcwd []", "no YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_the_entry(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refusal:
        read_tenants(write(tmp_path, text))
    assert KEY not in str(refusal.value)


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_tenants(tmp_path / "nothing.yaml")
    with pytest.raises(UsageError, match="larger than"):
        read_tenants(write(tmp_path, "#" * (5 << 20)))


def test_keys_cannot_be_guessed() -> None:
    assert new_key() != new_key()
    assert len(new_key()) > 40
    assert hash_key(KEY) == HASH
    with pytest.raises(UsageError, match="at least 20"):
        hash_key("password")
