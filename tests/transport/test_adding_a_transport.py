# SPDX-License-Identifier: Apache-2.0
"""Who follows docs/adding_a_transport.md has a transport that keeps the contract; and a wrong one is found."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conformance_suite import compile_suite, sentences
from libraries import ROOT
from tiers import needs_compiler

PAGE = ROOT / "docs/adding_a_transport.md"
CHANGED = ("tests/support/tidy_rules.py", "tests/transport/test_conformance.py")
COPIED = ("csrc", "CMakeLists.txt", "pyproject.toml", *CHANGED)
TOY = "csrc/transport/heap/transport.cc"

pytestmark = [needs_compiler, pytest.mark.slow]


def follow(page: str, root: Path) -> None:
    """Applies the blocks of the page: those of C++ are files or go behind them, those of diff change what is there."""
    blocks = re.findall(r"^`([^`]+)`(?:, behind that)?:\n\n```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == page.count("\n```") // 2, "each block says which file it is of"
    for name, kind, text in blocks:
        path = root / name
        if kind == "diff":
            old = "".join(line[1:] for line in text.splitlines(keepends=True) if line[0] != "+")
            new = "".join(line[1:] for line in text.splitlines(keepends=True) if line[0] != "-")
            before = path.read_text()
            assert before.count(old) == 1, f"{name} does not have these lines once any more:\n{old}"
            path.write_text(before.replace(old, new))
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text((path.read_text() if path.exists() else "") + text)


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("followed")
    for name in COPIED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, root / name)
    follow(PAGE.read_text(encoding="utf-8"), root)
    return root


def test_what_the_page_builds_keeps_the_contract_and_the_house_rules(followed: Path) -> None:
    [line] = [line for line in load(followed / "tests/transport/test_conformance.py").TRANSPORTS if line.id == "heap"]
    said = sentences(compile_suite(followed / "suite", followed), line.values[0])
    assert not said["WRONG"]
    assert len(said["not here"]) == line.values[1], said["not here"]
    rules = load(followed / "tests/support/tidy_rules.py")
    text = (followed / TOY).read_text()
    assert rules.floor_of(TOY).folder == "csrc/transport/heap/"
    assert not [*rules.includes(TOY, text), *rules.vocabulary(TOY, text), *rules.first_lines(TOY, text)]


def test_a_transport_that_does_not_keep_it_is_found(followed: Path) -> None:
    text = (followed / TOY).read_text()
    wrong = re.sub(r"    if \(!forget_unmapped.*\n", "    forget_local_object(ids_.at(peer_idx));\n", text)
    wrong = re.sub(r"    std::memset\(data\(\) .*\n", "", wrong)
    assert len(text.splitlines()) == len(wrong.splitlines()) + 1
    (followed / "wrong.cc").write_text(wrong)
    said = sentences(compile_suite(followed / "wrong", followed, instead=(followed / "wrong.cc",)), "heap")
    assert [line.split(":")[0] for line in said["WRONG"]] == [
        "an_object_that_nobody_has_is_given_back",
        "an_index_serves_one_link_after_another",
    ]
