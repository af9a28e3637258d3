"""The rows of the table, in its order."""

from benchmarks.rows import casting, commands, conversions, edits, large_values, scale

GROUPS = (
    *conversions.GROUPS,
    *edits.GROUPS,
    *large_values.GROUPS,
    *commands.GROUPS,
    *casting.GROUPS,
    *scale.GROUPS,
)
