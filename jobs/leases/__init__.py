"""The leadership of the dispatcher, the leases of workers, and the writes that need a valid lease."""

from jobs.leases.acquire import Capacity, claim_jobs, next_wakeup
from jobs.leases.claim import OWN_WORKER, Claim
from jobs.leases.leadership import LeadershipLost, renew_leadership, take_leadership
from jobs.leases.outcomes import (
    GuardedWrite,
    apply_writes,
    cancelled_values,
    failure_values,
    park,
    parked_values,
    paused_values,
    succeeded_values,
)
from jobs.leases.renewal import release_lost_jobs, renew, running_jobs_by_worker

__all__ = [
    "OWN_WORKER",
    "Capacity",
    "Claim",
    "GuardedWrite",
    "LeadershipLost",
    "apply_writes",
    "cancelled_values",
    "claim_jobs",
    "failure_values",
    "next_wakeup",
    "park",
    "parked_values",
    "paused_values",
    "release_lost_jobs",
    "renew",
    "renew_leadership",
    "running_jobs_by_worker",
    "succeeded_values",
    "take_leadership",
]
