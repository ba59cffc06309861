"""Messages that cross a layer. Plain data: this module imports nothing of the project and no torch.

Sizes in the comments: R scheduled requests, T scheduled tokens, S sampled tokens, all of one step.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context is used up
    ABORT = "abort"  # the client left
    ERROR = "error"


# They are looked at for each token, some of them for the whole batch: what one request brings must not slow others down.
MAX_STOP_STRINGS, MAX_STOP_LENGTH, MAX_STOP_TOKENS = 32, 256, 128
MAX_LOGPROBS, MAX_LOGIT_BIAS, MAX_BAD_WORDS, MAX_ALLOWED_TOKENS = 20, 1024, 128, 65536

# What a grammar may cost, by llguidance's names: the same when it is checked as when it runs. States take 1 to 2 KiB each.
GRAMMAR_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,  # while it is compiled; 50,000 a ms
    "max_grammar_size": 200_000,
    "max_lexer_states": 50_000,
    "step_lexer_fuel": 200_000,  # for one mask; 14,000 a ms
    "step_max_items": 50_000,
    "verbose_errors": False,
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw the tokens of one request. Each default asks for nothing, but temperature 1.

    Attributes:
        max_tokens: most tokens to generate; None is all that the context has room for.
        temperature: 0 is greedy, exactly.
        top_p, top_k, min_p, typical_p: 0 is off (so is top_p 1, typical_p 1 and top_k -1).
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output (HF); 1 is off.
        presence_penalty, frequency_penalty: subtracted once, or once per occurrence, for tokens in the output (OpenAI).
        seed: the same seed gives the same tokens, whatever else is in the batch; None draws one.
        stop: strings that end the text, and are not part of it.
        stop_token_ids: tokens that end the output, beside the model's own end-of-sequence tokens.
        ignore_eos: go on after end-of-sequence tokens (stop_token_ids still stop).
        include_stop_str_in_output: the text ends with the stop string, or the stop token's text, that ended it.
        min_tokens: so many tokens come before anything may stop the output, unless a grammar has nothing more to say.
        skip_special_tokens: the text leaves out what the tokenizer calls special.
        logit_bias: (token id, number added to its logit).
        allowed_token_ids: no others are drawn; empty allows all.
        bad_words: texts that the output shall not contain, as far as single tokens can tell.
        logprobs: how many of the likeliest tokens to report with each drawn one; None: nothing, 0: the drawn one.
        prompt_logprobs: the same for the prompt's tokens.
        grammar: what the output must be, in the form that the grammar library reads; empty is anything.
        priority: smaller numbers leave the queue first.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also refuses NaN
                raise ValueError(f"{name} must be between {low:g} and {high:g}, not {value}")
        if any(not text for text in self.stop):
            raise ValueError("stop must not contain an empty string")
        if len(self.stop) > MAX_STOP_STRINGS or any(len(text) > MAX_STOP_LENGTH for text in self.stop):
            raise ValueError(f"stop may have {MAX_STOP_STRINGS} strings of {MAX_STOP_LENGTH} characters at most")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise ValueError(f"stop_token_ids may have {MAX_STOP_TOKENS} entries at most, not {len(self.stop_token_ids)}")
        if any(not 0 <= token < 2**31 for token in self.stop_token_ids):
            raise ValueError("stop_token_ids must be token ids, 0 or greater")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must not be greater than max_tokens: {self.min_tokens} and {self.max_tokens}")
        for name, most in _LENGTHS:
            if len(getattr(self, name)) > most:
                raise ValueError(f"{name} may have {most} entries at most, not {len(getattr(self, name))}")
        if any(not -100 <= bias <= 100 for _, bias in self.logit_bias):
            raise ValueError("logit_bias must have values between -100 and 100")
        if any(not word.strip() or len(word) > MAX_STOP_LENGTH for word in self.bad_words):
            raise ValueError(f"bad_words must be texts of 1 to {MAX_STOP_LENGTH} characters")


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 1, 2**31 - 1),
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("top_k", -1, 2**31 - 1),
    ("min_p", 0, 1),
    ("typical_p", 0, 1),
    ("repetition_penalty", 0.01, 100),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("seed", -(2**63), 2**64 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("priority", -(2**31), 2**31 - 1),
)
_LENGTHS = (("logit_bias", MAX_LOGIT_BIAS), ("allowed_token_ids", MAX_ALLOWED_TOKENS), ("bad_words", MAX_BAD_WORDS))


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request as the engine sees it: tokens only.

    `stop_token_ids` holds every token that ends it, the model's own included; `max_tokens` and `seed` are settled.
    """

    request_id: str
    prompt_token_ids: Int32Array
    params: SamplingParams
    max_tokens: int
    seed: int
    stop_token_ids: tuple[int, ...] = ()
    bad_token_ids: tuple[tuple[int, ...], ...] = ()  # params.bad_words, in every way that begins a token

    @property
    def looks_back(self) -> bool:
        """A token can't be drawn before the ones before it are known on the host."""
        p = self.params
        penalties = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        return bool(penalties or p.grammar or any(len(words) > 1 for words in self.bad_token_ids))


