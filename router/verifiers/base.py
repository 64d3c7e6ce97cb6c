"""The contract of verifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # strategies use verifiers, and their package is imported as a whole
    from router.strategies.run import Run
    from router.strategies.scored import Scored


class Verifier(Protocol):
    """Scores samples. The operator configures verifiers; a request names one of them."""

    @property
    def name(self) -> str:
        """What requests call it."""

    async def score(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[float | None]:
        """One score in [0, 1] a sample, higher is better; None where it is unknown, which never raises.

        ``body`` is the prompt that ``samples``, all of them finished, were drawn from. What the verifier
        generates is drawn through ``run``, so budget, deadline and usage count it; what it asks elsewhere
        ends at the run's deadline. Nothing is kept between calls.

        Raises:
            BraidError: as :meth:`router.strategies.run.Run.draw`; BadRequest: it can't read such a prompt.
        """


@dataclass(frozen=True, slots=True)
class Check:
    """What a verifier says of one sample: a score as of :class:`Verifier`, and why, in words for a model."""

    score: float | None = None
    feedback: str = ""


@runtime_checkable
class Critic(Verifier, Protocol):
    """A verifier that can say why."""

    async def check(self, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]) -> list[Check]:
        """As :meth:`score`, with the reasons."""


async def check(
    verifier: Verifier, run: Run, body: Mapping[str, Any], samples: Sequence[Scored]
) -> list[Check]:
    """What ``verifier`` says of each sample, without reasons if it gives none."""
    if isinstance(verifier, Critic):
        return await verifier.check(run, body, samples)
    return [Check(score) for score in await verifier.score(run, body, samples)]
