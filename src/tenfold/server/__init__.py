"""The HTTP service: the APIs of OpenAI and of Anthropic before an engine."""
