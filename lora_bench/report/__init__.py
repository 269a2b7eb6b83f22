"""`lora-bench compare --html FILE`: a comparison as one page that opens offline.

A section of the page is a function of the table, or of one block of comparable rows. It returns its HTML, or None if
the runs have no data for it. Charts are SVG drawn here. Script and style are two files that are embedded in the page.
"""

from lora_bench.report.page import page

__all__ = ["page"]
