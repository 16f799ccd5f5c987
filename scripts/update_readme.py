"""Write the demo's figures into the README: ``python scripts/update_readme.py demo-report/results.json``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def main(results: Path) -> None:
    """Replace what stands between the demo marks of the README; ends with a message where they are missing."""
    content = json.loads(results.read_text(encoding="utf-8"))
    lines = [
        "| MLPNet on MNIST, 95 % of the weights removed | clean gradients, % | noisy gradients, % |",
        "|---|---|---|",
    ]
    for row in content["rows"]:
        noisy = "" if row["noisy"] is None else f"{row['noisy']:.2f}"
        lines.append(f"| {row['method']} | {row['clean']:.2f} | {noisy} |")
    readme = Path(__file__).parent.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    block = "<!-- demo -->\n" + "\n".join(lines) + "\n<!-- /demo -->"
    text, count = re.subn(r"<!-- demo -->.*<!-- /demo -->", lambda _: block, text, flags=re.DOTALL)
    if count == 0:
        raise SystemExit(f"{readme} has no <!-- demo --> ... <!-- /demo --> to write between")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
