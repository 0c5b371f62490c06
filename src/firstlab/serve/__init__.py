"""Serve a model over HTTP to programs that speak to OpenAI's API."""
