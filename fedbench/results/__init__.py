"""Run files: written, judged, read, brought together. For analysis: `from fedbench.results import open_sweep`."""

from fedbench.results.tables import Tables, open_sweep

__all__ = ["Tables", "open_sweep"]
