"""Realistic traffic for a running system: what is sent, by whom, and how it fared."""
