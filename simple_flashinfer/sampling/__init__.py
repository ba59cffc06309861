"""Logits in, tokens and log-probabilities out."""

from simple_flashinfer.sampling.logprobs import gather_logprobs
from simple_flashinfer.sampling.sampler import Draw, FilterProbs, SamplingBatch, likeliest, sample

__all__ = ["Draw", "FilterProbs", "SamplingBatch", "gather_logprobs", "likeliest", "sample"]
