"""A round in progress: options, the accumulator it needs, its log, its saved state, its base."""
