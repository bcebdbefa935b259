"""Cached generation with per-row gates, logit dial and sampling."""
