# SPDX-License-Identifier: Apache-2.0
"""The house rules hold (tests/support/tidy_rules.py), and each rule finds what it is there to find."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import prose_rules
import pytest
import tidy_rules as rules

import m2n
from m2n import _C

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "bindings", "m2n", "reference_model", "benchmarks", "tests", "examples")
SPDX = "SPDX-License-Identifier: Apache-2.0"


def files(*endings: str, folders: Iterable[str] = FOLDERS) -> dict[str, str]:
    """Text by path, relative to the repository."""
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in endings)
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in found}


CXX = files(*rules.CXX_ENDINGS)
PRODUCT_CXX = {path: text for path, text in CXX.items() if not path.startswith("tests/")}
PYTHON = files(".py")
SOURCES = {**CXX, **PYTHON, **files(".pyi")}
# Left out: benchmarks/results/README.md and tests/model/configs/README.md, whose tables are wider than a page.
PROSE = {
    **files(".md", folders=("docs",)),
    **{name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")},
    **{
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in ("csrc/README.md", "benchmarks/README.md", "tests/README.md")
    },
}
TOOLS = {name: (ROOT / name).read_text() for name in ("Makefile", "CMakeLists.txt", ".ci/run", ".ci/install")}


def public_names_only(path: str, text: str) -> Iterable[str]:
    return rules.public_names_only(path, text, m2n.__all__)


def prose(path: str, text: str) -> Iterable[str]:
    return prose_rules.prose(path, text, PROSE[prose_rules.GLOSSARY])


def glossary(path: str, text: str) -> Iterable[str]:
    """Sources use the words of the glossary; contenders speak of other libraries, tests of what is not to be."""
    if not path.startswith(("benchmarks/contenders/", "tests/")):
        yield from prose_rules.other_words(path, text, PROSE[prose_rules.GLOSSARY])


RULES: dict[str, tuple[Callable[[str, str], Iterable[str]], dict[str, str]]] = {
    "includes": (rules.includes, PRODUCT_CXX),
    "vocabulary": (rules.vocabulary, PRODUCT_CXX),
    "memory_orders": (rules.memory_orders, PRODUCT_CXX),
    "waited_for": (rules.waited_for, PRODUCT_CXX),
    "first_lines": (rules.first_lines, SOURCES),
    "leftovers": (rules.leftovers, {path: text for path, text in SOURCES.items() if "tidy" not in path}),
    "places": (rules.places, {**SOURCES, **TOOLS, **PROSE}),
    "file_size": (rules.file_size, SOURCES),
    "function_sizes": (rules.function_sizes, {**CXX, **PYTHON}),
    "tests_apart": (rules.tests_apart, PYTHON),
    "public_names_only": (public_names_only, PYTHON),
    "lower_python_floor": (rules.lower_python_floor, PYTHON),
    "prose": (prose, PROSE),
    "glossary": (glossary, SOURCES),
}


@pytest.mark.parametrize("name", RULES)
def test_house_rule(name: str) -> None:
    rule, texts = RULES[name]
    assert texts
    violations = [violation for path, text in texts.items() for violation in rule(path, text)]
    assert not violations, "\n".join(["", *violations])


BAD = [
    ("includes", "csrc/core/slot.h", '#include "transport/transport.h"'),
    ("includes", "csrc/core/slot.h", "#include <unistd.h>"),
    ("includes", "csrc/transport/shm/transport.cc", '#include "exchange/rows/route.h"'),
    ("includes", "csrc/transport/shm/transport.cc", '#include "transport/ucx/api.h"'),
    ("includes", "csrc/transport/network/proxy.cc", '#include "transport/tcp/links.h"'),
    ("includes", "csrc/transport/transport.h", '#include "transport/network/areas.h"'),
    ("includes", "csrc/transport/transport.h", '#include "transport/choice.h"'),
    ("includes", "csrc/transport/network.h", '#include "transport/transport.h"'),
    ("includes", "csrc/exchange/rows/sum.h", '#include "exchange/bodies/combine.h"'),
    ("includes", "csrc/exchange/bodies/inbox.h", '#include "exchange/links/comm.h"'),
    ("includes", "csrc/exchange/device/verbs/expert.h", '#include "exchange/device/comm.h"'),
    ("includes", "csrc/exchange/device/expert.h", '#include "exchange/host/expert.h"'),
    ("includes", "csrc/exchange/links/comm.h", '#include "transport/shm.h"'),
    ("includes", "csrc/exchange/links/comm.cc", "#include <cuda_runtime.h>"),
    ("includes", "bindings/module.cc", '#include "transport/watcher.h"'),
    ("includes", "bindings/tensor.cc", "#include <torch/extension.h>"),
    ("vocabulary", "csrc/core/slot.h", "uint32_t num_tokens;"),
    ("vocabulary", "csrc/core/slot.h", "class ExpertComm;"),
    ("vocabulary", "csrc/transport/shm/transport.cc", "// a route to the peer"),
    ("vocabulary", "csrc/exchange/links/comm.cc", "make_shm_transport();"),
    ("vocabulary", "csrc/exchange/links/comm.cc", "// over UCX"),
    ("memory_orders", "csrc/exchange/links/comm.h", "x.load(std::memory_order_relaxed);"),
    ("memory_orders", "csrc/transport/process.cc", "x.load(std::memory_order_acquire);"),
    ("waited_for", "csrc/exchange/links/comm.cc", "store_release(&is_closed_, 1u);  // SYNC: comm-closed"),
    ("waited_for", "csrc/core/peer.h", "return load_acquire(&entries[i].state);  // SYNC: peer-state"),
    ("memory_orders", "csrc/core/atomic.h", "std::atomic_thread_fence(std::memory_order_seq_cst);"),
    ("first_lines", "csrc/core/slot.h", "#pragma once\n"),
    ("first_lines", "csrc/core/slot.h", f"// {SPDX}\n#pragma once\n"),
    ("first_lines", "m2n/shape.py", f"# {SPDX}\nimport os\n"),
    ("first_lines", "m2n/shape.py", '"""What it is for."""\n'),
    ("leftovers", "m2n/shape.py", "# TODO: later"),
    ("places", "m2n/shape.py", "PATH = '/" + "home/somebody'"),
    ("file_size", "m2n/shape.py", "x = 1\n" * 401),
    ("function_sizes", "m2n/shape.py", "def long():\n" + "    x = 1\n" * 69),
    ("function_sizes", "csrc/core/slot.h", "int A::long_one(int x) const {\n" + "  if (x) { f(); }\n" * 68 + "}\n"),
    ("tests_apart", "tests/exchange/test_pack.py", "from test_exchange import FLOAT8"),
    ("tests_apart", "tests/transport/test_networks.py", "def f():\n    import test_threads"),
    ("tests_apart", "tests/exchange/test_faults.py", 'code = (\n    "from test_faults import SHAPE\\n"\n)'),
    ("public_names_only", "reference_model/model/decoder.py", "from m2n import _C"),
    ("public_names_only", "reference_model/model/decoder.py", "import m2n._C"),
    ("public_names_only", "reference_model/model/decoder.py", "import m2n\nm2n._C.Shape"),
    ("public_names_only", "reference_model/model/decoder.py", "from m2n.bootstrap import connect"),
    ("public_names_only", "reference_model/model/decoder.py", "from ... import _C"),
    ("public_names_only", "reference_model/model/decoder.py", "from ..engine import schedule"),
    ("public_names_only", "reference_model/engine/rounds.py", "from ..run.rank import run_rank"),
    ("public_names_only", "benchmarks/harness/runs.py", "from ..exchange import latency"),
    ("public_names_only", "benchmarks/exchange/latency.py", "from m2n.reference_model.report import timeline"),
    ("public_names_only", "benchmarks/exchange/growth.py", "from .latency import parse_list"),
    ("public_names_only", "reference_model/console/files.py", "from ..model import config"),
    ("public_names_only", "reference_model/model/decoder.py", "from ...benchmarks import cli"),
    ("public_names_only", "benchmarks/cli.py", "def f():\n    from m2n._C import Shape"),
    ("public_names_only", "benchmarks/cli.py", "import tests.bodies"),
    ("lower_python_floor", "m2n/comm.py", "from .reference_model import model"),
    ("lower_python_floor", "m2n/comm.py", "import torch"),
    ("lower_python_floor", "m2n/comm.py", "from torch.distributed import TCPStore"),
    ("lower_python_floor", "m2n/comm.py", "import os\nos.environ['M2N_JOB']"),
    ("glossary", "m2n/comm.py", "# the sequence number of a message"),
    ("glossary", "csrc/core/slot.h", "// the Mailbox of a peer"),
    ("prose", "docs/verbs.md", "x" * 121),
    ("prose", "docs/verbs.md", "| a | " + "x" * 120 + " |"),
    ("prose", "docs/verbs.md", "word " * 36),
    ("prose", "docs/verbs.md", "- Short.\n- " + "word\n  " * 36),
    ("prose", "docs/verbs.md", "| a | " + "w " * 36 + "|"),
    ("prose", "docs/verbs.md", "`code` and [a link](address) " * 9),
    ("prose", "docs/verbs.md", "Two expert nodes."),
    ("prose", "docs/verbs.md", "A routing\ntable."),
    ("prose", "README.md", "word\n" * 5),
    ("prose", "README.md", "A word.\n\n" * 76),
    ("prose", "README.md", "Ten words stand in this line, no more and no less. " * 2 + "\n\n" + "a b c. " * 400),
]


@pytest.mark.parametrize("name, path, text", BAD, ids=lambda value: value[:40].split("\n")[0])
def test_the_rule_finds_it(name: str, path: str, text: str) -> None:
    assert list(RULES[name][0](path, text)), "this was to be found"


def test_no_module_imports_itself_by_way_of_others() -> None:
    product = {path: text for path, text in PYTHON.items() if not path.startswith("tests/")}
    assert not rules.circles(product)
    beside = {"m2n/a.py": "from . import b\n", "m2n/b.py": "def f():\n    from .a import x\n"}
    around = {"benchmarks/a.py": "from .b.c import x", "benchmarks/b/c.py": "import m2n.benchmarks.b.d",
              "benchmarks/b/d.py": "from ..a import y"}  # fmt: skip
    for files_that_import in (beside, around):
        assert rules.circles(files_that_import), "this was to be found"
    assert not rules.circles({**around, "benchmarks/b/d.py": "from ..e import y", "benchmarks/e.py": ""})


GOOD = [
    ("includes", "csrc/exchange/links/comm.h", '#include "transport/watcher.h"\n#include <unistd.h>'),
    ("vocabulary", "csrc/core/slot.h", "// rerouted expertise of a tokenizer"),
    ("memory_orders", "csrc/exchange/links/comm.h", "// as memory_order_release would"),
    ("function_sizes", "m2n/shape.py", "def short():\n" + "    x = 1\n" * 68),
    ("function_sizes", "csrc/core/slot.h", "namespace m2n {\n" + "int f() {\n  return 1;\n}\n" * 30 + "}\n"),
    ("tests_apart", "tests/exchange/test_pack.py", "import m2n.testing\nfrom m2n import testing"),
    ("public_names_only", "reference_model/model/decoder.py", "import m2n\nfrom .rope import Rope\nm2n.Shape"),
    ("public_names_only", "benchmarks/cli.py", "from ..reference_model import model\nfrom m2n.testing import KINDS"),
    ("lower_python_floor", "m2n/comm.py", "def f():\n    import torch"),
    ("glossary", "benchmarks/contenders/ucxx.py", "# one communicator"),
    ("prose", "docs/verbs.md", "word " * 20 + "\n\n" + "word " * 20),
    ("prose", "docs/verbs.md", "Some words.\n\n    " + "code " * 20 + "\n\n```\n" + "a node " * 15 + "\n```"),
    ("prose", "docs/verbs.md", "- One `--node-rank a b c d` " + "word " * 15 + "\n- Two " + "word " * 15),
    ("prose", "docs/verbs.md", "[one](" + "a-node/" * 10 + ")"),
    ("prose", "docs/glossary.md", "| host | a computer | node |"),
    ("prose", "README.md", "word\n" * 4 + "\n" + "word\n" * 4),
]


@pytest.mark.parametrize("name, path, text", GOOD, ids=lambda value: value[:40].split("\n")[0])
def test_the_rule_lets_it_pass(name: str, path: str, text: str) -> None:
    assert not list(RULES[name][0](path, text))


def test_every_sync_label_has_its_partner() -> None:
    assert not list(rules.sync_labels(PRODUCT_CXX))
    assert list(rules.sync_labels({"csrc/core/slot.h": "store(); // SYNC: alone"}))


def stub_signatures(stub: str) -> dict[str, list[str]]:
    """Argument names by qualified name; a property or a value has none, a class stands for itself."""
    found: dict[str, list[str]] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = []
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                arguments = [argument.arg for argument in node.args.args]
                is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
                found[prefix + node.name] = [] if is_property else arguments
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[prefix + node.target.id] = []

    visit(ast.parse(stub).body, "")
    return found


NATIVE_DUNDERS = ("__init__", "__dlpack__", "__dlpack_device__")


def native_arguments(name: str, value: Any) -> list[str] | None:
    """Argument names from the docstring that pybind11 makes; None for a constructor that cannot be called."""
    line = (value.__doc__ or "").split("\n")[0]
    if not line.startswith(f"{name}("):
        return None
    inside = re.split(r"\)\s*->", line[len(name) + 1 :])[0]
    while "[" in inside:  # types such as tuple[int, int], innermost first
        inside = re.sub(r"\[[^\[\]]*\]", "", inside)
    return [re.split(r"[:=]", part)[0].strip() for part in inside.split(",") if part]


def native_signatures(module: Any) -> dict[str, list[str]]:
    """The same as stub_signatures of a module made by pybind11."""
    found: dict[str, list[str]] = {}

    def visit(owner: Any, prefix: str) -> None:
        bases = {name for base in getattr(owner, "__mro__", ())[1:-1] for name in vars(base)}
        for name, value in vars(owner).items():
            is_private = name.startswith("_") and name not in NATIVE_DUNDERS
            if is_private or (name in bases and not callable(value)):
                continue
            if inspect.isclass(value):
                found[prefix + name] = []
                visit(value, f"{prefix}{name}.")
            elif callable(value):
                arguments = native_arguments(name, value)
                if arguments is not None:
                    found[prefix + name] = [argument for argument in arguments if not argument.startswith("*")]
            else:
                found[prefix + name] = []

    visit(module, "")
    return found


def differences(stub: dict[str, list[str]], native: dict[str, list[str]]) -> list[str]:
    missing = [f"{name} is missing in the stub" for name in native.keys() - stub.keys()]
    missing += [f"{name} is in the stub only" for name in stub.keys() - native.keys()]
    for name in stub.keys() & native.keys():
        if stub[name] != native[name]:
            missing.append(f"{name}: the stub has {stub[name]}, the module {native[name]}")
    return missing


def test_the_stub_is_the_module() -> None:
    stub = stub_signatures((ROOT / "m2n/_C.pyi").read_text())
    assert not differences(stub, native_signatures(_C))


def test_a_stub_that_differs_is_found() -> None:
    stub, native = stub_signatures((ROOT / "m2n/_C.pyi").read_text()), native_signatures(_C)
    assert len(differences({**stub, "Comm.close": ["self", "force"]}, native)) == 1
    assert len(differences({**stub, "Comm.fly": ["self"]}, native)) == 1
    assert len(differences(stub, {**native, "Comm.fly": ["self"]})) == 1


def undocumented(names: Iterable[str], module: Any) -> list[str]:
    """Public names, their public methods and properties without a docstring of their own."""
    found = []
    for name in names:
        value = getattr(module, name)
        if name.startswith("_"):
            continue
        if not inspect.getdoc(value):
            found.append(name)
        for member in dir(value) if inspect.isclass(value) and not issubclass(value, (BaseException, tuple)) else ():
            attribute = inspect.getattr_static(value, member)
            is_code = inspect.isfunction(attribute) or isinstance(attribute, (property, classmethod, staticmethod))
            if not member.startswith("_") and is_code and not inspect.getdoc(getattr(value, member)):
                found.append(f"{name}.{member}")
    return found


def test_everything_public_is_documented() -> None:
    import m2n.testing

    assert not undocumented(m2n.__all__, m2n)
    assert not undocumented(m2n.testing.__all__, m2n.testing)

    class Bare:
        def method(self) -> None: ...

    class Module:
        bare = Bare

    assert undocumented(["bare"], Module) == ["bare", "bare.method"]


def test_importing_m2n_imports_no_torch(record_property: Callable[[str, object], None]) -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import m2n; seconds = time.perf_counter() - began;"
        "print(seconds, *sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'rich'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    seconds, *unwanted = done.stdout.split()
    record_property("import_s", float(seconds))
    assert not unwanted
    if float(seconds) > 0.3:
        # Not a failure: this machine may be busy.
        print(f"import m2n took {float(seconds):.2f} s; it should take less than 0.3 s")
