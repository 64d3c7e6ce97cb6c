"""What a vLLM engine's KV cache is made of, and which engines can't take part in transfers at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from braid.ranks import heads_of
from kvtransfer.cache import Group
from kvtransfer.plan import Blocking

_MOVABLE = (FullAttentionSpec, SlidingWindowSpec, MLAAttentionSpec)
"""Kinds of layers whose blocks are a function of the tokens before them and nothing else."""
_STATE_SPACE = (
    "models with state-space layers are not supported: such a layer keeps one state a sequence instead of "
    "blocks of tokens, so the samples of a prompt could not share its blocks: serve this model on plain vLLM"
)
_NO_CACHE = "this model keeps no KV cache: there is nothing to transfer"


class Unservable(RuntimeError):
    """This engine can't serve in Braid; the message says why and what to do."""


class GroupInfo(msgspec.Struct, frozen=True, array_like=True):
    """A KV cache group. ``layers``: their names, the same on every rank."""

    kind: str
    block_size: int
    window: int
    layers: tuple[str, ...]

    @property
    def blocking(self) -> Blocking:
        return Blocking(self.block_size, self.window)


def check_config(config: Any, role: str) -> None:
    """Refuse what vLLM's configuration already tells. Raises :class:`Unservable`."""
    parallel = config.parallel_config
    for name, size in (
        ("pipeline", parallel.pipeline_parallel_size),
        ("decode context", parallel.decode_context_parallel_size),
        ("prefill context", parallel.prefill_context_parallel_size),
        ("data", parallel.data_parallel_size),
    ):
        if size > 1:
            raise Unservable(f"{name} parallelism is not supported: use tensor parallelism, or more workers")
    model = config.model_config
    if model.is_hybrid or model.is_attention_free:
        raise Unservable(_STATE_SPACE if model.has_inner_state else _NO_CACHE)
    if config.cache_config.enable_prefix_caching:
        return
    if model.use_mla:
        raise Unservable(
            "vLLM has no prefix caching for MLA models on this hardware, so a prompt's samples could not "
            "share what was transferred: serve this model on plain vLLM"
        )
    if role == "decode":
        raise Unservable(
            "a decode worker shares prompts by prefix caching, which is off for this model or flags"
        )


def group_infos(config: KVCacheConfig) -> tuple[GroupInfo, ...]:
    """The groups of an engine, in vLLM's order. Raises :class:`Unservable` for kinds that can't be moved."""
    if not config.kv_cache_groups:
        raise Unservable(_NO_CACHE)
    if config.has_mixed_precision_kv_cache:
        raise Unservable(
            "layers with KV caches of different precision are not supported: vLLM zeroes their blocks"
        )
    return tuple(_info(group) for group in config.kv_cache_groups)


def _info(group: Any) -> GroupInfo:
    spec = group.kv_cache_spec
    inner = spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
    for layer in inner:
        _check_movable(layer)
    windows = {_window(layer) for layer in inner}
    if len(windows) != 1:
        raise Unservable(f"one KV cache group has layers with windows of {sorted(windows)} tokens")
    first = next(iter(inner))
    return GroupInfo(type(first).__name__, int(spec.block_size), windows.pop(), tuple(group.layer_names))


def _check_movable(spec: KVCacheSpec) -> None:
    if isinstance(spec, MambaSpec):
        raise Unservable(_STATE_SPACE)
    if type(spec) not in _MOVABLE:
        raise Unservable(f"layers with a {type(spec).__name__} cache are not supported")


def _window(spec: KVCacheSpec) -> int:
    """Tokens that blocks are kept for; 0: all. A full-attention spec that only computes with a window
    keeps all."""
    return spec.sliding_window + spec.extra_retained_tokens if isinstance(spec, SlidingWindowSpec) else 0


def total_heads(config: Any) -> int:
    """KV heads of a layer over all tensor-parallel ranks."""
    model = config.model_config
    return 1 if model.use_mla else int(model.get_total_num_kv_heads())


def sliceable(config: Any, cache: KVCacheConfig) -> bool:
    """Whether tokens can be told apart inside of a block, so that blocks of another size can be taken: the
    layout that :mod:`kvtransfer.adapter.reblock` knows, and one group without a window."""
    if not current_platform.is_cpu() or len(cache.kv_cache_groups) != 1:
        return False
    spec = cache.kv_cache_groups[0].kv_cache_spec
    if type(spec) is not FullAttentionSpec or spec.head_size != spec.head_size_v:
        return False
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    kernels = _get_attn_isa(
        config.model_config.dtype, spec.block_size, spec.head_size, config.cache_config.cache_dtype
    )
    return kernels in ("vec", "vec16")


def cache_groups(
    infos: Sequence[GroupInfo],
    kv_caches: Mapping[str, torch.Tensor],
    blocks: int,
    heads: int,
    ranks: int,
    rank: int,
) -> list[Group]:
    """A rank's layers by group, layers that share memory once.

    Blocks are told apart by head where every layer is ``[blocks, heads of the rank, ...]``; else a block is
    one row.
    """
    groups = []
    for info in infos:
        layers = {kv_caches[name].data_ptr(): kv_caches[name] for name in info.layers}
        groups.append(list(layers.values()))
    try:
        mine = len(heads_of(heads, ranks, rank))
    except ValueError:
        mine = 0
    if all(layer.dim() == 4 and layer.shape[:2] == (blocks, mine) for group in groups for layer in group):
        return [Group(group, mine) for group in groups]
    return [Group([layer.reshape(blocks, -1) for layer in group]) for group in groups]
