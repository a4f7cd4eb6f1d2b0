"""The queue: enqueue jobs, control them, and wake the dispatcher."""

from jobs.queue.control import cancel, cancel_all, pause, resume, retry
from jobs.queue.dependencies import finish_waiting_jobs, release_dependents
from jobs.queue.enqueue import check_request, enqueue, enqueue_child, enqueue_many, new_job_id, rejected_job
from jobs.queue.errors import ChildFailed, IdempotencyConflict, JobNotFound, JobStateConflict, UnknownDependency
from jobs.queue.requests import MAX_DEPENDENCIES, JobRequest
from jobs.queue.rows import count_unfinished, get, lock_jobs
from jobs.queue.wakeup import DISPATCHER, wake_dispatcher, wake_dispatcher_on_commit

__all__ = [
    "DISPATCHER",
    "MAX_DEPENDENCIES",
    "ChildFailed",
    "IdempotencyConflict",
    "JobNotFound",
    "JobRequest",
    "JobStateConflict",
    "UnknownDependency",
    "cancel",
    "cancel_all",
    "check_request",
    "count_unfinished",
    "enqueue",
    "enqueue_child",
    "enqueue_many",
    "finish_waiting_jobs",
    "get",
    "lock_jobs",
    "new_job_id",
    "pause",
    "rejected_job",
    "release_dependents",
    "resume",
    "retry",
    "wake_dispatcher",
    "wake_dispatcher_on_commit",
]
