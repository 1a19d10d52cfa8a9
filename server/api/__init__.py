"""The REST API: another face over `store`, `jobs` and `live`. Each module here makes one `router`, which `server.app` mounts.

Whatever lies under `/api/` answers errors in one shape (`server.pages.errors`), also those of the framework.
"""
