"""Simulated engines: workers that speak the router's wire and the KV protocol, and compute nothing.

Hundreds run in one process, so that placement, fairness and deadlines can be watched at a size that no test
machine has. What they answer is made up (:mod:`braid.sim.draws`) and says so: the served model's name and
``system_fingerprint`` begin with ``sim``, and no real worker is ever paired with one.

- :mod:`braid.sim.model` -- how long a scheduling step takes, and the fit of that to measured ones
- :mod:`braid.sim.tokens`, :mod:`braid.sim.draws` -- prompts as tokens, and deterministic samples
- :mod:`braid.sim.blocks`, :mod:`braid.sim.scheduler` -- paged KV cache and continuous batching (pure)
- :mod:`braid.sim.engine` -- steps on asyncio's clock
- :mod:`braid.sim.watch` -- the samples' confidence
- :mod:`braid.sim.request`, :mod:`braid.sim.reply` -- OpenAI bodies in and out
- :mod:`braid.sim.kv` -- KV transfer with bytes counted; :mod:`braid.sim.moved` with bytes moved
- :mod:`braid.sim.imports`, :mod:`braid.sim.decode`, :mod:`braid.sim.prefill` -- the two services
- :mod:`braid.sim.worker`, :mod:`braid.sim.serve` -- one worker, and a process full of them

Nothing here imports an engine or torch; :mod:`braid.sim.moved` brings in what ``kvtransfer`` needs.
"""
