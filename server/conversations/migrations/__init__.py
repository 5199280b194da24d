"""Alembic migrations, numbered; `schema` runs them. There is no alembic.ini: nothing here needs a working directory."""
