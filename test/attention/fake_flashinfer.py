"""A strict stand-in for flashinfer 0.7 where there is no CUDA device: its call signatures, its demands, torch's arithmetic.

The library checks little of what it is given and reads memory that is not its own when an index is wrong. Here every
dtype, shape, device and range is checked, so that whatever the backend builds is tested on any machine.
"""

import importlib.machinery
import math
import sys
import types

import torch
from torch.nn.functional import silu

from simple_flashinfer.kernels.cuda import cuda_kernels
from test.attention.recording import kernel

FLOATS = (torch.float16, torch.bfloat16)
FLOAT8 = torch.float8_e4m3fn


def install(monkeypatch) -> types.ModuleType:
    module = types.ModuleType("flashinfer")
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    module.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper
    module.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
    module.merge_state_in_place = merge_state_in_place
    module.append_paged_kv_cache = append_paged_kv_cache
    module.rmsnorm = rmsnorm
    module.fused_add_rmsnorm = fused_add_rmsnorm
    module.silu_and_mul = silu_and_mul
    module.apply_rope_with_cos_sin_cache = apply_rope_with_cos_sin_cache
    module.sampling = sampling
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    cuda_kernels.cache_clear()
    return module


def _check_int32(name: str, x: torch.Tensor, length: int | None = None) -> torch.Tensor:
    assert isinstance(x, torch.Tensor), f"{name} must be a tensor"
    assert x.dtype == torch.int32, f"{name} must be int32, not {x.dtype}"
    assert x.dim() == 1, name
    assert x.is_contiguous(), name
    assert length is None or len(x) == length, f"{name} must have {length} entries, not {len(x)}"
    return x.cpu()


