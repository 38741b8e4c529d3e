"""Time and peak memory of a call, in the process it runs in."""

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

    def seconds() -> float:
        started = time.perf_counter()
        step()
        if device() == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    warm: list[float] = []
    peak = peak_memory_mb(lambda: warm.extend(seconds() for _ in range(max(warm_up, 1))))
    times = [seconds() for _ in range(repeats)] or warm[-1:]
    return {"time_s": float(np.median(times)), "peak_mb": peak, "device": device()}


def peak_memory_mb(call: Callable[[], object]) -> float:
    """By how many MB this process's resident memory (or the GPU's allocated memory) rises at most during a call."""
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - base) / 2**20
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # or what comes next would seem to need none (glibc)
        ctypes.CDLL(None).malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(0.0005):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return (max(seen) - seen[0]) / 2**20
