"""Conversations that survive: turns kept in SQLite or PostgreSQL. `store.Store` is the way in."""
