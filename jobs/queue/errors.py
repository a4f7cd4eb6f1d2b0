"""The errors of the queue."""

from cluster.errors import Conflict, ForgearrError, NotFound, UnprocessableRequest
from jobs.states import State
from jobs.tables import Job


class JobNotFound(NotFound):
    """There is no such job."""

    code = "JOB_NOT_FOUND"


class JobStateConflict(Conflict):
    """The job is in a state that does not allow this."""

    code = "JOB_STATE_CONFLICT"


class IdempotencyConflict(Conflict):
    """This Idempotency-Key was used for another request."""

    code = "IDEMPOTENCY_KEY_REUSED"


class UnknownDependency(UnprocessableRequest):
    """A job named in depends_on does not exist."""

    code = "UNKNOWN_DEPENDENCY"


class ChildFailed(ForgearrError):
    """A child of this job did not succeed."""

    code = "CHILD_FAILED"

    def __init__(self, child: Job) -> None:
        reason = (child.error or {}).get("message", "")
        super().__init__(f"Its child '{child.child_name}' ({child.id}) {END_TEXTS[State(child.state)]}: {reason}")


END_TEXTS = {State.SUCCEEDED: "succeeded", State.FAILED: "failed", State.CANCELLED: "was cancelled"}


def format_end(job: Job) -> str:
    return {State.CANCELLED: "been cancelled"}.get(State(job.state), job.state)
