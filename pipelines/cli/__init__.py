"""The command line: what the commands take, do and show."""
