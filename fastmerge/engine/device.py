"""Where a merge computes: the host, or a GPU with streams of its own for copies.

The executor says what is to be done, in three lanes, and which of it must wait for what: inputs come up in one lane,
everything is computed in another, and results come down in the third. What is told to one lane is done in that order;
between lanes there is no order but that of a `wait` for a `record`. On the host everything is done when it is told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any, Literal, Protocol, TypeVar

import torch

from fastmerge import backends
from fastmerge.engine.buffers import Event, Memory, Range, TensorMemory
from fastmerge.errors import ArgumentError, BackendError, FastmergeError, MergeError

Lane = Literal["up", "compute", "down"]
UP: Lane = "up"
COMPUTE: Lane = "compute"
DOWN: Lane = "down"

GPU_MEMORY_SHARE = 0.8
"""Of what is free on a GPU, the part that a merge may take if it is not told otherwise."""

_OF_A_GPU = re.compile(r"\b(CUDA|HIP|cuda runtime|NVML)\b")

T = TypeVar("T")


class Device(Protocol):
    """What the executor needs of the place where a merge computes."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def place(self) -> torch.device:
        """Where chunks are merged."""

    @property
    def stages(self) -> bool:
        """Whether inputs of the host's memory must be brought there."""

    def free_bytes(self) -> int:
        """Bytes of its memory that could be allocated now."""

    def memory(self, nbytes: int) -> Memory:
        """Memory of the device, that has what is in it of before; the compute lane may use it at once."""

    def pinned(self, nbytes: int) -> Memory:
        """Memory of the host that copies in lanes can reach."""

    def copy(self, lane: Lane, target: Range, source: Range) -> None:
        """Copy bytes between pinned and device memory."""

    def record(self, lane: Lane) -> Event:
        """All that the lane has been told so far."""

    def wait(self, lane: Lane, event: Event) -> None:
        """What the lane is told from now on is done after what the event stands for."""

    def run(self, work: Callable[[], Any], reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """Do this in the compute lane. reads, writes: tensors in the device's memory."""

    def fetch(self, work: Callable[[], T]) -> T:
        """Do this in the compute lane, and return what it returns: the one place where the merge waits for a device."""

    def working(self, lane: Lane) -> AbstractContextManager[Any]:
        """What the thread does with torch while it is entered belongs to this lane."""

    def keep(self, tensor: torch.Tensor) -> None:
        """The compute lane may read a tensor that was made in the lane for copies up, if it is on the device."""

    def close(self, *, failed: bool) -> None:
        """Wait until everything is done. After a failure, whatever goes wrong here is of no interest."""

    def explain(self, error: BaseException) -> MergeError | None:
        """What a person should be told of an error that is the device's; None for others."""


class HostDevice:
    """The host. Nothing is copied and nothing waits."""

    name = "cpu"
    place = torch.device("cpu")
    stages = False

    def run(self, work: Callable[[], Any], reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """At once."""
        work()

    def fetch(self, work: Callable[[], T]) -> T:
        """At once."""
        return work()

    def working(self, lane: Lane) -> AbstractContextManager[Any]:
        """As everywhere."""
        return nullcontext()

    def keep(self, tensor: torch.Tensor) -> None:
        """It stays while somebody refers to it."""

    def close(self, *, failed: bool) -> None:
        """Everything is done."""

    def explain(self, error: BaseException) -> None:
        """Nothing goes wrong here."""
        return None

    def _none(self, *arguments: Any) -> Any:
        raise AssertionError("nothing is staged on the host")

    memory = pinned = copy = record = wait = free_bytes = _none


class CudaDevice:
    """A GPU. The compute lane is the caller's current stream, so that what he did before comes before."""

    stages = True

    def __init__(self, place: torch.device) -> None:
        """place: with its index."""
        self.name = str(place)
        self.place = place
        self._streams = {
            UP: torch.cuda.Stream(place),
            COMPUTE: torch.cuda.current_stream(place),
            DOWN: torch.cuda.Stream(place),
        }
        self.wait(UP, self.record(COMPUTE))

    def memory(self, nbytes: int) -> Memory:
        """See Device."""
        return TensorMemory(torch.empty(nbytes, dtype=torch.uint8, device=self.place))

    def pinned(self, nbytes: int) -> Memory:
        """See Device."""
        try:
            # Pinning touches the current GPU, which should be this one.
            with torch.cuda.device(self.place):
                return TensorMemory(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True))
        except RuntimeError as error:
            raise MergeError(
                f"The system pins no {nbytes >> 20} MiB of memory for copies to {self.name} "
                f"({_first_line(error)}); choose a smaller --memory-budget, or merge with --device cpu."
            ) from error

    def copy(self, lane: Lane, target: Range, source: Range) -> None:
        """See Device."""
        to, of = (one.memory.tensor(one.start, torch.uint8, one.nbytes) for one in (target, source))
        with torch.cuda.stream(self._streams[lane]):
            to.copy_(of, non_blocking=True)

    def record(self, lane: Lane) -> Event:
        """See Device."""
        # A thread that waits for a blocking event sleeps; for others it would use up a core.
        event = torch.cuda.Event(blocking=True)
        event.record(self._streams[lane])
        return event

    def wait(self, lane: Lane, event: Event) -> None:
        """See Device."""
        self._streams[lane].wait_event(event)  # type: ignore[arg-type]

    def run(self, work: Callable[[], Any], reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """See Device. Kernels are queued; the host goes on."""
        work()

    def fetch(self, work: Callable[[], T]) -> T:
        """See Device. What the work brings to the host, it waits for."""
        return work()

    def working(self, lane: Lane) -> AbstractContextManager[Any]:
        """See Device."""
        entered = ExitStack()
        entered.enter_context(torch.cuda.device(self.place))
        entered.enter_context(torch.cuda.stream(self._streams[lane]))
        return entered

    def keep(self, tensor: torch.Tensor) -> None:
        """See Device."""
        if tensor.is_cuda:
            tensor.record_stream(self._streams[COMPUTE])

    def close(self, *, failed: bool) -> None:
        """See Device."""
        for stream in self._streams.values():
            with suppress(Exception) if failed else nullcontext():
                stream.synchronize()

    def explain(self, error: BaseException) -> MergeError | None:
        """See Device."""
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return MergeError(
                f"{self.name} has too little memory left; choose a smaller --gpu-memory, end what else uses the GPU, "
                "or merge with --device cpu."
            )
        if isinstance(error, RuntimeError) and not isinstance(error, FastmergeError) and _OF_A_GPU.search(str(error)):
            return MergeError(
                f"{self.name} failed ({_first_line(error)}); see that the GPU works and try again, or merge with "
                "--device cpu."
            )
        return None

    def free_bytes(self) -> int:
        """Bytes that could be allocated now: what the GPU has left, and what torch keeps and does not use."""
        kept = torch.cuda.memory_reserved(self.place) - torch.cuda.memory_allocated(self.place)
        return torch.cuda.mem_get_info(self.place)[0] + kept


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def open_device(place: torch.device) -> Device:
    """The device at this place. Raises MergeError if it is a GPU that does not work."""
    if place.type == "cpu":
        return HostDevice()
    try:
        return CudaDevice(place)
    except RuntimeError as error:
        raise MergeError(
            f"{place} cannot be used ({_first_line(error)}); see that the GPU works, or merge with --device cpu."
        ) from error


def place_of(device: torch.device | str, backend: str | None) -> torch.device:
    """Where a merge computes, GPUs with their index.

    device: "auto" for a GPU, where the cuda or the triton backend works on one, else the CPU; or "cpu",
    "cuda", "cuda:1". Raises ArgumentError for a device that is not there.
    """
    if device == "auto":
        return _best(backend)
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise ArgumentError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:1', not {device!r}.") from None
    if place.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device {str(place)!r} is not supported; merge on a GPU ('cuda') or on the CPU ('cpu').")
    if place.type == "cpu":
        return torch.device("cpu")
    reason = no_gpu()
    if reason is None and place.index is not None and place.index >= torch.cuda.device_count():
        reason = f"there is no GPU after cuda:{torch.cuda.device_count() - 1}"
    if reason is not None:
        raise ArgumentError(f"device {str(place)!r} cannot be used: {reason}; merge on the CPU (device 'cpu').")
    return _current_gpu() if place.index is None else place


def host_backend(backend: str) -> str:
    """The backend for what stays on the host: the one that was asked for, if it works there."""
    for name in (backend, "cpu"):
        with suppress(BackendError):
            backends.resolve(name, "cpu")
            return name
    return "reference"


def no_gpu() -> str | None:
    """Why there is no GPU, or None if there is one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA"
    return "torch finds no GPU"


def _best(backend: str | None) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        module = backends.resolve(backend, "cuda")
    except BackendError:
        return torch.device("cpu")
    return _current_gpu() if backends.name_of(module) in backends.FOR_GPUS else torch.device("cpu")


def _current_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
