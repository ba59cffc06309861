"""The engine without HTTP, for scripts and tests. It is driven by whoever calls: no thread, no event loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from simple_flashinfer.config import Config
from simple_flashinfer.engine.launch import build_engine, resolve_model
from simple_flashinfer.engine.requests import RequestFactory
from simple_flashinfer.text.tokenizer import Tokenizer
from simple_flashinfer.types import Abort, Add, EngineStats, FinishReason, SamplingParams, TokenLogprobs

Prompt = str | Sequence[int]


@dataclass(slots=True)
class RequestOutput:
    """token_ids and text grow with each step; finish_reason is set when they are complete."""

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int = 0  # of the prompt, found in the cache
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one for each token, where asked for
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of all the prompt's tokens but the first


class LLM:
    """One model. Keyword arguments are the settings of `Config`: LLM(model="...", max_sequence=32).

    Use `generate` for everything at once, or `add_request` and `step` to drive it yourself; not from several threads.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        self.config = Config(**settings) if model is None else Config(model=model, **settings)
        path = resolve_model(self.config)
        self.core, self.info = build_engine(self.config, path)
        self.tokenizer = Tokenizer(path)
        self._requests = RequestFactory(self.info, self.config.seed, self.tokenizer.eos_token_id)
        self._unfinished: dict[str, _Unfinished] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One output for each prompt, in their order. A prompt is text or token ids; parameters are one for all or each.

        Raises ValueError (ContextLengthError when it is too long) for a prompt that can't be served, before any has run.
        """
        many: Sequence[Prompt] = [prompts] if _is_one_prompt(prompts) else prompts  # type: ignore[list-item, assignment]
        params = sampling_params if isinstance(sampling_params, Sequence) else [sampling_params] * len(many)
        if len(params) != len(many):
            raise ValueError(f"{len(many)} prompts came with {len(params)} sampling_params")
        started: list[str] = []
        try:
            for prompt, p in zip(many, params, strict=True):
                started.append(self.add_request(prompt, p))
            done: dict[str, RequestOutput] = {}
            with tqdm(total=len(many), desc="Requests", disable=not use_tqdm) as bar:
                while len(done) < len(started):
                    for output in self.step():
                        if output.finish_reason is not None:
                            done[output.request_id] = output
                            bar.update()
            return [done[request_id] for request_id in started]
        finally:
            for request_id in started:
                self.abort(request_id)

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> str:
        """Queues a prompt; the request's id."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        params = sampling_params or SamplingParams()
        request = self._requests.make(ids, params, self.tokenizer.encode_words(params.bad_words))
        output = RequestOutput(request.request_id, ids, [])
        self._unfinished[request.request_id] = _Unfinished(output, self.tokenizer.detokenizer(request.params))
        self.core.apply([Add(request)])
        return request.request_id

    def abort(self, request_id: str) -> None:
        """Forgets a request; nothing happens when it is finished."""
        if self._unfinished.pop(request_id, None) is not None:
            self.core.apply([Abort(request_id)])

    def step(self) -> list[RequestOutput]:
        """One engine step; the requests that it brought tokens for, finished ones for the last time."""
        result = self.core.step()
        changed = []
        for step_output in result.outputs if result else ():
            unfinished = self._unfinished.get(step_output.request_id)
            if unfinished is None:
                continue
            output, reason = unfinished.output, step_output.finish_reason
            delta = unfinished.detokenizer.push(step_output.token_ids, reason)
            output.text += delta.text
            output.token_ids += step_output.token_ids
            output.logprobs += step_output.logprobs
            output.prompt_logprobs = step_output.prompt_logprobs or output.prompt_logprobs
            output.num_cached_tokens = step_output.num_cached_tokens or output.num_cached_tokens
            output.finish_reason, output.error = delta.finish_reason, step_output.error
            if output.finish_reason is not None:
                if reason is None:  # a stop string, which the engine does not know
                    self.core.apply([Abort(output.request_id)])
                del self._unfinished[output.request_id]
            changed.append(output)
        return changed

    @property
    def has_unfinished(self) -> bool:
        return bool(self._unfinished)

    @property
    def stats(self) -> EngineStats:
        return self.core.scheduler.stats()

    def __repr__(self) -> str:
        return f"LLM(model={self.config.model!r}, {self.stats})"


@dataclass(slots=True)
class _Unfinished:
    output: RequestOutput
    detokenizer: Any


def _is_one_prompt(prompts: Any) -> bool:
    return isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and bool(prompts) and not isinstance(prompts[0], str | Sequence | Mapping)
    )
