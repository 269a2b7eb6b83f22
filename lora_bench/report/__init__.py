"""`lora-bench compare --html FILE`: what was compared as one page that opens offline.

A section of the page is a function of the table, or of one block of comparable rows, that returns its HTML, or None
where the runs have nothing for it. Charts are SVG of our own; script and style are two files in the page itself.
"""

from lora_bench.report.page import page

__all__ = ["page"]
