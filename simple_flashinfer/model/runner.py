"""The executor: one forward pass and one draw for each step."""

import inspect
import logging
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from simple_flashinfer.attention import AttentionBackend, AttentionLayer, AttentionMetadata, UnsupportedLayerError
from simple_flashinfer.model.attention_hook import AttentionHook
from simple_flashinfer.model.cuda_graph import DecodeGraphs
from simple_flashinfer.model.input_batch import InputBatch, device_tensor, token_ids
from simple_flashinfer.model.loader import LoadedModel
from simple_flashinfer.model.profiler import StepProfiler
from simple_flashinfer.sampling import gather_logprobs, sample
from simple_flashinfer.sampling.grammar import Grammars, GrammarState, apply_bitmask
from simple_flashinfer.types import (
    EngineDeadError,
    EngineRequest,
    Int32Array,
    ModelOutput,
    RequestFailedError,
    SchedulerOutput,
    TokenLogprobs,
)

logger = logging.getLogger(__name__)


class ModelRunner:
    """Implements core's Executor in the calling thread. `trace_layers`, then `use_backend`, then `execute`."""

    def __init__(self, loaded: LoadedModel, device: torch.device, max_num_seqs: int, profile: bool = False) -> None:
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
        self._hook = AttentionHook(loaded.model)
        self._graphs: DecodeGraphs | None = None
        self._inputs = InputBatch(max_num_seqs)
        self._grammars = Grammars(loaded.grammar_vocabulary)
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
            zeros = np.zeros(num_tokens, np.int32)
            positions = np.arange(num_tokens, dtype=np.int32) % self._max_model_len
            logits = self._logits(zeros, positions, np.arange(num_logits))
            torch.softmax(logits.float(), dim=-1).cumsum(-1, dtype=torch.float64)  # what sampling takes at its worst
        peak = torch.cuda.max_memory_allocated(self.device) - before if self.device.type == "cuda" else 0
        return self._hook.layers(self._text_config), peak

    def use_backend(self, backend: AttentionBackend) -> None:
        self._hook.backend = backend

    def use_cuda_graphs(self, max_num_seqs: int) -> None:
        """Decode steps from now on replay CUDA graphs, which are captured as their sizes come up."""
        assert self._hook.backend is not None
        self._graphs = DecodeGraphs(self._hook.backend, self._model_logits, max_num_seqs, self.device)

    def compile(self, mode: str) -> None:
        """Compiles the forward pass; attention stays one opaque operator. Batch sizes are dynamic, so recompiles are few."""
        self._hook.opaque = True
        self._forward = torch.compile(self._model, mode=mode, dynamic=True)

    @property
    def model(self) -> torch.nn.Module:
        return self._model

    @property
    def backend(self) -> AttentionBackend:
        assert self._hook.backend is not None
        return self._hook.backend

    # -- a step ----------------------------------------------------------------------------------------------------

    def execute(self, batch: SchedulerOutput) -> Future[ModelOutput]:
        future: Future[ModelOutput] = Future()
        try:
            with torch.inference_mode(), self._profiler.step():
                output = self._execute(batch)
            future.set_result(output)
        except torch.AcceleratorError as error:  # the CUDA context is lost: every later call would fail as well
            future.set_exception(EngineDeadError(str(error)))
        except Exception as error:
            future.set_exception(error)
        return future

    def _execute(self, batch: SchedulerOutput) -> ModelOutput:
        self._inputs.start(batch.new_requests, self._grammars.start)
        constrained = self._inputs.grammars(batch)
        masks = self._grammars.masks(list(constrained.values()))  # made while the model runs
        metadata = AttentionMetadata.of(batch)
        ids = token_ids(batch, metadata.batch_indices, metadata.positions)
        in_prompts = self._inputs.prompt_logprobs(batch)
        prompt_logits: torch.Tensor | None = None
        if self._graphs is not None and bool(batch.samples.all()) and metadata.num_decodes == len(batch.rows):
            logits = self._graphs.run(metadata, ids)
        else:
            assert self._hook.backend is not None
            self._hook.backend.plan(metadata)
            last_tokens = metadata.qo_indptr[1:][batch.samples] - 1
            if in_prompts:  # computed in the same pass, behind the logits to draw from
                inside = np.concatenate([np.arange(start, start + count) for _, start, count, _ in in_prompts])
                both = self._logits(ids, metadata.positions, np.concatenate([last_tokens, inside]))
                logits, prompt_logits = both[: len(last_tokens)], both[len(last_tokens) :]
            else:
                logits = self._logits(ids, metadata.positions, last_tokens)
        prompt_logprobs = {} if prompt_logits is None else _prompt_logprobs(batch, prompt_logits, in_prompts)
        if not len(logits):
            # nothing is read back in this step, so nothing waits for the device: the next plan would overwrite the pinned
            # buffer of this one before it was copied
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            return ModelOutput(np.empty(0, np.int32), prompt_logprobs=prompt_logprobs)
        sampled_rows = batch.rows[batch.samples]
        finite = logits
        if constrained:
            words = [mask for future in masks for mask in future.result()]
            for at, (state, _) in constrained.items():
                if state.error is not None:
                    raise RequestFailedError(self._inputs.request_ids[int(sampled_rows[at])], state.error)
            logits = apply_bitmask(logits, list(constrained), words)
        tokens = sample(logits, self._inputs.sampling(batch))
        drawn = tokens.cpu().numpy().astype(np.int32)
        if (drawn < 0).any():
            failed = int(np.flatnonzero(drawn < 0)[0])
            # reading the row again costs nothing that matters: the request ends here
            reason = (
                "all tokens are forbidden by what the request asks"
                if bool(torch.isfinite(finite[failed]).any())
                else "the model's logits are not finite"
            )
            raise RequestFailedError(self._inputs.request_ids[int(sampled_rows[failed])], reason)
        asked = self._inputs.num_logprobs(batch)
        logprobs = {}
        if asked:
            index = torch.tensor(list(asked), device=logits.device)
            logprobs = dict(zip(asked, gather_logprobs(finite[index], tokens[index], list(asked.values())), strict=True))
        return ModelOutput(drawn, logprobs, prompt_logprobs)

    def _logits(self, ids: Int32Array, positions: Int32Array, rows: np.ndarray) -> torch.Tensor:
        """ids, positions int32 [T], rows [S] indices into them -> logits [S, vocab_size]"""
        return self._model_logits(*(device_tensor(array, self.device) for array in (ids, positions, rows)))

    def _model_logits(self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        output = self._forward(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows)
        return output.logits[0]  # type: ignore[no-any-return]

    def prepare(self, request: EngineRequest) -> GrammarState:
        return self._grammars.start(request.params.grammar)

    def shutdown(self) -> None:
        self._grammars.shutdown()
        self._profiler.close()


def _prompt_logprobs(
    batch: SchedulerOutput, logits: torch.Tensor, asked: list[tuple[int, int, int, int]]
) -> dict[int, list[TokenLogprobs]]:
    """By row. logits: those of all rows that asked, one after the other."""
    computed = dict(zip(batch.rows.tolist(), batch.num_computed_tokens.tolist(), strict=True))
    found: dict[int, list[TokenLogprobs]] = {}
    offset = 0
    for row, _, count, num_top in asked:
        following = batch.table.token_ids[row, computed[row] + 1 : computed[row] + 1 + count]
        targets = torch.from_numpy(following.astype(np.int64)).to(logits.device)
        found[row] = gather_logprobs(logits[offset : offset + count], targets, [num_top] * count)
        offset += count
    return found
