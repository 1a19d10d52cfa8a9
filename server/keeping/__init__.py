"""Keeping a server for years: backups, moves between databases, room on disk, what may go, what must go. No torch."""
