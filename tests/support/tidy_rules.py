# SPDX-License-Identifier: Apache-2.0
"""The house rules, each a function from a file's path and text to the violations it finds, as lines of text."""

from __future__ import annotations

import ast
import graphlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
CXX_ENDINGS = (".h", ".cc", ".cu")


class Floor(NamedTuple):
    """What files under `folder` may include of this project, and the words they must never use."""

    folder: str
    may_include: tuple[str, ...]  # a path, or a folder that ends in "/": what lies in it, not deeper
    never_says: tuple[str, ...] = ()


# Deeper folders first. An arrow only points down, and a word of an upper floor never appears on a lower one.
_BYTES = ("token", "expert", "route")  # what a transport moves is bytes
_MEMORY = ("shm", "ucx", "ipc")  # what an exchange writes to is memory
_CONTRACT = ("core/", "transport/")  # what every transport knows
_HEADERS = tuple(f"transport/{name}.h" for name in ("network", "relay", "fd", "process"))  # of the contract's parts
_ROWS = ("core/", "exchange/rows/")
_BODIES = (*_ROWS, "exchange/bodies/")
_LINKS = (
    *(*_BODIES, "exchange/links/", "transport/transport.h", "transport/choice.h", "transport/watcher.h"),
    *("transport/host_exec.h", "transport/own_thread.h"),
)
_VERBS = (*_BODIES, "exchange/device/verbs/")
_MACHINES = (*_VERBS, "exchange/device/machines/", "transport/emulated_exec.h", "transport/cuda/api.h")
FLOORS = (
    Floor("csrc/core/", ("core/",), _BYTES),
    Floor("csrc/transport/shm/", (*_CONTRACT, "transport/shm/"), _BYTES),
    Floor("csrc/transport/cuda/", (*_CONTRACT, "transport/cuda/"), _BYTES),
    Floor("csrc/transport/faulty/", (*_CONTRACT, "transport/faulty/"), _BYTES),
    Floor("csrc/transport/network/", (*_CONTRACT, "transport/network/"), _BYTES),
    Floor("csrc/transport/tcp/", (*_CONTRACT, "transport/network/", "transport/tcp/"), _BYTES),
    Floor("csrc/transport/ucx/", (*_CONTRACT, "transport/network/", "transport/ucx/"), _BYTES),
    Floor("csrc/transport/transport.h", ("core/", *_HEADERS), _BYTES),
    Floor("csrc/transport/network.h", ("core/", "transport/fd.h"), _BYTES),
    Floor("csrc/transport/relay.h", ("core/",), _BYTES),
    Floor("csrc/transport/", _CONTRACT, _BYTES),
    Floor("csrc/exchange/rows/", _ROWS, _MEMORY),
    Floor("csrc/exchange/bodies/", _BODIES, _MEMORY),
    Floor("csrc/exchange/links/", _LINKS, _MEMORY),
    Floor("csrc/exchange/host/", (*_LINKS, "exchange/host/"), _MEMORY),
    Floor("csrc/exchange/device/verbs/", _VERBS, _MEMORY),
    Floor("csrc/exchange/device/machines/", _MACHINES, _MEMORY),
    Floor("csrc/exchange/device/", (*_LINKS, *_MACHINES, "exchange/device/"), _MEMORY),
    Floor(
        "bindings/",
        (
            *("exchange/rows/", "exchange/bodies/", "exchange/links/", "exchange/host/", "exchange/device/"),
            *("exchange/device/verbs/", "core/error.h", "transport/choice.h", "transport/memory_limit.h"),
            *("tensor.h", "bind.h", "lock.h"),
        ),
        _MEMORY,
    ),
)
# Headers of the C++ library have no dot; `.h` means an operating system, which floor 0 does not know.
CORE_SYSTEM_INCLUDE = re.compile(r"[a-z_]+|cuda/atomic")

PUBLIC_MODULES = ("m2n", "m2n.testing")


def floor_of(path: str) -> Floor | None:
    return next((floor for floor in FLOORS if path.startswith(floor.folder)), None)


