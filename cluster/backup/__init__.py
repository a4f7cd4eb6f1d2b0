"""Backups: an installation in one file, made while it runs, and restored onto an empty machine."""

from cluster.backup.create import BackupResult, create
from cluster.backup.names import remove_old
from cluster.backup.restore import RestoreResult, restore
from cluster.backup.snapshot import remove_leftovers

__all__ = ["BackupResult", "RestoreResult", "create", "remove_leftovers", "remove_old", "restore"]
