"""Offline work as OpenAI has it: files of requests, answered within a day behind everything else."""
