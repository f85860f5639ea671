"""README.md beside a saved adapter: before all else, what has to be imported to load it.

PEFT has no place where a package announces a method (no entry point; `auto_mapping` is read after the method is looked
up), so that without the import it ends in a bare `KeyError: 'NEUROADA'`.
"""

from pathlib import Path

from huggingface_hub import ModelCard

from neuroada.files import read_text, write_text

NOTE = (
    "**Before loading: `import neuroada`.** PEFT then knows the method; without it, loading ends in "
    "`KeyError: 'NEUROADA'`."
)
NEW = "---\nlibrary_name: peft\n---\n\n# An adapter of NeuroAda\n"


def write_note(folder: Path) -> None:
    """Put the note, and the hub's tag, into the card in `folder`, which is made if there is none (PEFT makes one)."""
    path = folder / "README.md"
    try:
        card = ModelCard(read_text(path) if path.exists() else NEW)
        tags = list(card.data.get("tags") or [])
    except (ValueError, TypeError):
        return  # a card by hand whose head is no YAML stays as it is
    card.data["tags"] = tags if "neuroada" in tags else [*tags, "neuroada"]
    if NOTE not in card.text:
        card.text = f"\n{NOTE}\n\n{card.text.lstrip()}"
    write_text(path, str(card))
