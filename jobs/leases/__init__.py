"""Who runs what: the leadership of the dispatcher, the leases of workers, and the guarded writes that both allow."""

from jobs.leases.acquire import Capacity, claim, outlook
from jobs.leases.claim import ALONE, Claim
from jobs.leases.leadership import LeadershipLost, keep_leadership, take_leadership
from jobs.leases.outcomes import Write, cancelled, failed, park, parked, paused, succeeded, write
from jobs.leases.renewal import held_by_workers, release_lost, renew

__all__ = [
    "ALONE",
    "Capacity",
    "Claim",
    "LeadershipLost",
    "Write",
    "cancelled",
    "claim",
    "failed",
    "held_by_workers",
    "keep_leadership",
    "outlook",
    "park",
    "parked",
    "paused",
    "release_lost",
    "renew",
    "succeeded",
    "take_leadership",
    "write",
]
