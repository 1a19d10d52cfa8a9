"""Dashboards of other tools: read into harvests, and written from them. No torch."""
