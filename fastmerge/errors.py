"""Every error that fastmerge raises on purpose. Each message is a sentence that names the culprit and the fix."""

from __future__ import annotations


class FastmergeError(Exception):
    """The root of all errors that fastmerge raises on purpose."""


class ArgumentError(FastmergeError, ValueError):
    """An argument has a value that the function cannot work with."""


class ArgumentTypeError(FastmergeError, TypeError):
    """An argument has a type or dtype that the function cannot work with."""


class BackendError(FastmergeError, RuntimeError):
    """A backend that was asked for is missing or broken here."""


class ConfigError(FastmergeError, ValueError):
    """The merge configuration is wrong. Nothing has been read (exit code 2)."""


class CheckpointError(FastmergeError, ValueError):
    """A checkpoint cannot be merged as it stands. No tensor has been read (exit code 2)."""


class MergeError(FastmergeError, RuntimeError):
    """The merge failed while running; nothing half-written is left behind (exit code 1)."""


class EvaluationError(MergeError):
    """A search was stopped because its evaluator failed again and again; what it had found is kept in its history."""


class PeerError(FastmergeError, RuntimeError):
    """A tool that fastmerge plugs into is missing here, or is not one that it knows."""
