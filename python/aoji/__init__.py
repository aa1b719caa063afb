"""Inference of Llama-like language models on one GPU or a CPU, made for low latency.

    engine = aoji.Engine("demo")
    for piece in engine.chat("넌 누구니?"):
        print(piece, end="", flush=True)
"""
from ._aoji import (
    Answer,
    AojiError,
    ContextError,
    CudaError,
    DeviceMemoryError,
    Engine,
    FileError,
    Generation,
    InputError,
    NoGpuError,
    NoModelError,
    Score,
    Session,
    UnsupportedError,
    __version__,
)

__all__ = [
    "Answer",
    "AojiError",
    "ContextError",
    "CudaError",
    "DeviceMemoryError",
    "Engine",
    "FileError",
    "Generation",
    "InputError",
    "NoGpuError",
    "NoModelError",
    "Score",
    "Session",
    "UnsupportedError",
    "__version__",
]
