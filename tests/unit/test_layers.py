"""Layers import in one direction only, and start-up stays light."""

import ast
import graphlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mlpstorage"

# The empty name is mlpstorage/__init__.py, which holds the version.
BASE = frozenset({"", "models", "config", "errors"})
LEAVES = BASE | {"measure", "storage", "cluster"}
# argv -> cli -> spec -> plan -> launch -> ranks -> results -> history / report
FLOW = LEAVES | {"spec", "cli", "plan", "launch", "kvcache", "results"}

ALLOWED: Mapping[str, frozenset[str]] = {
    "": frozenset(),
    "models": frozenset(),
    "config": frozenset({"models"}),
    "errors": frozenset({"models", "config"}),
    "measure": BASE,
    "cluster": BASE | {"measure"},
    # A marker names the process that holds a place; whether that still lives is for cluster to say.
    "storage": BASE | {"measure", "cluster"},
    "spec": LEAVES,
    # Stands left of spec in the flow, but its flags are generated from the models of spec.
    "cli": LEAVES | {"spec"},
    "plan": LEAVES | {"spec"},
    "launch": LEAVES | {"spec", "plan"},
    "results": LEAVES | {"spec", "plan"},
    # The shapes alone, so that ranks can fill them without the rest of results.
    "results.models": BASE | {"measure"},
    # A rank parses the same argv as the launcher, and hands its numbers back in the shapes of results.
    "kvcache": LEAVES | {"spec", "plan", "cli", "results.models"},
    "history": FLOW,
    # One step further right than history: it renders history's rows.
    "report": FLOW | {"history"},
    # Public fakes and conformance suites: they may use what they imitate and what they check.
    "testing": FLOW,
    "benchmarks": FLOW | {"history", "report"},
    # What the commands do, once main has parsed them.
    "commands": FLOW | {"history", "report", "benchmarks"},
    "main": FLOW | {"commands"},
    "__main__": frozenset({"main"}),
}
"""What each layer may import; a dotted name is one module, and its own rule beats that of its package."""

HEAVY = ("numpy", "rich", "pydantic", "mpi4py", "obstore", "psutil", "yaml")


def layer_of(module: str) -> str | None:
    """The longest entry of ALLOWED that `module` (without `mlpstorage.`) belongs to."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in ALLOWED), None)


def imports_of(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Modules of mlpstorage that `source` imports anywhere, without the leading `mlpstorage.`."""
    package = ["mlpstorage", *(part for part in module.split(".") if part)]
    if not is_package:
        package.pop()
    for node in ast.walk(ast.parse(source)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            # `from mlpstorage import x` may name a module or a value; from a package below, the package is enough.
            targets = [f"{origin}.{alias.name}" for alias in node.names] if _may_hold_layers(origin) else [origin]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in {"import_module", "__import__"}:
                targets = [str(node.args[0].value)]
        for target in targets:
            if target == "mlpstorage" or target.startswith("mlpstorage."):
                yield target.removeprefix("mlpstorage").removeprefix(".")


def _may_hold_layers(origin: str) -> bool:
    name = origin.removeprefix("mlpstorage").removeprefix(".")
    return not name or any(layer.startswith(f"{name}.") for layer in ALLOWED)


def is_allowed(module: str, target: str) -> bool:
    """Whether `module` may import `target`: a module of its own layer, or one that the layer's rule names."""
    own = layer_of(module)
    if own is None:
        return False
    # A value of mlpstorage/__init__.py, such as __version__, looks like a module that no layer has.
    layer = layer_of(target) or ("" if "." not in target and not _exists(target) else None)
    package = layer.partition(".")[0] if layer else layer
    return layer is not None and (layer == own or bool({layer, package} & ALLOWED[own]) or _same_package(own, layer))


def _same_package(own: str, layer: str) -> bool:
    """A package may use a module of it that has a rule of its own; the other way round that rule decides."""
    return layer.startswith(f"{own}.")


def _exists(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def modules() -> dict[str, Path]:
    """Every module of the package by name, without the leading `mlpstorage.`."""
    found: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_layers_import_in_one_direction() -> None:
    """No module imports from a layer to its right; imports inside functions count."""
    found = modules()
    assert len(found) >= 10
    seen = 0
    wrong: list[str] = []
    for module, path in found.items():
        assert layer_of(module) is not None, f"{path} belongs to no layer: add it to ALLOWED, where the flow puts it"
        for target in imports_of(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py"):
            seen += 1
            if not is_allowed(module, target):
                wrong.append(f"mlpstorage.{module} imports mlpstorage.{target}")
    assert seen >= 10
    assert wrong == []


def test_rules_have_no_circle() -> None:
    """The table itself orders the layers: two that may import each other would be one."""
    order = list(graphlib.TopologicalSorter(ALLOWED).static_order())
    assert order.index("spec") < order.index("cli") < order.index("kvcache") < order.index("main")


def test_every_way_to_import_is_seen() -> None:
    """Absolute, relative, in functions, for types only, by name: the reader of imports misses none."""
    source = """
import mlpstorage.config as c, os
from mlpstorage import errors, __version__
from mlpstorage.spec.hosts import Host
from mlpstorage.results import models
from . import engine
from ..measure import histogram
def late():
    import mlpstorage.launch.mpi
    import importlib
    importlib.import_module("mlpstorage.main")
if TYPE_CHECKING:
    from mlpstorage.benchmarks import base
import mlpstorage_other
"""
    assert sorted(imports_of(source, "kvcache.rank", is_package=False)) == [
        "__version__",
        "benchmarks",
        "config",
        "errors",
        "kvcache",
        "launch.mpi",
        "main",
        "measure",
        "results.models",
        "spec.hosts",
    ]
    assert list(imports_of("from . import engine", "kvcache", is_package=True)) == ["kvcache"]


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("launch.mpi", "spec.hosts", True),
        ("spec.hosts", "launch.mpi", False),
        ("storage.object_marker", "cluster.process", True),
        ("cluster.facts", "storage.files", False),
        ("kvcache.rank", "results.models", True),
        ("kvcache.rank", "results.merge", False),
        ("results.merge", "results.models", True),
        ("results.models", "results.merge", False),
        ("history", "results.load", True),
        ("results.load", "history", False),
        ("cluster.facts", "__version__", True),
        ("commands", "benchmarks.kvcache", True),
        ("benchmarks.kvcache", "main", False),
        ("main", "nowhere.yet", False),
    ],
)
def test_rules_decide(module: str, target: str, *, allowed: bool) -> None:
    """Samples of what the table allows and refuses."""
    assert is_allowed(module, target) is allowed


@pytest.mark.parametrize(
    "argv", [["-c", "import mlpstorage.main"], ["-m", "mlpstorage", "--help"]], ids=["import", "help"]
)
def test_start_up_is_light(argv: list[str]) -> None:
    """Importing main and building the top-level parser load no library that only a run needs."""
    if importlib.util.find_spec("mlpstorage.main") is None:
        pytest.skip("mlpstorage.main is not there yet")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *argv], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip() for line in lines}
    assert "mlpstorage.main" in loaded
    assert sorted(name for name in loaded if name.partition(".")[0] in HEAVY) == []
