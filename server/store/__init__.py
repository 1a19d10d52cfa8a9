"""Every product query by name: a session in, a frozen dataclass out. Imports tables; never torch, never FastAPI."""
