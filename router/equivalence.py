"""When two answers are the same: canonical keys.

Equality of answers is equality of their keys, so it is reflexive, symmetric and transitive, and a vote
does not depend on the order in which answers arrive. (math-verify's own ``verify`` compares pairs with
tolerances and is not transitive; its parser is what is used here.)

Numbers are compared by value (``1,234`` = ``1234.0``; ``50%`` = ``1/2``; a unit after a number is
dropped: ``18 dollars`` = ``$18``), mathematical expressions by their simplified form, and everything else
by its text without case, markup and outer punctuation.
"""

from __future__ import annotations

import asyncio
import re
from fractions import Fraction

from router.bounded import BoundedProcess, LimitExceeded

MAX_EXPRESSION = 200
"""Longest text in characters that is tried as a mathematical expression."""

_CACHED = 4096
_cache: dict[str, str | None] = {}
_algebra = BoundedProcess(limit_s=2.0)

_CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "⁄": "/", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "％": "%"}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
_QUOTES = " *_`\"'“”‘’$€£"
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|\\(?:left|right)(?![a-zA-Z])|\^\{?\\circ\}?|\\(?=[$%])")
_SHORT_FRAC = re.compile(r"\\[dt]?frac\s*([0-9])\s*([0-9])(?![0-9])")
_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_ASSIGNED = re.compile(r"[A-Za-z]\s*=[\s$€£]*")
_UNIT = re.compile(
    r"(?:\s+(?!(?:sin|cos|tan|log|exp|sqrt|and|plus|minus|times|over)\b)[A-Za-z]{3,20}"
    r"|\s*(?:km|cm|mm|kg|mg|ml|ft|lbs?|oz|hrs?|mins?|am|pm)\b)(?:(?:[ /]|\^?[23])[A-Za-z]{0,15}){0,4}"
)
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?:(?P<whole>[0-9]{1,30})\s+(?=[0-9]+\s*/))?"
    r"(?P<value>(?:[0-9]{1,3}(?:[, ][0-9]{3}){1,10}(?![0-9])|[0-9]{1,60})(?:\.[0-9]{0,60})?|\.[0-9]{1,60})"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,2}))?"
    r"(?:\s*/\s*(?P<below>[0-9]{1,60}))?(?:\s*(?P<percent>%|percent\b))?"
)
_MATHEMATICAL = re.compile(r"[\\0-9^=<>+*/{}()\[\]√π-]")
_FUNCTIONS = frozenset({"sin", "cos", "tan", "log", "ln", "exp", "sqrt", "pi", "max", "min", "frac"})


def clean(answer: str) -> str:
    """``answer`` without the markup around it: LaTeX delimiters and spacing, bold, currency, outer
    quotes, brackets around one letter, closing punctuation."""
    text = _TEXT.sub(r" \1 ", answer.translate(_CHARACTERS)).replace("{,}", ",")
    text = _outer(" ".join(_SPACING.sub(" ", text).split()))
    for left, right in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right):
            text = _outer(text[len(left) : -len(right)])
    return text.strip("()") if re.fullmatch(r"\(?[A-Za-z]\)?", text) else text


def _outer(text: str) -> str:
    return text.lstrip(_QUOTES + "=").rstrip(_QUOTES + ".,;:?")


def number(text: str) -> Fraction | None:
    """The value of a cleaned answer that is one plain number (with thousands separators, a fraction, a
    mixed number, an exponent of two digits, a percent sign or a unit), else None."""
    text = _FRAC.sub(r" \1/\2", _SHORT_FRAC.sub(r" \1/\2", text)).strip()
    assigned = _ASSIGNED.match(text)
    text = text[assigned.end() :] if assigned else text
    match = _NUMBER.match(text)
    if match is None or (match.end() < len(text) and not _UNIT.fullmatch(text, match.end())):
        return None
    below = int(match["below"] or 1)
    if below == 0 or (match["whole"] and "." in match["value"]):
        return None
    value = Fraction(re.sub("[, ]", "", match["value"])) * Fraction(10) ** int(match["exponent"] or 0)
    value = int(match["whole"] or 0) + value / below
    value = value / 100 if match["percent"] else value
    return -value if match["sign"] == "-" else value


async def canonical(answer: str, limit_s: float = 10.0) -> str:
    """The key of an answer: two answers are the same when their keys are equal.

    An expression that takes longer than ``limit_s``, or 2 s of processor time, is compared by its text.
    Never raises.
    """
    text = clean(answer)
    value = number(text)
    if value is not None:
        return f"={value}"
    plain = f"'{text.casefold()}"
    if not _is_expression(text):
        return plain
    if text not in _cache:
        try:
            form = await asyncio.wait_for(_algebra.call({"op": "symbolic", "text": text}), limit_s)
        except TimeoutError:
            return plain
        except LimitExceeded:
            form = None
        while len(_cache) >= _CACHED:
            del _cache[next(iter(_cache))]
        _cache[text] = form
    return _cache[text] or plain


def _is_expression(text: str) -> bool:
    """Whether the algebra should look at it: short, with an operator or a digit, and without words
    (``3 and 4`` and ``3 4`` would become products)."""
    if len(text) > MAX_EXPRESSION or not _MATHEMATICAL.search(text) or re.search("[0-9] [0-9]", text):
        return False
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", text))
    return all(word in _FUNCTIONS for word in words)
