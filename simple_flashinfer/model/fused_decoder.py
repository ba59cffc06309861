"""All decoder layers of a model as one call of the attention backend: on the CPU in C++ (kernels/decoder_layers.cpp), on
CUDA over kernels that fuse more (kernels/cuda.py).

As with the small layers, what a layer's parts are called proposes it, and trying settles it: embedding, the call, the last
norm and the output matrix take the place of the model's forward only if both give the very same logits for a small batch
(the kernels are the same), at positions all over the context, through the attention and the pages that will serve. A model
that does anything else keeps its forward: a factor on the residual, a norm after attention, layers that have no rope.
Kernels that fuse further than that, and round less, come in afterwards if they give nearly the same.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from simple_flashinfer.attention import AttentionBackend, AttentionMetadata
from simple_flashinfer.kernels.decoder_parts import DecoderParts, Matmul
from simple_flashinfer.model.fuse import FusedLinear, FusedPart
from simple_flashinfer.model.fused_layers import FusedMLP, FusedRMSNorm, RotaryTable

logger = logging.getLogger(__name__)

# a request that decodes its third token, and one that begins with five; a page each. Positions are for attention alone
_TRIAL = AttentionMetadata(
    num_decodes=1,
    num_shared_pages=0,
    qo_indptr=np.array([0, 1, 6], np.int32),
    kv_indptr=np.array([0, 1, 2], np.int32),
    kv_indices=np.array([0, 1], np.int32),
    kv_last_page_len=np.array([3, 5], np.int32),
    kv_lens=np.array([3, 5], np.int32),
    batch_indices=np.array([0, 1, 1, 1, 1, 1], np.int32),
    positions=np.array([2, 0, 1, 2, 3, 4], np.int32),
)


# token ids and positions, int64 [T] each, and rows, int64 [S] or None for all -> logits [S, vocab_size] of these rows
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
_NEARLY = 0.1  # of the largest logit: what rounding may change after many layers, and no mistake stays below


class _OtherKindError(Exception):
    """The message says what the model does not have, or does beside."""


def fuse_decoder(model: Any, backend: AttentionBackend) -> Forward | None:
    """None where the model is of another kind. `fuse_layers` comes first, and the model attends through `backend`.

    Which it is, and why, is logged.
    """
    try:
        with torch.inference_mode():
            forward, words = _tried(model, backend)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an unusual model may raise: it is served by its own forward
        why = error if isinstance(error, _OtherKindError) else repr(error)
        logger.info("Decoder layers: transformers' own, since %s", why)
        return None
    logger.info("Decoder layers: %s", words)
    return forward


def _tried(model: Any, backend: AttentionBackend) -> tuple[Forward, str]:
    if backend.num_pages < len(_TRIAL.kv_indices) or backend.page_size < max(_TRIAL.kv_lens):
        raise _OtherKindError("there are too few pages, or too small ones, to try others")
    forward, exact = (_forward(model, backend, exact) for exact in (False, True))
    last = len(_rotary_table(model).tables[0]) - 1  # type: ignore[union-attr]
    positions = torch.tensor([last, 0, 1, last // 3, last // 2, max(last - 1, 0)], device=backend.device)
    ids = torch.arange(6, device=backend.device) % len(model.get_input_embeddings().weight)
    rows = torch.tensor([0, 3, 5], device=backend.device)
    backend.plan(_TRIAL)
    expected = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows).logits[0]
    if not torch.equal(expected, exact(ids, positions, rows)):
        raise _OtherKindError("the model does more than they would")
    error = float((forward(ids, positions, rows) - expected).abs().max() / expected.abs().max())
    if error <= _NEARLY:
        return forward, "one call"
    return exact, f"one call, without kernels that round less: these differ by {error:.2g} of the largest logit"


def _forward(model: Any, backend: AttentionBackend, exact: bool) -> Forward:
    parts = {layer.self_attn.layer_idx: own for layer in model.modules() if (own := _parts(layer)) is not None}
    table = _rotary_table(model)
    if table is None or parts.keys() != backend.layers.keys():
        raise _OtherKindError("layers are not made of the usual parts")
    run = backend.decoder_layers(parts, *table.tables, exact)
    if run is None:
        raise _OtherKindError(f"the {type(backend).__name__} has no call for them")
    norm = dict(model.get_decoder().named_children())["norm"]
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()

    def forward(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        hidden = run(embed(ids[None]), positions)[0]
        return head(norm(hidden if rows is None else hidden.index_select(0, rows)))  # type: ignore[no-any-return]

    return forward


def _rotary_table(model: nn.Module) -> RotaryTable | None:
    """That of all layers."""
    tables = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    return tables[0] if len(tables) == 1 and isinstance(tables[0], RotaryTable) else None


def _parts(layer: Any) -> DecoderParts | None:
    children, inner = dict(layer.named_children()), dict(getattr(layer, "self_attn", nn.Module()).named_children())
    if children.keys() != {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
        return None
    if inner.keys() - {"q_norm", "k_norm"} != {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return None
    norms = [children["input_layernorm"], children["post_attention_layernorm"], inner.get("q_norm"), inner.get("k_norm")]
    if not all(isinstance(norm, FusedRMSNorm) for norm in norms if norm) or not isinstance(children["mlp"], FusedMLP):
        return None
    if not all(isinstance(inner[name], FusedPart) for name in ("k_proj", "v_proj")):  # of one matmul with q
        return None
    mlp = dict(children["mlp"].named_children())
    matmuls = [_matmul(part) for part in (inner["q_proj"], inner["o_proj"], mlp["gate_up_proj"], mlp["down_proj"])]
    qkv, o, gate_up, down = matmuls
    if qkv is None or o is None or gate_up is None or down is None:
        return None
    return DecoderParts(norms[0], qkv, norms[2], norms[3], o, norms[1], gate_up, down)


def _matmul(module: nn.Module) -> Matmul | None:
    """Of all that the module computes."""
    if isinstance(module, FusedLinear):
        return module.packed or module.multiply
    return module if type(module) is nn.Linear else None
