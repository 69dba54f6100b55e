# SPDX-License-Identifier: Apache-2.0
"""What people read is right about the sources: links, paths, labels, the lists of pages and of tests."""

from __future__ import annotations

import re
from pathlib import Path

import prose_rules as rules

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "csrc", "benchmarks", "tests", "reference_model", "m2n", "bindings")
PATHS = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md")))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
# A page to be followed names what is not there yet; the configs' page names files of other repositories.
NAMES_OTHER_FILES = ("docs/adding_a_transport.md", "tests/model/configs/README.md")


def exists(path: str) -> bool:
    return (ROOT / path).exists()


def test_links_lead_somewhere() -> None:
    broken = [line for path, text in PAGES.items() for line in rules.broken_links(path, text, PAGES, exists)]
    assert not broken, "\n".join(["", *broken])
    assert sum(len(list(rules.links(text))) for text in PAGES.values()) > 50


def test_a_broken_link_is_found() -> None:
    texts = {"docs/a.md": "# One two", "b.md": ""}
    for good in ("[x](../b.md)", "[x](a.md#one-two)", "[x](#one-two)", "[x](https://b.c)", "`[x](no.md)`"):
        text = f"# One two\n{good}"
        assert not list(rules.broken_links("docs/a.md", text, {**texts, "docs/a.md": text}, texts.__contains__)), good
    for bad in ("[x](b.md)", "![x](no.png)", "[x](a.md#three)", "[x](#three)", "[x]: no.md"):
        assert list(rules.broken_links("docs/a.md", bad, texts, texts.__contains__)), bad


def test_paths_that_pages_name_exist() -> None:
    missing = []
    for path, text in PAGES.items():
        for name in () if path in NAMES_OTHER_FILES else re.findall(r"`((?:m2n|csrc|bindings|tests)/[\w./-]+)`", text):
            if not (ROOT / name).exists():
                missing.append(f"{path}: {name}")
    assert not missing, "\n".join(["", *missing])


def test_every_page_stands_in_the_index() -> None:
    index = PAGES["docs/README.md"]
    for path in PAGES:
        if path.startswith("docs/") and path != "docs/README.md":
            assert f"({path.removeprefix('docs/')})" in index, path


def test_every_file_of_tests_stands_in_their_page() -> None:
    page = PAGES["tests/README.md"]
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"`(test_\w+\.py)`", page)) == there


def test_every_sync_label_has_its_line() -> None:
    table = PAGES["docs/internals/memory.md"]
    for path in (path for ending in ("h", "cc", "cu") for path in (ROOT / "csrc").rglob(f"*.{ending}")):
        for label in re.findall(r"// SYNC: ([a-z-]+)", path.read_text(encoding="utf-8")):
            assert f"`{label}`" in table, f"{path.name}: {label}"


def test_the_glossary_has_each_word_once_and_in_order() -> None:
    for section in PAGES[rules.GLOSSARY].split("\n## ")[1:]:
        words = [word.lower() for word in rules.terms(section)]
        assert words == sorted(words)
    words = rules.terms(PAGES[rules.GLOSSARY])
    assert len(words) == len(set(words)) > 50
