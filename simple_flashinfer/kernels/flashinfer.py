"""The only file that imports flashinfer, and only when it is asked to."""

import importlib.util
import os
from typing import Any


def library() -> Any:
    """The package. Raises ImportError, saying what to install, where it is missing."""
    if importlib.util.find_spec("flashinfer") is None:
        raise ImportError(
            "FlashInfer's kernels need the package flashinfer-python; install it with: pip install 'simple-flashinfer[cuda]'"
        )
    # norms have a second implementation, in packages that flashinfer can do without: one code path everywhere
    os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
    import flashinfer

    return flashinfer
