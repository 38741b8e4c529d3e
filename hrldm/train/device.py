"""Where networks run, in which precision, and whether the same seed gives the same bits.

On a CPU it does, on one machine with a fixed number of threads. On a GPU, the order of sums varies unless
`HRLDM_DETERMINISTIC=1` is set, as in the tests; that costs speed.
"""

import os
from collections.abc import Callable, Sequence

import psutil
import torch
from torch import Tensor, nn

if os.environ.get("HRLDM_DETERMINISTIC") == "1" and torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at its first call
    torch.use_deterministic_algorithms(True, warn_only=True)  # operations without a deterministic form only warn
    torch.backends.cudnn.benchmark = False

DTYPES = {"no": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}  # by `mixed_precision`; no: not used


def device() -> str:
    """`cuda` if available, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory_mb() -> float:
    """Free memory of the device that networks run on, in MB."""
    free = torch.cuda.mem_get_info()[0] if device() == "cuda" else psutil.virtual_memory().available
    return free / 2**20


def autocast(precision: str, kind: str) -> torch.autocast:
    """Mixed precision (no, bf16, fp16) on device type `kind`. A CPU always uses full precision, since bf16 is slower
    there: without bf16 instructions it takes 20 times as long (a step of the paper profile: 16 minutes), and on two
    cores with `avx512_bf16` a convolution of the released network was measured at 161 GFLOP/s in bf16 against 222 in
    float32.

    Not accelerate's autocast: it keeps one precision per process, and a notebook may open profiles with two.

    Raises:
        ValueError: unknown setting.
    """
    if precision not in DTYPES:
        raise ValueError(f"unknown mixed_precision {precision!r}; choose one of {', '.join(DTYPES)}")
    mixed = precision != "no" and kind == "cuda"
    # cached casts would break CUDA graphs
    return torch.autocast(kind, DTYPES[precision], enabled=mixed, cache_enabled=False)


def grad_scaler(precision: str, kind: str) -> torch.amp.GradScaler:
    """Scales losses where gradients could underflow, in fp16 on a GPU, and skips the steps that overflow; else it does nothing."""
    return torch.amp.GradScaler(kind, enabled=precision == "fp16" and kind == "cuda")


class _OneShape(nn.Module):
    """A wrapper around a network, since capturing replaces `forward`."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, *inputs: Tensor) -> Tensor:
        with autocast(self.precision, "cuda"):
            return self.model(*inputs)


def graphed(model: nn.Module, examples: Sequence[tuple[Tensor, ...]], precision: str) -> Callable[..., Tensor]:
    """The network, forward and backward, as one CUDA graph per example shape: a step is then one launch instead of some
    thousand from Python, which take longer than their arithmetic.

    examples: inputs, distinguished by the shape of the first
    """
    searched = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:  # few shapes, many steps: worth the search for the fastest kernels
        graphs = {
            x[0].shape: torch.cuda.make_graphed_callables(_OneShape(model, precision), x, allow_unused_input=True)
            for x in examples
        }
    finally:
        torch.backends.cudnn.benchmark = searched
    return lambda *inputs: graphs[inputs[0].shape](*inputs)
