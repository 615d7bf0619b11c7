"""Stage 4: an orthonormal basis of the chosen features, and its file."""

from .artifact import Subspace
from .site import SubspaceSite

__all__ = ["Subspace", "SubspaceSite"]
