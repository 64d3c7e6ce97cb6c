"""Writes blocks into a paged cache in host memory, past the CPU's caches, in one call for all layers.

A row written by ordinary stores is read first: the core fetches each cache line that it is about to
overwrite. Blocks that come over the wire are written once and read much later, so streaming (non-temporal)
stores save that third of the traffic and leave the model's working set in the caches. NumPy has none below
several megabytes in a row, so these are a few lines of LLVM IR, compiled when first used (llvmlite comes with
vLLM). The call holds no interpreter lock.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger("braid.kvtransfer")

STEP = 128
"""Rows are a multiple of this many bytes."""
ALIGN = 16
"""Targets start at multiples of this many bytes."""

WriteBlocks = Callable[[int, int, int, int, int, int, int, int, int], None]
"""``(layers, count, starts, ids, block_bytes, rows, layer_stride, block_stride, row_bytes)``.

For each layer ``l`` and each ``b`` below ``count``, copies ``row_bytes`` from
``rows + l * layer_stride + b * block_stride`` to ``starts[l] + ids[b] * block_bytes``. ``starts`` and ``ids``
are addresses of arrays of int64.
"""

_LANES = range(STEP // 16)
_AHEAD = 4096
"""Bytes by which reading runs ahead: the next page, which the CPU does not guess."""

_IR = f"""
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

define void @write_blocks(i64 %layers, i64 %count, ptr %starts, ptr %ids, i64 %block_bytes,
                          ptr %rows, i64 %layer_stride, i64 %block_stride, i64 %row_bytes) {{
entry:
  br label %layer
layer:
  %l = phi i64 [ 0, %entry ], [ %l_next, %layer_end ]
  %start_at = getelementptr i64, ptr %starts, i64 %l
  %start = load i64, ptr %start_at
  %from_layer = mul i64 %l, %layer_stride
  br label %block
block:
  %b = phi i64 [ 0, %layer ], [ %b_next, %block_end ]
  %id_at = getelementptr i64, ptr %ids, i64 %b
  %id = load i64, ptr %id_at
  %to_block = mul i64 %id, %block_bytes
  %to = add i64 %start, %to_block
  %target = inttoptr i64 %to to ptr
  %from_block = mul i64 %b, %block_stride
  %from = add i64 %from_layer, %from_block
  %source = getelementptr i8, ptr %rows, i64 %from
  br label %step
step:
  %i = phi i64 [ 0, %block ], [ %i_next, %step ]
  %t = getelementptr i8, ptr %target, i64 %i
  %s = getelementptr i8, ptr %source, i64 %i
  {
    " ".join(
        f'''
  %s{n} = getelementptr i8, ptr %s, i64 {16 * n}
  %v{n} = load <16 x i8>, ptr %s{n}, align 1'''
        for n in _LANES
    )
}
  {
    " ".join(
        f'''
  %t{n} = getelementptr i8, ptr %t, i64 {16 * n}
  store <16 x i8> %v{n}, ptr %t{n}, align {ALIGN}, !nontemporal !0'''
        for n in _LANES
    )
}
  {
    " ".join(
        f'''
  %p{n} = getelementptr i8, ptr %s, i64 {_AHEAD + n}
  call void @llvm.prefetch.p0(ptr %p{n}, i32 0, i32 0, i32 1)'''
        for n in range(0, STEP, 64)
    )
}
  %i_next = add i64 %i, {STEP}
  %more = icmp ult i64 %i_next, %row_bytes
  br i1 %more, label %step, label %block_end
block_end:
  %b_next = add i64 %b, 1
  %more_blocks = icmp ult i64 %b_next, %count
  br i1 %more_blocks, label %block, label %layer_end
layer_end:
  %l_next = add i64 %l, 1
  %more_layers = icmp ult i64 %l_next, %layers
  br i1 %more_layers, label %layer, label %end
end:
  fence seq_cst  ; streaming stores are seen by other cores before whatever is stored next
  ret void
}}

!0 = !{{i32 1}}
"""


@functools.cache
def compiled() -> WriteBlocks | None:
    """The compiled function, or None where there is no llvmlite.

    The caller answers for every address: at least one layer, block and :data:`STEP`; rows are whole multiples
    of :data:`STEP`, targets are aligned to :data:`ALIGN` and overlap no source.
    """
    try:
        from llvmlite import binding as llvm
    except ImportError:
        log.info("kv_ordinary_stores", extra={"detail": "llvmlite is not installed"})
        return None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(_IR)
    module.verify()
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    signature: Any = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 9)
    call = signature(engine.get_function_address("write_blocks"))
    call.engine = engine  # owns the code
    return call  # type: ignore[no-any-return]
