"""The version of densezoo."""

__version__ = "0.1.0"
