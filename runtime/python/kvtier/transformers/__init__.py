"""kvtier under ``model.generate()``; see :func:`attach`, :class:`TieredCache` and :func:`record`."""

from __future__ import annotations

from .attach import Attached, attach
from .cache import TieredCache
from .families import TESTED as TESTED_FAMILIES
from .recording import Recording, record

__all__ = ["Attached", "Recording", "TESTED_FAMILIES", "TieredCache", "attach", "record"]
