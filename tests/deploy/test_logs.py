"""How the end of a process is told from its log."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.logs import advice, first_error, last_lines

FP8 = """\
{"event": "engine_starting", "model": "demo/model"}
(MainProcess pid=9) INFO 11-29 17:54:26 [cache.py:361] Using fp8 data type to store kv cache.
(Worker pid=7) ERROR 11-29 17:54:43 [multiproc_executor.py:1063]     raise NotImplementedError(
(Worker pid=7) ERROR 11-29 17:54:43 [multiproc_executor.py:1063] NotImplementedError: FP8 KV cache on CPU \
requires x86 with AVX-512 or AMX.
(EngineCore pid=8) ERROR 11-29 17:54:43 [core.py:1510] RuntimeError: Worker failed with error 'FP8 KV cache'
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked shared_memory objects
  warnings.warn('resource_tracker: There appear to be %d '
""".splitlines()


def test_the_first_error_of_a_log_is_the_cause() -> None:
    assert first_error(FP8) == "NotImplementedError: FP8 KV cache on CPU requires x86 with AVX-512 or AMX"
    assert first_error(["zmq.error.ZMQError: Address already in use (addr='tcp://*:1')"]).startswith(
        "zmq.error"
    )
    assert first_error(["all is well", "no Error here", "Traceback (most recent call last):"]) == ""


@pytest.mark.parametrize(
    ("end", "wanted"),
    [
        ("\n".join(FP8), "kv-cache-dtype"),
        ("\n".join(FP8[-3:]), "braid doctor"),
        (
            "ValueError: Available memory on node 0 (1.0/2.0 GiB) on startup is less than desired",
            "--decode 1",
        ),
        ("OSError: [Errno 12] Cannot allocate memory", "--decode 1"),
        ("OSError: [Errno 98] Address already in use", "--port"),
        ("ModuleNotFoundError: No module named 'vllm'", "make install"),
    ],
)
def test_the_advice_fits_the_end(end: str, wanted: str) -> None:
    assert wanted in advice(end)


def test_lines_of_an_earlier_life_are_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("ValueError: of the first life\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("KeyError: of the second life\n")
    assert first_error(last_lines(log, 1000, start)) == "KeyError: of the second life"
    assert last_lines(log, 1000) == ["ValueError: of the first life", "KeyError: of the second life"]
    assert last_lines(tmp_path / "none", 3) == []