def without_comments(text: str) -> str:
    """C++ without comments and literals; line breaks stay."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])\'(?:\\.|[^\'\\\n])*\''
    return re.sub(pattern, lambda match: "\n" * match[0].count("\n") or " ", text, flags=re.DOTALL)


def includes(path: str, text: str) -> Iterator[str]:
    """A C++ file includes only what its floor may know."""
    floor = floor_of(path)
    if floor is None:
        return
    is_cuda_file = path.endswith(".cu") or path.startswith("csrc/transport/cuda/")
    for own in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
        if own not in floor.may_include and own[: own.rfind("/") + 1] not in floor.may_include:
            yield f"{path}: includes {own}, which its floor must not know"
        if own == "transport/cuda/api.h" and not is_cuda_file:
            yield f"{path}: includes {own}; CUDA stays in .cu files and in csrc/transport/cuda"
    for system in re.findall(r"^\s*#\s*include\s+<([^>]+)>", text, re.MULTILINE):
        if floor.folder == "csrc/core/" and not CORE_SYSTEM_INCLUDE.fullmatch(system):
            yield f"{path}: includes <{system}>; floor 0 knows no operating system"
        if system.startswith("cuda") and not is_cuda_file and system != "cuda/atomic":
            yield f"{path}: includes <{system}>; CUDA stays in .cu files and in csrc/transport/cuda"
        if system.startswith(("torch", "ATen", "c10")):
            yield f"{path}: includes <{system}>; tensors cross as DLPack"


def vocabulary(path: str, text: str) -> Iterator[str]:
    """A word of an upper floor is not used on a lower one, as a word or as a part of a name."""
    floor = floor_of(path)
    for word in floor.never_says if floor else ():
        # Parts of names: num_tokens, ExpertComm; but not "tokenizer" or "expertise".
        pattern = rf"(?<![a-z])(?:{word}s?(?![a-z]))|(?:{word.capitalize()}s?(?![a-z]))|\b{word.upper()}S?\b"
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(pattern, line):
                yield f"{path}:{number}: says {word!r}, a word of another floor"


def memory_orders(path: str, text: str) -> Iterator[str]:
    """Memory orders stand in core/atomic.h alone; fences nowhere, as ThreadSanitizer does not understand them."""
    # Relaxed counters of forks: nothing is published through them.
    is_allowed = path in ("csrc/core/atomic.h", "csrc/transport/process.cc")
    for number, line in enumerate(without_comments(text).splitlines(), 1):
        if "memory_order" in line and not is_allowed:
            yield f"{path}:{number}: a memory order outside core/atomic.h"
        if path == "csrc/transport/process.cc" and re.search(r"memory_order_(?!relaxed)", line):
            yield f"{path}:{number}: only relaxed counters may have a memory order here"
        if re.search(r"\batomic_(thread|signal)_fence\b|\bvolatile\b|\b__sync_", line) and "asm" not in line:
            yield f"{path}:{number}: a fence, volatile or __sync: use the operations of core/atomic.h"


def sync_labels(files: Mapping[str, str]) -> Iterator[str]:
    """Each label `SYNC: name` stands at both ends: at least twice."""
    labels: Counter[str] = Counter()
    for text in files.values():
        labels.update(re.findall(r"//\s*SYNC: ([a-z][a-z0-9-]*)", text))
    for label, count in labels.items():
        if count < 2:
            yield f"SYNC: {label} stands only once: where is its partner?"
    if not labels:
        yield "no SYNC label was found at all"


# What a waiter sleeps for: release and acquire would lose a wake now and then (core/wake.h).
WAITED_FOR = ("slot-signal", "peer-state", "comm-closed")


def waited_for(path: str, text: str) -> Iterator[str]:
    """Words that a waiter sleeps for are stored and loaded in one total order on the host."""
    for number, line in enumerate(text.splitlines() if path.startswith("csrc/") else (), 1):
        label = re.search(r"//\s*SYNC: ([a-z][a-z0-9-]*)", line)
        if label and label[1] in WAITED_FOR and re.search(r"_(release|acquire|relaxed)\(", line):
            yield f"{path}:{number}: {label[1]} needs seq_cst: a waiter sleeps for it"


def first_lines(path: str, text: str) -> Iterator[str]:
    """The licence, then what the file is for."""
    lines = [line for line in text.splitlines() if not line.startswith("#!")]
    sign = "//" if path.endswith(CXX_ENDINGS) else "#"
    if not lines or lines[0] != f"{sign} SPDX-License-Identifier: Apache-2.0":
        yield f"{path}: the first line is not the SPDX line"
    if path.endswith(".py"):
        if not ast.get_docstring(ast.parse(text)):
            yield f"{path}: no docstring says what the file is for"
    elif len(lines) < 2 or not lines[1].startswith(f"{sign} "):
        yield f"{path}: no comment after the SPDX line says what the file is for"


def leftovers(path: str, text: str) -> Iterator[str]:
    """No notes to oneself."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            yield f"{path}:{number}: {line.strip()[:80]}"


