"""One file per architecture; `base.py` holds what all of them share."""
