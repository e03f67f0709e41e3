"""The engine process of one replica and the Celery part that supervises it. Never imports Django."""
