"""A SchedulerOutput in, tokens out: loading any HF causal LM, and running it over a paged KV cache."""
