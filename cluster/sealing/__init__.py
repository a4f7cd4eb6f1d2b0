"""Sealed secrets: the columns that have them, those that cannot be opened, and the change of their key."""

from cluster.sealing.columns import SealedSecret, contains_secrets, find_unreadable
from cluster.sealing.rotation import rotate_sealing_key

__all__ = ["SealedSecret", "contains_secrets", "find_unreadable", "rotate_sealing_key"]
