"""Data: tasks, tokens, metrics, and the small encoder that the generated tasks are meant for."""
