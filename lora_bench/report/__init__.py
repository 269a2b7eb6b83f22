"""`lora-bench compare --html FILE`: a comparison as one page that opens offline.

A section of the page is a function of one block of comparable settings, or of the table. It returns contents
(`content`): texts, tables, and charts as Vega-Lite specifications. `document` renders them by the templates; scripts,
style and the charting library are embedded.
"""

from lora_bench.report.page import page

__all__ = ["page"]
