"""Logits in, tokens and log-probabilities out."""

from simple_flashinfer.sampling.logprobs import gather_logprobs
from simple_flashinfer.sampling.sampler import SamplingBatch, likeliest, sample

__all__ = ["SamplingBatch", "gather_logprobs", "likeliest", "sample"]
