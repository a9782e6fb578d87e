"""All of it in one process: a configuration, its clients, the rounds, and the folder they leave."""
