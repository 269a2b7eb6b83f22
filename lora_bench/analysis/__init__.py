"""From records to a table with verdicts: grouping, statistics, baselines, savings, output formats. Needs no torch."""
