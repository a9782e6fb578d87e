"""What runs did, read from their folders: tables, plots, and a page."""
