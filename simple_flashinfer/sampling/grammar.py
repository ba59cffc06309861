"""Which tokens a grammar allows next, as bit masks over the vocabulary; by llguidance.

A grammar is compiled once, in a thread, and kept; each request that uses it gets a copy of the matcher. Masks are made in
threads too (the library lets go of the GIL), while the model runs. A `GrammarState` follows from the grammar and the
request's output tokens alone: one that is started anew after a preemption, or asked twice in a step, ends up the same.

Nothing here raises for a grammar or for a token. What goes wrong is in `GrammarState.error`; from then on the state allows
end-of-sequence tokens only, and the engine is to end that request with the error.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from simple_flashinfer.kernels.transfer import indices, to_device
from simple_flashinfer.types import GRAMMAR_LIMITS, Int32Array

_COMPILE_SECONDS = 10.0  # a grammar that takes longer is given up; those that were checked take one

_TRIAL_STEPS = 3


class GrammarVocabulary:
    """What llguidance must know of the tokenizer; W below is `words`, ceil(vocab_size / 32).

    `vocab_size` is that of the model's logits. The tokenizer may have fewer tokens (padding is never allowed) or more (those
    that the model has no logits for are never allowed). Raises ValueError where there is no fast tokenizer, or no
    end-of-sequence token to end an output with. Takes a second, and holds the GIL for most of it.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        from llguidance import LLTokenizer, hf

        eos = sorted({int(token) for token in eos_token_ids if 0 <= token < vocab_size})
        if not eos:
            raise ValueError("structured output needs an end-of-sequence token, which this model has not")
        size = max(vocab_size, len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)
        self.words = -(-vocab_size // 32)
        self.tokenizer: LLTokenizer = hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=eos)
        self.eos_token_ids = frozenset(eos)
        self._in_model = _pack(np.arange(vocab_size), self.words)
        self.only_eos = _pack(np.array(eos), self.words)

    @classmethod
    def load(cls, path: str, vocab_size: int, eos_token_ids: Sequence[int]) -> "GrammarVocabulary":
        """From the model's folder."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path)
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return cls(tokenizer, vocab_size, [*eos_token_ids, *own])

    def mask(self, matcher: Any) -> Int32Array:
        """int32 [W]; bit i of word w is token 32 w + i."""
        words = np.zeros(-(-self.tokenizer.vocab_size // 32), np.int32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return words[: self.words] & self._in_model


Masks = list[Future[list[Int32Array]]]


def _pack(token_ids: np.ndarray, words: int) -> Int32Array:
    bits = np.zeros(words * 32, bool)
    bits[token_ids] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


class GrammarState:
    """One request. `sync`, then `mask`, by one thread at a time.

    Attributes:
        error: what went wrong, for the client; None while all is well.
        finished: an end-of-sequence token has come.
    """

    def __init__(self, vocabulary: "Future[GrammarVocabulary]", compiled: "Future[Any]") -> None:
        self.error: str | None = None
        self.finished = False
        self._vocabulary = vocabulary
        self._compiled = compiled
        self._overdue = time.monotonic() + _COMPILE_SECONDS
        self._matcher: Any = None
        self._num_tokens = 0

    @property
    def ready(self) -> bool:
        """Whether `sync` and `mask` will not wait for the compilation. Look at `error` then; schedule nothing before."""
        if self._compiled.done():
            if self.error is None and (error := self._compiled.exception()) is not None:
                self.error = str(error)
            return True
        if self.error is None and time.monotonic() > self._overdue:
            self.error = f"the grammar is too complex: not compiled within {_COMPILE_SECONDS:g} s"
        return self.error is not None

    def sync(self, output_token_ids: Int32Array) -> None:
        """Takes in the output's tokens, int32, that it does not know yet; fewer than before start it anew."""
        if self.error is not None:
            return
        try:
            if self._matcher is None or len(output_token_ids) < self._num_tokens:
                self._matcher = self._compiled.result().deep_copy()
                self._num_tokens, self.finished = 0, False
            for token in output_token_ids[self._num_tokens :].tolist():
                self._num_tokens += 1
                if self.finished:
                    continue  # ignore_eos: whatever follows
                if token in self._vocabulary.result().eos_token_ids and self._matcher.is_accepting():
                    self.finished = True
                elif not self._matcher.consume_token(token):
                    self._fail()
                    return
        except Exception as error:
            self.error = str(error) or type(error).__name__

    def mask(self) -> Int32Array:
        """The tokens allowed next, int32 [W]: at least one, and end-of-sequence tokens only where the output may end."""
        vocabulary = self._vocabulary.result()
        if self.error is not None or self.finished:
            return vocabulary.only_eos
        try:
            words = vocabulary.mask(self._matcher)
            if self._matcher.is_error():
                self._fail()
            elif not words.any():
                self.error = "no token of the vocabulary can go on as the grammar asks"
            else:
                return words
        except Exception as error:
            self.error = str(error) or type(error).__name__
        return vocabulary.only_eos

    def _fail(self) -> None:
        self.error = "the grammar failed: " + self._matcher.get_error().split("\n")[0]