@dataclass(frozen=True, slots=True)
class Add:
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Ends the engine loop."""


Command = Add | Abort | Stop


UNKNOWN_TOKEN = -1  # in a RequestTable: a step in flight draws it


class RequestTable:
    """One row for each running request; the only copy of its tokens and of its page table.

    The core writes. An executor reads, and only until its `execute` returns: the next `schedule` may change any row.
    Rows are reused: what is right of `num_tokens` (of `num_pages`) in a row is left over from earlier requests.
    All counts are what they will be when the steps in flight are done.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, page_size: int) -> None:
        def column() -> Int32Array:
            return np.zeros(max_num_seqs, np.int32)

        # np.zeros takes no memory before it is written to, so a long max_model_len costs nothing by itself
        self.token_ids: Int32Array = np.zeros((max_num_seqs, max_model_len), np.int32)
        self.page_table: Int32Array = np.zeros((max_num_seqs, -(-max_model_len // page_size)), np.int32)
        self.num_prompt_tokens = column()
        self.num_tokens = column()  # prompt and output, those that are being drawn included
        self.num_computed_tokens = column()  # those whose K/V is in the cache
        self.num_pages = column()
        self.page_size = page_size


@dataclass(slots=True)
class SchedulerOutput:
    """One step. Requests with one token to compute stand before those with several.

    A token to compute that is UNKNOWN_TOKEN in the table is the one that the executor drew for that row last.

    Attributes:
        rows: int32 [R], rows of `table`.
        num_scheduled_tokens: int32 [R], at least 1 each; they follow `num_computed_tokens` in the row.
        num_computed_tokens: int32 [R], before this step.
        num_decodes: how many of the first rows have one token.
        samples: bool [R], whether the step reaches the end of the known tokens, so that a token is drawn.
        new_requests: (row, request) for each row that has another request than in the step before.
        arrivals: int64 [R], for the scheduler: tells the requests from others that the rows have at other times.
    """

    rows: Int32Array
    num_scheduled_tokens: Int32Array
    num_computed_tokens: Int32Array
    num_decodes: int
    samples: BoolArray
    table: RequestTable
    new_requests: list[tuple[int, EngineRequest]] = field(default_factory=list)
    arrivals: Int64Array = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def ends(self) -> Int32Array:
        """int32 [R], tokens of each request that are computed after this step: the place of the token that is drawn."""
        return self.num_computed_tokens + self.num_scheduled_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of a token's probability and of the likeliest ones', from the model's logits as they are."""

    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class ModelOutput:
    """What a step gave.

    Attributes:
        token_ids: int32 [S], one for each row with `samples` set, in the order of `SchedulerOutput.rows`.
        logprobs: for those of them that asked, by index into token_ids.
        prompt_logprobs: for rows that asked, by row: of the prompt's tokens that follow those of this step.
    """

    token_ids: Int32Array
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


class StepResult(Protocol):
    def result(self) -> ModelOutput:
        """Waits for it, and may raise what went wrong: EngineDeadError when nothing more can be run."""


@dataclass(slots=True)
class EngineOutput:
    """What one or more steps gave one request. Exactly one output of each has a finish reason, and it is the last."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None  # with FinishReason.ERROR: what went wrong, for the client
    num_cached_tokens: int | None = None  # with the first token: how many of the prompt's were in the cache
    logprobs: tuple[TokenLogprobs, ...] = ()  # of token_ids, where asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # with the first token: of all the prompt's tokens but the first

    def join(self, later: "EngineOutput") -> None:
        """Takes in the same request's next output."""
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason, self.error = later.finish_reason, later.error

    def __reduce__(self) -> tuple[Any, ...]:
        """Less than half of the time and the bytes that pickle takes by itself: each step has one for every request."""
        return EngineOutput, (
            self.request_id, self.token_ids, self.finish_reason, self.error,
            self.num_cached_tokens, self.logprobs, self.prompt_logprobs,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts after a step."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_pages: int = 0
    num_pages: int = 0
    num_preemptions: int = 0
    num_steps: int = 0


@dataclass(slots=True)
class StepOutputs:
    """All that one step has to tell; crosses the channel as one message."""

    outputs: list[EngineOutput]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the front end must know of a started engine."""

    max_model_len: int
    vocab_size: int
    page_size: int
    num_pages: int
    eos_token_ids: tuple[int, ...]


class RequestFailedError(RuntimeError):
    """One request can't go on, and the step was not taken; without it the step can be tried again. The message is for it."""

    def __init__(self, request_id: str, message: str) -> None:
        super().__init__(message)
        self.request_id = request_id


class EngineDeadError(RuntimeError):
    """The engine loop ended by a failure that it can't survive; only a restart helps."""
