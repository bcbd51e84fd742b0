"""The guide's table of diffusers models is the one that the code keeps."""

from __future__ import annotations

from pathlib import Path

from rfkernels.integrations.diffusers import coverage

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "attention_integrations.md"


def table() -> str:
    """coverage() in Markdown."""
    lines = [
        "| model | class | `set_attention` | backend by name alone | |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.model} | `{row.cls}` | {row.set_attention} | {row.backend} | {row.note} |"
        for row in coverage()
    ]
    return "\n".join(lines)


def test_the_guide_lists_what_is_covered():
    text = GUIDE.read_text()
    start = text.index("<!-- coverage: begin")
    written = text[text.index("-->", start) + 3 : text.index("<!-- coverage: end")]
    assert written.strip() == table()
