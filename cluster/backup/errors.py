"""What can be wrong with a backup, or in the way of one."""

from cluster.errors import Conflict, ForgearrError, InvalidRequest, UnprocessableRequest


class BackupFailed(ForgearrError):
    """The backup could not be made."""

    code = "BACKUP_FAILED"


class BackupRunning(Conflict):
    """Another backup of this installation is being made; try again when it has finished."""

    code = "BACKUP_RUNNING"
    retryable = True


class BackupExists(Conflict):
    """There is a file already where the backup would be written."""

    code = "BACKUP_EXISTS"


class NoBackup(UnprocessableRequest):
    """The file is not a backup of Forgearr."""

    code = "NO_BACKUP"


class BackupDamaged(UnprocessableRequest):
    """The backup is damaged."""

    code = "BACKUP_DAMAGED"


class BackupNewer(Conflict):
    """The backup was made by a newer version of Forgearr."""

    code = "BACKUP_NEWER"


class WrongPassphrase(InvalidRequest):
    """The passphrase is not the one of this backup."""

    code = "WRONG_PASSPHRASE"


class NotEmpty(Conflict):
    """A backup is restored onto an empty installation only, so that nothing is lost."""

    code = "NOT_EMPTY"


class RestoreFailed(ForgearrError):
    """The backup could not be restored."""

    code = "RESTORE_FAILED"
