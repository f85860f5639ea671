"""Phase 1's rule, under the name its users import it by."""

from neuroada.ops.selection import Selection, select_top_k

__all__ = ["Selection", "select_top_k"]
