"""A request on its way through the scheduler."""

import hashlib
from dataclasses import dataclass, field

from simple_flashinfer.types import EngineRequest, Int32Array, TokenLogprobs

NO_ROW = -1
PageKey = tuple[bytes, bytes]


@dataclass(slots=True, eq=False)
class Request:
    """Waiting: `token_ids` has its prompt and what it generated before it was preempted, and `row` is NO_ROW.

    Running: its tokens and pages stand in row `row` of the RequestTable, and nowhere else.
    """

    spec: EngineRequest
    token_ids: Int32Array
    arrival: int = 0
    row: int = NO_ROW
    num_cached_tokens: int | None = None  # found in the cache when it first ran
    keys: list[PageKey] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of tokens 1, 2, ... of the prompt
    _chain: bytes = b""  # digest of all tokens that `keys` covers

    @property
    def id(self) -> str:
        return self.spec.request_id

    @property
    def order(self) -> tuple[int, int]:
        """The smallest goes first, and is preempted last."""
        return self.spec.params.priority, self.arrival

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Some of them are still to come."""
        wanted = self.spec.params.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < len(self.spec.prompt_token_ids) - 1

    @property
    def max_total_tokens(self) -> int:
        return len(self.spec.prompt_token_ids) + self.spec.max_tokens

    def page_key(self, index: int, tokens: Int32Array) -> PageKey:
        """What names the content of this request's index-th page: its tokens, and a digest of all tokens before them.

        Equal keys have equal tokens, compared one by one, after a beginning with an equal 128-bit digest. Keys are made once
        and in order: `tokens`, those of the page, are only read for the first one that is not there yet.
        """
        if index == len(self.keys):
            content = tokens.tobytes()
            self.keys.append((self._chain, content))
            self._chain = hashlib.blake2b(self._chain + content, digest_size=16).digest()
        return self.keys[index]