def _check_loads(name: str, x: torch.Tensor) -> None:
    """Kernels load as many numbers at once as 16 bytes hold and a row is a multiple of."""
    vector = math.gcd(16 // x.element_size(), x.shape[-1])
    assert x.stride(-1) == 1, f"{name} has gaps between numbers"
    assert x.storage_offset() % vector == 0, f"{name} starts between two loads"
    assert all(stride % vector == 0 for stride in x.stride()[:-1]), f"rows of {name} start between two loads"


def _check_pages(indptr, indices, last_page_len, page_size: int) -> None:
    indptr = _check_int32("kv_indptr", indptr)
    indices = _check_int32("kv_indices", indices)
    last = _check_int32("kv_last_page_len", last_page_len, len(indptr) - 1)
    assert indptr[0] == 0, "kv_indptr must start at 0"
    assert (indptr.diff() >= 1).all(), "every request needs a page"
    assert indptr[-1] <= len(indices), "kv_indptr points beyond kv_indices"
    assert (indices >= 0).all()
    assert (last >= 1).all(), "1 <= last_page_len"
    assert (last <= page_size).all(), "last_page_len <= page_size"


def _check_cache(cache: torch.Tensor, page_size: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    assert cache.dtype == dtype, f"cache is {cache.dtype}, planned {dtype}"
    assert cache.dim() == 5, "cache must be [pages, 2, page_size, heads, head_dim]"
    assert cache.shape[1:] == (2, page_size, heads, head_dim), cache.shape
    assert cache.stride(-1) == 1


@kernel
def append_paged_kv_cache(
    append_key,
    append_value,
    batch_indices,
    positions,
    paged_kv_cache,
    kv_indices,
    kv_indptr,
    kv_last_page_len,
    kv_layout="NHD",
) -> None:
    assert kv_layout == "NHD"
    page_size = paged_kv_cache.shape[2]
    _check_pages(kv_indptr, kv_indices, kv_last_page_len, page_size)
    num_tokens = len(append_key)
    batch_indices = _check_int32("batch_indices", batch_indices, num_tokens)
    positions = _check_int32("positions", positions, num_tokens)
    for name, x in (("append_key", append_key), ("append_value", append_value)):
        assert x.dtype == paged_kv_cache.dtype, f"{name} is {x.dtype}: the kernel would read it as {paged_kv_cache.dtype}"
        assert x.shape == (num_tokens, *paged_kv_cache.shape[3:]), name
        assert x.dim() == 3, name
        _check_loads(name, x)
    assert (kv_indices < len(paged_kv_cache)).all(), "page number beyond the cache"
    lengths = (kv_indptr.diff() - 1) * page_size + kv_last_page_len
    for i, (request, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
        assert 0 <= request < len(lengths)
        assert 0 <= position < lengths[request], "position beyond the request's tokens"
        page = kv_indices[kv_indptr[request] + position // page_size]
        paged_kv_cache[page, 0, position % page_size] = append_key[i]
        paged_kv_cache[page, 1, position % page_size] = append_value[i]


@kernel
def rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None) -> torch.Tensor:
    assert input.dim() in (2, 3), "rows, or rows of heads"
    assert weight.dim() == 1
    assert len(weight) == input.shape[-1]
    assert weight.device == input.device
    assert input.dtype == weight.dtype
    assert input.dtype in FLOATS
    assert isinstance(eps, float)
    out = torch.empty_like(input) if out is None else out
    assert out.shape == input.shape
    assert out.dtype == input.dtype
    for name, x in (("input", input), ("out", out), ("weight", weight)):
        _check_loads(name, x)
    x = input.float()
    return out.copy_(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float())


@kernel
def fused_add_rmsnorm(input, residual, weight, eps=1e-6, enable_pdl=None) -> None:
    """The sum is rounded for the residual, and not for its norm."""
    assert input.dim() == residual.dim() == 2
    assert input.shape == residual.shape
    assert weight.shape == input.shape[1:]
    assert input.dtype == residual.dtype == weight.dtype
    assert input.dtype in FLOATS
    assert input.device == residual.device == weight.device
    assert isinstance(eps, float)
    for name, x in (("input", input), ("residual", residual), ("weight", weight)):
        _check_loads(name, x)
    total = input.float() + residual.float()
    residual.copy_(total)
    input.copy_(total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps) * weight.float())


@kernel
def silu_and_mul(input, out=None, enable_pdl=None) -> torch.Tensor:
    assert input.shape[-1] % 2 == 0
    assert input.dtype in FLOATS
    assert input.is_contiguous(), "the kernel takes no strides"
    assert input.numel(), "a launch of no blocks fails"
    gate, up = input.float().chunk(2, -1)
    result = (silu(gate) * up).to(input.dtype)
    return result if out is None else out.copy_(result)


@kernel
def apply_rope_with_cos_sin_cache(positions, query, key, head_size, cos_sin_cache, is_neox=True):
    if head_size not in (64, 128, 256, 512):
        raise RuntimeError(f"Unsupported head_dim: {head_size}")
    assert cos_sin_cache.dtype == torch.float32, "cos_sin_cache should be float32"
    assert cos_sin_cache.dim() == 2
    assert cos_sin_cache.is_contiguous()
    assert cos_sin_cache.shape[1] <= head_size
    assert cos_sin_cache.shape[1] % 2 == 0
    assert positions.dtype in (torch.int32, torch.int64)
    assert positions.shape == (len(query),) == (len(key),)
    assert positions.is_contiguous()
    assert ((positions >= 0) & (positions < len(cos_sin_cache))).all(), "position beyond the table"
    assert query.dtype == key.dtype
    assert query.dtype in FLOATS
    assert is_neox
    cos, sin = cos_sin_cache[positions.long()].chunk(2, -1)
    results = []
    for name, x in (("query", query), ("key", key)):
        assert x.dim() == 2, name
        assert x.device == cos_sin_cache.device == positions.device
        _check_loads(name, x)
        heads = x.view(len(x), -1, head_size).float()
        turning, rest = heads.split([2 * cos.shape[1], head_size - 2 * cos.shape[1]], -1)
        a, b = turning.chunk(2, -1)
        turned = [a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None], rest]
        results.append(torch.cat(turned, -1).to(x.dtype).flatten(1))
    return tuple(results)


class _Wrapper:
    def _plan(
        self, qo_indptr, kv_indptr, kv_indices, last_page_len, heads, kv_heads, dim, page_size, dtypes, window, cap, scale,
        causal=True,
    ):  # fmt: skip
        _check_pages(kv_indptr, kv_indices, last_page_len, page_size)
        assert kv_indptr.device.type == last_page_len.device.type == "cpu", "planning would wait for the device"
        assert kv_indptr[-1] == len(kv_indices), "prefill kernels take exactly the pages of their requests"
        assert heads % kv_heads == 0
        assert dim in (64, 128, 256), "no kernel for this head_dim"
        q_dtype, kv_dtype = dtypes
        assert q_dtype in FLOATS, "attention kernels are for 16 bit"
        assert kv_dtype in (q_dtype, FLOAT8), "with K and V of the same, or of 8"
        assert isinstance(window, int)
        assert window >= -1
        assert cap is None or cap >= 0
        self.plan_of = (qo_indptr, kv_indptr, kv_indices.clone(), last_page_len, heads, kv_heads, dim, page_size)
        self.options = (dtypes, window, cap or 0.0, scale if scale is not None else dim**-0.5)
        self.causal = causal

    def _run(self, q: torch.Tensor, cache: torch.Tensor, return_lse: bool = False):
        qo_indptr, kv_indptr, kv_indices, last_page_len, heads, kv_heads, dim, page_size = self.plan_of
        (q_dtype, kv_dtype), window, cap, scale = self.options
        assert q.dtype == q_dtype
        assert q.shape == (int(qo_indptr[-1]), heads, dim), f"planned {int(qo_indptr[-1])} queries, got {q.shape}"
        assert q.is_contiguous()
        _check_cache(cache, page_size, kv_heads, dim, kv_dtype)
        assert (kv_indices < len(cache)).all()
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
        for i in range(len(last_page_len)):
            pages = kv_indices[kv_indptr[i] : kv_indptr[i + 1]].long()
            length = (len(pages) - 1) * page_size + int(last_page_len[i])
            k, v = cache[pages].float().transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(heads // kv_heads, dim=2)
            start, end = int(qo_indptr[i]), int(qo_indptr[i + 1])
            scores = torch.einsum("qhd,khd->hqk", q[start:end].float(), k) * scale
            if cap > 0:
                scores = cap * torch.tanh(scores / cap)
            distance = torch.arange(length - (end - start), length)[:, None] - torch.arange(length)
            hidden = (distance < 0) & self.causal
            if window >= 0:
                hidden |= distance > window
            scores = scores.masked_fill(hidden, -torch.inf)
            out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype)
            lse[start:end] = scores.logsumexp(-1).T * math.log2(math.e)
        return (out, lse) if return_lse else out


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, *, backend="auto", jit_args=None
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"
        assert not use_cuda_graph, "prefill wrappers under a graph are not to be trusted"

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        *,
        causal=False,
        pos_encoding_mode="NONE",
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
    ) -> None:
        assert causal, "a chunk must not look ahead"
        assert head_dim_vo in (None, head_dim_qk)
        assert pos_encoding_mode == "NONE"
        lengths = _check_int32("qo_indptr", qo_indptr, len(paged_kv_indptr)).diff()
        assert qo_indptr.device.type == "cpu"
        assert qo_indptr[0] == 0
        kv_lengths = (paged_kv_indptr.diff() - 1) * page_size + paged_kv_last_page_len
        assert (lengths >= 1).all()
        assert (lengths <= kv_lengths).all(), "more queries than keys"
        dtypes = (q_data_type, kv_data_type or q_data_type)
        self._plan(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk,
            page_size, dtypes, window_left, logits_soft_cap, sm_scale,
        )  # fmt: skip

    def run(self, q, paged_kv_cache, *, out=None, return_lse=False):
        return self._run(q, paged_kv_cache, return_lse)


