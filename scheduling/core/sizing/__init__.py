"""How many requests a batch may hold: strategies, and the models of time and memory that they read."""
