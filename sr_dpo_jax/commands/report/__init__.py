"""`sr-dpo report`: run directories -> one HTML page. Read `read.py`, `tables.py`, `figures.py`, then `page.py`."""
