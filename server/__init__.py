"""Web pages, REST API, storage and jobs. torch is imported only behind `worker.py` with `work/`, and `engine.py`."""
