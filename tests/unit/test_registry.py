from __future__ import annotations

from pathlib import Path

import pytest

from engines import registry
from engines.protocol import EngineLoadError, EngineSpec


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine_with_a_missing_package.py").write_text("import package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "KINDS", {"fake": "engine_with_a_missing_package:Absent"})
    with pytest.raises(EngineLoadError, match="package_that_is_not_installed"):
        registry.create(EngineSpec(name="m", kind="fake"), lambda progress: None)
