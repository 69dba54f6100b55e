# SPDX-License-Identifier: Apache-2.0
"""Rules for what people read: lines, sentences, the words of the glossary, links, and the size of the README."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

MAX_COLUMNS = 120
MAX_SENTENCE_WORDS = 35
README_LINES, README_WORDS, README_PARAGRAPH_LINES = 150, 1200, 4
GLOSSARY = "docs/glossary.md"


class Piece(NamedTuple):
    """A paragraph, an item of a list, a heading or a cell of a table, as one line of plain words."""

    line: int  # where it begins
    num_lines: int
    text: str


def plain(text: str) -> str:
    """Without marks: what a link or a picture shows, and one word for each piece of code."""
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)\s]*\)|\[([^\]]*)\]\[[^\]]*\]", lambda match: match[1] or match[2] or "", text)
    return re.sub(r"<https?:[^>]*>|[*_]{1,2}(?=\S)|(?<=\S)[*_]{1,2}", "", text)


def pieces(text: str) -> Iterator[Piece]:
    """What is prose in a Markdown text: neither code blocks nor the addresses of links."""
    begun, lines, is_code = 0, [], False

    def end() -> Iterator[Piece]:
        if lines:
            yield Piece(begun, len(lines), plain(" ".join(lines)))
            lines.clear()

    for number, line in enumerate([*text.splitlines(), ""], 1):
        stripped = line.strip()
        if stripped.startswith("```"):
            is_code = not is_code
            stripped = ""
        is_block = is_code or (line.startswith("    ") and not lines)
        is_address = re.match(r"\[[^\]]+\]: \S+$", stripped)
        if not stripped or is_block or is_address:
            yield from end()
        elif stripped.startswith("|"):
            yield from end()
            for cell in re.split(r"(?<!\\)\|", stripped.strip("|")):
                yield Piece(number, 1, plain(cell.strip()))
        else:
            item = re.match(r"(?:[-*]|\d+\.|#+) +", stripped)
            if item:
                yield from end()
            if not lines:
                begun = number
            lines.append(stripped[item.end() :] if item else stripped)
            if stripped.startswith("#"):
                yield from end()


def sentences(piece: Piece) -> Iterator[list[str]]:
    """The words of each sentence; what has no letter or digit is no word."""
    for sentence in re.split(r"(?<=[.!?])[\"')]*\s+", piece.text):
        yield [word for word in sentence.split() if re.search(r"\w", word)]


@functools.cache
def words_not_used(glossary: str) -> dict[str, str]:
    """Words that stand for none of the glossary's, each with the one that is used in its place."""
    found = {}
    for line in glossary.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and cells[0] not in ("word", "---"):
            found.update({word.strip(): cells[0] for word in cells[2].split(",") if word.strip()})
    return found


def terms(glossary: str) -> list[str]:
    """The words that the glossary defines, in its order."""
    rows = re.findall(r"^\| ([^|]+?) \|", glossary, re.MULTILINE)
    return [row for row in rows if row not in ("word", "---")]


def prose(path: str, text: str, glossary: str) -> Iterator[str]:
    """Lines of 120 columns, sentences of 35 words, and the glossary's words."""
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > MAX_COLUMNS:
            yield f"{path}:{number}: {len(line)} columns; at most {MAX_COLUMNS}"
    for piece in pieces(text):
        for words in sentences(piece):
            if len(words) > MAX_SENTENCE_WORDS:
                start = " ".join(words[:4])
                yield f"{path}:{piece.line}: a sentence of {len(words)} words; at most {MAX_SENTENCE_WORDS}: {start}"
        if path != GLOSSARY:
            yield from other_words(f"{path}:{piece.line}", piece.text, glossary)
    if path == "README.md":
        yield from readme_size(path, text)


def other_words(where: str, text: str, glossary: str) -> Iterator[str]:
    """Words that the glossary has others for."""
    instead = words_not_used(glossary)
    for word in re.findall(rf"\b({'|'.join(map(re.escape, instead))})s?\b", text, re.IGNORECASE):
        yield f"{where}: says {word!r}; the glossary's word is {instead[word.lower()]!r}"


def readme_size(path: str, text: str) -> Iterator[str]:
    num_lines, num_words = len(text.splitlines()), len(text.split())
    if num_lines > README_LINES:
        yield f"{path}: {num_lines} lines; at most {README_LINES}"
    if num_words > README_WORDS:
        yield f"{path}: {num_words} words; at most {README_WORDS}"
    for piece in pieces(text):
        if piece.num_lines > README_PARAGRAPH_LINES:
            yield f"{path}:{piece.line}: a paragraph of {piece.num_lines} lines; at most {README_PARAGRAPH_LINES}"


def anchors(text: str) -> set[str]:
    """The names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> Iterator[str]:
    """The addresses of links and pictures that lead to other files, or to other places of this one."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    yield from (one or other for one, other in found if not re.match(r"https?:|mailto:", one or other))


def broken_links(path: str, text: str, texts: Mapping[str, str], exists: Callable[[str], bool]) -> Iterator[str]:
    """Relative links lead to files that are there, and to headings that stand in them."""
    folder = path.rpartition("/")[0]
    for link in links(text):
        name, _, anchor = link.partition("#")
        parts: list[str] = []
        for part in f"{folder}/{name}".split("/") if name else path.split("/"):
            if part == ".." and parts:
                parts.pop()
            elif part not in ("", "."):
                parts.append(part)
        target = "/".join(parts)
        if not exists(target):
            yield f"{path}: links to {link}, where there is nothing"
        elif anchor and anchor not in anchors(texts.get(target, "")):
            yield f"{path}: links to {link}, and there is no such heading"
