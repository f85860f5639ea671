"""Nothing but neuroada.files opens a file: what goes past it is listed here, with the reason."""

import ast
from pathlib import Path

import neuroada

ROOT = Path(neuroada.__file__).parent

NAMES = {"open", "safe_open", "save_file", "load_file", "mkstemp", "NamedTemporaryFile"}
METHODS = {
    "open", "read_text", "write_text", "read_bytes", "write_bytes", "load", "safe_load", "dump", "copyfile", "copy",
    "save", "loadtxt",
}  # fmt: skip
MODULES = {"json", "yaml", "torch", "np", "numpy", "pickle", "shutil", "os", "io"}
"""Of METHODS, those that are functions of these modules or methods of anything that looks like a path."""

ALLOWED = {
    "neuroada/cli/command.py: os.open": "/dev/null, for a broken pipe",
    "neuroada/offline/rewrite.py: .open": "a weight file of a new folder, block by block",
    "neuroada/offline/convert.py: .open": "a weight file of a new folder, tensor by tensor",
    "neuroada/offline/output.py: shutil.copyfile": "into a new folder, after check_inside",
    "neuroada/reporting/page.py: .read_text": "this package's own files",
    "neuroada/runs/metadata.py: .read_bytes": "this package's own files",
    "neuroada/ops/cpu_kernel.py: .read_bytes": "this package's own files, and what was compiled from them",
    "neuroada/sources/llm_adapters.py: shutil.copyfile": "to a temporary name of `replacing`",
    "neuroada/sync/transports.py: .write_bytes": "to a temporary name of `replacing`",
    "neuroada/data/storage.py: .open": "arrays of a new folder, written as they come",
    "neuroada/data/sources.py: .open": "data files of any format and compression, row by row",
    "neuroada/sources/download.py: .open": "a download, which is taken up where it was cut off",
}


def calls(path: Path) -> set[str]:
    """What a module calls that opens a file, as the keys of ALLOWED."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        where = path.relative_to(ROOT.parent).as_posix()
        if isinstance(node.func, ast.Name) and node.func.id in NAMES:
            found.add(f"{where}: {node.func.id}")
        elif isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            path_like = node.func.attr in ("open", "read_text", "write_text", "read_bytes", "write_bytes")
            if of in MODULES:
                found.add(f"{where}: {of}.{node.func.attr}")
            elif path_like:
                found.add(f"{where}: .{node.func.attr}")
    return found


def test_nothing_else_opens_a_file() -> None:
    outside = [path for path in ROOT.rglob("*.py") if ROOT / "files" not in path.parents]
    found = set().union(*(calls(path) for path in outside))
    assert sorted(found - ALLOWED.keys()) == []
    assert sorted(ALLOWED.keys() - found) == []


def test_no_pickle_and_no_code_of_a_repository() -> None:
    texts = {path: path.read_text() for path in ROOT.rglob("*.py")}
    assert not [path for path, text in texts.items() if "trust_remote_code=True" in text or "import pickle" in text]
    assert not [path for path, text in texts.items() if "torch.load(" in text]
