"""A stand-in for CUDA graphs: what a function does is noted operator by operator, and done again without the function.

As in a graph, numbers that Python worked out stay what they were, tensors stay where they are, and nothing may wait for the
device to know a number.
"""

import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves


def _leaves(result):
    return [leaf for leaf in tree_leaves(result) if leaf is not None]


class Recording(TorchDispatchMode):
    """Notes what happens inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self._done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.note(functools.partial(function, *args, **(kwargs or {})))

    def note(self, operation):
        result = operation()
        assert all(isinstance(x, torch.Tensor) for x in _leaves(result)), f"{operation.func} tells the host a number"
        self._done.append((operation, _leaves(result)))
        return result

    def replay(self) -> None:
        for operation, results in self._done:
            for kept, new in zip(results, _leaves(operation()), strict=True):
                if kept.data_ptr() != new.data_ptr():  # else it is a view, or was worked on in place
                    kept.copy_(new)


def capture(function):
    """What CudaCapture does with it."""
    function()
    with Recording() as recording:
        outputs = function()

    def replay():
        recording.replay()
        return outputs

    return replay


def kernel(function):
    """One operation for a recording, whatever it does inside."""

    @functools.wraps(function)
    def recorded(*args, **kwargs):
        recording = _get_current_dispatch_mode()
        if not isinstance(recording, Recording):
            return function(*args, **kwargs)
        with _disable_current_modes():
            return recording.note(functools.partial(function, *args, **kwargs))

    return recorded
