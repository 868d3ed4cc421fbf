"""Bundles over HTTP: OpenAI's routes for embeddings and chat, and routes for captions, classes, ranking."""
