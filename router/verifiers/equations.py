"""Equations in a text, recomputed exactly: ``12 * 34 = 408`` holds, ``7 + 5 = 13`` does not.

Nothing of the text is run as code: numbers, ``+ - * /`` and brackets are read one by one, in time linear in
the text. What is not understood for sure (variables, powers, units between numbers) is passed over, not
judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 32_768
"""Only so many characters at the end of a text are read."""
MAX_EQUATIONS = 256
"""Only so many equals signs of a text are looked at, the last ones."""
MAX_TOKENS = 64
"""An equation with a longer side is passed over."""

_PLAIN = (
    (re.compile(r"\\(?:boxed|text|mathrm|mathbf)\{([^{}]{0,100})\}"), r"\1"),
    (re.compile(r"\\[dt]?frac\{([0-9]{1,40})\}\{([0-9]{1,40})\}"), r"(\1/\2)"),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])|(?<=[0-9)])[ ]?[xX][ ]?(?=[0-9(])"), "*"),
    (re.compile(r"\\div(?![a-zA-Z])"), "/"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:left|right)(?=[()])|\\?[$€£]|\\[,;:! ()\[\]]"), " "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"(?m)^[ \t]{0,40}(?:[-*+•][ \t]|[0-9]{1,3}[.)][ \t])"), "\n"),
)
_TOKEN = (
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}(?![0-9])|[0-9]{1,40}(?![0-9]))(?:\.[0-9]{1,40}(?![0-9]))?%?"
    r"|(?<![0-9])\.[0-9]{1,40}(?![0-9])%?)"
    r"|(?P<power>(?<=[0-9)])\*\*(?=[0-9(]))"
    r"|(?P<bold>\*\*)"
    r"|(?P<sign>[-+*/()−–×·÷])"
    r"|(?P<equals>=)"
    r"|(?P<space>[ \t\u00a0\u2009\u202f]+)"
    r"|(?P<word>[^\W\d_]+)"
    r"|(?P<glue>(?<=[0-9])[.,:'](?=[0-9])|[0-9]+)"
    r"|(?P<end>[\n.,;:?\"'“”‘’`<>|\[\]&#→⇒•])"
    r"|(?P<other>.)"
)
_SIGNS = {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/"}
_BINDING = re.compile(
    r"of|times|plus|minus|over|per|by|divided|squared|cubed|half|twice"
    r"|sqrt|root|log|ln|exp|sin|cos|tan|max|min|abs",
    re.IGNORECASE,
)
"""Words that make the numbers beside them a part of something larger."""


@dataclass(frozen=True, slots=True)
class Equation:
    """``left = right`` as the text has it, spaces aside; ``value`` is what the left side comes to."""

    left: str
    right: str
    value: Fraction
    holds: bool


@dataclass(frozen=True, slots=True)
class _Token:
    """``kind``: number, sign (also a bracket), equals, word, end (of a phrase), or other. ``spaced``: whether
    there is space before it."""

    kind: str
    text: str
    spaced: bool


def equations(text: str) -> list[Equation]:
    """The equations in ``text`` with an operation on a side, in order; of a chain ``a = b = c`` each pair of
    neighbours. A rounded decimal is right only where the exact value has no end: ``2/3 = 0.67``."""
    tokens = list(_tokens(text[-MAX_CHARS:]))
    places = [place for place, token in enumerate(tokens) if token.kind == "equals"][-MAX_EQUATIONS:]
    found = (_judge(_left(tokens, place), _right(tokens, place)) for place in places)
    return [equation for equation in found if equation is not None]


def plain(value: Fraction) -> str:
    """As one would write it: an integer, a decimal that ends, else a fraction."""
    if value.denominator == 1 or not _ends(value):
        return str(value)
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
    digits = str(abs((value * 10**places).numerator)).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _tokens(text: str) -> Iterator[_Token]:
    for pattern, by in _PLAIN:
        text = pattern.sub(by, text)
    spaced = True
    for match in re.compile(_TOKEN, re.DOTALL).finditer(text):  # compiled when first used
        kind = str(match.lastgroup)
        if kind == "space":
            spaced = True
            continue
        kind = {"power": "other", "glue": "other", "bold": "end"}.get(kind, kind)
        yield _Token(kind, _SIGNS.get(match.group(), match.group()), spaced)
        spaced = False


# The sides of an equals sign


def _left(tokens: Sequence[_Token], equals: int) -> Sequence[_Token]:
    """The tokens of the expression that ends at ``equals``; none where it may begin further left."""
    begin, depth = equals, 0
    while begin > 0 and equals - begin <= MAX_TOKENS and tokens[begin - 1].kind in ("number", "sign"):
        depth += {")": 1, "(": -1}.get(tokens[begin - 1].text, 0)
        if depth < 0:
            return tokens[begin:equals]  # an outer bracket opens before the equation
        begin -= 1
    if depth > 0:
        return _after_bracket(tokens[begin:equals], depth)
    side = tokens[begin:equals]
    before = tokens[begin - 1] if begin > 0 else None
    if not side or before is None or before.kind in ("end", "equals"):
        return side
    fresh = before.kind == "word" and not _BINDING.fullmatch(before.text) and side[0].spaced
    return side if fresh and (side[0].kind == "number" or side[0].text == "(") else ()


def _after_bracket(side: Sequence[_Token], depth: int) -> Sequence[_Token]:
    """What follows the bracket that closes something else: ``Step 1) 2 + 3``."""
    for place, token in enumerate(side):
        depth -= {")": 1, "(": -1}.get(token.text, 0)
        if depth == 0:
            rest = side[place + 1 :]
            return rest if rest and rest[0].spaced and rest[0].kind == "number" else ()
    return ()


def _right(tokens: Sequence[_Token], equals: int) -> Sequence[_Token]:
    """The tokens of the expression that begins after ``equals``; none where it may go on further right."""
    begin = end = equals + 1
    depth = 0
    while end < len(tokens) and end - begin <= MAX_TOKENS and tokens[end].kind in ("number", "sign"):
        depth += {"(": 1, ")": -1}.get(tokens[end].text, 0)
        if depth < 0:
            return tokens[begin:end]  # an outer bracket closes after the equation
        end += 1
    side = tokens[begin:end]
    after = tokens[end] if end < len(tokens) else None
    if depth == 1 and side and side[-1].text == "(" and side[-1].spaced:
        return side[:-1]  # a remark in brackets
    if after is None or after.kind in ("end", "equals"):
        return side
    unit = after.kind == "word" and after.spaced and not _BINDING.fullmatch(after.text)
    return side if unit else ()


def _judge(left: Sequence[_Token], right: Sequence[_Token]) -> Equation | None:
    sides = [[token.text for token in side] for side in (left, right)]
    if not all(0 < len(side) <= MAX_TOKENS and _unmixed(side) for side in sides):
        return None
    one, other = (_Reader(side).value() for side in sides)
    if one is None or other is None or not any(map(_operates, sides)):
        return None
    holds = one == other or (len(sides[1]) == 1 and not _ends(one) and _rounds(one, sides[1][0], other))
    return Equation("".join(sides[0]), "".join(sides[1]), one, holds)


def _operates(side: Sequence[str]) -> bool:
    return sum(token[0].isdigit() or token[0] == "." for token in side) > 1


def _unmixed(side: Sequence[str]) -> bool:
    """Whether it is clear what a percentage is of: ``100 - 20%`` may mean 80."""
    numbers = [token for token in side if token[0].isdigit() or token[0] == "."]
    percents = sum(number.endswith("%") for number in numbers)
    return percents in (0, len(numbers)) or not {"+", "-"}.intersection(side)


def _ends(value: Fraction) -> bool:
    """Whether its decimals end."""
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1


def _rounds(exact: Fraction, literal: str, value: Fraction) -> bool:
    places = len(literal.rstrip("%").partition(".")[2]) + (2 if literal.endswith("%") else 0)
    return places > 0 and abs(exact - value) <= Fraction(1, 2 * 10**places)


class _Reader:
    """Reads one expression by recursive descent; as deep as it has brackets or signs, at most
    :data:`MAX_TOKENS`."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = tokens
        self._at = 0

    def value(self) -> Fraction | None:
        """What it comes to; None if it is no expression, or divides by zero."""
        try:
            value = self._sum()
        except (ValueError, IndexError, ZeroDivisionError):
            return None
        return value if self._at == len(self._tokens) else None

    def _sum(self) -> Fraction:
        value = self._product()
        while self._next() in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while self._next() in ("*", "/"):
            value = value * self._factor() if self._take() == "*" else value / self._factor()
        return value

    def _factor(self) -> Fraction:
        token = self._take()
        if token in ("+", "-"):
            return self._factor() if token == "+" else -self._factor()
        if token == "(":
            value = self._sum()
            if self._take() != ")":
                raise ValueError(token)
            return value
        percent = token.endswith("%")
        value = Fraction(token.rstrip("%").replace(",", ""))
        return value / 100 if percent else value

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1]
