"""Tell which leases have expired, by the clock of the process that asks.

A heartbeat is a number that goes up, not a time. So the clocks of two machines need not agree, and a clock that is set
back or forward ends no lease.
"""

import math
import time
from collections.abc import Callable, Mapping

from cluster.settings import get_settings


class LeaseWatch:
    """Measures how long the heartbeats of each lease have not changed, since this process saw them first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_look = -math.inf
        self._unchanged_since: dict[tuple[str, int], float] = {}  # by token and heartbeats

    def find_expired(self, heartbeats: Mapping[str, int]) -> dict[str, int]:
        """Return the leases that have expired, of all that there are: their tokens, and the heartbeats of each."""
        # Read after the heartbeats were: a lease is never thought older than it is.
        moment, lease_seconds = self._clock(), get_settings().jobs.lease_seconds
        if moment - self._last_look > lease_seconds:
            # This process was frozen, or had no database: the holders may have had none either.
            self._unchanged_since = {}
        self._last_look = moment
        self._unchanged_since = {lease: self._unchanged_since.get(lease, moment) for lease in heartbeats.items()}
        return dict(lease for lease, since in self._unchanged_since.items() if moment - since > lease_seconds)
