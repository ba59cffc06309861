"""From a prompt and sampling parameters to an EngineRequest with nothing left open."""

import itertools
import random
from collections.abc import Sequence

import numpy as np

from simple_flashinfer.types import EngineInfo, EngineRequest, SamplingParams


class ContextLengthError(ValueError):
    """Prompt and output do not fit into the context."""

    def __init__(self, limit: int, num_prompt_tokens: int, max_tokens: int | None) -> None:
        if max_tokens is None:
            asked = f"the prompt has {num_prompt_tokens} tokens, which leaves no room for an answer"
        else:
            asked = (
                f"{num_prompt_tokens + max_tokens} tokens were asked for: "
                f"{num_prompt_tokens} in the prompt and {max_tokens} for the answer"
            )
        super().__init__(f"The context of this model is {limit} tokens, but {asked}. Make one of them shorter.")


class RequestFactory:
    """Checks against the engine's limits, and settles max_tokens, seed and the tokens that end the output."""

    def __init__(self, info: EngineInfo, seed: int, eos_token_id: int | None = None, name: str = "") -> None:
        """eos_token_id: the tokenizer's, which not every model's config repeats. name: of one among several for one engine;
        what they make has different ids, and different seeds where none is asked for.
        """
        self._info = info
        self._name = name
        self._eos_token_ids = info.eos_token_ids + (() if eos_token_id is None else (eos_token_id,))
        self._random = random.Random(f"{name}{seed}" if name else seed)
        self._counter = itertools.count()

    def make(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, bad_token_ids: tuple[tuple[int, ...], ...] = ()
    ) -> EngineRequest:
        """Raises ContextLengthError when it can't fit, ValueError for tokens that the model does not have.

        bad_token_ids: params.bad_words in tokens.
        """
        info, num_prompt = self._info, len(prompt_token_ids)
        if num_prompt == 0:
            raise ValueError("the prompt is empty: it has no tokens")
        room = info.max_model_len - num_prompt
        if room < (params.max_tokens or 1):
            raise ContextLengthError(info.max_model_len, num_prompt, params.max_tokens)
        if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= info.vocab_size:
            raise ValueError(f"the prompt has token ids outside of 0 to {info.vocab_size - 1}")
        for name, ids in (
            ("logit_bias", [i for i, _ in params.logit_bias]),
            ("allowed_token_ids", params.allowed_token_ids),
        ):
            if ids and (min(ids) < 0 or max(ids) >= info.vocab_size):
                raise ValueError(f"{name} has token ids outside of 0 to {info.vocab_size - 1}")
        stops = params.stop_token_ids + (() if params.ignore_eos else self._eos_token_ids)
        return EngineRequest(
            request_id=f"{self._name}{next(self._counter)}",
            prompt_token_ids=np.asarray(prompt_token_ids, np.int32),
            params=params,
            max_tokens=params.max_tokens if params.max_tokens is not None else room,
            seed=params.seed if params.seed is not None else self._random.getrandbits(64),
            stop_token_ids=tuple(dict.fromkeys(stops)),
            bad_token_ids=bad_token_ids,
        )
