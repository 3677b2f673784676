"""A small Django project that the HTTP measurements serve with uvicorn."""
