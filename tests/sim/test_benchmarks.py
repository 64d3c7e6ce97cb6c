"""The scripts around simulated engines: the fit of a live server, and the fleet at scale."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from benchmarks import fit_sim, sim_scale
from braid.sim.model import DEFAULT, Observation, load_model
from tests.sim.conftest import Fleet

pytestmark = pytest.mark.slow


def test_steps_behind_a_request_give_its_model_back() -> None:
    def of(observation: Observation) -> float:
        columns = observation.row
        model = (DEFAULT.step, DEFAULT.sequence, DEFAULT.attended_token, DEFAULT.prefill_token, 0.02)
        return float(sum(a * b for a, b in zip(columns, model, strict=True)))

    measured = []
    for length in fit_sim.LENGTHS:
        seconds = of(fit_sim.prefill_steps(length, 512, 1.0))
        measured.append(fit_sim.Measurement("prefill", length, 1, [seconds]))
    for context in fit_sim.CONTEXTS:
        for width in fit_sim.WIDTHS:
            seconds = of(fit_sim.decode_steps(context, width, 1.0))
            measured.append(fit_sim.Measurement("decode", context, width, [seconds]))
    result = fit_sim.report(fit_sim._with_steps(measured, 512), "demo", False, 512)
    assert result["model"]["step"] == pytest.approx(DEFAULT.step, rel=1e-3)
    assert result["model"]["attended_token"] == pytest.approx(DEFAULT.attended_token, rel=1e-3)
    assert result["request_s"] == pytest.approx(0.02, rel=1e-3)


@pytest.mark.slow
async def test_a_live_server_is_fitted_and_a_simulated_one_is_named_so(fleet: Fleet, tmp_path: Path) -> None:
    await fleet.pairs(sim_time_scale=0.3)
    out = tmp_path / "model.json"
    arguments = [fleet.stand.url, "--repeats", "1", "--limit-s", "60", "--out", str(out)]
    assert await asyncio.to_thread(fit_sim.main, arguments) == 0
    told = msgspec.json.decode(out.read_bytes())
    assert told["simulated"]
    assert len(told["measurements"]) == 6 + 12
    found = load_model(out)
    wide = found.seconds(32, 32 * 1024, 0) / (0.3 * DEFAULT.seconds(32, 32 * 1024, 0))
    assert 0.5 < wide < 30  # a busy machine is slow, never fast; the bound above is for units


async def test_a_server_that_answers_nothing_is_no_model(fleet: Fleet, tmp_path: Path) -> None:
    await fleet.pairs()
    out = tmp_path / "model.json"
    arguments = [fleet.stand.url, "--limit-s", "0", "--out", str(out)]
    assert await asyncio.to_thread(fit_sim.main, arguments) == 1
    assert not out.exists()


def test_the_same_seed_plans_the_same_groups() -> None:
    one, other = sim_scale.plan(200, 40.0, 3), sim_scale.plan(200, 40.0, 3)
    assert one == other
    assert {ask.n for ask in one} == {1, 4, 8, 16, 64}
    assert 0.1 < sum(ask.deadline_s > 0 for ask in one) / 200 < 0.3
    assert one[-1].at == pytest.approx(5.0, rel=0.4)


@pytest.mark.slow
def test_a_small_fleet_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    sizes = ["--groups", "30", "--rate", "30", "--prefill", "1", "--decode", "3"]
    assert sim_scale.main([*sizes, "--time-scale", "0.2", "--out", str(out)]) == 0
    told = msgspec.json.decode(out.read_bytes())
    assert told["simulated"]
    assert sum(told["statuses"].values()) == 30
    free = [one for one in told["outcomes"] if not one["ask"]["deadline_s"]]  # a busy machine is late
    assert {(one["status"], one["path"]) for one in free} == {(200, "remote")}
    assert told["router"]["cpu_s"] > 0
