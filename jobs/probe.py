"""The kind `probe`: a job that does nothing useful, for tests and measurements of the queue."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import ForgearrError
from jobs.context import Context
from jobs.registry import job


class ProbeSpec(BaseModel):
    model_config = ConfigDict(extra="forbid")

    payload: Any = Field(default=None, description="Returned unchanged.")
    seconds: float = Field(default=0, ge=0, le=86_400, description="Duration of all steps together.")
    steps: int = Field(default=1, ge=0, le=1000, description="Number of steps. Each is reported and checkpointed.")
    fail_times: int = Field(default=0, ge=0, le=100, description="Number of attempts that fail after their first step.")
    memory_mb: int = Field(default=0, ge=0, le=1_000_000, description="Memory to allocate while it runs.")


MAX_USER_SECONDS = 60.0
"""How long a probe of a user may take: it occupies a slot for a job that does something."""


class ProbeFailed(ForgearrError):
    """The probe failed, as its spec requires."""

    code = "PROBE_FAILED"
    retryable = True


def _admin_choice(spec: ProbeSpec) -> str | None:
    if spec.memory_mb > 0:  # it is not accounted for, so other jobs may lack it
        return "memory_mb above 0"
    return f"seconds above {MAX_USER_SECONDS:g}" if spec.seconds > MAX_USER_SECONDS else None


@job("probe", spec=ProbeSpec, admin_only=_admin_choice)
def probe(context: Context, spec: ProbeSpec) -> dict[str, Any]:
    """Runs steps without effect, and returns its payload and the steps that it executed."""
    ballast = bytearray(spec.memory_mb * 1024 * 1024)
    ballast[::4096] = b"\1" * len(ballast[::4096])  # touched, so that the pages are really allocated
    executed: list[int] = list(context.checkpoint_state or [])
    for step in range(len(executed), spec.steps):
        context.sleep(spec.seconds / spec.steps)
        executed.append(step)
        context.report(progress=100 * (step + 1) / spec.steps, phase=f"step {step + 1} of {spec.steps}", step=step)
        context.checkpoint(executed)
        if context.attempt <= spec.fail_times:
            break
    if context.attempt <= spec.fail_times:
        raise ProbeFailed(f"Attempt {context.attempt} failed, as the first {spec.fail_times} have to.")
    return {"payload": spec.payload, "executed": executed}
