"""The HTTP server: OpenAI's API in front of one engine. Sees the engine, never weights."""
