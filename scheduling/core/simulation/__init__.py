"""The scheduler replayed on a virtual clock: traces in, outcomes and reports out."""
