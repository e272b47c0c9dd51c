"""The command line: `tenora serve`, and the commands that speak to a server over HTTP."""

from tenora.cli.app import main

__all__ = ["main"]
