"""From files to arrays: images, videos, texts and chat prompts. No torch."""
