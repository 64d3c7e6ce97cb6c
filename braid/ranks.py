"""Which KV heads a tensor-parallel rank holds, and who reads them from whom. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadRun:
    """Heads ``[first, last)`` of a producer's rank become a consumer rank's heads from ``put`` on."""

    rank: int
    first: int
    last: int
    put: int


def heads_of(heads: int, ranks: int, rank: int) -> range:
    """The model's KV heads that a rank holds: an equal share, or one that several ranks hold alike.

    Raises:
        ValueError: neither number is a multiple of the other.
    """
    if heads % ranks and ranks % heads:
        raise ValueError(f"{heads} KV heads over {ranks} ranks")
    share = max(1, heads // ranks)
    first = rank * heads // ranks
    return range(first, first + share)


def head_runs(heads: int, producers: int, consumers: int, rank: int) -> list[HeadRun]:
    """What a consumer's rank reads from the producer's ranks, in the order of its heads.

    Where producers hold a head alike, consumers spread over them. ``heads`` 0 says that the heads of a
    block can't be told apart: then each rank reads from its like.

    Raises:
        ValueError: these two can't be paired; the message says why.
    """
    if heads == 0:
        if producers != consumers:
            raise ValueError(
                f"tensor-parallel degrees {producers} and {consumers}: this KV cache can't be split by head"
            )
        return [HeadRun(rank, 0, 1, 0)]
    mine, found = heads_of(heads, consumers, rank), list[HeadRun]()
    share, alike = max(1, heads // producers), max(1, producers // heads)
    for head in mine:
        owner = head // share * alike + rank % alike
        first = head - heads_of(heads, producers, owner).start
        if found and found[-1].rank == owner:
            found[-1] = HeadRun(owner, found[-1].first, first + 1, found[-1].put)
        else:
            found.append(HeadRun(owner, first, first + 1, head - mine.start))
    return found


def readers(heads: int, producers: int, consumers: int) -> list[int]:
    """How many of a consumer's ranks read from each of the producer's.

    Raises:
        ValueError: these two can't be paired; the message says why.
    """
    counts = [0] * producers
    for rank in range(consumers):
        for run in head_runs(heads, producers, consumers, rank):
            counts[run.rank] += 1
    if 0 in counts:
        raise ValueError(
            f"{consumers} decode ranks would leave some of {producers} prefill ranks unread, as these hold "
            f"copies of {heads} KV heads: give decode at least as many ranks, or prefill fewer"
        )
    return counts