def places(path: str, text: str) -> Iterator[str]:
    """No file names a place on one machine."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"(?<![\w.])/(root|home|work|opt|Users)/\w", line):
            yield f"{path}:{number}: a path of one machine: {line.strip()[:80]}"


def file_size(path: str, text: str) -> Iterator[str]:
    count = len(text.splitlines())
    if count > MAX_FILE_LINES:
        yield f"{path}: {count} lines; at most {MAX_FILE_LINES}"


def function_sizes(path: str, text: str) -> Iterator[str]:
    functions = python_functions(text) if path.endswith(".py") else cxx_functions(text)
    for name, line, count in functions:
        if count >= MAX_FUNCTION_LINES:
            yield f"{path}:{line}: {name} has {count} lines; fewer than {MAX_FUNCTION_LINES}"


def python_functions(text: str) -> Iterator[tuple[str, int, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def cxx_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, lines) of each body in braces that follows a parameter list; lambdas count too."""
    text = re.sub(r"^\s*#.*$", "", without_comments(text), flags=re.MULTILINE)
    control = re.compile(r"\s*(namespace|class|struct|enum|union|if|for|while|switch|else|do|try|catch|extern)\b")
    opened: list[tuple[str, int] | None] = []
    header, header_line, line = "", 1, 1
    for character in text:
        if character == "\n":
            line += 1
        if character not in "{};":
            if not header.strip():
                header, header_line = "", line
            header += character
            continue
        if character == "{":
            is_function = "(" in header and not control.match(header)
            name = re.split(r"\(", header.strip(), maxsplit=1)[0].split()[-1:] or ["lambda"]
            opened.append((name[0], header_line) if is_function else None)
        elif character == "}" and opened:
            function = opened.pop()
            if function:
                yield function[0], function[1], line - function[1] + 1
        header = ""


def tests_apart(path: str, text: str) -> Iterator[str]:
    """No test module is imported, by another or by a program in a string: what several use lies in tests/support."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\W*(from|import) \.*test_\w", line):
            yield f"{path}:{number}: imports a test module; what several use lies in tests/support"


def imported(text: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every import at any depth; name "" for `import module`. Relative ones begin with a dot."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((module, alias.name) for alias in node.names)


def attributes_of_m2n(text: str) -> Iterator[str]:
    """`m2n.name` for each such expression."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "m2n":
            yield node.attr


