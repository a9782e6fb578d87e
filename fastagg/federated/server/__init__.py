"""The server's side of a round: who is known, what comes in, and what each is handed."""
