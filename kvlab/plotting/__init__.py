"""Figures from rows. Each function returns a plotly Figure; plotly is imported on use."""
