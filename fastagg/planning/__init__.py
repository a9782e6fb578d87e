"""The plan of a round: who takes part, which factors land where, and the memory that it takes."""
