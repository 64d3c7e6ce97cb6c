"""The child of :class:`router.bounded.BoundedProcess`: one JSON job a line in, one JSON result a line out.

Run by path, so that it imports nothing of the router. ``SIGPROF`` keeps its default action: the kernel
ends the process at the limit of processor time, also inside a C function that does not return to the
interpreter.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from typing import Any

MEMORY_BYTES = 2 * 1024**3


def search(pattern: str, text: str) -> dict[str, Any]:
    """The last match of ``pattern``: group ``answer``, else the first group that took part, else all."""
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return {"invalid": str(error)}
    last = None
    for match in compiled.finditer(text):
        last = match
    if last is None:
        return {"found": None}
    named = last.groupdict().get("answer")
    taken = [group for group in (named, *last.groups()) if group is not None]
    return {"found": taken[0] if taken else last.group()}


def schema(schema: Any, text: str) -> dict[str, Any]:
    """Whether ``text`` is JSON that conforms to ``schema``; references lead nowhere but into it."""
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
    from jsonschema.exceptions import SchemaError  # type: ignore[import-untyped]
    from referencing import Registry

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return {"invalid": error.message}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {"valid": False}
    return {"valid": Draft202012Validator(schema, registry=Registry()).is_valid(value)}


def symbolic(text: str) -> str | None:
    """Canonical form of a mathematical expression, None if it does not parse as one."""
    from math_verify import LatexExtractionConfig, parse

    found = parse(
        f"\\boxed{{{text}}}",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # its own limit needs signals and can't stop C code; ours does
    )
    return _form(found[0]) if found and not isinstance(found[0], str) else None


def _form(value: Any) -> str:
    import sympy  # type: ignore[import-untyped]

    if isinstance(value, sympy.MatrixBase):
        return f"matrix{value.shape}[" + ",".join(_form(item) for item in value) + "]"
    if isinstance(value, sympy.Interval):
        left, right = "(" if value.left_open else "[", ")" if value.right_open else "]"
        return f"{left}{_form(value.start)},{_form(value.end)}{right}"
    if isinstance(value, sympy.Tuple):
        return "tuple[" + ",".join(_form(item) for item in value) + "]"
    if isinstance(value, sympy.FiniteSet):
        return "set[" + ",".join(sorted({_form(item) for item in value})) + "]"
    if not isinstance(value, sympy.Expr):
        return str(sympy.srepr(sympy.simplify(value)))
    value = sympy.simplify(sympy.expand(sympy.nsimplify(value.doit(), rational=True)))
    if value.is_Rational:
        return f"={value}"
    if value.is_number:
        return f"~{sympy.N(value, 12)}"
    return str(sympy.srepr(value))


def run(job: dict[str, Any]) -> Any:
    """The result of one job."""
    if job["op"] == "search":
        return search(job["pattern"], job["text"])
    if job["op"] == "schema":
        return schema(job["schema"], job["text"])
    return symbolic(job["text"])


def main(limit_s: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        job = json.loads(line)
        if job["op"] == "symbolic":
            import math_verify  # noqa: F401  # its import takes longer than a job may
        elif job["op"] == "schema":
            import jsonschema  # noqa: F401  # likewise
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            result = run(job)
        except Exception:  # whatever the algebra raises on nonsense means: no canonical form
            result = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
