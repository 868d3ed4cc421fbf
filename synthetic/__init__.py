"""Drawn scenes, captions and dialogues about them, and the tasks scored on them. No torch."""
