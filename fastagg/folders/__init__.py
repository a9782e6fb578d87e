"""From folders to folders: what the command line does, as functions."""
