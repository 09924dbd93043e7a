"""What a backend cannot take though it works: another one can."""

from __future__ import annotations

from ..errors import BackendError


class TooManyModelsError(BackendError):
    """More models than its kernels take at once. Raised before anything is written; "auto" takes the next backend."""
