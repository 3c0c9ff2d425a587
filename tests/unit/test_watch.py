from __future__ import annotations

from server.worker.watch import LONGEST_PAUSE, START_PATIENCE, Backoff, Watchdog
from server.worker.wire import EngineLoad, LoadReport

TICK = 0.25


def report(steps: int, phase: str, running: int = 0) -> LoadReport:
    engine = EngineLoad(
        name="m",
        running=running,
        waiting=0,
        waiting_tokens=0,
        blocks_used=0,
        blocks_cached=0,
        blocks_total=1,
        token_budget=1,
        preemptions=0,
        prefix_queries=0,
        prefix_hits=0,
        integrity_errors=0,
    )
    return LoadReport(incarnation=1, steps=steps, phase=phase, rss_bytes=0, engines=[engine])


def look(watchdog: Watchdog, start: float, end: float) -> str | None:
    """Look every tick, as the supervisor does; the cause that is found."""
    now = start
    while now < end:
        now += TICK
        verdict = watchdog.verdict(now, TICK)
        if verdict is not None:
            return verdict.cause
    return None


def test_silence_is_found_within_the_step_timeout() -> None:
    watchdog = Watchdog(0.0, step_timeout=10, load_timeout=100)
    watchdog.heard(3.0)
    assert look(watchdog, 0.0, 13.0 - 2 * TICK) is None
    assert look(watchdog, 13.0 - 2 * TICK, 13.0) == "silent"


def test_a_process_that_starts_or_loads_may_say_nothing_for_longer() -> None:
    watchdog = Watchdog(0.0, step_timeout=2, load_timeout=1000)
    assert look(watchdog, 0.0, START_PATIENCE - 1) is None
    watchdog.heard(START_PATIENCE - 1)
    watchdog.loading(START_PATIENCE - 1, unfinished=True)
    assert look(watchdog, START_PATIENCE - 1, 2 * START_PATIENCE - 2) is None
    assert look(watchdog, 2 * START_PATIENCE - 2, 2 * START_PATIENCE) == "silent"


def test_an_idle_worker_that_reports_is_well() -> None:
    watchdog = Watchdog(0.0, step_timeout=10, load_timeout=100)
    for second in range(100):
        watchdog.report(report(5, "idle"), float(second))
        assert look(watchdog, second, second + 1) is None


def test_a_step_that_never_settles_is_found_though_reports_come() -> None:
    watchdog = Watchdog(0.0, step_timeout=10, load_timeout=100)
    for second in range(9):
        watchdog.report(report(5, "step", running=1), float(second))
        assert look(watchdog, second, second + 1) is None
    watchdog.report(report(5, "step", running=1), 9.0)
    assert look(watchdog, 9.0, 10.0) == "no_step"


def test_settled_steps_are_progress_without_a_report() -> None:
    watchdog = Watchdog(0.0, step_timeout=10, load_timeout=100)
    watchdog.report(report(5, "step", running=1), 0.0)
    watchdog.settled(8.0)
    assert look(watchdog, 0.0, 17.5) is None
    assert look(watchdog, 17.5, 18.0) == "silent"


def test_work_that_is_never_planned_is_found() -> None:
    watchdog = Watchdog(0.0, step_timeout=10, load_timeout=100)
    found = None
    for second in range(13):
        watchdog.report(report(5, "idle", running=1), float(second))
        found = found or look(watchdog, second, second + 1)
    assert found == "no_step"


def test_progress_puts_the_deadline_off() -> None:
    watchdog = Watchdog(0.0, step_timeout=10, load_timeout=100)
    for second in range(60):
        watchdog.report(report(second // 5, "step", running=1), float(second))
        assert look(watchdog, second, second + 1) is None


def test_a_long_idle_time_does_not_count_against_the_first_step() -> None:
    watchdog = Watchdog(0.0, step_timeout=10, load_timeout=100)
    for second in range(50):
        watchdog.report(report(5, "idle"), float(second))
        look(watchdog, second, second + 1)
    for second in range(50, 59):
        watchdog.report(report(5, "step", running=1), float(second))
        assert look(watchdog, second, second + 1) is None


def test_a_load_has_its_own_deadline() -> None:
    watchdog = Watchdog(0.0, step_timeout=10, load_timeout=30)
    watchdog.loading(0.0, unfinished=True)
    for second in range(30):
        watchdog.report(report(0, "load"), float(second))
        assert look(watchdog, second, second + 1) is None
    watchdog.report(report(0, "load"), 30.0)
    assert look(watchdog, 30.0, 31.0) == "load_timeout"
    watchdog.loading(31.0, unfinished=False)
    assert look(watchdog, 31.0, 32.0) is None


def test_a_pause_of_this_process_is_not_blamed_on_the_worker() -> None:
    watchdog = Watchdog(0.0, step_timeout=10, load_timeout=100)
    watchdog.heard(0.0)
    assert look(watchdog, 0.0, 1.0) is None
    assert watchdog.verdict(500.0, TICK) is None
    assert look(watchdog, 500.0, 509.0) is None
    assert look(watchdog, 509.0, 511.0) is not None


def test_the_first_restart_is_at_once_and_pauses_double_up_to_the_longest_and_start_afresh_after_a_step() -> None:
    backoff = Backoff(budget=9)
    assert [backoff.failed() for _ in range(9)] == [0, 0.5, 1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE]
    assert backoff.failed() is None
    backoff.settled()
    assert backoff.failed() == 0


def test_a_budget_of_none_gives_up_at_once() -> None:
    assert Backoff(budget=0).failed() is None
