"""The evaluation of every strategy: what it asks, and what its retriever finds."""

from __future__ import annotations

import argparse

import httpx

from benchmarks.evaluation import METHODS, Search, command, retriever, solved
from braid.evaluate import methods
from router import strategies

EXAMPLES = [
    {"id": "a", "text": "A", "question": "Ines has 4 boxes of eggs."},
    {"id": "b", "text": "B", "question": "Omar sells apples, and more apples."},
]


def test_every_strategy_has_a_row() -> None:
    asked = {body["reasoning"]["strategy"] for body in METHODS.values()}
    assert asked == set(strategies.names())


def test_the_rows_are_what_braid_eval_takes() -> None:
    options = argparse.Namespace(only=None, count=5, concurrency=2, block=3, run="run")
    given = command(options, "http://127.0.0.1:1")
    rows = [one.removeprefix("--strategy=") for one in given if one.startswith("--strategy=")]
    assert [methods.parse(row).name for row in rows] == list(METHODS)


def test_what_shares_most_words_is_found_first() -> None:
    with retriever(Search(EXAMPLES)) as url:
        reply = httpx.post(url, json={"query": "How many apples does Omar sell?", "k": 1}, trust_env=False)
    (found,) = reply.json()["documents"]
    assert (found["id"], found["text"]) == ("b", "B")


def test_examples_are_of_the_train_split() -> None:
    (one,) = solved(1)
    assert one["id"] == "train-0"
    assert one["question"] in one["text"]
