"""A small site to learn from: each page shows one way to give CPU work to leased workers."""
