"""How long a scheduling step takes: a linear model, and its fit to measured steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

TERMS = ("step", "sequence", "attended_token", "prefill_token", "request")
"""What seconds are spent on, in the order of an observation's columns."""


class StepModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of a step: ``step`` + ``sequence`` x batch + ``attended_token`` x attended tokens +
    ``prefill_token`` x prompt tokens computed.

    Attended tokens are summed over the tokens that the step computes: a decoding sequence attends to its
    whole context, a chunk of a prompt to about its length times what precedes it. ``source`` says where the
    figures are from.
    """

    step: float
    sequence: float
    attended_token: float
    prefill_token: float
    source: str = ""

    def seconds(self, sequences: int, attended_tokens: int, prefill_tokens: int) -> float:
        """Duration of one step."""
        return (
            self.step
            + self.sequence * sequences
            + self.attended_token * attended_tokens
            + self.prefill_token * prefill_tokens
        )


class Observation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``seconds`` that some consecutive steps took together, and what was in them.

    ``steps``: how many; ``sequences``, ``attended_tokens``, ``prefill_tokens``: summed over them.
    ``requests``: requests whose fixed cost outside the engine (HTTP, rendering, dispatch) is in it.
    """

    steps: float
    sequences: float
    attended_tokens: float
    prefill_tokens: float
    seconds: float
    requests: float = 0.0

    @property
    def row(self) -> tuple[float, ...]:
        """Its columns, in the order of :data:`TERMS`."""
        return self.steps, self.sequences, self.attended_tokens, self.prefill_tokens, self.requests


class Fit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fitted model. ``request_s``: fixed seconds a request spends outside the engine.

    ``residuals``: measured minus modelled seconds, one an observation; ``rmse`` of them; ``r2``: share of
    the variance that is explained.
    """

    model: StepModel
    request_s: float
    residuals: tuple[float, ...]
    rmse: float
    r2: float


class ModelFile(msgspec.Struct, frozen=True):
    """What a file for ``--sim-model-file`` must have; other keys are the measurement's own."""

    model: StepModel


def load_model(path: Path | None) -> StepModel:
    """The model of a file, or :data:`DEFAULT`.

    Raises:
        ValueError: the file can't be read or holds none.
    """
    if path is None:
        return DEFAULT
    try:
        return msgspec.json.decode(path.read_bytes(), type=ModelFile).model
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"{path} holds no step-time model: {error}") from None


def fit(observations: Sequence[Observation], source: str = "") -> Fit:
    """Least squares with coefficients of at least 0, relative to each observation's own seconds.

    Relative, because a long prefill would else outweigh every decode step. Terms that no observation has
    come out as 0.

    Raises:
        ValueError: no observations, or one without a duration.
    """
    if not observations:
        raise ValueError("there is nothing to fit")
    if any(o.seconds <= 0 for o in observations):
        raise ValueError("every observation needs a duration over 0")
    rows = [tuple(x / o.seconds for x in o.row) for o in observations]
    found = nonnegative(rows, [1.0] * len(rows))
    step, sequence, attended, prefill, request_s = found
    residuals = tuple(o.seconds - _dot(found, o.row) for o in observations)
    mean = sum(o.seconds for o in observations) / len(observations)
    spread = sum((o.seconds - mean) ** 2 for o in observations)
    missed = sum(r * r for r in residuals)
    return Fit(
        model=StepModel(step, sequence, attended, prefill, source),
        request_s=request_s,
        residuals=residuals,
        rmse=math.sqrt(missed / len(residuals)),
        r2=1 - missed / spread if spread else 0.0,
    )


def nonnegative(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """The x >= 0 that minimises the sum of squares of ``rows @ x - values``.

    Exact: of a few columns every subset is solved, and the best of those without a negative coefficient is
    the optimum.
    """
    width = len(rows[0])
    columns = [j for j in range(width) if any(row[j] for row in rows)]
    scale = {j: math.sqrt(sum(row[j] ** 2 for row in rows)) for j in columns}
    best, least = [0.0] * width, sum(v * v for v in values)
    for size in range(1, len(columns) + 1):
        for chosen in itertools.combinations(columns, size):
            x = _least_squares([[row[j] / scale[j] for j in chosen] for row in rows], values)
            if x is None or min(x) < 0:
                continue
            full = [0.0] * width
            for j, coefficient in zip(chosen, x, strict=True):
                full[j] = coefficient / scale[j]
            missed = sum((_dot(full, row) - value) ** 2 for row, value in zip(rows, values, strict=True))
            if missed < least * (1 - 1e-12):
                best, least = full, missed
    return best


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float] | None:
    """Solve by QR (modified Gram-Schmidt); None where columns depend on each other."""
    width = len(rows[0])
    q = [[row[j] for row in rows] for j in range(width)]
    r = [[0.0] * width for _ in range(width)]
    for j in range(width):
        for i in range(j):
            r[i][j] = _dot(q[i], q[j])
            q[j] = [b - r[i][j] * a for a, b in zip(q[i], q[j], strict=True)]
        r[j][j] = math.sqrt(_dot(q[j], q[j]))
        if r[j][j] < 1e-7:  # of unit columns: what is left is rounding
            return None
        q[j] = [b / r[j][j] for b in q[j]]
    rest = list(values)
    x = [0.0] * width
    for j in range(width):
        x[j] = _dot(q[j], rest)
        rest = [b - x[j] * a for a, b in zip(q[j], rest, strict=True)]
    for j in reversed(range(width)):
        x[j] = (x[j] - sum(r[j][i] * x[i] for i in range(j + 1, width))) / r[j][j]
    return x


DEFAULT = StepModel(
    step=3.33e-3,
    sequence=4.7e-5,
    attended_token=3.1e-8,
    prefill_token=3.9e-5,
    source="the demo model in float32 on one CPU core, chunks of 512 tokens: fitted to the plain engine's "
    "times in benchmarks/results/handover-20261121-*.json, worst residual 13 %",
)
"""Client-side times of a real vLLM engine: first tokens of 1,000, 4,000 and 16,000 prompt tokens, decoding
one sequence, and groups of 1, 4 and 16. The longer prompts are of slower runs, scaled by what 1,000 tokens
took in both. ``benchmarks/fit_sim.py`` measures a machine of your own."""
