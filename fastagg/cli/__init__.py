"""The `fastagg` command: one file per subcommand, torch imported only when one runs."""