@kernel
def merge_state_in_place(v, s, v_other, s_other, mask=None) -> None:
    assert mask is None
    assert v.shape == v_other.shape
    assert v.shape[:2] == s.shape == s_other.shape
    assert v.dtype == v_other.dtype
    assert v.dtype in FLOATS
    for x in (v, s, v_other, s_other):
        assert x.is_contiguous(), "the kernel takes no strides"
    assert s.dtype == s_other.dtype == torch.float32, "a copy would be merged"
    weight = torch.sigmoid((s - s_other) * math.log(2))[..., None]
    v.copy_(v.float() * weight + v_other.float() * (1 - weight))
    s.copy_(torch.logaddexp2(s, s_other))


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
        *,
        backend="auto",
        jit_args=None,
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"
        self.buffers = None
        if use_cuda_graph:
            _check_int32("indptr buffer", paged_kv_indptr_buffer)
            _check_int32("indices buffer", paged_kv_indices_buffer)
            _check_int32("last_page_len buffer", paged_kv_last_page_len_buffer, len(paged_kv_indptr_buffer) - 1)
            self.buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        pos_encoding_mode="NONE",
        window_left=-1,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
        sm_scale=None,
    ) -> None:
        assert pos_encoding_mode == "NONE"
        dtypes = (q_data_type, kv_data_type or q_data_type)
        queries = torch.arange(len(indptr), dtype=torch.int32)
        self._plan(
            queries, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, dtypes, window_left,
            logits_soft_cap, sm_scale,
        )  # fmt: skip
        if self.buffers is not None:
            indptr_buffer, indices_buffer, last_buffer = self.buffers
            assert len(last_page_len) == len(last_buffer), "the batch size of a graph is fixed"
            assert len(indices) <= len(indices_buffer)
            indptr_buffer.copy_(indptr)
            indices_buffer[: len(indices)].copy_(indices)
            last_buffer.copy_(last_page_len)

    @kernel
    def run(self, q, paged_kv_cache, *, out=None, return_lse=False):
        if self.buffers is not None:  # a replay reads what stands in the buffers then
            indptr, indices, last = self.buffers
            self.plan_of = (self.plan_of[0], indptr, indices[: int(indptr[-1])], last, *self.plan_of[4:])
        return self._run(q, paged_kv_cache, return_lse)


