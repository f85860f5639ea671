"""The one door to files: what is read is bounded and checked, what is written is whole and this process's own.

    reading   text, JSON, JSON lines, YAML; a schema's check           UserError: file, place, remedy, in one line
    tensors   safetensors files, and the weights of a model's folder
    atomic    a file or a folder that appears whole or not at all
    locks     one command at a time in a folder

Nothing else in the package opens a file by itself (tests/files/test_one_door.py). Only `neuroada.errors` is imported
here, and torch only where a function is given or asked for tensors.
"""

from neuroada.files.atomic import (
    check_free,
    new_folder,
    open_append,
    replacing,
    scratch_folder,
    write_json,
    write_text,
    write_yaml,
)
from neuroada.files.locks import FolderLock
from neuroada.files.problems import explained
from neuroada.files.reading import (
    Refused,
    check_inside,
    check_schema,
    member,
    open_regular,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_json_lines,
    read_text,
    read_yaml,
    strict_json,
)
from neuroada.files.tensors import (
    StoredTensor,
    load_tensors,
    open_tensors,
    read_header,
    save_tensors,
    weight_files,
)

__all__ = [
    "FolderLock",
    "Refused",
    "StoredTensor",
    "check_free",
    "check_inside",
    "check_schema",
    "explained",
    "load_tensors",
    "member",
    "new_folder",
    "open_append",
    "open_regular",
    "open_tensors",
    "parse_json",
    "parse_yaml",
    "read_bytes",
    "read_header",
    "read_json",
    "read_json_lines",
    "read_text",
    "read_yaml",
    "replacing",
    "save_tensors",
    "scratch_folder",
    "strict_json",
    "weight_files",
    "write_json",
    "write_text",
    "write_yaml",
]
