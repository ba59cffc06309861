"""Logits in, tokens out."""

from simple_flashinfer.sampling.sampler import SamplingBatch, sample

__all__ = ["SamplingBatch", "sample"]
