"""Tables into a document that also holds prose."""

from __future__ import annotations

HEADING = "## "


def update(document: str, sections: dict[str, str]) -> str:
    """`document` with each of `sections` (by title, text with its heading) in the place of the old one, or at the end.

    A section goes from its line `## title` to the next such line; everything else stays as it is.
    """
    parts: list[list[str]] = [[]]
    for line in document.splitlines(keepends=True):
        if line.startswith(HEADING):
            parts.append([])
        parts[-1].append(line)
    left = dict(sections)
    texts = []
    for part in parts:
        title = part[0].removeprefix(HEADING).strip() if part and part[0].startswith(HEADING) else None
        text = left.pop(title, None) if title is not None else None
        texts.append("".join(part) if text is None else text)
    return "\n".join(text.strip("\n") + "\n" for text in [*texts, *left.values()] if text.strip("\n"))
