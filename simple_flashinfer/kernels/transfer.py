"""Arrays on their way from the host to a device."""

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for: through pinned memory, which torch keeps until the device has read it.

    On the CPU it is the array's own memory.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def indices(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64, as embeddings and indexing want it; a copy also on the CPU."""
    return to_device(array.astype(np.int64), device)
