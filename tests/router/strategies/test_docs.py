"""docs/strategies.md: every strategy and option is in it, and what it shows works."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from braid.settings import RouterSettings
from router import strategies
from router.metrics import Metrics
from router.retrievers import Retrievers
from router.strategies.options import ManyOptions
from router.verifiers import Verifiers
from tests.router.strategies.packages import installed
from tests.router.strategies.scripted import Scripted, ask, sample

PAGE = (Path(__file__).parents[3] / "docs" / "strategies.md").read_text()
EXAMPLES = [json.loads(block)["reasoning"] for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
BUILT_IN = strategies.names()


def section(name: str) -> str:
    return PAGE.partition(f"\n### {name}\n")[2].partition("\n### ")[0].partition("\n## ")[0]


@pytest.mark.parametrize("reasoning", EXAMPLES, ids=lambda example: example["strategy"])
def test_an_example_is_a_valid_request(reasoning: dict[str, object]) -> None:
    strategies.get(str(reasoning["strategy"])).parse(reasoning)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_strategy_has_a_row_a_section_and_an_example_of_it(name: str) -> None:
    assert f"\n| [`{name}`](#{name}) |" in PAGE
    assert f'"strategy": "{name}"' in section(name)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_option_is_told(name: str) -> None:
    common = set(ManyOptions.model_fields)
    own = set(strategies.get(name).options.model_fields) - common
    row = re.search(rf"^\| \[`{name}`\].*\| (.*)\|$", PAGE, re.MULTILINE)
    assert row
    assert {option for option in re.findall(r"`(\w+)`", row[1]) if option != "trigger"} == own
    assert all(f"`{option}`" in section(name) for option in own)
    assert all(f"| `{option}`" in PAGE or f", `{option}`" in PAGE for option in common)


def test_the_verifiers_and_retrievers_it_shows_are_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = next(block for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if "verifiers" in block)
    monkeypatch.setenv("CHECKS_TOKEN", "x")
    monkeypatch.setenv("BRAID_CONFIG", str(tmp_path / "braid.toml"))
    (tmp_path / "braid.toml").write_text(table)
    settings = RouterSettings()
    verifiers = Verifiers(settings.verifiers, Metrics())
    assert {"judge", "unit_tests", "reward", "self", "arithmetic", "logprob"} == set(verifiers.names)
    assert Retrievers(settings.retrievers, Metrics()).names == ("wiki",)
    assert verifiers.get("judge").settings.k == 4  # type: ignore[attr-defined]


@pytest.fixture
def worked_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's example, installed as the page says."""
    code = re.search(r'```python\n("""Second opinion.*?)```', PAGE, re.DOTALL)
    points = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert code
    assert points
    offered = tomllib.loads(points[1])["project"]["entry-points"]["braid.strategies"]
    with installed(tmp_path, monkeypatch, {"second_opinion": code[1]}, offered):
        strategies.load_plugins()
        yield


@pytest.mark.parametrize(
    ("answers", "heard", "winner"),
    [([4, 4, 5, 5, 5], 2, "4"), ([4, 5, 5, 4, 4], 3, "5"), ([1, 2, 3, 4, 5], 5, "1")],
)
async def test_the_worked_example_works(
    worked_example: None, answers: list[int], heard: int, winner: str
) -> None:
    sampler = Scripted([sample(i, f"The answer is {answer}.") for i, answer in enumerate(answers)])
    answer, _ = await ask("second_opinion", sampler)
    assert (answer.report["answer"], len(answer.report["samples"])) == (winner, heard)
    assert answer.report["stopped_early"] == ("agreed" if heard < 5 else None)
