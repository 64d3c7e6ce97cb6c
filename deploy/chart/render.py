"""Render the chart offline, and rewrite the committed default manifest.

    python -m deploy.chart.render           # rewrite rendered/default.yaml
    python -m deploy.chart.render --check   # end with status 1 if it differs

The default manifest is the chart with no value set but the name of the keys secret.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python

CHART = Path(__file__).parent / "braid"
DEFAULT = Path(__file__).parent / "rendered" / "default.yaml"
DEFAULT_VALUES: Mapping[str, Any] = {"keys": {"existingSecret": "braid-keys"}}


def render(values: Mapping[str, Any], release: str = "braid", namespace: str = "default") -> dict[str, str]:
    """Rendered templates by file name. No cluster is contacted.

    Raises:
        helm_python.HelmError: the values break the schema, or a template refuses them.
    """
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(dict(values))
        files = chart.render(dict(values), name=release, namespace=namespace)
    return {Path(path).name: text for path, text in sorted(files.items())}


def default_manifest() -> str:
    """The manifest that `rendered/default.yaml` holds, as `helm template` prints it."""
    files = render(DEFAULT_VALUES)
    documents = [
        f"---\n# Source: braid/templates/{name}\n{text.strip()}\n"
        for name, text in files.items()
        if name.endswith(".yaml") and text.strip()
    ]
    return "# Made by `python -m deploy.chart.render`; do not edit.\n" + "".join(documents)


def main(argv: list[str] | None = None) -> int:
    """Rewrite or check the default manifest; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deploy.chart.render", description="Render the chart.")
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args(argv)
    manifest = default_manifest()
    if args.check:
        same = DEFAULT.is_file() and DEFAULT.read_text(encoding="utf-8") == manifest
        print("the manifest is current" if same else "it differs: run `python -m deploy.chart.render`")
        return 0 if same else 1
    DEFAULT.write_text(manifest, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
