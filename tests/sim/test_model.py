"""The step-time model and its fit."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from braid.sim.model import DEFAULT, ModelFile, Observation, StepModel, fit, load_model, nonnegative

TRUE = StepModel(0.004, 0.0003, 5e-8, 0.0002)
REQUEST_S = 0.015


def observed(noise: float = 0.0, seed: int = 0) -> list[Observation]:
    """Prefills of several lengths in chunks of 512, and decode at several widths and contexts."""
    rng = random.Random(seed)
    rows = []
    for length in (64, 300, 512, 1500, 4000):
        ends = [*range(512, length, 512), length]
        rows.append((len(ends), len(ends), length * (length + 1) / 2, length, 1.0))
    for width in (1, 2, 4, 8, 16):
        for context in (100, 1000):
            rows.append((31, 31 * width, 31 * width * context, 0, 0.0))
    found = []
    for steps, sequences, contexts, prefill, requests in rows:
        seconds = (
            TRUE.step * steps
            + TRUE.sequence * sequences
            + TRUE.attended_token * contexts
            + TRUE.prefill_token * prefill
            + REQUEST_S * requests
        ) * (1 + rng.uniform(-noise, noise))
        found.append(Observation(steps, sequences, contexts, prefill, seconds, requests))
    return found


def test_exact_steps_give_the_exact_model() -> None:
    found = fit(observed())
    for name in ("step", "sequence", "attended_token", "prefill_token"):
        assert getattr(found.model, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)
    assert found.request_s == pytest.approx(REQUEST_S, rel=1e-6)
    assert found.rmse < 1e-9
    assert found.r2 == pytest.approx(1)


def test_noise_of_a_few_percent_moves_the_model_little() -> None:
    found = fit(observed(noise=0.03))
    predicted = found.model.seconds(8, 8 * 500, 0)
    assert predicted == pytest.approx(TRUE.seconds(8, 8 * 500, 0), rel=0.05)
    assert max(abs(r) for r in found.residuals) < 0.05


def test_what_was_never_seen_costs_nothing() -> None:
    only_decode = [o for o in observed() if not o.prefill_tokens]
    assert fit(only_decode).model.prefill_token == 0
    assert fit(only_decode).request_s == 0


@pytest.mark.parametrize("rows", [[], [Observation(1, 1, 1, 1, 0.0)]])
def test_what_can_not_be_fitted_is_refused(rows: list[Observation]) -> None:
    with pytest.raises(ValueError, match=r"nothing to fit|duration over 0"):
        fit(rows)


numbers = st.floats(-10, 10, allow_nan=False, width=32)


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=8))
def test_no_nonnegative_point_is_better(rows: list[tuple[float, ...]]) -> None:
    *columns, values = zip(*rows, strict=True)
    table = list(zip(*columns, strict=True))

    def missed(x: list[float]) -> float:
        told = [sum(a * b for a, b in zip(x, row, strict=True)) for row in table]
        return float(sum((a - b) ** 2 for a, b in zip(told, values, strict=True)))

    best = nonnegative(table, values)
    assert min(best) >= 0
    least = missed(best)
    for j in range(3):
        for step in (1e-3, -1e-3):
            moved = list(best)
            moved[j] = max(0.0, moved[j] + step)
            assert least <= missed(moved) + 1e-6 * (1 + least)


def test_a_model_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(msgspec.json.encode({"model": msgspec.to_builtins(TRUE), "residuals": []}))
    assert load_model(path) == TRUE
    assert load_model(None) == DEFAULT
    assert msgspec.convert({"model": msgspec.to_builtins(TRUE)}, ModelFile).model == TRUE


@pytest.mark.parametrize("text", ["{}", '{"model": {"step": 1}}', "nothing"])
def test_a_file_without_a_model_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no step-time model"):
        load_model(path)
    with pytest.raises(ValueError, match="holds no step-time model"):
        load_model(tmp_path / "none.json")
