"""Plots in one style, charts as SVG, sample grids and PNG encoding."""
