"""`sr-dpo report`: run directories -> one HTML page. `read.py` reads, `figures.py` draws, `page.py` joins."""
