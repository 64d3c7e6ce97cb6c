"""Moving paged KV blocks between two engines.

Layers, each knowing only those above it in this list:

- :mod:`kvtransfer.plan` -- which blocks move, and the hash chain that says whose they are (pure)
- :mod:`kvtransfer.wire` -- the messages (msgspec)
- :mod:`kvtransfer.lease` -- who may still read what, bounded (pure, clock injected)
- :mod:`kvtransfer.arena` -- the memory that a producer stages blocks in
- :mod:`kvtransfer.cache` -- gather and scatter of blocks in a paged cache; on a GPU :mod:`kvtransfer.gpu`
  with :mod:`kvtransfer.kernels`; :mod:`kvtransfer.fence` for copies that go on meanwhile
- :mod:`kvtransfer.codec`, :mod:`kvtransfer.digest` -- rows in fewer bytes, and their checksums
- :mod:`kvtransfer.loop` -- one thread that owns the sockets
- :mod:`kvtransfer.transport` -- how payloads travel: ``shm``, ``zmq``, ``collective``, ``nixl``
- :mod:`kvtransfer.producer`, :mod:`kvtransfer.consumer` -- the two ends
- :mod:`kvtransfer.control` -- how a server process commands the ends in its engine's workers
- :mod:`kvtransfer.adapter` -- the only part that imports vLLM
- :mod:`kvtransfer.example` -- the ends without any of Braid, in two processes
"""
