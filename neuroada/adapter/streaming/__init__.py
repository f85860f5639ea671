"""Selection and merge over safetensors files, block of rows by block of rows: no model is built, none need fit."""

from neuroada.adapter.streaming.checkpoint import Checkpoint, resolve
from neuroada.adapter.streaming.merge import merge, unmerge
from neuroada.adapter.streaming.select import apply_selection, load_selection, select

__all__ = ["Checkpoint", "apply_selection", "load_selection", "merge", "resolve", "select", "unmerge"]
