"""What ships so that the first run needs no download, and the scripts that made it."""
