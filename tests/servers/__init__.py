"""A small Django project that real servers serve in tests, and what runs and reports it."""
