"""The web process's side of the queue: admission, replies of running requests, cancellation, live fleet status."""