def _check_probs(probs: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> None:
    assert probs.dtype == torch.float32
    assert probs.dim() == 2
    assert probs.is_contiguous()
    assert isinstance(values, torch.Tensor), "a number for all rows would be another kernel, which compiles for minutes"
    assert values.dtype == dtype
    assert values.shape == probs.shape[:1]
    assert values.device == probs.device


class sampling:  # a module there
    @staticmethod
    def top_k_renorm_probs(probs, top_k, is_deterministic=False) -> torch.Tensor:
        _check_probs(probs, top_k, torch.int32)
        assert ((top_k >= 1) & (top_k <= probs.shape[1])).all()
        pivot = probs.sort(dim=-1, descending=True).values.gather(1, top_k.long()[:, None] - 1)
        left = probs * (probs >= pivot)
        return left / left.sum(-1, keepdim=True)

    @staticmethod
    def top_p_renorm_probs(probs, top_p, is_deterministic=False) -> torch.Tensor:
        _check_probs(probs, top_p, torch.float32)
        assert ((top_p > 0) & (top_p <= 1)).all()
        ordered = probs.sort(dim=-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        count = (before < top_p[:, None]).sum(-1, keepdim=True)
        left = probs * (probs >= ordered.gather(1, count - 1))
        return left / left.sum(-1, keepdim=True)
