from __future__ import annotations

import random

from server.worker.blame import STRIKES, Blame

KILLER = 7


def test_who_was_not_there_gets_no_strike() -> None:
    blame = Blame()
    for _ in range(STRIKES + 1):
        assert blame.died([], alone=False).struck == frozenset()
        assert blame.died([1], alone=False).struck == {1}
    assert blame.suspects(1)
    assert not blame.suspects(2)


def test_a_token_clears_all_strikes() -> None:
    blame = Blame()
    for _ in range(10):
        blame.died([1, 2], alone=False)
        blame.forget(1)
    assert not blame.suspects(1)
    assert blame.suspects(2)


def test_only_a_suspect_that_was_alone_is_guilty() -> None:
    blame = Blame()
    assert blame.died([1], alone=True).guilty is None
    assert blame.died([1], alone=True).guilty is None
    assert blame.died([1], alone=False).guilty is None
    verdict = blame.died([1], alone=True)
    assert verdict.guilty == 1
    assert verdict.struck == {1}
    assert not blame.suspects(1), "what is ended leaves nothing behind"


def test_whatever_the_steps_are_only_the_killer_is_found_guilty() -> None:
    """Random steps over ten items, of which one kills every step that it is in; suspects run alone."""
    for seed in range(200):
        chance = random.Random(seed)
        blame, items, deaths = Blame(), set(range(10)), 0
        while KILLER in items:
            suspects = [item for item in sorted(items) if blame.suspects(item)]
            others = sorted(items - set(suspects))
            alone = suspects[:1] if suspects and (not others or chance.random() < 0.5) else []
            step = alone or chance.sample(others, chance.randint(1, len(others)))
            if KILLER not in step:
                for item in step:
                    blame.forget(item)
                continue
            deaths += 1
            guilty = blame.died(step, alone=len(step) == 1).guilty
            assert guilty in (None, KILLER)
            items = {item for item in items if item != guilty}
        assert deaths == STRIKES + 1
