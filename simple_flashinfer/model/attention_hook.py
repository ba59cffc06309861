"""Where transformers' models meet the paged attention backends.

Every model that follows transformers' attention interface calls a function that it looks up by name. The hook registers
itself under a name of its own, so several models in one process each find theirs; for a name that transformers does not
know it builds no mask, and the backend does the masking. Tokens come flat, as [1, heads, T, head_dim].

Before the first real step a trial forward pass goes through the hook with no backend: it records what each layer passes
(shapes, scale, window, cap, sinks) and answers with zeros. Backends are built, or refuse the model, from that record, and
a model with layers that never ask for attention (a state-space layer, say) is refused rather than computed wrongly.
"""

import itertools
import weakref
from typing import Any

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from simple_flashinfer.attention import AttentionBackend, AttentionLayer, UnsupportedLayerError

_counter = itertools.count()
# compiled graphs look a hook up by number: they can't hold objects
_hooks: weakref.WeakValueDictionary[int, "AttentionHook"] = weakref.WeakValueDictionary()


class AttentionHook:
    """The attention function of one model. `backend` None means: record, and return zeros."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.backend: AttentionBackend | None = None
        self.opaque = False  # set for torch.compile: call through an operator that it does not look into
        self._seen: dict[int, AttentionLayer] = {}
        self._number = next(_counter)
        _hooks[self._number] = self
        name = f"page_table_{self._number}"  # a name with "flash" in it would be looked for on the hub
        me = weakref.ref(self)  # transformers keeps what it is given for ever, and with it would keep the KV cache

        def attend(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            hook = me()
            assert hook is not None
            return hook(*args, **kwargs)

        AttentionInterface.register(name, attend)
        if not type(model)._can_set_attn_implementation():
            raise UnsupportedLayerError(
                f"{type(model).__name__} does not use transformers' attention interface, so its attention can't be paged"
            )
        model.set_attn_implementation(name)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> ([1, T, Hq, Dv], None)"""
        q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        sinks = options.get("s_aux")
        if self.backend is None:
            self._record(module, q, k, v, attention_mask, scaling, options)
            return q.new_zeros(1, *q.shape[:2], v.shape[-1]), None
        if self.opaque:
            return torch.ops.simple_flashinfer.attend(q, k, v, module.layer_idx, self._number, sinks)[None], None
        return self.attend(q, k, v, module.layer_idx, sinks)[None], None  # type: ignore[arg-type]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_idx: int, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """In the backend's dtype, which may be narrower than the model's; the result is in the model's."""
        assert self.backend is not None
        dtype = self.backend.dtype
        if q.dtype == dtype:
            return self.backend.run(layer_idx, q, k, v, sinks)
        return self.backend.run(layer_idx, q.to(dtype), k.to(dtype), v.to(dtype), sinks).to(q.dtype)

    def _record(
        self,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
        options: dict[str, Any],
    ) -> None:
        layer_idx: int = module.layer_idx  # type: ignore[assignment]
        causal = options.get("is_causal", getattr(module, "is_causal", True))
        if attention_mask is not None or causal is False or options.get("position_bias") is not None:
            raise UnsupportedLayerError(f"layer {layer_idx} of the model uses attention that is not plain causal attention")
        if layer_idx in self._seen:
            raise UnsupportedLayerError(f"layer {layer_idx} of the model attends twice in one forward pass")
        self._seen[layer_idx] = AttentionLayer(
            layer_idx=layer_idx,
            num_qo_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim_qk=q.shape[2],
            head_dim_vo=v.shape[2],
            scaling=float(scaling) if scaling is not None else q.shape[2] ** -0.5,
            sliding_window=options.get("sliding_window") or None,
            softcap=options.get("softcap") or None,
            has_sinks=options.get("s_aux") is not None,
        )

    def layers(self, text_config: PretrainedConfig) -> list[AttentionLayer]:
        """What the trial pass recorded. Raises UnsupportedLayerError unless every layer attended once, as it was to."""
        missing = sorted(set(range(text_config.num_hidden_layers)) - set(self._seen))
        if missing:
            raise UnsupportedLayerError(
                f"layer {missing[0]} of the model keeps a state that is not attention over keys and values "
                "(linear attention, a state space, or K/V shared with another layer), which can't be paged yet"
            )
        for index, kind in enumerate(getattr(text_config, "layer_types", None) or ()):
            if kind == "sliding_attention" and self._seen[index].sliding_window is None:
                raise UnsupportedLayerError(
                    f"layer {index} of the model has a sliding window that it keeps in its mask only"
                )
        has_window = getattr(text_config, "sliding_window", None) and getattr(text_config, "use_sliding_window", True)
        seen = any(layer.sliding_window for layer in self._seen.values())
        if has_window and not seen and not getattr(text_config, "layer_types", None):
            raise UnsupportedLayerError("layer 0 of the model has a sliding window that it keeps in its mask only")
        return [self._seen[index] for index in sorted(self._seen)]


# cudagraph_unsafe: what it reads changes behind torch.compile's back, so reduce-overhead must not record it
@torch.library.custom_op("simple_flashinfer::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_idx: int, hook: int, sinks: torch.Tensor | None
) -> torch.Tensor:
    return _hooks[hook].attend(q, k, v, layer_idx, sinks).contiguous()


@_attend.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_idx: int, hook: int, sinks: torch.Tensor | None
) -> torch.Tensor:
    return q.new_empty(*q.shape[:2], v.shape[-1])
