"""The version of Forgearr."""

from importlib.metadata import version

VERSION = version("forgearr")
