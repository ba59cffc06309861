"""The executor: one forward pass and one draw for each step.

On CUDA `execute` only queues work: the host waits for the device in the step's `result`, and, with FlashInfer's kernels to
sample by, nowhere else. On the CPU a step runs at once, or in a thread of its own when steps overlap. Drawn tokens stay on
the device as well (`_drawn`), from where the next step takes those that the host does not know yet.
"""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor as Worker
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from simple_flashinfer.attention import AttentionBackend, AttentionLayer, UnsupportedLayerError
from simple_flashinfer.kernels.transfer import indices
from simple_flashinfer.model.attention_hook import AttentionHook
from simple_flashinfer.model.cuda_graph import DecodeGraphs
from simple_flashinfer.model.fused_decoder import Forward, fuse_decoder
from simple_flashinfer.model.input_batch import InputBatch, PromptLogprobs, StepInputs
from simple_flashinfer.model.loader import LoadedModel
from simple_flashinfer.model.profiler import StepProfiler
from simple_flashinfer.sampling import Draw, FilterProbs, SamplingBatch, gather_logprobs, likeliest, sample
from simple_flashinfer.sampling.grammar import Grammars, GrammarState, Masks, apply_bitmask
from simple_flashinfer.types import (
    EngineDeadError,
    EngineRequest,
    ModelOutput,
    RequestFailedError,
    SchedulerOutput,
    StepResult,
    TokenLogprobs,
)

logger = logging.getLogger(__name__)


