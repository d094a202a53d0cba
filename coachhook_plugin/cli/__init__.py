"""The command line: `coachhook --help`."""

from .main import main

__all__ = ["main"]
