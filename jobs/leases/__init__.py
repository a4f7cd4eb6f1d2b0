"""The leadership of the dispatcher, the leases of workers, and the writes that need a valid lease."""

from jobs.leases.acquire import Capacity, claim_jobs, next_wakeup
from jobs.leases.claim import OWN_WORKER, Claim
from jobs.leases.leadership import LeadershipLost, renew_leadership, take_leadership
from jobs.leases.losses import release_expired_jobs, release_lost_jobs
from jobs.leases.outcomes import (
    GuardedWrite,
    apply_writes,
    cancelled_values,
    cleared_values,
    failure_values,
    park,
    parked_values,
    paused_values,
    released_values,
    succeeded_values,
)
from jobs.leases.renewal import renew, running_jobs_by_worker
from jobs.leases.watch import LeaseWatch

__all__ = [
    "OWN_WORKER",
    "Capacity",
    "Claim",
    "GuardedWrite",
    "LeadershipLost",
    "LeaseWatch",
    "apply_writes",
    "cancelled_values",
    "claim_jobs",
    "cleared_values",
    "failure_values",
    "next_wakeup",
    "park",
    "parked_values",
    "paused_values",
    "release_expired_jobs",
    "release_lost_jobs",
    "released_values",
    "renew",
    "renew_leadership",
    "running_jobs_by_worker",
    "succeeded_values",
    "take_leadership",
]
