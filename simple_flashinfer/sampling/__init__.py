"""Logits in, tokens and log-probabilities out."""

from simple_flashinfer.sampling.logprobs import gather_logprobs
from simple_flashinfer.sampling.sampler import FilterProbs, Likeliest, SamplingBatch, likeliest, sample

__all__ = ["FilterProbs", "Likeliest", "SamplingBatch", "gather_logprobs", "likeliest", "sample"]
