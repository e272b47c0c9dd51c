"""The database: tables, migrations, pages, and what its errors mean."""
