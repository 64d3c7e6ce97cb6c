from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, ClassVar

import pytest
from pydantic import Field, create_model

from braid.errors import BadRequest
from braid.settings import RouterSettings
from router import strategies
from router.strategies.options import TRIGGER, ManyOptions


def test_the_strategies_that_need_groups_of_the_prompt_only() -> None:
    expected = """
        direct cot self_consistency best_of_n adaptive_consistency early_stopping_consistency
        universal_consistency mbr rejection_sampling rollouts car first_finish self_refine mixture_of_agents
    """
    assert set(expected.split()) <= set(strategies.names())
    assert all(strategies.get(name).name == name for name in strategies.names())


@pytest.mark.parametrize("name", strategies.names())
def test_a_name_alone_is_enough_but_where_a_check_must_be_given(name: str) -> None:
    if name == "rejection_sampling":
        with pytest.raises(BadRequest, match="nothing is rejected"):
            strategies.get(name).parse({})
    else:
        strategies.get(name).parse({})


@pytest.mark.parametrize("name", strategies.names())
def test_a_strategy_tells_its_source(name: str) -> None:
    run = strategies.get(name).run
    assert name == "direct" or "arXiv" in (run.__doc__ or "")


@pytest.mark.parametrize("told", strategies.describe(trigger="Think."))
def test_the_list_tells_name_parameters_and_schema(told: dict[str, Any]) -> None:
    json.dumps(told, allow_nan=False)
    assert told["description"].endswith(".")
    assert "\n" not in told["description"]
    parameters = {one["name"]: one for one in told["parameters"]}
    assert parameters.keys() == told["schema"]["properties"].keys()
    assert all(one["description"] for one in parameters.values())
    if "trigger" in parameters:
        assert parameters["trigger"]["default"] == "Think."


@pytest.mark.parametrize("name", ["", "majority", "run", "__class__", None, ["cot"]])
def test_an_unknown_name_is_refused_with_the_list(name: Any) -> None:
    with pytest.raises(BadRequest, match="self_consistency"):
        strategies.get(name)


def test_options_are_read_and_the_strategy_s_name_passed_over() -> None:
    options = strategies.get("self_consistency").parse({"strategy": "self_consistency", "n": 16})
    assert options.n == 16


@pytest.mark.parametrize(
    ("name", "reasoning", "param"),
    [
        ("self_consistency", {"n": 0}, "reasoning.n"),
        ("cot", {"n": 2}, "reasoning.n"),
        ("self_consistency", {"samples": 3}, "reasoning.samples"),
        ("best_of_n", {"reward": "Secret!"}, "reasoning.reward"),
        ("best_of_n", {"weight": "uniform"}, "reasoning.weight"),
        ("cot", {"deadline_s": float("inf")}, "reasoning.deadline_s"),
        ("cot", {"extractor": "regex"}, "reasoning"),
        ("cot", {"pattern": "secret"}, "reasoning"),
        ("cot", {"extractor": "regex", "pattern": "secret" * 40}, "reasoning.pattern"),
    ],
)
def test_a_wrong_option_is_refused_by_name_and_not_echoed(
    name: str, reasoning: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        strategies.get(name).parse(reasoning)
    assert caught.value.param == param
    assert "secret" not in caught.value.message.lower()


@pytest.mark.parametrize("name", strategies.names())
def test_every_option_is_documented(name: str) -> None:
    fields = strategies.get(name).options.model_json_schema()["properties"]
    assert {"n", "budget_tokens", "deadline_s", "early_stop", "extractor", "on_failure"} <= set(fields)
    assert all(field.get("description") for field in fields.values())


def test_an_option_is_described_by_its_docstring_unless_its_field_says_more() -> None:
    class Mine(ManyOptions):
        limit: ClassVar[int] = 3
        """No option."""
        n: int = Field(4, ge=1)
        """Mine."""
        said: int = Field(1, description="By the field.")
        """By the docstring."""
        bare: int = 0

    fields = Mine.model_json_schema()["properties"]
    assert (fields["n"]["description"], fields["said"]["description"]) == ("Mine.", "By the field.")
    assert fields["trigger"]["description"].startswith("What makes the model reason")
    assert "description" not in fields["bare"]
    assert "limit" not in fields


def test_options_without_a_source_have_no_descriptions_of_their_own() -> None:
    made = create_model("Made", __base__=ManyOptions, extra=(int, 1))
    fields = made.model_json_schema()["properties"]
    assert "description" not in fields["extra"]
    assert fields["n"]["description"] == "Samples of the prompt."


def test_the_trigger_is_the_router_s_default() -> None:
    assert RouterSettings.model_fields["trigger"].default == TRIGGER


def test_importing_the_strategies_does_not_load_the_algebra() -> None:
    check = "import sys, router.strategies; sys.exit('sympy' in sys.modules or 'math_verify' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
