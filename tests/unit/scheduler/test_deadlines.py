"""What a request aims at, and how long a step may take for all that are there."""

from __future__ import annotations

from typing import Any

import pytest

from server.scheduler.config import SchedulerConfig
from server.scheduler.deadlines import (
    BEST_EFFORT,
    IDLE_STEP,
    SOFT_DECODES,
    SOFT_LAG,
    SOFT_STEP,
    SOFT_TPOT,
    STEP_SHARE,
    STRETCH,
    WAIT_SHARE,
    Outlook,
    aim_of,
)
from tests.unit.scheduler.rig import Rig


class TestAims:
    def aim(self, config: SchedulerConfig, length: int = 10, **fields: Any) -> tuple[float, float, bool]:
        aim = aim_of(Rig().item(range(length), **fields), config)
        return aim.ttft, aim.tpot, aim.firm

    def test_an_items_own_target_goes_before_the_operators(self) -> None:
        config = SchedulerConfig(target_ttft=2.0, target_tpot=0.1)
        assert self.aim(config) == (2.0, 0.1, False)
        assert self.aim(config, ttft=0.5, tpot=0.01, firm=True) == (0.5, 0.01, True)

    def test_without_any_nothing_is_firm(self) -> None:
        assert self.aim(SchedulerConfig(), firm=True) == (1.0, SOFT_TPOT, False)
        assert self.aim(SchedulerConfig(), length=8000) == (2.0, SOFT_TPOT, False)


class TestOutlook:
    def check(self, outlook: Outlook, arguments: tuple[float, float, float, bool], seconds: float, bound: str) -> None:
        given, reason = outlook.seconds(*arguments)
        assert given == pytest.approx(seconds, rel=0.005)
        assert reason == bound

    def test_nobody_decodes(self) -> None:
        self.check(Outlook(), (0.1, 0.1, 1.0, True), IDLE_STEP, "idle")
        self.check(Outlook(ttft=0.4), (0.1, 0.1, 1.0, True), 0.4 * STEP_SHARE, "idle")
        self.check(Outlook(ttft=0.5), (0.003, 0.001, 1.0, True), 0.0183, "idle")

    def test_bounds_and_their_reasons(self) -> None:
        easy = Outlook(slack=1.0, tpot=0.05)
        self.check(easy, (0.01, 0.0, 1.25, False), 0.04, "pace")
        self.check(easy, (0.01, 0.0, 1.25, True), STRETCH * 0.04, "stretch")
        late = Outlook(slack=0.03, tpot=0.05)
        self.check(late, (0.01, 0.0, 1.0, True), 0.03, "slack")
        self.check(late, (0.03, 0.0, 1.0, True), 0.03 * BEST_EFFORT, "behind")
        self.check(Outlook(slack=-9.0, tpot=0.05), (0.01, 0.0, 1.0, True), 0.01 * BEST_EFFORT, "behind")

    @pytest.mark.parametrize(
        ("wait", "lag", "step", "bound"),
        [
            (0.09, SOFT_LAG[0], SOFT_STEP, "pace"),
            (0.6, 0.6, 0.6 * WAIT_SHARE, "backlog"),
            (9.0, SOFT_LAG[1], IDLE_STEP, "backlog"),
        ],
    )
    def test_streams_without_a_target_bear_what_prompts_bear(
        self, wait: float, lag: float, step: float, bound: str
    ) -> None:
        outlook = Outlook()
        outlook.bear(0.04, wait, 0.005)
        assert (outlook.lag, outlook.slack) == (lag, 0.04 + lag)
        self.check(outlook, (0.005, 0.0, 1.0, False), step, bound)
        asked = Outlook(slack=0.02, tpot=0.05)
        asked.bear(0.04, wait, 0.005)
        self.check(asked, (0.005, 0.0, 1.0, False), 0.02, "slack")

    @pytest.mark.parametrize(("alone", "step"), [(0.001, SOFT_STEP), (0.01, 0.01 / SOFT_DECODES), (0.04, 0.1)])
    def test_where_decodes_take_long_a_step_may_too(self, alone: float, step: float) -> None:
        outlook = Outlook()
        outlook.bear(0.04, 0.0, alone)
        self.check(outlook, (alone, 0.0, 1.0, False), step, "pace")
        assert step <= STRETCH * SOFT_TPOT
