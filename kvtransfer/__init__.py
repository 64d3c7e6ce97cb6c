"""Moving paged KV blocks between two engines.

Layers, each knowing only those above it in this list:

- :mod:`kvtransfer.plan` -- which blocks move, and the hash chain that says whose they are (pure)
- :mod:`kvtransfer.wire` -- the messages (msgspec)
- :mod:`kvtransfer.lease` -- who may still read what, bounded (pure, clock injected)
- :mod:`kvtransfer.paged` -- gather and scatter of blocks in a paged cache (torch)
- :mod:`kvtransfer.loop` -- one thread that owns the sockets
- :mod:`kvtransfer.producer`, :mod:`kvtransfer.consumer` -- the two ends over ZMQ
- :mod:`kvtransfer.control` -- how a server process commands the ends in its engine's workers
- :mod:`kvtransfer.adapter` -- the only part that imports vLLM
"""
