"""Reports of runs: tables and pictures. ``python -m gaudi_jax.report WORKDIR`` makes them again."""

from gaudi_jax.report.curves import plot_curves
from gaudi_jax.report.masks import plot_masks
from gaudi_jax.report.summary import write_report
from gaudi_jax.report.tables import summary_table

__all__ = ["plot_curves", "plot_masks", "summary_table", "write_report"]
