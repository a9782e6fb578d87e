"""A round: who takes part, where factors land, what memory it takes, and its saved state."""
