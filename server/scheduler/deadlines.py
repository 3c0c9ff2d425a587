"""When an item's tokens should be there, and how long a step may take so that they are.

The law looks one step ahead and uses device time only. Latency that includes queueing never enters it: a rule that
shrinks the batch when requests wait makes them wait longer. There is no integrator, so nothing can wind up; only the
step-time model adapts.

Deadlines follow FairBatching (arXiv 2510.14392): token j of a stream is due at its first token + j * TPOT, so a stream
that is ahead has slack, which a step may use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from server.scheduler.config import SchedulerConfig
from server.worker.wire import Item

SOFT_TTFT = 1.0
"""Seconds to the first token that items without a target are scheduled for, or, for a long prompt ..."""
SOFT_PROMPT_RATE = 4000
"""... prompt tokens a second."""
SOFT_TPOT = 0.05
SOFT_STEP = 0.03
"""Longest step beside streams without a target while prompts wait no longer than they usually do, ..."""
SOFT_DECODES = 0.2
"""... or longer, so that decodes alone are no larger share of it, up to what ``STRETCH`` gives."""
SOFT_LAG = (0.25, 4.0)
"""Seconds that a stream without a target may fall behind, at least and at most. Between them it is what the prompts of
now wait for their first tokens: whoever runs waits no longer than those who do not, and no less while a burst lasts."""
STRICT = 0.97
"""Share of the TPOT target that is aimed at: what a stream loses to one slow step it can make up for."""
IDLE_STEP = 0.25
"""Longest step while nobody decodes, so that the next arrival does not wait long."""
STEP_SHARE = 0.25
"""Share of the TTFT target that one step may take: a prompt may arrive behind two launched steps."""
WAIT_SHARE = 0.3
"""Share of what prompts wait as it is that one step may take where no stream has a target: it makes them wait little
longer, and in a burst steps are full."""
STRETCH = 2.0
"""TPOT is a mean over a stream, so one step may take this many times the target where slack allows and it saves a
first token."""
STEPS_TO_TOKEN = 3
"""Steps between a prompt and its first token where nobody is before it: two that are launched already, and its own."""
LEAST_TARGET = 1e-4
"""Shorter targets, and negative ones, count as this: out of reach, but fit to be divided by."""
BEST_EFFORT = 1.25
"""A step may take this many times its decodes alone, however late they are: prompts must not stand still."""


@dataclass(frozen=True, slots=True)
class Aim:
    """Targets of one item in seconds, and who set them."""

    ttft: float
    tpot: float
    asked_ttft: bool = False
    """By the client or the operator; otherwise it only shapes order and steps."""
    asked_tpot: bool = False
    firm: bool = False
    """It is refused where it must miss its first token."""
    timeout: float = math.inf
    """From arrival, after which the client no longer waits for the first token."""

    pace: float = field(init=False)
    """Seconds between two tokens that are aimed at."""

    def __post_init__(self) -> None:
        # Read for every stream in every plan.
        object.__setattr__(self, "pace", self.tpot * STRICT)


def aim_of(item: Item, config: SchedulerConfig) -> Aim:
    """The item's own targets, else the operator's, else built-in ones."""
    ttft = item.ttft if item.ttft is not None else config.target_ttft
    tpot = item.tpot if item.tpot is not None else config.target_tpot
    return Aim(
        ttft=max(SOFT_TTFT, item.prompt_length / SOFT_PROMPT_RATE) if ttft is None else max(LEAST_TARGET, ttft),
        tpot=SOFT_TPOT if tpot is None else max(LEAST_TARGET, tpot),
        asked_ttft=ttft is not None,
        asked_tpot=tpot is not None,
        firm=item.firm and ttft is not None,
        timeout=math.inf if item.timeout is None else item.timeout,
    )


@dataclass(slots=True)
class Outlook:
    """What the residents that decode need of the next step."""

    slack: float = math.inf
    """Least time from the step's start to the next token's deadline."""
    tpot: float = math.inf
    """Least target; of streams that may fall behind, what a single step may take."""
    ttft: float = math.inf
    """Least target that was asked for: the next arrival may have the same."""
    asked: bool = False
    """One of them has a TPOT that was asked for."""
    lag: float = SOFT_LAG[0]
    """Seconds that streams may fall behind for whose TPOT nobody asked."""
    backlog: bool = False
    """It is what prompts wait that says how long a step may take."""

    def bear(self, slack: float, wait: float, alone: float) -> None:
        """There are streams for whose TPOT nobody asked, and prompts that wait so many seconds for their first tokens.

        ``slack`` is that of these streams were they to keep the built-in pace, ``alone`` the predicted time of a step
        without prompts.
        """
        least, most = SOFT_LAG
        self.lag = min(max(wait, least), most)
        self.slack = min(self.slack, slack + self.lag)
        usual = min(max(SOFT_STEP, alone / SOFT_DECODES), SOFT_TPOT * STRETCH)
        longer = min(wait * WAIT_SHARE, IDLE_STEP)
        self.backlog = usual < longer < self.tpot
        self.tpot = min(self.tpot, max(usual, longer))

    def seconds(self, alone: float, overhead: float, safety: float, tight: bool) -> tuple[float, str]:
        """Longest that the next step should take, and what sets it.

        ``alone`` is the predicted time of its decodes, ``overhead`` the part of it that any step costs, ``safety`` the
        factor by which predictions may be wrong; ``tight`` tells that some first token will be late at the usual pace.
        """
        ceiling = self._ceiling(alone, overhead)
        if self.tpot == math.inf:
            return ceiling, "idle"
        usual = self.tpot / safety
        slack = self.slack / safety
        least = alone * BEST_EFFORT
        if slack < usual:
            return (slack, "slack") if slack > least else (least, "behind")
        if tight and slack > usual:
            return max(least, min(slack, STRETCH * usual, ceiling)), "stretch"
        pace = min(usual, ceiling)
        return (pace, "backlog" if self.backlog else "pace") if pace > least else (least, "behind")

    def usual(self, alone: float, overhead: float, safety: float) -> float:
        """What ``seconds`` gives where nobody is late."""
        return min(self._ceiling(alone, overhead), self.tpot / safety)

    def _ceiling(self, alone: float, overhead: float) -> float:
        return min(IDLE_STEP, self.ttft * STEP_SHARE, self._balanced(alone, overhead))

    def _balanced(self, alone: float, overhead: float) -> float:
        """The step in which what short steps waste and what long ones make first tokens wait are equal.

        Of each step its ``overhead`` is lost, and of its decodes part is: they could have been put off. A first token
        waits for several steps, which is lost to the time that its prompt has.
        """
        return math.sqrt((alone + overhead) / 2 * self.ttft / STEPS_TO_TOKEN)
