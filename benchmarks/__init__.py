"""Measures this package beside what a user would pick instead, on the same work in the same run.

``python -m benchmarks`` (``make bench``) measures; ``docs/benchmarks.md`` says what and how. A
reader's path: ``goals`` (what must be reached) → ``workloads`` (what is done, one module per group)
→ ``contenders`` and ``floors`` (who does it) → ``rounds`` (how often, and in which order) →
``figures`` (medians, ratios, spread) → ``reports`` and ``guard``.
"""