class ModelRunner:
    """Implements core's Executor. `trace_layers`, then `use_backend`, then `execute`."""

    def __init__(
        self,
        loaded: LoadedModel,
        device: torch.device,
        max_num_seqs: int,
        overlap: bool = False,
        worker: Worker | None = None,
        profile: bool = False,
        filter_probs: FilterProbs | None = None,
        draw: Draw | None = None,
    ) -> None:
        """overlap: a step may come before the result of the one before was asked for. worker: the thread that runs steps,
        None for the one that calls. filter_probs, draw: kernels of the device; see `sample`.
        """
        accepted = inspect.signature(type(loaded.model).forward).parameters
        for name in ("position_ids", "logits_to_keep"):
            if name not in accepted:
                raise UnsupportedLayerError(
                    f"{type(loaded.model).__name__} takes no {name}, so its requests can't be batched"
                )
        self.device = device
        self._model = loaded.model
        self._text_config = loaded.text_config
        self._max_model_len = loaded.max_model_len
        self._forward: Any = loaded.model
        self._whole: Forward | None = None
        self._hook = AttentionHook(loaded.model)
        self._graphs: DecodeGraphs | None = None
        self._grammars = Grammars(loaded.grammar_vocabulary)
        self._inputs = InputBatch(max_num_seqs, self._grammars.start)
        self._overlap = overlap
        self._worker = worker
        self._filter_probs = filter_probs
        self._draw = draw
        # the token that each row drew last; one place more for the padding rows of graphs
        self._drawn = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self._profiler = StepProfiler(enabled=profile)

    # -- setting up ------------------------------------------------------------------------------------------------

    def trace_layers(self, num_tokens: int, num_logits: int) -> tuple[list[AttentionLayer], int]:
        """Runs the model once with attention left out: what its layers ask of attention, and the peak bytes of activations.

        On CUDA with the largest shapes of service, so that the peak can be kept free; on CPU one token is enough.
        """
        if self.device.type == "cpu":
            num_tokens = num_logits = 1
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        num_logits = min(num_logits, num_tokens)
        with torch.inference_mode():
            zeros = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
            positions = np.arange(num_tokens, dtype=np.int32) % self._max_model_len
            logits = self._logits(zeros, positions, np.arange(num_logits))
            sample(logits, SamplingBatch.demanding(num_logits), self._filter_probs, self._draw)
        peak = torch.cuda.max_memory_allocated(self.device) - before if self.device.type == "cuda" else 0
        return self._hook.layers(self._text_config), peak

    def use_backend(self, backend: AttentionBackend, fuse: bool = False) -> None:
        """fuse: all decoder layers at once, where the backend computes them in one call."""
        self._hook.backend = backend
        self._whole = fuse_decoder(self._model, backend) if fuse else None

    def use_cuda_graphs(self, max_num_seqs: int) -> None:
        """Decode steps from now on replay CUDA graphs, which are captured as their sizes come up."""
        me = weakref.ref(self)  # a cycle would keep the KV cache of an engine that is given up

        def decode(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            runner = me()
            assert runner is not None
            return runner._decode(ids, positions, rows)

        self._graphs = DecodeGraphs(self.backend, decode, max_num_seqs, self.device)

    def compile(self, mode: str) -> None:
        """Compiles the forward pass; attention stays one opaque operator."""
        from simple_flashinfer.model.compile import compile_model  # a second, for torch's compiler

        self._hook.opaque = True
        self._forward = compile_model(self._model, mode)

    @property
    def model(self) -> torch.nn.Module:
        return self._model

    @property
    def backend(self) -> AttentionBackend:
        assert self._hook.backend is not None
        return self._hook.backend

    # -- a step ----------------------------------------------------------------------------------------------------

    def execute(self, batch: SchedulerOutput) -> StepResult:
        inputs = self._inputs.prepare(batch)
        masks = self._grammars.masks(list(inputs.grammars.values()))  # made while the model runs
        if self._worker is not None:
            return self._worker.submit(lambda: self._launch(inputs, masks).result())
        return self._launch(inputs, masks)

    def _launch(self, inputs: StepInputs, masks: Masks) -> "_Running":
        with _lost_device(), _finished(masks), torch.inference_mode(), self._profiler.step():
            logits, prompt_logits, tokens = self._run_model(inputs)
            prompt_logprobs = _of_prompts(inputs.prompt_logprobs, prompt_logits)
            allowed = logits
            if inputs.grammars:
                words = [mask for future in masks for mask in future.result()]
                for at, (state, _) in inputs.grammars.items():
                    if state.error is not None:
                        raise RequestFailedError(inputs.request_ids[at], state.error)
                allowed = apply_bitmask(logits, list(inputs.grammars), words)
            if tokens is None or inputs.grammars or not inputs.sampling.is_greedy:
                simple = inputs.sampling.is_greedy and self._draw is None
                tokens = likeliest(allowed) if simple else sample(allowed, inputs.sampling, self._filter_probs, self._draw)
                if self._overlap:
                    self._drawn[indices(inputs.sampled_rows, self.device)] = tokens.clamp_min(0)
            logprobs: Callable[[], dict[int, TokenLogprobs]] = dict
            if asked := inputs.num_logprobs:
                index = indices(np.array(list(asked)), self.device)
                listed = gather_logprobs(logits[index], tokens[index], list(asked.values()))
                logprobs = lambda: dict(zip(asked, listed(), strict=True))  # noqa: E731
            tokens = tokens.to("cpu", non_blocking=True)
            done = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

        def collect() -> ModelOutput:
            if done is not None:
                done.synchronize()
            drawn = tokens.numpy().astype(np.int32)
            if (drawn < 0).any():
                failed = int(np.flatnonzero(drawn < 0)[0])
                # of a graph these may be overwritten by now, and then the reason may be the other one
                finite = bool(torch.isfinite(logits[failed]).any())
                reason = (
                    "all tokens are forbidden by what the request asks" if finite else "the model's logits are not finite"
                )
                raise RequestFailedError(inputs.request_ids[failed], reason)
            return ModelOutput(drawn, logprobs(), {row: listed() for row, listed in prompt_logprobs.items()})

        return _Running(collect)

    def _run_model(self, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Logits to draw from [S, V], those asked of prompts [P, V], the likeliest tokens [S] if they are there already."""
        metadata = inputs.metadata
        if self._graphs is not None and inputs.only_decodes and not self.backend.prefers_eager(metadata):
            logits, tokens = self._graphs.run(metadata, inputs.token_ids, inputs.rows)
            return logits, logits[:0], tokens
        self.backend.plan(metadata)
        ids = indices(inputs.token_ids, self.device)
        if inputs.has_unknown_tokens:
            ids = torch.where(ids < 0, self._drawn[indices(inputs.rows[metadata.batch_indices], self.device)], ids)
        # those of prompts in the same pass, behind those to draw from
        inside = [np.arange(asked.start, asked.start + len(asked.targets)) for asked in inputs.prompt_logprobs]
        logits = self._logits(ids, metadata.positions, np.concatenate([inputs.last_tokens, *inside]))
        count = len(inputs.last_tokens)
        return logits[:count], logits[count:], None

    def _logits(self, ids: torch.Tensor, positions: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """ids, positions [T], rows [S] indices into them -> logits [S, vocab_size]"""
        return self._model_logits(ids, indices(positions, self.device), indices(rows, self.device))

    def _model_logits(self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """rows: None for all."""
        if self._whole is not None:
            return self._whole(ids, positions, rows)
        kept = 0 if rows is None else rows  # 0 is transformers' word for all
        output = self._forward(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=kept)
        return output.logits[0]  # type: ignore[no-any-return]

    def _decode(self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A decode step from tokens to tokens, to be captured: int64 [B] each -> logits [B, V], the likeliest tokens [B]."""
        ids = torch.where(ids < 0, self._drawn[rows], ids)
        logits = self._model_logits(ids, positions, None)
        tokens = likeliest(logits)
        self._drawn[rows] = tokens.clamp_min(0)
        return logits, tokens

    def prepare(self, request: EngineRequest) -> GrammarState:
        return self._grammars.start(request.params.grammar)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        self._grammars.shutdown()
        self._profiler.close()


class _Running:
    """A step whose work is queued."""

    def __init__(self, collect: Callable[[], ModelOutput]) -> None:
        self._collect = collect

    def result(self) -> ModelOutput:
        with _lost_device():
            return self._collect()


@contextmanager
def _lost_device() -> Iterator[None]:
    """After such an error the CUDA context is lost: every later call would fail as well."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise EngineDeadError(str(error)) from error


@contextmanager
def _finished(masks: Masks) -> Iterator[None]:
    """Also when the step fails: it is tried again, and two threads must not work on one grammar's state."""
    try:
        yield
    finally:
        wait(masks)


def _of_prompts(asked: list[PromptLogprobs], logits: torch.Tensor) -> dict[int, Callable[[], list[TokenLogprobs]]]:
    """By row. logits [P, V]: those of all that asked, one after the other."""
    found, offset = {}, 0
    for one in asked:
        count = len(one.targets)
        targets = indices(one.targets, logits.device)
        found[one.row] = gather_logprobs(logits[offset : offset + count], targets, [one.num_top] * count)
        offset += count
    return found
