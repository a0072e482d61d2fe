"""HTTP: OpenAI and Anthropic wire formats, metrics, limits."""
