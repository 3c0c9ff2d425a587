from __future__ import annotations

from pathlib import Path

import pytest

from engines.engine_folder import Quality
from engines.protocol import EngineLoadError
from server.catalog import describe_folder
from server.errors import CommandFailed
from server.quality import check_quality, describe, read_quality, score
from server.settings import load_settings
from tests.unit.compression.tiny_pair import write_record
from tests.unit.models.checkpoints import LLAMA, write_checkpoint

GOOD = Quality(perplexity=20.4, base_perplexity=20.0, perplexity_ratio=1.02, top1_agreement=0.951, kl=0.0123)
ENCODER = Quality(accuracy=0.78, base_accuracy=0.8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    write_checkpoint(folder, LLAMA)
    return folder


def test_the_score_is_the_share_of_the_base_s_quality() -> None:
    assert score(GOOD) == pytest.approx(1 / 1.02)
    assert score(ENCODER) == pytest.approx(0.975)
    assert score(Quality()) is None
    assert score(Quality(accuracy=0.0, base_accuracy=0.0)) is None


@pytest.mark.parametrize("quality", [GOOD, ENCODER])
def test_the_gate_opens_at_the_score_and_shuts_above_it(quality: Quality) -> None:
    found = score(quality)
    assert found is not None
    check_quality("m", quality, None)
    check_quality("m", quality, found)
    with pytest.raises(EngineLoadError, match=r"m: its quality is 0\.9\d+ of its base's .*min_quality is 0\.99"):
        check_quality("m", quality, 0.99)


@pytest.mark.parametrize("quality", [None, Quality()])
def test_what_was_never_measured_does_not_pass(quality: Quality | None) -> None:
    check_quality("m", quality, None)
    with pytest.raises(EngineLoadError, match="slimserve evaluate"):
        check_quality("m", quality, 0.0)


def test_only_an_evaluated_engine_folder_has_a_quality(folder: Path, tmp_path: Path) -> None:
    assert read_quality(folder) is None
    assert read_quality(tmp_path / "model.gguf") is None
    write_record(folder)
    assert read_quality(folder) is None
    write_record(folder, quality=GOOD)
    assert read_quality(folder) == GOOD


def test_in_a_few_words() -> None:
    assert describe(GOOD) == "perplexity x1.020, same token 95.1 %, KL 0.0123"
    assert describe(ENCODER) == "accuracy 78.0 % (base 80.0 %)"
    assert describe(Quality(router_agreement=0.993)) == "same experts 99.3 %"


def test_a_folder_is_listed_with_its_quality(folder: Path) -> None:
    with pytest.raises(CommandFailed, match="no engine folder"):
        describe_folder(folder)
    write_record(folder, quality=GOOD)
    listed = describe_folder(folder)
    assert (listed.name, listed.source, listed.quality) == ("small", "made of base", describe(GOOD))
    assert listed.size > 10_000
    (folder / "slimserve.json").write_text("{}")
    with pytest.raises(CommandFailed, match="damaged"):
        describe_folder(folder)


def test_the_setting_is_a_share() -> None:
    assert load_settings({"min_quality": 0.98}).models[0].min_quality == 0.98
    with pytest.raises(Exception, match="min_quality"):
        load_settings({"min_quality": 1.5})
