"""Thinking text in a reply."""

from __future__ import annotations


def without_thinking(text: str) -> str:
    """What follows the last ``</think>``; nothing if a ``<think>`` was never closed."""
    _, closed, rest = text.rpartition("</think>")
    if closed:
        return rest
    return text.partition("<think>")[0]
