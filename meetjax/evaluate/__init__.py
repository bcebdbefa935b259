"""What a trained adapter does: intervals for what was measured, figures, the report page and `summary.json`."""
