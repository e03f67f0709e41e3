"""OpenAI's dialect at `/v1`: a lean ASGI application beside Django."""

from controlplane.api.openai.app import OpenAIApp

__all__ = ["OpenAIApp"]
