"""OpenAI's dialect at `/v1`: a lean ASGI application beside Django."""
