"""How long a run takes, whether it learns, and what to run next."""