# What files under a folder may import of this project beside the public names of m2n. Deeper folders first.
_CONSOLE = ("reference_model.console", "reference_model.errors")
_HARNESS = ("benchmarks.harness", "benchmarks.contenders", *_CONSOLE)
PYTHON_FLOORS = {
    "reference_model/console/": _CONSOLE,
    "reference_model/model/": ("reference_model.model", "reference_model.errors"),
    "reference_model/engine/": tuple(f"reference_model.{name}" for name in ("model", "engine", "errors", "trace")),
    "reference_model/report/": tuple(
        f"reference_model.{name}" for name in ("report", "engine.schedule", "run_config", "console", "errors", "trace")
    ),
    "reference_model/run/": tuple(
        f"reference_model.{name}"
        for name in ("model", "engine", "report", "run", "run_config", "console", "errors", "trace")
    ),
    "reference_model/training/": ("reference_model.training", "reference_model.model.precision", *_CONSOLE),
    "reference_model/": ("reference_model",),
    "benchmarks/contenders/": ("benchmarks.contenders", *_CONSOLE),
    "benchmarks/harness/": _HARNESS,
    "benchmarks/exchange/": (*_HARNESS, "benchmarks.exchange.connect_ranks"),  # no command knows another one
    "benchmarks/pipeline/": (*_HARNESS, "benchmarks.pipeline", "reference_model"),
    "benchmarks/gpu/": (*_HARNESS, "benchmarks.gpu", "reference_model"),
    "benchmarks/": ("benchmarks", "reference_model"),
}


def absolute(path: str, module: str) -> str:
    """A module as `path` imports it, by its name from the root: m2n.x, reference_model.x, benchmarks.x."""
    if module.startswith("."):
        dots = len(module) - len(module.lstrip("."))
        package = path.split("/")[:-1]
        package = package[: len(package) - dots + 1] if dots <= len(package) else ["m2n"]
        module = ".".join([*package, *module[dots:].split(".")]).rstrip(".")
    return re.sub(r"^m2n\.(?=(reference_model|benchmarks)\b)", "", module)


def circles(files: Mapping[str, str]) -> list[str]:
    """Modules that import each other, be it by way of others or inside of a function; `files`: texts by path."""
    module_of = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in files}
    imports = {
        module: {
            next((name for name in (f"{full}.{name}", full) if name in module_of), module)
            for one, name in imported(files[path])
            for full in [absolute(path, one)]
        }
        - {module, "m2n"}  # the package names what its parts hold
        for module, path in module_of.items()
    }
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def public_names_only(path: str, text: str, public: Iterable[str]) -> Iterator[str]:
    """reference_model and benchmarks use the public names of m2n; no floor looks up."""
    may = next((modules for folder, modules in PYTHON_FLOORS.items() if path.startswith(folder)), None)
    if may is None:
        return
    names = {*public, "testing", "reference_model", "benchmarks"}
    for module, name in imported(text):
        full = absolute(path, module)
        if full == "m2n" and name in ("reference_model", "benchmarks"):
            full, name = name, ""
        if full.split(".")[0] in ("reference_model", "benchmarks", "tests"):
            wanted = (full, f"{full}.{name}")
            if not any(one == good or one.startswith(f"{good}.") for one in wanted for good in may):
                yield f"{path}: imports {name or full} of {full}, which its floor must not know"
            continue
        is_fine = full in PUBLIC_MODULES and (full != "m2n" or not name or name in names)
        if full.split(".")[0] == "m2n" and not is_fine:
            yield f"{path}: imports {name or full} of {full}, which is not public"
    for attribute in attributes_of_m2n(text):
        if attribute not in names:
            yield f"{path}: uses m2n.{attribute}, which is not public"


def lower_python_floor(path: str, text: str) -> Iterator[str]:
    """m2n knows neither the model nor the benchmarks, imports torch only inside functions (but for torch_ops, which
    users import by name), and only Config looks at environment variables."""
    if not path.startswith("m2n/"):
        return
    for module, name in imported(text):
        if re.match(r"(\.|m2n\.)?(reference_model|benchmarks)\b", module) or name in ("reference_model", "benchmarks"):
            yield f"{path}: imports {module} {name}, an upper floor"
    for node in ast.parse(text).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if path != "m2n/torch_ops.py" and any(name.split(".")[0] == "torch" for name in names):
            yield f"{path}:{node.lineno}: imports torch with the module"
    if path != "m2n/shape.py" and re.search(r"\bos\.(environ|getenv)\b|\bimport environ\b", text):
        yield f"{path}: reads environment variables; only Config does"
