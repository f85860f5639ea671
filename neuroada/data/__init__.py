"""Own data, by a recipe alone: files and hub data sets in five formats, as token sequences on disk."""

from neuroada.data.preparation import Prepared, prepare
from neuroada.data.schema import Data

__all__ = ["Data", "Prepared", "prepare"]
