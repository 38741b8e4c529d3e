"""Time and peak memory of a call, in the process it runs in."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch

from hrldm.train.device import device


def measure(step: Callable[[], object], repeats: int, warm_up: int = 2) -> dict:
    """Median seconds of a call, and by how many MB memory grew at most (in calls of their own: watching takes time)."""
    with PeakMemory() as peak:
        for _ in range(max(warm_up, 1)):
            started = time.perf_counter()
            step()
            _wait()
            first = time.perf_counter() - started
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        _wait()
        times.append(time.perf_counter() - started)
    return {"time_s": float(np.median(times)) if times else first, "peak_mb": peak.mb, "device": device()}


class PeakMemory:
    """By how much this process's resident memory (or the GPU's allocated memory) rises above that on entry, in MB."""

    def __enter__(self) -> PeakMemory:
        self._gpu, self._done = device() == "cuda", threading.Event()
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
        else:
            _give_back()
            self._process = psutil.Process()
            self._base = self._top = self._process.memory_info().rss
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.0005):
            self._top = max(self._top, self._process.memory_info().rss)

    def __exit__(self, *_) -> None:
        self._done.set()
        if self._gpu:
            self._top = torch.cuda.max_memory_allocated()
        else:
            self._thread.join()
        self.mb = (self._top - self._base) / 2**20


def _give_back() -> None:
    """Hand memory that the allocator keeps back to the system (glibc), or what comes next would seem to need none."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _wait() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()
