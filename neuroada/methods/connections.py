"""Connections that are chosen once the model runs: from a file, or by what training examples do in it."""

from pathlib import Path

from neuroada.adapter import NeuroAdaModel, select_by_activations, select_by_gradient
from neuroada.adapter.fingerprint import fingerprint
from neuroada.adapter.selection import NEEDS
from neuroada.adapter.selection_file import apply_selection, write_selection
from neuroada.config.recipe import Recipe
from neuroada.engines import Engine
from neuroada.methods.base import Calibration
from neuroada.sharding import whole


def choose_connections(engine: Engine, tuner: NeuroAdaModel, recipe: Recipe, calibration: Calibration) -> None:
    """Apply adapter.selection_file, or select by the calibration examples.

    What they chose is kept in the run's folder and read again by the run's next life: another engine may round
    differently, and the deltas belong to these connections. Collective.
    """
    kept = Path(recipe.output_dir) / "selection.safetensors"
    if recipe.adapter.selection_file is not None or kept.exists():
        apply_selection(tuner, "default", Path(recipe.adapter.selection_file or kept))
        return
    if NEEDS[recipe.adapter.selection] == "activations":
        select_by_activations(tuner, "default", calibration.forwards())
    else:
        select_by_gradient(tuner, "default", calibration.backwards())
    layers = tuner.adapted_layers("default")
    connections = {}
    for layer in sorted(layers, key=lambda layer: layer.name):
        with whole(layer.neuroada_idx["default"]) as idx:
            connections[layer.name] = idx.cpu().clone()
    base = fingerprint(layers, "default")
    if engine.rank == 0:
        write_selection(kept, connections, recipe.adapter.k, recipe.adapter.selection, recipe.train.seed, base)
