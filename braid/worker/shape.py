"""What shapes a first token that one engine draws for another."""

from __future__ import annotations

from vllm.sampling_params import SamplingParams

from braid import wire


def shape_of(params: SamplingParams) -> wire.Shape:
    """Temperature, ``top_p``, ``top_k`` and ``min_p`` of a request, with its engine's defaults."""
    return params.temperature, params.top_p, params.top_k, params.min_p


def shaped(shape: wire.Shape) -> SamplingParams:
    """Parameters that draw one token so."""
    temperature, top_p, top_k, min_p = shape
    return SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
