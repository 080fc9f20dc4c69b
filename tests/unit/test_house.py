"""The plan of the house, held by the import graph: arrows point one way, configs are light, flows are flows.

Every import counts: those of functions and those for type checkers, too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

PACKAGES = ("ddsr_core", "tasks", "flows", "deployments")
#: Each room imports only from rooms before it.
ROOMS = (
    "threads", "errors", "factories", "progress", "reporters", "parallel", "config", "storage", "distributed", "metrics",
    "imaging", "pseudo_labels", "diffusion", "sr", "sampling", "baselines", "evaluation", "stages", "report", "pipeline",
    "planning", "experiments", "nightly", "pretrain", "gc", "api",
)  # fmt: skip
#: Configs and tables of names. They may be imported by anybody, and import nothing but pydantic and each other.
LIGHT_NAMES = ("config", "names", "spec", "kernel", "architectures", "recipes")
#: The ground floor, light as well.
LIGHT_MODULES = (
    "ddsr_core.errors",
    "ddsr_core.factories",
    "ddsr_core.progress",
    "ddsr_core.parallel",
    "ddsr_core.reporters",
)
#: What a light module may import from outside.
LIGHT_IMPORTS = {
    "__future__", "codecs", "collections", "dataclasses", "difflib", "enum", "hashlib", "importlib", "json", "math",
    "pathlib", "pydantic", "re", "tomli_w", "tomllib", "typing", "yaml",
}  # fmt: skip
MOST_IMPORTS_IN_FUNCTIONS = 40


@dataclass(frozen=True)
class Import:
    """One import statement's target: a module of ours, or the name of another package."""

    source: str
    target: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def modules() -> dict[str, Path]:
    """Module name -> file, of all four packages."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


MODULES = modules()


def imports_of(name: str, path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = sorted({target if target in MODULES else node.module for target in named})
        else:
            continue
        for target in targets:
            yield Import(name, target, node.lineno, id(node) in inside)


IMPORTS = [item for name, path in MODULES.items() for item in imports_of(name, path)]
OURS = [item for item in IMPORTS if item.target in MODULES and item.source != item.target]


def room_of(module: str) -> str:
    """``diffusion`` of ``ddsr_core.diffusion.dit``."""
    return module.split(".")[1] if "." in module else ""


def is_light(module: str) -> bool:
    return module.startswith("ddsr_core.") and module.rpartition(".")[2] in LIGHT_NAMES


def listed(items: list[Import]) -> str:
    return "\n".join(map(str, items))


def test_every_room_of_the_library_has_its_place():
    assert {room_of(name) for name in MODULES if name.startswith("ddsr_core.")} <= {
        *ROOMS,
        "__main__",
        "presets",
        "protocols",
        "weights",
    }


def test_packages_import_downwards_only():
    allowed = {
        "ddsr_core": {"ddsr_core"}, "tasks": {"tasks", "ddsr_core"}, "flows": {"flows", "tasks", "ddsr_core"},
        "deployments": {"deployments", "tasks", "ddsr_core"},
    }  # fmt: skip
    wrong = [
        item
        for item in OURS
        if item.target.split(".")[0] not in allowed[item.source.split(".")[0]]
        and not (item.source.startswith("flows.cli") and item.target.startswith("deployments"))
    ]
    assert not wrong, listed(wrong)
    upwards = [item for item in OURS if item.target.startswith("flows.cli") and not item.source.startswith("flows.cli")]
    assert not upwards, listed(upwards)


def test_rooms_import_rooms_that_stand_before_them():
    wrong = [
        item
        for item in OURS
        if item.source.startswith("ddsr_core.")
        and item.target.startswith("ddsr_core.")
        and not is_light(item.target)
        and ROOMS.index(room_of(item.source)) < ROOMS.index(room_of(item.target))
    ]
    assert not wrong, listed(wrong)


def cycle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle of modules, or nothing."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if circle := visit(target, [*path, node]):
                return circle
        done.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := visit(node, []))), [])


def test_there_is_no_circle():
    graph: dict[str, set[str]] = {}
    for item in OURS:
        graph.setdefault(item.source, set()).add(item.target)
    assert cycle_in(graph) == []


def test_configs_import_nothing_heavy():
    wrong = [
        item
        for item in IMPORTS
        if is_light(item.source)
        and not item.in_function
        and item.target.split(".")[0] not in LIGHT_IMPORTS
        and not (is_light(item.target) or item.target in LIGHT_MODULES)
    ]
    assert not wrong, listed(wrong)


def test_flows_hold_nothing_but_flows():
    for path in (ROOT / "flows").glob("*.py"):
        if path.name != "__init__.py":
            assert "@flow(" in path.read_text(), path


def test_few_imports_stand_in_functions():
    inside = [item for item in IMPORTS if item.in_function]
    assert len(inside) < MOST_IMPORTS_IN_FUNCTIONS, f"{len(inside)} imports:\n{listed(inside)}"


@pytest.mark.parametrize("module", ["ddsr_core.pipeline.config", "ddsr_core.pipeline.run_folder", "flows.cli.main"])
def test_what_must_answer_at_once_imports_neither_torch_nor_prefect(module: str):
    heavy = "{'torch', 'numpy', 'pyarrow', 'prefect'} & set(sys.modules)"
    code = f"import sys, {module}; heavy = {heavy}; sys.exit(str(heavy) if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
