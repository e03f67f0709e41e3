"""Batches inside one process, around any async callable."""
