"""Alerts: rules over what stands already, firings that last over restarts, and notices delivered at least once."""