class Grammars:
    """The grammars of one engine. `start` and `masks` are called by one thread, and neither of them waits.

    `load` makes the vocabulary, in a thread, when the first grammar comes: a server without such requests pays nothing.
    """

    def __init__(self, load: Callable[[], GrammarVocabulary], num_threads: int = 2, max_compiled: int = 64) -> None:
        self._load = load
        self._max_compiled = max_compiled
        self._vocabulary: Future[GrammarVocabulary] | None = None
        self._compiled: OrderedDict[str, Future[Any]] = OrderedDict()  # used last stands last
        # Threads of its own: however long a grammar compiles, masks of running requests come in time.
        self._compile_pool = ThreadPoolExecutor(1, "grammar-compile")
        self._mask_pool = ThreadPoolExecutor(num_threads, "grammar-mask")
        self._num_threads = num_threads

    def start(self, grammar: str) -> GrammarState:
        """A request's state before its first token; not to be used before it is `ready`."""
        if self._vocabulary is None:
            self._vocabulary = self._compile_pool.submit(self._load)
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compiled[grammar] = self._compile_pool.submit(_compile, self._vocabulary, grammar)
            if len(self._compiled) > self._max_compiled:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return GrammarState(self._vocabulary, compiled)

    def masks(self, rows: Sequence[tuple[GrammarState, Int32Array]]) -> Masks:
        """Syncs each state with its request's output tokens; its mask [W]. In the order of `rows`, in one list or several.

        All states are ready and without error. Token arrays are read until the futures are done.
        """
        size = max(-(-len(rows) // self._num_threads), 8)  # less is not worth waking a thread
        return [self._mask_pool.submit(_masks, rows[at : at + size]) for at in range(0, len(rows), size)]

    def shutdown(self) -> None:
        for pool in (self._compile_pool, self._mask_pool):
            pool.shutdown(wait=False, cancel_futures=True)


def _compile(vocabulary: "Future[GrammarVocabulary]", grammar: str) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    known = vocabulary.result()
    matcher = LLMatcher(known.tokenizer, grammar, log_level=0, limits=LLParserLimits(**GRAMMAR_LIMITS))
    # A few steps of one output: a grammar that runs into a limit mostly does so here, where no request waits for its mask.
    trial = matcher.deep_copy()
    for _ in range(_TRIAL_STEPS):
        if trial.is_stopped():
            break
        allowed = np.flatnonzero(np.unpackbits(known.mask(trial).view(np.uint8), bitorder="little"))
        allowed = allowed[~np.isin(allowed, list(known.eos_token_ids))]
        if not len(allowed):
            break
        trial.consume_token(int(allowed[len(allowed) // 2]))
    if trial.is_error():
        raise ValueError("the grammar failed: " + trial.get_error().split("\n")[0])
    return matcher


def _masks(rows: Sequence[tuple[GrammarState, Int32Array]]) -> list[Int32Array]:
    masks = []
    for state, output_token_ids in rows:
        state.sync(output_token_ids)
        masks.append(state.mask())
    return masks


def apply_bitmask(logits: torch.Tensor, rows: Sequence[int], masks: Sequence[Int32Array]) -> torch.Tensor:
    """float [S, V]; for each of `rows` a mask, int32 [ceil(V / 32)] -> a new tensor with -inf where the mask has no bit."""
    words = to_device(np.stack(masks).view(np.uint8), logits.device)
    index = indices(np.array(rows), logits.device)
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (words[:, :, None] >> bits & 1).bool().flatten(1)[:, : logits.shape[-1]]
    logits = logits.clone()
    logits[index] = logits[index].masked_fill(~allowed, -torch.inf)
    return logits
