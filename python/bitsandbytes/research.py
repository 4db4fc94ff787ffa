"""Gone: importing this module raises ImportError with the alternative."""

from . import gone

raise ImportError(gone.text("bitsandbytes", "research"))
