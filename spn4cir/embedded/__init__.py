"""What ships so that the first run needs no download; ``benchmarks.embedded`` holds the scripts that made it."""
