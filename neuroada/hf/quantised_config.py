"""What the config.json of a quantised folder says, to this package and to transformers."""

from typing import Any

from neuroada.errors import UserError
from neuroada.quantised import METHOD, Quantisation

KEY = "quantization_config"
"""Of config.json, as transformers has it."""
GUARD = "transformers_weights"
"""Of config.json: which weight file transformers is to open. It only warns of a quant_method that nobody registered,
and starts from random weights; a file name that it must refuse stops it, and it prints the name."""
REFUSAL = "quantised by neuroada: `import neuroada` before from_pretrained"


def stored_quantisation(config: Any, source: str) -> Quantisation | None:
    """How the checkpoint itself is stored, by its configuration; None: unquantised.

    UserError: quantised by another library, whose tensors are not plain bytes by rows.
    """
    found = getattr(config, KEY, None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    if found.get("quant_method") != METHOD:
        raise UserError(
            f"model = {source}: already quantised ({found.get('quant_method')}); give the original checkpoint, and "
            f"base.model_dtype"
        )
    return Quantisation.from_json(found, f"model = {source}: {KEY}")


def as_quantised(config: dict[str, Any], quantisation: Quantisation) -> dict[str, Any]:
    """The config.json of the same model, stored so."""
    return config | {KEY: quantisation.as_json(), GUARD: REFUSAL}


def as_dense(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the same model in floating point."""
    return {name: value for name, value in config.items() if name not in (KEY, GUARD)}
