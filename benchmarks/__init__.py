"""Measure what the program costs, each time against a simple operation that is measured in the same run.

``python -m benchmarks`` prints the table, ``docs/reference/benchmarks.md`` explains its rows.
"""
