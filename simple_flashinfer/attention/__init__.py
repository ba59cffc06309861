"""Appending K/V to pages, and attending to them: one interface, one backend a file."""

from simple_flashinfer.attention.base import AttentionBackend, AttentionLayer, AttentionMetadata, UnsupportedLayerError

__all__ = ["AttentionBackend", "AttentionLayer", "AttentionMetadata", "UnsupportedLayerError", "backend_class"]


def backend_class(name: str) -> type[AttentionBackend]:
    """`flashinfer`, `cpu` or `sdpa`. Raises ImportError, saying what to install, when the backend's library is missing."""
    if name == "flashinfer":
        from simple_flashinfer.attention.flashinfer import FlashInferBackend
        from simple_flashinfer.kernels.flashinfer import library

        library()
        return FlashInferBackend
    if name == "cpu":
        from simple_flashinfer.attention.cpu import CpuBackend

        return CpuBackend
    from simple_flashinfer.attention.sdpa import SdpaBackend

    return SdpaBackend
