"""The thin vLLM layer on :mod:`kvtransfer`: the only code here that imports vLLM.

- :mod:`.connector` -- the ``KVConnectorBase_V1`` that vLLM loads, in both roles
- :mod:`.scheduler`, :mod:`.worker` -- its state in EngineCore and in a Worker
- :mod:`.utilities` -- what a server calls on EngineCore
- :mod:`.imports` -- prefixes moved into a consumer's block pool, outside of any request
- :mod:`.layout` -- the KV cache groups of an engine, and which engines are refused
- :mod:`.reblock` -- blocks of another size than ours
- :mod:`.guards` -- private touchpoints of vLLM that keep one request from ending an engine

Each private touchpoint is listed in ``TOUCHPOINTS`` of :mod:`.guards` and has a test of its own; other
versions of vLLM than :data:`TESTED` are refused.
"""

TESTED = ("0.32.0",)
"""Versions of vLLM the adapter was tested on."""
