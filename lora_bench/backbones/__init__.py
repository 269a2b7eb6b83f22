"""Pretrained networks behind one small protocol (`base.py`), one file per family; `load.py` finds their weights."""
