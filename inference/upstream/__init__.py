"""Replicas whose model another server computes: the fleet's protocol on one side, OpenAI's dialect on the other."""
