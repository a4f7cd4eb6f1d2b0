"""The errors of reading a git repository."""

from cluster.errors import ForgearrError, InvalidRequest, NotFound


class NotARepository(InvalidRequest):
    """This is not a git repository."""

    code = "NOT_A_REPOSITORY"


class RepositoryUnreadable(InvalidRequest):
    """The repository may not be read by the account that Forgearr runs as."""

    code = "REPOSITORY_UNREADABLE"


class CommitNotFound(NotFound):
    """The repository has no such commit."""

    code = "COMMIT_NOT_FOUND"


class RepositoryDamaged(ForgearrError):
    """Git cannot read an object of this repository."""

    code = "REPOSITORY_DAMAGED"
