r"""Finding the answer in a generated text.

``auto`` tries, in this order: ``\boxed{}``, "the answer is", ``####`` (GSM8K), a JSON field, a choice
letter on the last line, the last number. Within each the last occurrence counts. A text that was cut off
at its token limit has no last number worth a vote, so there ``auto`` keeps to marked answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

from braid.errors import BadRequest
from braid.thinking import without_thinking
from router.bounded import BoundedProcess, LimitExceeded

ExtractorName = Literal["auto", "boxed", "answer_is", "hashes", "json", "choice", "last_number", "regex"]
EXTRACTORS: tuple[str, ...] = get_args(ExtractorName)
MAX_TEXT = 32_768
"""Only so many characters at the end of a text are looked at."""
MAX_ANSWER = 500
"""A longer find is prose, not an answer."""
MAX_PATTERN = 200
"""Longest regular expression of a caller, in characters."""

_patterns = BoundedProcess(limit_s=0.25)

_BRACES = re.compile(r"\\f?boxed\s*\{|\\.|[{}]", re.DOTALL)
_BOXED_BARE = re.compile(r"\\f?boxed\s+([^\s{}$\\]+)")
_ANSWER_IS = re.compile(r"\banswer\b\*{0,2}\s{0,4}(?:is\b\s{0,4}:?|[:=])\*{0,2}\s{0,8}", re.I)
_SENTENCE_END = re.compile(r"[.!?](?=[\s*\"')]|$)|,?\s(?:because|since|so|which|as)\b")
_HASHES = re.compile(r"####[ \t]{0,8}")
_FIELDS = ("answer", "final_answer", "result")
_CHOICE_LINE = re.compile(
    r"\W*(?:(?:option|choice|answer)\s{0,4}[:=]?\s{0,4})?(?:\(([A-J])\)|([A-J]))\s?[.):]?\W*", re.I
)
_CHOICE = re.compile(
    r"\(([A-J])\)|\b(?:option|choice|answer(?: is)?)\s{0,4}:?\s{0,4}\(?([A-J])\b|^\(?([A-J])[.):]", re.M
)
_LAST_NUMBER = re.compile(
    r"(?<![\w.,])[-−]?[$€£]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?%?"
)


def boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{}`` or ``\fbox{}`` whose braces balance, of the innermost where one
    holds nothing but another; else of a bare ``\boxed 5``."""
    stack: list[re.Match[str]] = []
    opened, found = -1, None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            start = stack.pop() if stack else None
            if start is None or start.group() == "{":
                continue
            only_a_box = opened >= start.end() and not text[start.end() : opened].strip()
            if not only_a_box:
                found = text[start.end() : match.start()]
            opened = start.start()
        elif token.endswith("{") and token != r"\{":
            stack.append(match)
    if found is not None:
        return found
    bare = _BOXED_BARE.findall(text)
    return bare[-1] if bare else None


def answer_is(text: str) -> str | None:
    """What follows the last "answer is" (or "answer:"), up to the end of its sentence."""
    line = _after_last(_ANSWER_IS, text)
    return None if line is None else _SENTENCE_END.split(line, maxsplit=1)[0]


def hashes(text: str) -> str | None:
    """What follows the last ``####`` on its line."""
    return _after_last(_HASHES, text)


def _after_last(marker: re.Pattern[str], text: str) -> str | None:
    end = None
    for match in marker.finditer(text):
        end = match.end()
    return None if end is None else text[end : end + 2_000].partition("\n")[0]


def json_field(text: str) -> str | None:
    """Field ``answer``, ``final_answer`` or ``result`` of the last JSON object that has one."""
    if not any(f'"{name}"' in text for name in _FIELDS):
        return None
    decoder = json.JSONDecoder()
    found, start = None, text.find("{")
    for _ in range(100):  # each failed start may scan to the end
        if start < 0:
            break
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            found = next((value[name] for name in _FIELDS if value.get(name) is not None), found)
        start = text.find("{", end)
    return found if found is None or isinstance(found, str) else json.dumps(found, sort_keys=True)


def choice(text: str) -> str | None:
    """The last choice letter A to J: ``(B)``, ``B.`` at the start of a line, ``option B``."""
    line = choice_line(text)
    if line is not None:
        return line
    found = ["".join(groups) for groups in _CHOICE.findall(text)]
    return found[-1] if found else None


def choice_line(text: str) -> str | None:
    """A choice letter that stands alone on the last line."""
    lines = text.strip().splitlines()
    match = _CHOICE_LINE.fullmatch(lines[-1][:80]) if lines else None
    return (match[1] or match[2]).upper() if match else None


def last_number(text: str) -> str | None:
    """The last number, with its sign, thousands separators, fraction and percent sign."""
    found = _LAST_NUMBER.findall(text)
    return found[-1] if found else None


_NAMED: dict[str, Callable[[str], str | None]] = {
    "boxed": boxed,
    "answer_is": answer_is,
    "hashes": hashes,
    "json": json_field,
    "choice": choice,
    "last_number": last_number,
}


def automatic(text: str) -> str | None:
    """The first that one of the ways finds, in the order of the chain."""
    for find in (boxed, answer_is, hashes, json_field, choice_line, last_number):
        answer = _tidy(find(text))
        if answer is not None:
            return answer
    return None


def automatic_truncated(text: str) -> str | None:
    """As :func:`automatic`, of a text whose last word may be half a word: only marked answers count."""
    whole_words = text[: max(text.rfind(" "), text.rfind("\n")) + 1]
    for find, part in ((boxed, text), (answer_is, whole_words), (hashes, whole_words), (json_field, text)):
        answer = _tidy(find(part))
        if answer is not None:
            return answer
    return None


async def extract(
    text: str, extractor: ExtractorName = "auto", pattern: str | None = None, truncated: bool = False
) -> str | None:
    """The answer in ``text``, None if there is none.

    Args:
        text: what the model generated.
        extractor: which way to look; ``regex`` uses ``pattern`` (its group ``answer``, else its first
            group, else the whole match; the last match counts).
        truncated: the text ended at its token limit.

    Raises:
        BadRequest: the pattern is invalid or needs more than 0.25 s of processor time.
    """
    text = without_thinking(text)[-MAX_TEXT:]
    if extractor == "regex":
        return _tidy(await search(pattern or "", text))
    if extractor == "auto":
        return automatic_truncated(text) if truncated else automatic(text)
    return _tidy(_NAMED[extractor](text))


async def search(pattern: str, text: str, field: str = "reasoning.pattern") -> str | None:
    """The caller's pattern in ``text``, in a process that can be killed; raises as :func:`extract`, naming
    ``field``."""
    if len(pattern) > MAX_PATTERN:
        raise BadRequest(f"pattern is over {MAX_PATTERN} characters", param=field)
    try:
        result: Any = await _patterns.call({"op": "search", "pattern": pattern, "text": text})
    except LimitExceeded:
        raise BadRequest("pattern takes too long: avoid nested repetition", param=field) from None
    if result is None or "invalid" in result:
        raise BadRequest("pattern is not a regular expression of Python's re module", param=field)
    found: str | None = result["found"]
    return found


def _tidy(answer: str | None) -> str | None:
    if answer is None:
        return None
    answer = answer.strip().strip("*").strip()
    return answer if answer and len(answer) <= MAX_ANSWER else None
