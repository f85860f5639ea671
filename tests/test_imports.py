"""The import graph of the package: every arrow points down, and there are no circles. docs/architecture.md draws it."""

import ast
from pathlib import Path

import neuroada

ROOT = Path(neuroada.__file__).parent

LAYERS = [
    {"errors", "version"},
    {"registry", "environment"},
    {"files"},
    {"config", "ops"},
    {"sharding", "tasks", "quantised"},
    {"adapter", "hf", "data"},
    {"offline", "engines", "sync"},
    {"objectives", "methods"},
    {"runs"},
    {"reporting", "evaluation"},
    {"training"},
    {"planning", "comparison", "sources"},
    {"doctor"},
    {"cli"},
]
"""From the ground up. A package imports from the layers below its own, and from itself."""


def package(module: str) -> str:
    """The part of a dotted name that a layer names: neuroada.hf.config -> hf."""
    return module.split(".")[1]


def imports() -> dict[str, set[str]]:
    """module -> the modules of this package that it imports, anywhere in its text (for type checkers alone: not)."""
    names = {
        ".".join(("neuroada", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }
    found = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        unreal = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
            for node in ast.walk(block)
        }
        wanted = set()
        for node in ast.walk(tree):
            if id(node) in unreal:
                continue
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "neuroada":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    wanted.add(inner if inner in names else node.module)
            elif isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names if alias.name in names}
        found[name] = {module for module in wanted if module in names and module not in (name, "neuroada")}
    return found


def test_imports_point_down() -> None:
    height = {name: layer for layer, names in enumerate(LAYERS) for name in names}
    wrong = []
    for module, wanted in imports().items():
        if module in ("neuroada", "neuroada.__main__"):
            continue  # the package itself hands out what others may import
        for other in wanted:
            mine, theirs = package(module), package(other)
            if mine != theirs and height[theirs] >= height[mine]:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_there_are_no_circles() -> None:
    graph = imports()
    state: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        if state.get(module) == 2:
            return
        assert state.get(module) != 1, " -> ".join((*path, module))
        state[module] = 1
        for other in sorted(graph[module]):
            visit(other, (*path, module))
        state[module] = 2

    for module in sorted(graph):
        if module != "neuroada":
            visit(module, ())


def test_every_package_has_a_layer() -> None:
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    modules = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert packages | modules == set().union(*LAYERS)
