"""The losses by kind; `losses.py` is the door to all of them."""
