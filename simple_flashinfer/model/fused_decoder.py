"""Whole decoder layers as one call, where the attention backend has one: the CPU's (kernels/decoder_layers.cpp).

As with the small layers, what a layer's parts are called proposes it, and trying settles it: the call takes the place of the
layer's forward only if both give the very same for a small batch, through the attention and the pages that will serve (the
kernels are the same). A layer that does anything else keeps its forward: a factor on the residual, a norm after attention, a
rope that some layers lack. If all layers are of that kind they become a single call, and the same trial is made of the model
as a whole.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from simple_flashinfer.attention import AttentionBackend, AttentionMetadata
from simple_flashinfer.attention.base import RunLayers
from simple_flashinfer.kernels.cpu import Linear
from simple_flashinfer.kernels.decoder_layers import DecoderParts
from simple_flashinfer.model.fuse import FusedLinear, FusedPart
from simple_flashinfer.model.fused_layers import FusedMLP, FusedRMSNorm, RotaryTable, random_tensor

# a request that decodes its third token, and one that begins with five; a page each
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


# token ids and positions, int64 [T] each, and rows, int64 [S] -> logits [S, vocab_size] of these rows
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@torch.inference_mode()
def fuse_decoder(model: Any, backend: AttentionBackend, dtype: torch.dtype) -> Forward | None:
    """Replaces forwards inside the model, in place. `fuse_layers` comes first, and the model attends through `backend`.

    Returns a forward for all of the model, where embedding, layers, norm and output matrix are all there is to it.
    """
    tables = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    table = tables[0] if len(tables) == 1 else None
    if (
        not isinstance(table, RotaryTable)
        or backend.num_pages < len(_TRIAL.kv_indices)
        or backend.page_size < max(_TRIAL.kv_lens)
    ):
        return None
    positions = torch.from_numpy(_TRIAL.positions).long()
    whole = {}
    for layer in model.modules():
        parts = _parts(layer)
        run = backend.decoder_layers({layer.self_attn.layer_idx: parts}) if parts else None
        if parts is None or run is None:
            continue
        x = random_tensor(dtype, backend.device, 1, len(positions), parts.qkv.in_features)
        rope = table(x, positions[None])
        backend.plan(_TRIAL)
        try:
            expected = layer(x, attention_mask=None, position_embeddings=rope, past_key_values=None, use_cache=False)
            got = run(x, *rope)
        except (TypeError, ValueError, RuntimeError):  # it wants other arguments, or turns a part of each head only
            continue
        if isinstance(expected, torch.Tensor) and torch.equal(expected, got):
            layer.forward = _layer_forward(run, layer.forward)
            whole[layer.self_attn.layer_idx] = parts
    return _whole_forward(model, table, backend, whole) if whole.keys() == backend.layers.keys() else None


def _layer_forward(run: RunLayers, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: torch.Tensor, *args: Any, position_embeddings: Any = None, **options: Any) -> Any:
        if position_embeddings is None:
            return original(hidden_states, *args, **options)
        return run(hidden_states, *position_embeddings)

    return forward


def _whole_forward(
    model: Any, table: RotaryTable, backend: AttentionBackend, parts: dict[int, DecoderParts]
) -> Forward | None:
    embed, head, run = model.get_input_embeddings(), model.get_output_embeddings(), backend.decoder_layers(parts)
    norm = dict(model.get_decoder().named_children()).get("norm")
    if norm is None or head is None or run is None:
        return None

    def forward(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        hidden = run(embed(ids[None]), *table(ids, positions[None]))
        return head(norm(hidden[0].index_select(0, rows)))  # type: ignore[no-any-return]

    ids, positions = (torch.from_numpy(array).long() for array in (_TRIAL.positions + 1, _TRIAL.positions))
    rows = torch.tensor([0, 3, 5])
    expected = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows).logits[0]
    return forward if torch.equal(expected, forward(ids, positions, rows)) else None


def _parts(layer: Any) -> DecoderParts | None:
    children, inner = dict(layer.named_children()), dict(getattr(layer, "self_attn", nn.Module()).named_children())
    if children.keys() != {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
        return None
    if inner.keys() - {"q_norm", "k_norm"} != {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return None
    norms = [children["input_layernorm"], children["post_attention_layernorm"], inner.get("q_norm"), inner.get("k_norm")]
    if not all(isinstance(norm, FusedRMSNorm) for norm in norms if norm) or not isinstance(children["mlp"], FusedMLP):
        return None
    mlp = dict(children["mlp"].named_children())
    modules = [inner["q_proj"], inner["o_proj"], mlp["gate_up_proj"], mlp["down_proj"]]
    linears = [module.packed for module in modules if isinstance(module, FusedLinear)]
    joined = all(isinstance(inner[name], FusedPart) for name in ("k_proj", "v_proj"))
    if not joined or len(linears) < len(modules) or not all(isinstance(linear, Linear) for linear in linears):
        return None
    if any(norm.weight.dtype != linears[0].dtype for norm in norms if norm):  # type: ignore[union-attr]
        return None
    qkv, o, gate_up, down = linears
    return DecoderParts(norms[0], qkv, norms[2], norms[3], o, norms[1], gate_up, down)  # type: ignore[arg-type]
