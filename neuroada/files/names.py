"""One module, two spellings: with the base model's prefix, and without."""

from collections.abc import Collection


def match(name: str, known: Collection[str]) -> str | None:
    """`name` as `known` spells it, which may carry the base model's prefix where `name` has none, or the reverse.

    transformers loads both into both: "model.layers.0..." of a model with a head, "layers.0..." of a bare one.
    """
    for spelling in (name, name.partition(".")[2]):
        if spelling in known:
            return spelling
    longer = [spelling for spelling in known if spelling.endswith(f".{name}")]
    return longer[0] if len(longer) == 1 else None
