"""Low-latency inference of Llama-architecture language models.

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
