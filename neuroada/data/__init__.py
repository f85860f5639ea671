"""Own data, by a recipe alone: files and hub data sets in five formats, as token sequences on disk."""

from neuroada.data.dataset import TokenData
from neuroada.data.preparation import Prepared, prepare

__all__ = ["Prepared", "TokenData", "prepare"]
