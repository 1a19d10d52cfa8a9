"""Train, read and attribute sparse autoencoders on attention outputs. Knows no SQL and no HTTP."""

import os

# torch asks for large tensors in pages of 2 MB, where the system grants them on request: a fresh tensor costs a page fault
# per page, and with pages of 4 kB these take 10 to 40 ms of each 100 MB. Read by torch at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
